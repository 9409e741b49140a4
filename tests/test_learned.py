"""Trained scales and ranges against loops over the values, and what they are inside a model."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import compile_for_logits, conv_net, images, labels

import pocketsize
from learners.training import _decayed
from pocketsize.compressor import CompressionCallback
from pocketsize.errors import UserError
from pocketsize.quantization.asymmetric import AsymmetricWeightQuantizer
from pocketsize.quantization.dorefa import Dorefa, DorefaActivation
from pocketsize.quantization.learned import LearnedRange, LearnedScale, Pact
from pocketsize.quantization.learned_gradients import (
  adjusted_range,
  quantize_by_clipping,
  quantize_by_high,
  quantize_by_range,
  quantize_by_scale,
)
from pocketsize.quantization.uniform import ACTIVATION_RANGES
from tests.test_quantizers import groups_of

GRANULARITIES = ['tensor', 'channel', 'bucket']


def kernel_of(shape=(3, 2, 4, 6), seed=3):
  return np.random.default_rng(seed).normal(size=shape).astype('float32')


def gradients(function, *values, upstream):
  """Returns (value, gradients) of `function(*values)` for an upstream gradient, as arrays."""
  variables = [tf.Variable(value, dtype=tf.float32) for value in values]
  with tf.GradientTape() as tape:
    y = function(*[variable.value() for variable in variables])
  return np.array(y), [np.array(g) for g in tape.gradient(y, variables, upstream)]


# Kernels.


def slow_scale_gradient(x, scale, bits, upstream):
  """(value, gradient to x, gradient to the scale) of one row, weight by weight."""
  high = max(2 ** (bits - 1) - 1, 1)
  values, to_x, to_scale = [], [], 0.0
  for value, g in zip(x, upstream, strict=True):
    ratio = 0.0 if scale == 0 else value / scale
    if bits == 1:
      sign = np.sign(value)
      values, to_x, to_scale = [*values, sign * scale], [*to_x, g], to_scale + g * sign
    elif ratio > high:
      values, to_x, to_scale = [*values, high * scale], [*to_x, 0.0], to_scale + g * high
    elif ratio < -high:
      values, to_x, to_scale = [*values, -high * scale], [*to_x, 0.0], to_scale - g * high
    else:
      code = round(ratio)
      values, to_x = [*values, code * scale], [*to_x, g]
      to_scale += g * (code - ratio)
  return values, to_x, to_scale


@settings(max_examples=60)
@given(
  st.integers(1, 8),
  st.sampled_from([0.0, 0.25, 0.5, 2.0]),
  st.lists(st.integers(-40, 40), min_size=1, max_size=12),
)
def test_quantizing_by_a_scale_against_the_slow_loop(bits, scale, eighths):
  """Eighths over powers of two are exact, with ties and values at the ends of the range."""
  x = np.float32(eighths) / 8.0
  upstream = np.float32([(index % 5) - 2 for index in range(len(x))])
  y, (to_x, to_scale) = gradients(
    lambda x, scale: quantize_by_scale(x, scale, bits, 0.5), x, [scale], upstream=upstream
  )
  values, slow_x, slow_s = slow_scale_gradient(x.tolist(), scale, bits, upstream.tolist())
  np.testing.assert_array_equal(y, values)
  np.testing.assert_array_equal(to_x, slow_x)
  np.testing.assert_allclose(to_scale, [0.5 * slow_s], rtol=1e-6, atol=1e-6)


def test_the_gradient_of_a_scale_by_hand():
  """Codes -1 to 1 over scale 2: -7 gives -1, 5 gives 1, 1.4 rounds 0.7 up: 0.3."""
  _, (to_x, to_scale) = gradients(
    lambda x, scale: quantize_by_scale(x, scale, 2),
    [-7.0, 5.0, 1.4],
    [2.0],
    upstream=tf.constant([1.0, 10.0, 100.0]),
  )
  assert to_x.tolist() == [0, 0, 100]
  assert to_scale.tolist() == [pytest.approx(-1 + 10 + 30, rel=1e-5)]


def fitted(kind, kernel, **arguments):
  quantizer = kind(**arguments)
  quantizer.build(kernel.shape)
  quantizer.fit(kernel)
  return quantizer


@pytest.mark.parametrize('granularity', GRANULARITIES)
@pytest.mark.parametrize('log2', [False, True])
@pytest.mark.parametrize('bits', [1, 3, 8])
def test_a_learned_scale_against_the_slow_loop(bits, log2, granularity):
  """144 weights in buckets of 41: the last has 21. Scales are half of what fits, so some clip."""
  kernel, upstream = kernel_of(), kernel_of(seed=4) / 8.0
  quantizer = fitted(
    LearnedScale, kernel, bits=bits, granularity=granularity, bucket_size=41, log2=log2
  )
  variable = quantizer.trainable_weights[0]
  variable.assign(np.asarray(variable) - 1.0 if log2 else np.asarray(variable) / -2.0)
  x = tf.Variable(kernel)
  with tf.GradientTape() as tape:
    y = quantizer(x)
  to_x, to_scale = tape.gradient(y, [x, variable.value], upstream)
  scales = np.ravel(quantizer.scales())
  rows = groups_of(kernel, granularity, 41)
  high = max(2 ** (bits - 1) - 1, 1)
  # Of LSQ below 3 bits; at 8 bits the end of the range moves as a weight does.
  factor = min(1.0 / np.sqrt(kernel.size / len(rows) * high), 1.0 / high**2)
  for row, scale, got in zip(rows, scales, np.ravel(to_scale), strict=True):
    values, slow_x, slow_s = slow_scale_gradient(
      kernel.ravel()[row].tolist(), float(scale), bits, upstream.ravel()[row].tolist()
    )
    np.testing.assert_allclose(np.ravel(y)[row], values, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.ravel(to_x)[row], slow_x)
    # A negative scale counts as its magnitude; log2 has the relative step of the scale, up to 1.
    sign_or_log = 1.0 / (scale * np.log(2.0)) if log2 else -1.0
    factor_here, bound = factor * sign_or_log, 1.0 if log2 else np.inf
    expected = np.clip(slow_s * factor_here, -bound, bound)
    assert got == pytest.approx(expected, rel=2e-3, abs=0.0025 * abs(factor_here))


@pytest.mark.parametrize('granularity', GRANULARITIES)
@pytest.mark.parametrize('bits', [1, 2, 4, 8, 16])
@pytest.mark.parametrize(
  ('kind', 'arguments'),
  [
    (LearnedScale, {}),
    (LearnedScale, {'log2': True}),
    (AsymmetricWeightQuantizer, {}),
    (Dorefa, {}),
  ],
)
def test_codes_stand_for_the_values_of_training_to_the_last_bit(kind, arguments, bits, granularity):
  kernel = kernel_of() + np.float32(0.4)
  kernel[..., 4] = 0
  quantizer = fitted(kind, kernel, bits=bits, granularity=granularity, bucket_size=41, **arguments)
  deployed = quantizer(kernel).numpy()
  codes = quantizer.codes(deployed)
  assert codes.bits == bits and codes.codes.shape == kernel.shape
  assert codes.codes.min() >= 0 and codes.codes.max() < 2**bits
  assert (codes.zero_point % (0.5 if kind is not AsymmetricWeightQuantizer else 1) == 0).all()
  for row, group in enumerate(groups_of(kernel, granularity, 41)):
    values = (codes.codes.ravel()[group].astype('float32') - codes.zero_point[row]) * (
      codes.scale[row]
    )
    wanted = deployed.ravel()[group]
    # Without a level of zero there is no code for exact zeros.
    exact = wanted != 0 if np.any(codes.zero_point % 1) else slice(None)
    np.testing.assert_array_equal(values[exact], wanted[exact])
  assert (deployed[..., 4] == 0).all()


@pytest.mark.parametrize('log2', [False, True])
def test_a_row_of_zeros_has_a_scale_and_stays_zero(log2):
  """A hundredth of the largest, so that a weight that comes to life moves it by its size."""
  kernel = kernel_of()
  kernel[..., 2] = 0
  quantizer = fitted(LearnedScale, kernel, bits=8, log2=log2)
  scales = np.ravel(quantizer.scales())
  assert scales[2] == pytest.approx(0.01 * scales.max(), rel=1e-5)
  assert (quantizer(kernel).numpy()[..., 2] == 0).all()
  assert np.ravel(fitted(LearnedScale, 0 * kernel, bits=4, log2=log2).scales())[0] > 0


def test_asymmetric_weights_by_hand():
  """-1.4 to 1.6 with 2 bits and extremes: levels -1, 0, 1, 2; one-sided rows begin at 0."""
  kernel = np.float32([[-1.4, 3.0], [0.4, 1.4], [1.6, 0.2]])
  quantizer = fitted(AsymmetricWeightQuantizer, kernel, bits=2, start='min_max')
  assert quantizer(kernel).numpy().tolist() == [[-1, 3], [0, 1], [2, 0]]
  assert np.ravel(quantizer.zero_point).tolist() == [1, 0]
  x = tf.Variable(9 * kernel)
  with tf.GradientTape() as tape:
    y = tf.reduce_sum(quantizer(x) * kernel)
  np.testing.assert_array_equal(tape.gradient(y, x), kernel)


def test_asymmetric_weights_are_on_a_grid_of_one_bit_more_up_to_seven():
  kernel = kernel_of()
  for bits in (1, 4, 7):
    quantizer = fitted(AsymmetricWeightQuantizer, kernel, bits=bits)
    deployed = quantizer(kernel).numpy()
    grid = quantizer.grid(deployed)
    codes = grid.codes(deployed)
    assert grid.bits == bits + 1 and np.ptp(codes, axis=(0, 1, 2)).max() == 2**bits - 1
    np.testing.assert_array_equal((codes * grid.scale).astype('float32'), deployed)
  assert fitted(AsymmetricWeightQuantizer, kernel, bits=8).grid(kernel) is None
  bucket = fitted(AsymmetricWeightQuantizer, kernel, bits=2, granularity='bucket')
  assert bucket.grid(kernel) is None


@pytest.mark.parametrize('granularity', GRANULARITIES)
@pytest.mark.parametrize('bits', [1, 2, 5])
def test_dorefa_against_the_slow_loop(bits, granularity):
  kernel, upstream = kernel_of(), kernel_of(seed=4)
  quantizer = fitted(Dorefa, kernel, bits=bits, granularity=granularity, bucket_size=41)
  x = tf.Variable(kernel)
  with tf.GradientTape() as tape:
    y = quantizer(x)
  to_x, levels = np.ravel(tape.gradient(y, x, upstream)), 2**bits - 1
  for row in groups_of(kernel, granularity, 41):
    values = kernel.ravel()[row].astype(np.float64)
    most, largest = np.tanh(np.abs(values).max()), np.abs(values).max()
    for index, value in zip(row, values, strict=True):
      code = round(levels * (np.tanh(value) / (2 * most) + 0.5))
      assert np.ravel(y)[index] == pytest.approx(largest * (2 * code / levels - 1), rel=1e-5)
      slope = largest * (1 - np.tanh(value) ** 2) / most
      assert to_x[index] == pytest.approx(slope * upstream.ravel()[index], rel=1e-4)


def test_dorefa_keeps_exact_zeros():
  kernel = kernel_of()
  kernel[..., ::2] = 0.0
  deployed = fitted(Dorefa, kernel, bits=2)(kernel).numpy()
  np.testing.assert_array_equal(deployed == 0.0, kernel == 0.0)


def test_dorefa_has_odd_codes_on_a_grid_of_one_bit_more_up_to_seven():
  kernel = kernel_of()
  for bits in (1, 2, 7):
    quantizer = fitted(Dorefa, kernel, bits=bits)
    deployed = quantizer(kernel).numpy()
    grid = quantizer.grid(deployed)
    codes = grid.codes(deployed)
    assert grid.bits == bits + 1 and (codes % 2 == 1).all() and np.abs(codes).max() == 2**bits - 1
    np.testing.assert_array_equal((codes * grid.scale).astype('float32'), deployed)
  assert fitted(Dorefa, kernel, bits=8).grid(kernel) is None
  assert fitted(Dorefa, kernel, bits=2, granularity='bucket').grid(kernel) is None


# Activations.


def slow_adjusted(low, high, bits):
  """The two candidates and the wider of them, in plain Python."""
  low, high, levels = min(low, 0.0), max(high, 0.0), 2**bits - 1
  if high == low:
    return 0.0, 0.0
  zero = int(np.floor(-low * levels / (high - low) + 0.5))
  candidates = []
  if zero > 0:
    candidates.append((low, (zero - levels) / zero * low))
  if zero < levels:
    candidates.append((zero / (zero - levels) * high, high))
  return max(candidates, key=lambda ends: ends[1] - ends[0])


def slow_range_gradient(x, ends, bits, upstream, error_by, below):
  """(value, to x, to the width or upper end, to low) of levels between `ends`, value by value."""
  low, high = ends
  step = (high - low) / (2**bits - 1)
  values, to_x, to_width, to_low = [], [], 0.0, 0.0
  for value, g in zip(x, upstream, strict=True):
    if value < low:
      values, to_x = [*values, low], [*to_x, 0.0]
      to_width, to_low = to_width + g * below, to_low + g
    elif value > high:
      values, to_x = [*values, high], [*to_x, 0.0]
      to_width, to_low = to_width + g, to_low + g
    else:
      level = low + np.floor((value - low) / step + 0.5) * step
      values, to_x = [*values, level], [*to_x, g]
      to_width += g * (level - value) / error_by
  return values, to_x, to_width, to_low


BATCH = np.random.default_rng(5).normal(size=200).astype('float32')
UPSTREAM = np.random.default_rng(6).normal(size=200).astype('float32')


@settings(max_examples=60)
@given(st.floats(-3, 1, width=32), st.floats(0.125, 4, width=32), st.integers(2, 9))
def test_an_asymmetric_range_against_the_slow_loop(low, width, bits):
  """Values on an end in one precision and beyond it in the other are rare: 5 in 1000."""
  adjusted = slow_adjusted(low, low + width, bits)
  got = [float(end) for end in adjusted_range(tf.constant(low), tf.constant(width), bits)]
  ratio = -min(low, 0.0) * (2**bits - 1) / (max(low + width, 0.0) - min(low, 0.0) or 1.0)
  if adjusted[0] == adjusted[1] or abs(ratio % 1 - 0.5) < 1e-3:
    return
  assert got == pytest.approx(adjusted, rel=1e-4, abs=1e-5)
  y, (to_x, to_low, to_width) = gradients(
    lambda x, low, width: quantize_by_range(x, low, width, bits),
    BATCH,
    low,
    width,
    upstream=UPSTREAM,
  )
  values, slow_x, slow_width, slow_low = slow_range_gradient(
    BATCH, got, bits, UPSTREAM, got[1] - got[0], below=0.0
  )
  np.testing.assert_allclose(y, values, atol=1e-4 + 1.01 * (got[1] - got[0]) / (2**bits - 1))
  assert np.mean(np.abs(y - values) > 1e-4) < 0.02
  np.testing.assert_allclose(to_x, slow_x)
  assert to_low == pytest.approx(slow_low, rel=1e-3, abs=1e-3)
  assert to_width == pytest.approx(slow_width, rel=1e-2, abs=0.05)


@pytest.mark.parametrize('low', [-2.0, -0.01, 0.0, 0.5])
def test_the_adjusted_range_has_a_whole_zero_point_and_shrinks_on_no_kept_side(low):
  for width in (0.6, 1.0, 2.3):
    for bits in (1, 2, 3, 8):
      begin, end = min(low, 0.0), max(low + width, 0.0)
      got = [float(part) for part in adjusted_range(tf.constant(low), tf.constant(width), bits)]
      step = (got[1] - got[0]) / (2**bits - 1)
      zero = -got[0] / step
      assert zero == pytest.approx(round(zero), abs=1e-3)
      assert got[0] == pytest.approx(begin, abs=1e-6) or got[1] == pytest.approx(end, abs=1e-6)
      if 0 < round(zero) < 2**bits - 1:
        assert got[0] <= begin + 1e-6 and got[1] >= end - 1e-6


def test_the_adjusted_range_by_hand():
  """3 steps from -1.4 to 1.6, zero point 1: (-1.4, 2.8) is wider than (-0.8, 1.6)."""
  assert [float(end) for end in adjusted_range(tf.constant(-1.4), tf.constant(3.0), 2)] == (
    pytest.approx([-1.4, 2.8])
  )


@pytest.mark.parametrize('signed', [False, True])
@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize('high', [0.5, 1.3, 7.0])
def test_a_symmetric_range_against_the_slow_loop(bits, signed, high):
  ratio = -(2 ** (bits - 1)) / (2 ** (bits - 1) - 1) if signed else 0.0
  y, (to_x, to_high) = gradients(
    lambda x, high: quantize_by_high(x, high, bits, signed), BATCH, high, upstream=UPSTREAM
  )
  values, slow_x, slow_high, _ = slow_range_gradient(
    BATCH, (ratio * high, high), bits, UPSTREAM, high, below=ratio
  )
  np.testing.assert_allclose(y, values, atol=1e-4)
  np.testing.assert_allclose(to_x, slow_x)
  assert to_high == pytest.approx(slow_high, rel=1e-3, abs=1e-2)


@pytest.mark.parametrize('bits', [2, 8])
@pytest.mark.parametrize(
  ('function', 'ends'),
  [
    (lambda x, high, bits: quantize_by_high(x, high, bits, False), [1.3]),
    (lambda x, high, bits: quantize_by_high(x, high, bits, True), [1.3]),
    (quantize_by_range, [-0.7, 2.1]),
  ],
  ids=['nonnegative', 'symmetric', 'range'],
)
def test_gradients_are_the_same_where_there_is_a_gpu(function, ends, bits, monkeypatch):
  """There TensorFlow's one operation for them is not used; sums differ in their order only."""
  found = []
  for devices in ([], ['gpu']):
    monkeypatch.setattr(tf.config, 'list_physical_devices', lambda kind, there=devices: there)
    y, parts = gradients(
      lambda x, *ends: function(x, *ends, bits), BATCH, *ends, upstream=tf.constant(UPSTREAM)
    )
    found.append([y, *parts])
  for one, other in zip(*found, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_ties_of_activations_go_up_as_in_tensorflows_fake_quantizer():
  y, _ = gradients(
    lambda x, high: quantize_by_high(x, high, 2, False), [0.5, 1.5, 2.5], 3.0, upstream=tf.ones(3)
  )
  assert y.tolist() == [1, 2, 3]


def test_pact_by_hand():
  """Levels 0, 1, 2, 3; what is at alpha or above gives it its gradient."""
  y, (to_x, to_alpha) = gradients(
    lambda x, alpha: quantize_by_clipping(x, alpha, 2),
    [-1.0, 0.0, 1.4, 3.0, 9.0],
    3.0,
    upstream=tf.constant([1.0, 10.0, 100.0, 1e3, 1e4]),
  )
  assert y.tolist() == [0, 0, 1, 3, 3]
  assert to_x.tolist() == [0, 10, 100, 0, 0]
  assert to_alpha == 1.1e4


def built(kind=LearnedRange, **arguments):
  quantizer = kind(**arguments)
  quantizer.build((None, 3))
  return quantizer


KINDS = [
  (LearnedRange, {}),
  (LearnedRange, {'symmetric': True}),
  (LearnedRange, {'nonnegative': True}),
  (LearnedRange, {'log2': True}),
  (LearnedRange, {'log2': True, 'nonnegative': True}),
  (Pact, {'decay': 0.1}),
]
every_kind = pytest.mark.parametrize(('kind', 'arguments'), KINDS)


@every_kind
def test_the_first_training_batch_sets_a_range_and_no_later_one(kind, arguments):
  quantizer = built(kind, bits=4, **arguments)
  assert not quantizer.has_range
  quantizer(np.float32([[-1.5, 3.0, 0.5]]))
  assert not quantizer.has_range
  quantizer(np.float32([[-1.5, 3.0, 0.5]]), training=True)
  assert quantizer.has_range
  low, high = quantizer.range()
  assert high == pytest.approx(3.0, rel=0.1)
  # 16 levels: -1.5 to 3 has the zero point 5, hence 3 to -1.5; symmetric 3 * 8 / 7.
  two_ended = -3.0 * 8 / 7 if quantizer.symmetric else -1.5
  assert low == pytest.approx(0 if quantizer.nonnegative else two_ended, rel=1e-4)
  quantizer(np.float32([[-90, 90, 1]]), training=True)
  assert quantizer.range() == (low, high)


@pytest.mark.parametrize(('kind', 'arguments'), KINDS[1:])
def test_training_goes_on_from_an_end_that_a_step_took_below_zero(kind, arguments):
  quantizer = built(kind, bits=4, **arguments)
  quantizer.high.assign(-0.75)
  x = np.float32([[0.1, 0.4, 2.0]])
  expected = quantizer(x, training=False).numpy()
  assert expected.any()
  np.testing.assert_array_equal(quantizer(x, training=True).numpy(), expected)
  assert float(quantizer.high) == -0.75


@every_kind
@pytest.mark.parametrize('bits', [2, 8])
def test_values_lie_on_the_levels_of_the_range_that_files_get(kind, arguments, bits):
  """The exported operation is TensorFlow's fake quantizer over `range()`."""
  quantizer = built(kind, bits=bits, **arguments)
  quantizer.set_range(-1.37, 2.71)
  x = np.float32(np.linspace(-4, 4, 1001))
  low, high = quantizer.range()
  expected = tf.quantization.fake_quant_with_min_max_args(x, low, high, num_bits=bits)
  step = (high - low) / (2**bits - 1)
  off = np.abs(quantizer(x) - expected) / step
  # A value half way between two levels may go either way.
  assert np.mean(off > 1e-3) < 0.01 and off.max() < 1.001


@every_kind
def test_data_that_are_all_zero_give_a_range(kind, arguments):
  quantizer = built(kind, **arguments)
  quantizer(tf.zeros((2, 3)), training=True)
  assert quantizer.has_range
  np.testing.assert_array_equal(quantizer(tf.zeros((2, 3))), np.zeros((2, 3)))
  other = built(kind, **arguments)
  other.set_range(0.0, 0.0)
  assert other.has_range


@pytest.mark.parametrize(
  ('kind', 'arguments'),
  [
    (LearnedScale, {'bits': 3, 'granularity': 'bucket', 'start': 'percentile', 'log2': True}),
    (AsymmetricWeightQuantizer, {'bits': 3, 'start': 'mse'}),
    (Dorefa, {'bits': 2, 'granularity': 'tensor'}),
    (LearnedRange, {'bits': 5, 'symmetric': True, 'start': 'mse'}),
    (LearnedRange, {'bits': 5, 'nonnegative': True}),
    (LearnedRange, {'bits': 5, 'log2': True, 'start': 'percentile'}),
    (Pact, {'bits': 4, 'decay': 0.5, 'start': 'min_max'}),
    (DorefaActivation, {'bits': 3}),
  ],
)
def test_a_config_makes_an_equal_quantizer(kind, arguments):
  copy = keras.saving.deserialize_keras_object(
    keras.saving.serialize_keras_object(kind(**arguments))
  )
  assert type(copy) is kind
  assert {name: getattr(copy, name) for name in arguments} == arguments


def to_end(quantizer, x, upstream):
  """Returns (value, gradient to the variable of the one trained end)."""
  with tf.GradientTape() as tape:
    y = quantizer(tf.constant(x))
  return np.array(y), float(tape.gradient(y, quantizer.trainable_variables[0].value, upstream))


@pytest.mark.parametrize('nonnegative', [False, True])
@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize('high', [0.5, 1.3, 7.0])
def test_a_range_by_log2_against_the_slow_loop(bits, nonnegative, high):
  quantizer = built(bits=bits, log2=True, nonnegative=nonnegative)
  quantizer.set_range(-0.25 * high, high)
  ratio = 0.0 if nonnegative else -(2 ** (bits - 1)) / (2 ** (bits - 1) - 1)
  upstream, slope = 0.01 * UPSTREAM, high * np.log(2.0)
  y, to_log2 = to_end(quantizer, BATCH, upstream)
  values, _, slow_high, _ = slow_range_gradient(
    BATCH, (ratio * high, high), bits, upstream, high, below=ratio
  )
  np.testing.assert_allclose(y, values, atol=1e-4)
  assert abs(slow_high / slope) < 1.0
  assert to_log2 == pytest.approx(slow_high / slope, rel=1e-3, abs=1e-4 / slope)


@pytest.mark.parametrize('nonnegative', [False, True])
def test_a_step_of_log2_moves_the_end_as_one_of_the_end_itself(nonnegative):
  """To first order: here it is by a thousandth, and by another thousandth of that to second."""
  moved = []
  for log2 in (False, True):
    quantizer = built(bits=3, symmetric=True, log2=log2, nonnegative=nonnegative)
    quantizer.set_range(0.0, 0.8)
    _, gradient = to_end(quantizer, BATCH, 0.01 * np.abs(UPSTREAM))
    quantizer.high.assign_sub(1e-2 * gradient)
    moved.append(float(quantizer.end()) - 0.8)
  assert abs(moved[0]) > 5e-4
  assert moved[1] == pytest.approx(moved[0], rel=0.01)


@pytest.mark.parametrize('nonnegative', [False, True])
@pytest.mark.parametrize('step', [-1e6, -30.0, 30.0, 1e6])
def test_an_end_by_log2_stays_positive_and_finite_after_a_huge_step(step, nonnegative):
  quantizer = built(bits=8, log2=True, nonnegative=nonnegative)
  quantizer.set_range(-1.0, 2.0)
  quantizer.high.assign_add(step)
  x = np.float32([-2.0, 0.0, 0.7, 5.0])
  y, gradient = to_end(quantizer, x, tf.ones(4))
  low, high = quantizer.range()
  assert 0.0 < high < np.inf and np.isfinite(low) and np.isfinite(y).all()
  assert np.isfinite(gradient)
  assert quantizer(x, training=True).numpy().tolist() == y.tolist()


def errors_in_training(quantizer, start, x):
  """Returns the squared error of 200 steps for the least, from `start` as what is trained."""
  (variable,) = quantizer.trainable_variables
  variable.assign(tf.fill(variable.shape, start))
  optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
  optimizer.build([variable])

  @tf.function
  def step():
    with tf.GradientTape() as tape:
      error = tf.reduce_sum(tf.square(quantizer(x) - x))
    optimizer.apply([tape.gradient(error, variable.value)])
    return error

  return [float(step()) for _ in range(200)]


@pytest.mark.parametrize('start', [-30.0, -12.0, 0.0, 3.0])
def test_what_is_trained_by_log2_comes_to_its_data_from_far_away(start):
  """With a rate that without a bound would make a small scale or range an infinite one."""
  x = tf.constant(BATCH[:, None])
  scale = fitted(LearnedScale, BATCH[:, None], bits=4, granularity='tensor', log2=True)
  for quantizer in (scale, built(bits=4, log2=True)):
    errors = errors_in_training(quantizer, start, x)
    # 15 or 16 levels over +-3: steps of 0.4 or so, whose errors have the square 0.4^2 / 12 of x^2.
    assert np.isfinite(errors).all() and errors[-1] < 0.03 * np.sum(BATCH**2)


@pytest.mark.parametrize(
  ('data', 'end'), [([-2.0, -0.5], 2.0), ([0.25, 3.0], 3.0), ([-4.0, 3.0], 4.0)]
)
def test_a_range_by_log2_reaches_to_the_larger_end_of_the_data(data, end):
  """Of a batch as of calibration; with 4 bits the lowest of 16 codes is -8, the highest 7."""
  by_batch, by_calibration = built(bits=4, log2=True), built(bits=4, log2=True)
  by_batch(np.float32([data]), training=True)
  by_calibration.set_range(min(data[0], 0.0), max(data[1], 0.0))
  for quantizer in (by_batch, by_calibration):
    assert quantizer.range() == pytest.approx((-end * 8 / 7, end), rel=1e-5)


def test_a_range_by_log2_has_an_end_of_one_that_is_set():
  """log2 of 1 is 0, the value of what other ranges have not set."""
  quantizer = built(log2=True)
  quantizer.set_range(0.0, 1.0)
  assert quantizer.has_range and float(quantizer.high) == 0.0
  quantizer(np.float32([[9.0, -9.0, 1.0]]), training=True)
  assert float(quantizer.high) == 0.0


@pytest.mark.parametrize('bits', [1, 2, 4, 8, 16])
def test_dorefa_activations_against_numpy(bits):
  """Values and gradients; nothing moves the range."""
  quantizer, levels = built(DorefaActivation, bits=bits), 2**bits - 1
  assert quantizer.has_range and quantizer.weights == []
  quantizer.set_range(0.0, 7.0)
  x, upstream = 0.7 * BATCH, tf.constant(UPSTREAM)
  quantizer(9.0 * x, training=True)
  y, (to_x,) = gradients(lambda x: quantizer(x, training=True), x, upstream=upstream)
  clipped = np.clip(x.astype(np.float64), 0.0, 1.0)
  np.testing.assert_allclose(y, np.round(levels * clipped) / levels, atol=1e-6 + 1e-3 / levels)
  np.testing.assert_array_equal(to_x, np.where((x >= 0.0) & (x <= 1.0), UPSTREAM, 0.0))
  assert quantizer.range() == pytest.approx((0.0, 1.0))


# In a model.


LEARNED = {'algorithm': 'uniform', 'weight_bits': 4, 'activation_bits': 4}
VARIANTS = [
  {'weight_range': 'learned', 'activation_range': 'learned'},
  {'weight_range': 'learned_log2', 'activation_range': 'learned_symmetric'},
  {'weight_range': 'dorefa', 'activation_range': 'pact'},
  {'weight_range': 'learned_log2', 'activation_range': 'learned_log2'},
  {'weight_range': 'asymmetric', 'range_start': 'mse'},
  {'weight_range': 'dorefa', 'activation_range': 'dorefa'},
]


def compressed(**fields):
  return pocketsize.compress(conv_net(), [{**LEARNED, **fields}], calibration=[images(seed=9)])


@pytest.mark.parametrize('fields', VARIANTS, ids=lambda fields: '-'.join(fields.values()))
def test_training_moves_scales_and_ranges_at_the_common_rate(fields):
  """Twenty steps at 0.01 with momentum 0.9: by less than half of a scale, less than a range."""
  model, stack = compressed(**fields)
  trained = [transform for transform in model.transforms if transform.trainable_weights]
  before = [sizes(transform) for transform in trained]
  compile_for_logits(model, rate=0.01)
  x, y = images(160, seed=1), labels(160, seed=1)
  model.fit(x, y, batch_size=8, verbose=0, callbacks=[CompressionCallback(stack)])
  assert bool(trained) == (fields not in VARIANTS[-2:])
  for transform, old in zip(trained, before, strict=True):
    change = np.abs(sizes(transform) - old).max(axis=-1) / (np.abs(old).max(axis=-1))
    assert 0.0 < change.max() < (0.5 if isinstance(transform, LearnedScale) else 1.0)
  assert np.isfinite(model(x)).all()


def sizes(transform):
  """Returns a quantizer's scales, [rows, 1], or the ends of its range, [1, 2]."""
  if isinstance(transform, LearnedScale):
    return np.reshape(transform.scales(), (-1, 1))
  return np.float64([transform.range()])


def test_trained_scales_and_ranges_are_not_decayed():
  model, _ = compressed(**VARIANTS[0])
  decayed = {id(weight) for weight in _decayed(model)}
  trained = [weight for transform in model.transforms for weight in transform.trainable_weights]
  assert trained and decayed and not decayed & {id(weight) for weight in trained}


def test_learned_scales_are_fitted_once_and_not_again():
  model, stack = pocketsize.compress(conv_net(), [{**LEARNED, **VARIANTS[0]}])
  quantizer = model.transforms_at('conv1', 'kernel')[0]
  fitted_scale = np.array(quantizer.scale)
  assert (fitted_scale > 0).all()
  quantizer.scale.assign(2 * fitted_scale)
  for step in (0, 50, 100):
    stack.update(step)
  np.testing.assert_array_equal(quantizer.scale, 2 * fitted_scale)
  quantizer.scale.assign(0 * fitted_scale)
  stack.update(0)
  np.testing.assert_array_equal(quantizer.scale, fitted_scale)


def test_the_penalty_of_pact_is_part_of_the_loss():
  model, stack = compressed(**VARIANTS[2], pact_decay=0.5)
  alphas = [float(transform.high) for transform in model.transforms if isinstance(transform, Pact)]
  assert len(alphas) == 3
  expected = 0.25 * sum(alpha**2 for alpha in alphas)
  assert float(stack.loss(None, None, None)) == pytest.approx(expected, rel=1e-6)
  assert compressed(**VARIANTS[0])[1].loss(None, None, None) == 0.0


@pytest.mark.parametrize('kind', ACTIVATION_RANGES)
def test_a_range_without_data_is_one_sentence(kind, tmp_path):
  model, _ = pocketsize.compress(conv_net(), [{**LEARNED, 'activation_range': kind}])
  with pytest.raises(UserError, match='never saw data: train the model'):
    pocketsize.export(model, tmp_path, ['tflite_int8'])
  with pytest.raises(UserError, match='never saw data: train the model'):
    model(images())
  with pytest.raises(UserError, match='Activation ranges need data'):
    pocketsize.calibrate(model, [])
