"""Binary weights and activations: numbers on paper, and slow loops over every value."""

import hypothesis
import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

from pocketsize.quantization.binary_quantizers import (
  BinaryActivation,
  BinaryKernel,
  binary_activation,
  least_error_scale,
  top_quantile,
)
from pocketsize.quantization.quantizers import WeightQuantizer


def built(transform, shape):
  """Returns a transform that is built, and switched on."""
  transform.build(shape)
  transform.switch(True)
  return transform


def binarized(kernel, mode, axes=(-1,)):
  return built(BinaryKernel(mode, axes), kernel.shape)(tf.constant(kernel)).numpy()


def random_kernel(seed, shape, zeros=0.2):
  """Returns a normal kernel some of whose weights are exactly 0."""
  rng = np.random.default_rng(seed)
  kernel = rng.normal(size=shape) * (rng.random(shape) >= zeros)
  return kernel.astype(np.float32)


def test_two_columns_by_hand():
  """Columns (1, 0) and (-2, 4): means 1/2 and 3, together 7/4; zero is negative."""
  kernel = np.float32([[1, -2], [0, 4]])
  assert binarized(kernel, 'xnor').tolist() == [[0.5, -3], [-0.5, 3]]
  assert binarized(kernel, 'dorefa').tolist() == [[1.75, -1.75], [-1.75, 1.75]]


shapes = st.lists(st.integers(1, 4), min_size=2, max_size=5).map(tuple)


@hypothesis.given(st.integers(0, 2**32 - 1), shapes, st.sampled_from(['xnor', 'dorefa']), st.data())
@hypothesis.settings(max_examples=40)
def test_weights_against_a_loop(seed, shape, mode, data):
  axes = data.draw(st.sampled_from([(-1,), (-2,), (-2, -1)]))
  kernel = random_kernel(seed, shape)
  counted = [axis % len(shape) for axis in axes] if mode == 'xnor' else []
  magnitudes = {}
  for place in np.ndindex(shape):
    magnitudes.setdefault(tuple(place[axis] for axis in counted), []).append(abs(kernel[place]))
  expected = np.zeros(shape)
  for place in np.ndindex(shape):
    scale = np.mean(magnitudes[tuple(place[axis] for axis in counted)], dtype=np.float64)
    expected[place] = scale if kernel[place] > 0 else -scale
  np.testing.assert_allclose(binarized(kernel, mode, axes), expected, rtol=1e-6)


@hypothesis.given(st.integers(0, 2**32 - 1), shapes, st.sampled_from(['xnor', 'dorefa']))
@hypothesis.settings(max_examples=40)
def test_grid_and_codes_give_the_kernel_back_to_the_last_bit(seed, shape, mode):
  quantizer = built(BinaryKernel(mode), shape)
  deployed = quantizer(tf.constant(random_kernel(seed, shape))).numpy()
  grid = quantizer.grid(deployed)
  assert grid.bits == 1
  signs = np.where(deployed > 0, np.float32(1), np.float32(-1))
  np.testing.assert_array_equal(signs * grid.scale, deployed)
  codes = quantizer.codes(deployed)
  assert codes.bits == 1 and set(np.unique(codes.codes)) <= {0, 1}
  rows = codes.groups.split(codes.codes.astype(np.float32))
  values = (rows - codes.zero_point[:, None]) * codes.scale[:, None]
  assert values.dtype == np.float32
  np.testing.assert_array_equal(codes.groups.join(values), deployed)


def test_codes_are_those_of_the_uniform_quantizer_of_one_bit():
  kernel = random_kernel(5, (3, 3, 2, 4), zeros=0.0)
  uniform = WeightQuantizer(1)
  uniform.build(kernel.shape)
  uniform.fit(kernel)
  binary = built(BinaryKernel('xnor'), kernel.shape)
  found, expected = (
    quantizer.codes(quantizer(tf.constant(kernel)).numpy()) for quantizer in (binary, uniform)
  )
  np.testing.assert_array_equal(found.codes, expected.codes)
  np.testing.assert_array_equal(found.zero_point, expected.zero_point)
  np.testing.assert_allclose(found.scale, expected.scale, rtol=1e-6)


@pytest.mark.parametrize('mode', ['xnor', 'dorefa'])
def test_the_gradient_goes_straight_through_and_the_scale_follows_the_kernel(mode):
  kernel = tf.Variable(random_kernel(1, (3, 4)))
  quantizer = built(BinaryKernel(mode), (3, 4))
  upstream = tf.constant(random_kernel(2, (3, 4)))
  with tf.GradientTape() as tape:
    loss = tf.reduce_sum(upstream * quantizer(kernel))
  np.testing.assert_array_equal(tape.gradient(loss, kernel), upstream)
  before = quantizer(kernel).numpy()
  kernel.assign(2.0 * kernel)
  np.testing.assert_array_equal(quantizer(kernel), 2.0 * before)


def test_what_is_off_changes_nothing_and_has_no_integers():
  kernel = random_kernel(3, (2, 2))
  quantizer = BinaryKernel()
  quantizer.build((2, 2))
  assert not quantizer.is_on
  np.testing.assert_array_equal(quantizer(tf.constant(kernel)), kernel)
  assert quantizer.grid(kernel) is None and quantizer.codes(kernel) is None
  activation = BinaryActivation()
  activation.build((None, 2))
  np.testing.assert_array_equal(activation(tf.constant(kernel), training=True), kernel)
  assert not activation.has_range


def slow_activation(x, scale, threshold, upstream):
  """Returns (y, dx, ds, [channels] dt) value by value, channels last."""
  y, dx, dscale, dthreshold = np.zeros_like(x), np.zeros_like(x), 0.0, np.zeros(x.shape[-1])
  for place in np.ndindex(x.shape):
    value, gradient, channel = x[place], upstream[place], place[-1]
    y[place] = scale if value > scale * threshold[channel] else 0.0
    if 0.0 <= value <= scale:
      dx[place] = gradient
    dscale += gradient * ((y[place] - value) / scale if value <= scale else 1.0)
    if 0.0 < value < scale:
      dthreshold[channel] -= gradient
  return y, dx, dscale, dthreshold


@hypothesis.given(
  st.integers(0, 2**32 - 1), st.integers(1, 4), st.sampled_from([0.5, 2.0]), st.booleans()
)
@hypothesis.settings(max_examples=40)
def test_activations_and_their_three_gradients_against_a_loop(seed, channels, scale, is_first):
  """Values at 0, at s and at s t are among them, where the intervals are open or closed."""
  rng = np.random.default_rng(seed)
  threshold = rng.choice([0.25, 0.5, 0.75], channels)
  x = rng.choice([-1.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5], (3, 2, 2, channels)) * scale
  upstream = rng.integers(-4, 5, x.shape) / 4.0
  expected = slow_activation(x, scale, threshold, upstream)
  order = (0, 3, 1, 2) if is_first else (0, 1, 2, 3)
  shape = (1, channels, 1, 1) if is_first else (1, 1, 1, channels)
  inputs = [
    tf.Variable(value, dtype=tf.float32)
    for value in (x.transpose(order), scale, threshold.reshape(shape))
  ]
  with tf.GradientTape() as tape:
    y = binary_activation(*map(tf.convert_to_tensor, inputs))
    loss = tf.reduce_sum(y * tf.constant(upstream.transpose(order), tf.float32))
  dx, dscale, dthreshold = tape.gradient(loss, inputs)
  assert dthreshold.shape == shape
  # Quarters and halves: sums are exact.
  np.testing.assert_array_equal(y, expected[0].transpose(order))
  np.testing.assert_array_equal(dx, expected[1].transpose(order))
  np.testing.assert_allclose(dscale, expected[2], rtol=1e-6, atol=1e-6)
  np.testing.assert_array_equal(np.ravel(dthreshold), expected[3])


def test_an_activation_is_its_function_of_exp_and_sigmoid():
  """s = 2 e^p, t = sigmoid(p') with p' per channel; gradients by the chain rule."""
  activation = built(BinaryActivation(), (None, 2))
  activation.set_range(2.0)
  activation.scale_logarithm.assign(np.log(1.5))
  activation.threshold_logits.assign(np.log([[1.0, 3.0]]))
  x = np.float32([[1.6, 2.3], [1.4, 2.2], [-1.0, 4.0]])
  upstream = np.float32([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
  with tf.GradientTape() as tape:
    y = activation(tf.constant(x))
    loss = tf.reduce_sum(y * upstream)
  np.testing.assert_allclose(y, [[3, 3], [0, 0], [0, 3]], rtol=1e-6)
  trained = [activation.scale_logarithm.value, activation.threshold_logits.value]
  gradients = tape.gradient(loss, trained)
  _, _, dscale, dthreshold = slow_activation(x, 3.0, [0.5, 0.75], upstream)
  np.testing.assert_allclose(gradients[0], 3.0 * dscale, rtol=1e-5)
  np.testing.assert_allclose(np.ravel(gradients[1]), dthreshold * [0.25, 0.1875], rtol=1e-5)


def test_the_threshold_begins_at_half_the_scale():
  activation = built(BinaryActivation(), (None, 3))
  activation.set_range(4.0)
  x = tf.constant([[2.0, 2.1, 9.0]])
  np.testing.assert_array_equal(activation(x), [[0, 4, 4]])
  np.testing.assert_array_equal(activation.operations()(x), activation(x))


@pytest.mark.parametrize(('count', 'quantile'), [(3000, 2997), (2400, 2398), (400, 399), (1, 0)])
def test_the_top_quantile_by_hand(count, quantile):
  """The least of 3, of 2 (2.4), of 1 (0.4, at least one) largest of 0, 1, 2, ..."""
  values = np.random.default_rng(0).permutation(count).astype(np.float32)
  assert float(top_quantile(tf.constant(values.reshape(1, -1)))) == quantile


@pytest.mark.parametrize('shift', [0.0, -0.5, 1.0])
def test_the_scale_of_least_error_against_all_scales(shift):
  x = np.maximum(np.random.default_rng(1).normal(shift, 1.0, 20_000), 0).astype(np.float32)
  found = float(least_error_scale(tf.constant(x)))
  scales = np.linspace(0.05, x.max(), 400)
  errors = [np.sum((x - np.where(x > s / 2, s, 0)) ** 2) for s in scales]
  assert np.sum((x - np.where(x > found / 2, found, 0)) ** 2) <= min(errors) * 1.001
  assert abs(found - scales[np.argmin(errors)]) < 0.05


@pytest.mark.parametrize(
  ('values', 'scale'), [([0, 0, 1, 2, 3], 2.5), ([-9, 4, 1, 6], 5), ([0, -1], 0), ([-2, -1], -1)]
)
def test_the_scale_of_least_error_by_hand(values, scale):
  """[1, 2, 3]: from 3, those above 1.5 give 2.5, and so do those above 1.25."""
  assert float(least_error_scale(tf.constant(values, tf.float32))) == scale


@pytest.mark.parametrize('compiled', [False, True])
def test_the_first_training_batch_that_comes_while_it_is_on_sets_the_scale(compiled):
  activation = BinaryActivation()
  activation.build((None, 2))
  call = tf.function(activation, jit_compile=True) if compiled else activation
  for is_on, training, value, start in (
    (False, True, 7.0, 0),
    (True, False, 6.0, 0),
    (True, True, 5.0, 5),
    (True, True, 8.0, 5),
    (False, True, 8.0, 0),
    (True, True, 9.0, 9),
  ):
    activation.switch(is_on)
    y = call(tf.constant([[value, 1.0]]), training=training)
    assert float(activation.start) == start
    np.testing.assert_allclose(y, [[start, 0.0]] if start else [[value, 1.0]], rtol=1e-6)


def test_the_first_training_batch_sets_the_scale_of_least_error():
  activation = built(BinaryActivation(scale_init='mse'), (None, 4))
  activation(tf.constant([[-9.0, 4.0, 1.0, 6.0]]), training=True)
  assert float(activation.start) == 5


def test_a_batch_without_positive_values_gives_the_least_scale():
  activation = built(BinaryActivation(), (None, 2))
  np.testing.assert_array_equal(activation(tf.constant([[-1.0, 0.0]]), training=True), [[0, 0]])
  assert activation.has_range and float(activation.start) <= 1e-6


@pytest.mark.parametrize(
  ('kind', 'arguments'),
  [
    (BinaryKernel, {'mode': 'dorefa', 'channel_axes': (0, 1)}),
    (BinaryActivation, {'channel_axis': 1, 'scale_init': 'mse'}),
  ],
)
def test_a_config_makes_an_equal_quantizer(kind, arguments):
  made = keras.saving.deserialize_keras_object(
    keras.saving.serialize_keras_object(kind(**arguments))
  )
  assert type(made) is kind
  for name, value in arguments.items():
    got = getattr(made, name)
    assert (tuple(got) if isinstance(value, tuple) else got) == value
  assert made.bits == 1 and made.order == 20
