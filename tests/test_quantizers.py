"""Quantizers against slow NumPy oracles and TensorFlow's own fake quantizer."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import compile_for_logits, conv_net, images, labels

import pocketsize
from pocketsize.quantization import quantizers
from pocketsize.quantization.quantizers import (
  ActivationQuantizer,
  WeightQuantizer,
  highest_code,
  nudged_range,
  quantize_affine,
  quantize_symmetric,
  weight_scale,
)
from pocketsize.ste import replace


def kernel_of(shape=(3, 3, 4, 6), seed=3):
  return np.random.default_rng(seed).normal(size=shape).astype('float32')


def slow_scale(values, bits):
  """The scale of one group, by loops; up to 4 bits the best of 29 shares of the full range."""
  values = [abs(float(value)) for value in values]
  if bits == 1:
    return sum(values) / max(sum(value > 0 for value in values), 1)
  high = max(2 ** (bits - 1) - 1, 1)
  full = max(values) / high
  if bits > 4 or full == 0:
    return full

  def error(scale):
    return sum((min(round(value / scale), high) * scale - value) ** 2 for value in values)

  return min((full * (0.3 + 0.025 * index) for index in range(29)), key=error)


def slow_quantize(value, scale, bits):
  if bits == 1:
    return scale * np.sign(value)
  high = max(2 ** (bits - 1) - 1, 1)
  return 0.0 if scale == 0 else max(-high, min(high, round(value / scale))) * scale


def fitted(kernel, **arguments):
  quantizer = WeightQuantizer(**arguments)
  quantizer.build(kernel.shape)
  quantizer.fit(kernel)
  return quantizer


def groups_of(kernel, granularity, bucket_size):
  """Flat indices of the weights that share a scale."""
  numbers = np.arange(kernel.size).reshape(kernel.shape)
  if granularity == 'tensor':
    return [numbers.ravel()]
  if granularity == 'channel':
    return [numbers[..., channel].ravel() for channel in range(kernel.shape[-1])]
  return [
    numbers.ravel()[start : start + bucket_size] for start in range(0, kernel.size, bucket_size)
  ]


@pytest.mark.parametrize('granularity', ['tensor', 'channel', 'bucket'])
@pytest.mark.parametrize('bits', range(1, 17))
def test_weight_quantizer_against_the_slow_loop(bits, granularity):
  """One float32 rounding of scale and of the product: 1e-6 relative.

  Buckets of 17 leave a short one of 13.
  """
  kernel = kernel_of((3, 2, 4, 9))[..., :6].copy()
  kernel = kernel.reshape(-1)[:132].reshape(2, 11, 6)
  got = fitted(kernel, bits=bits, granularity=granularity, bucket_size=17)(kernel).numpy().ravel()
  for group in groups_of(kernel, granularity, 17):
    values = kernel.ravel()[group]
    scale = slow_scale(values, bits)
    slow = [slow_quantize(float(value), scale, bits) for value in values]
    np.testing.assert_allclose(got[group], slow, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('granularity', ['tensor', 'channel', 'bucket'])
@pytest.mark.parametrize('bits', range(1, 17))
def test_codes_stand_for_the_values_of_training_to_the_last_bit(bits, granularity):
  kernel = kernel_of((3, 2, 4, 9))
  kernel[..., 4] = 0
  quantizer = fitted(kernel, bits=bits, granularity=granularity, bucket_size=17)
  deployed = quantizer(kernel).numpy()
  codes = quantizer.codes(deployed)
  assert codes.bits == bits and codes.codes.shape == kernel.shape
  assert codes.codes.min() >= 0 and codes.codes.max() < 2**bits
  flat, wanted = codes.codes.ravel(), deployed.ravel()
  for row, group in enumerate(groups_of(kernel, granularity, 17)):
    values = (flat[group].astype('float32') - codes.zero_point[row]) * codes.scale[row]
    # One bit has no code for exact zeros.
    exact = wanted[group] != 0 if bits == 1 else slice(None)
    np.testing.assert_array_equal(values[exact], wanted[group][exact])
  assert (deployed[..., 4] == 0).all()


@pytest.mark.parametrize('bits', [2, 3, 4])
def test_the_searched_scale_is_no_worse_than_a_fine_brute_force_in_its_range(bits):
  """29 shares against 2,000: the error may be 2 % above the best of all (measured: below 1 %)."""
  group = kernel_of((1, 500))
  scale = weight_scale(group, bits)[0]

  def error(scale):
    return float(((quantize_symmetric(tf.constant(group), scale, bits).numpy() - group) ** 2).sum())

  full = np.abs(group).max() / highest_code(bits)
  best = min(error(np.float32(full * share)) for share in np.linspace(0.01, 1.2, 2000))
  assert best <= error(scale) <= 1.02 * best
  assert error(scale) < 0.9 * error(np.float32(full))


def test_one_bit_has_the_mean_magnitude_by_hand_and_zeros_stay():
  kernel = np.float32([[1, -2], [3, 0]])
  quantizer = fitted(kernel, bits=1, granularity='channel')
  assert quantizer(kernel).numpy().tolist() == [[2, -2], [2, 0]]


def test_eight_bits_by_hand():
  """Scale 2.54 / 127 = 0.02; 0.031 is 1.55 steps, hence 2; -0.009 rounds to 0."""
  kernel = np.float32([2.54, 0.031, -0.009, -2.54])
  quantizer = fitted(kernel, bits=8, granularity='tensor')
  np.testing.assert_allclose(quantizer(kernel), [2.54, 0.04, 0, -2.54], atol=1e-6)
  assert quantizer.grid(kernel).codes(quantizer(kernel)).tolist() == [127, 2, 0, -127]


@pytest.mark.parametrize('bits', [1, 2, 4, 8, 16])
@pytest.mark.parametrize('granularity', ['tensor', 'channel', 'bucket'])
def test_a_kernel_of_zeros_stays_zero(bits, granularity):
  kernel = np.zeros((2, 3, 4), 'float32')
  np.testing.assert_array_equal(
    fitted(kernel, bits=bits, granularity=granularity, bucket_size=5)(kernel), kernel
  )


@pytest.mark.parametrize('bits', [2, 4, 8])
def test_a_dead_channel_beside_live_ones_stays_zero(bits):
  kernel = kernel_of()
  kernel[..., 2] = 0
  got = fitted(kernel, bits=bits)(kernel).numpy()
  assert np.all(got[..., 2] == 0) and np.all(np.isfinite(got))


@pytest.mark.parametrize('bits', range(2, 17))
def test_negative_only_weights_mirror_positive_ones(bits):
  kernel = np.abs(kernel_of()) + 0.1
  np.testing.assert_array_equal(
    fitted(-kernel, bits=bits)(-kernel), -fitted(kernel, bits=bits)(kernel).numpy()
  )


@pytest.mark.parametrize('granularity', ['tensor', 'channel'])
@pytest.mark.parametrize('bits', range(1, 17))
def test_the_baked_kernel_is_idempotent_and_its_codes_are_integers_of_their_bits(bits, granularity):
  kernel = kernel_of()
  quantizer = fitted(kernel, bits=bits, granularity=granularity)
  baked = quantizer(kernel).numpy()
  np.testing.assert_array_equal(quantizer(baked), baked)
  grid = quantizer.grid(baked)
  codes = grid.codes(baked)
  assert codes.dtype == np.int32 and grid.bits == bits
  np.testing.assert_array_equal((codes * grid.scale).astype('float32'), baked)
  assert np.abs(codes).max() <= highest_code(bits)
  assert (
    set(np.unique(codes)) == {-1, 1}
    if bits == 1
    else np.abs(codes).max() >= highest_code(bits) // 2
  )


def test_buckets_have_no_grid():
  kernel = kernel_of()
  assert fitted(kernel, granularity='bucket').grid(kernel) is None


def test_the_scale_stands_still_between_two_fits():
  kernel = kernel_of()
  quantizer = fitted(kernel, bits=8, granularity='tensor')
  full = np.abs(kernel).max()
  assert np.abs(quantizer(3 * kernel).numpy()).max() == pytest.approx(full, rel=1e-6)
  quantizer.fit(3 * kernel)
  assert np.abs(quantizer(3 * kernel).numpy()).max() == pytest.approx(3 * full, rel=1e-6)


@pytest.mark.parametrize('axes', [(-2, -1), (-2,), (0,), (1, 3)])
def test_channel_axes_may_be_any(axes):
  kernel = kernel_of((3, 2, 4, 5))
  quantizer = fitted(kernel, bits=8, channel_axes=axes)
  others = tuple(axis for axis in range(4) if axis not in {a % 4 for a in axes})
  np.testing.assert_allclose(
    quantizer.scale, np.abs(kernel).max(axis=others, keepdims=True) / 127, rtol=1e-6
  )


def test_a_single_output_channel_is_a_group():
  kernel = kernel_of((3, 4, 1))
  assert fitted(kernel, bits=8).scale.numpy().item() == pytest.approx(
    np.abs(kernel).max() / 127, rel=1e-6
  )


@pytest.mark.parametrize('granularity', ['tensor', 'channel', 'bucket'])
@pytest.mark.parametrize('bits', [1, 2, 8])
def test_the_gradient_of_a_weight_quantizer_is_straight_through(bits, granularity):
  kernel, upstream = kernel_of(), kernel_of(seed=4)
  quantizer = fitted(kernel, bits=bits, granularity=granularity, bucket_size=50)
  x = tf.Variable(5 * kernel)  # most of it clipped
  with tf.GradientTape() as tape:
    y = tf.reduce_sum(quantizer(x) * upstream)
  np.testing.assert_array_equal(tape.gradient(y, x), upstream)


def test_replace_gives_the_value_to_the_last_bit():
  x, value = tf.Variable([1e8, 1.0]), tf.constant([1.0, 0.1])
  with tf.GradientTape() as tape:
    y = replace(x, value)
    loss = tf.reduce_sum(y * [2.0, 3.0])
  np.testing.assert_array_equal(y, value)
  np.testing.assert_array_equal(tape.gradient(loss, x), [2.0, 3.0])


RANGES = st.tuples(st.floats(-1e3, 0, width=32), st.floats(0, 1e3, width=32)).filter(
  lambda r: r[1] - r[0] > 1e-3
)


@settings(max_examples=150)
@given(RANGES, st.integers(2, 16))
def test_nudged_range_is_the_range_of_tensorflows_fake_quantizer(range_, bits):
  """Values far outside come out as TensorFlow's nudged ends: the same float32 operations."""
  low, high = nudged_range(*range_, bits)
  x = tf.constant([-1e9, 0.0, 1e9])
  ends = tf.quantization.fake_quant_with_min_max_vars(x, *range_, num_bits=bits).numpy()
  step = (range_[1] - range_[0]) / (2**bits - 1)
  np.testing.assert_allclose([low, high], ends[[0, 2]], rtol=1e-5, atol=1e-5 * step)
  assert ends[1] == 0.0
  zero = -low / ((high - low) / (2**bits - 1))
  assert abs(zero - round(zero)) < 1e-2 and low <= 0 <= high


@settings(max_examples=60)
@given(RANGES, st.integers(2, 16))
def test_clipping_computes_what_tensorflows_fake_quantizer_does(range_, bits):
  x = tf.constant(np.random.default_rng(bits).normal(size=200) * 4.0, tf.float32)
  results = []
  for quantize in (quantizers.quantize_affine, quantizers._quantize_by_clipping):
    with tf.GradientTape() as tape:
      tape.watch(x)
      y = quantize(x, *map(tf.constant, range_), bits)
    results.append((y.numpy(), tape.gradient(y, x).numpy()))
  np.testing.assert_array_equal(results[0][0], results[1][0])
  np.testing.assert_array_equal(results[0][1], results[1][1])


def test_activations_that_are_all_zero_have_a_range():
  for nonnegative in (False, True):
    quantizer = built(nonnegative=nonnegative)
    quantizer(tf.zeros((2, 3)), training=True)
    assert quantizer.has_range
    np.testing.assert_array_equal(quantizer(tf.zeros((2, 3))), np.zeros((2, 3)))


@given(RANGES, st.integers(2, 10))
def test_every_output_lies_on_the_nudged_grid(range_, bits):
  low, high = nudged_range(*range_, bits)
  x = np.linspace(1.1 * low, 1.1 * high, 301, dtype='float32')
  y = quantize_affine(x, *range_, bits).numpy().astype('float64')
  step = (high - low) / (2**bits - 1)
  codes = (y - low) / step
  np.testing.assert_allclose(codes, np.round(codes), atol=1e-3)
  slow = low + np.round((np.clip(x, low, high) - low) / step) * step
  # A value half way between two codes may go either way in float32.
  assert np.mean(np.abs(y - slow) > 1e-3 * step) < 0.05
  assert np.max(np.abs(y - slow)) < 1.01 * step


def test_nudged_range_by_hand():
  """3 steps of 1 from -1.4: zero point round(1.4) = 1, so -1 to 2."""
  assert nudged_range(-1.4, 1.6, 2) == (-1.0, 2.0)
  assert nudged_range(0.0, 6.0, 4) == (0.0, pytest.approx(6.0))
  assert nudged_range(-6.0, 0.0, 4) == (pytest.approx(-6.0), 0.0)


@pytest.mark.parametrize(
  ('low', 'high', 'inputs', 'outputs', 'range_'),
  [
    (0.0, 2.0, [-1, 0.9, 1.1, 9], [0, 0, 2, 2], (0.0, 2.0)),
    (-3.0, 1.0, [-9, -1.6, -1.4, 5], [-3, -3, 0, 0], (-3.0, 0.0)),
  ],
)
def test_one_bit_activations_are_zero_and_the_larger_end(low, high, inputs, outputs, range_):
  assert quantize_affine(tf.constant(inputs, tf.float32), low, high, 1).numpy().tolist() == outputs
  assert nudged_range(low, high, 1) == range_


@pytest.mark.parametrize('bits', [1, 2, 8])
def test_the_gradient_of_an_activation_quantizer_is_one_inside_and_zero_outside(bits):
  x = tf.Variable([-0.5, 0.3, 0.9, 2.5])
  with tf.GradientTape() as tape:
    y = tf.reduce_sum(quantize_affine(x, tf.constant(0.0), tf.constant(2.0), bits))
  assert tape.gradient(y, x).numpy().tolist() == [0, 1, 1, 0]


def built(**arguments):
  quantizer = ActivationQuantizer(**arguments)
  quantizer.build((None, 3))
  return quantizer


def ends(quantizer):
  return [
    pytest.approx(float(quantizer.low), abs=1e-6),
    pytest.approx(float(quantizer.high), abs=1e-6),
  ]


def test_the_running_range_by_hand_for_three_steps():
  """Momentum 0.75: (-2, 4), then a quarter of the way to (0, 8), then to (-6, 1)."""
  quantizer = built(bits=8, momentum=0.75)
  assert not quantizer.has_range
  quantizer(np.float32([[-2, 4, 1]]), training=True)
  assert ends(quantizer) == [-2, 4]
  quantizer(np.float32([[2, 8, 3]]), training=True)
  assert ends(quantizer) == [-1.5, 5]
  quantizer(np.float32([[-6, 1, 0]]), training=True)
  assert ends(quantizer) == [-2.625, 4]
  assert quantizer.has_range


def test_the_first_batch_sets_the_range_and_is_quantized_with_it():
  quantizer = built(bits=2, momentum=0.99)
  assert quantizer(np.float32([[0.4, 1.4, 3]]), training=True).numpy().tolist() == [[0, 1, 3]]


def test_inference_does_not_move_the_range():
  quantizer = built(bits=8)
  quantizer(np.float32([[-2, 4, 1]]), training=True)
  quantizer(np.float32([[-90, 90, 1]]), training=False)
  quantizer(np.float32([[-90, 90, 1]]))
  assert ends(quantizer) == [-2, 4]


def test_negative_only_activations_have_a_range_that_ends_at_zero():
  quantizer = built(bits=8)
  quantizer(np.float32([[-2, -4, -1]]), training=True)
  assert ends(quantizer) == [-4, 0]


def test_a_nonnegative_quantizer_keeps_its_low_end_at_zero():
  quantizer = built(bits=8, nonnegative=True)
  quantizer(np.float32([[-2, 4, 1]]), training=True)
  assert ends(quantizer) == [0, 4]


@pytest.mark.parametrize(
  ('kind', 'arguments'),
  [
    (
      WeightQuantizer,
      {'bits': 3, 'granularity': 'bucket', 'channel_axes': (0, 1), 'bucket_size': 7},
    ),
    (ActivationQuantizer, {'bits': 5, 'momentum': 0.5, 'nonnegative': True}),
  ],
)
def test_a_config_makes_an_equal_quantizer(kind, arguments):
  copy = keras.saving.deserialize_keras_object(
    keras.saving.serialize_keras_object(kind(**arguments))
  )
  assert type(copy) is kind
  assert {name: getattr(copy, name) for name in arguments} == arguments


@pytest.fixture
def policy(request):
  """Sets the dtype policy of Keras."""
  keras.config.set_dtype_policy(request.param)
  yield request.param
  keras.config.set_dtype_policy('float32')


@pytest.mark.parametrize('policy', ['mixed_float16', 'mixed_bfloat16'], indirect=True)
@pytest.mark.parametrize('algorithm', ['uniform', 'non-uniform'])
def test_kernels_are_on_their_grid_in_mixed_precision(algorithm, policy):
  """Half precision would be off by 1e-3 of a weight; float32 is by 1e-7."""
  model, stack = pocketsize.compress(
    conv_net(), [{'algorithm': algorithm, 'weight_bits': 4}], calibration=[images(seed=1)]
  )
  callbacks = [pocketsize.CompressionCallback(stack)]
  compile_for_logits(model).fit(images(), labels(), verbose=0, callbacks=callbacks)
  assert model(images()).dtype == policy.removeprefix('mixed_')
  assert {weight.dtype for each in model.transforms for weight in each.weights} == {'float32'}
  for path in ('conv0', 'conv1', 'head'):
    kernel, quantizer = model.baked(path), model.transforms_at(path, 'kernel')[0]
    grid = quantizer.grid(kernel)
    np.testing.assert_allclose(grid.codes(kernel) * grid.scale, kernel, rtol=1e-6)


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_a_half_precision_tensor_is_quantized_in_float32(dtype):
  quantizer = ActivationQuantizer(8)
  quantizer.build((4, 3))
  quantizer.set_range(-1.0, 2.0)
  x = tf.cast(kernel_of((4, 3)), dtype)
  x._keras_mask = tf.constant([True, False, True, True])
  got = quantizer(x)
  assert got.dtype == dtype and got._keras_mask is x._keras_mask
  np.testing.assert_array_equal(got, tf.cast(quantizer(tf.cast(x, 'float32')), dtype))


def test_a_quantizer_that_was_saved_in_mixed_precision_is_float32():
  config = {**WeightQuantizer(4).get_config(), 'dtype': 'mixed_float16'}
  quantizer = WeightQuantizer.from_config(config)
  assert quantizer.compute_dtype == 'float32' and quantizer.bits == 4
