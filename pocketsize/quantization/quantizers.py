"""Uniform quantizers of weights and activations, and the arithmetic they stand on.

Weights: symmetric, narrow range (Jacob et al. 2018, arXiv:1712.05877, section 3.1). Activations:
affine with an integer zero point, ranges as running averages (section 3).
"""

import keras
import numpy as np
import tensorflow as tf

from pocketsize import ste
from pocketsize.quantization.kernel_quantizer import KernelQuantizer
from pocketsize.transform import Codes, Grid, Transform

BITS = range(1, 17)
# The least width of a range: where data are all zero there is a range nevertheless.
LEAST_WIDTH = 1e-6
# Up to this many bits a kernel's range is searched for the least squared error: with few levels,
# cutting the tails costs less than a coarse step. Above it the range is the largest magnitude.
SEARCH_BITS = 4
_SEARCH_SHARES = np.linspace(0.3, 1.0, 29)


def highest_code(bits):
  """Returns the largest code of a symmetric quantizer: 127 for 8 bits; 1 for 2 and for 1."""
  return max(2 ** (bits - 1) - 1, 1)


def quantize_symmetric(x, scale, bits):
  """Returns x on the grid: round(clip(x / scale, -h, h)) * scale with h = 2^(bits-1) - 1.

  One bit is the sign: +scale for x >= 0, -scale below (Rastegari et al. 2016). A scale of 0 gives
  0.

  Args:
    x: float tensor or array.
    scale: broadcasts against x, not negative.
    bits: 1 to 16.
  """
  if bits == 1:
    return tf.where(x >= 0, scale, -scale) * tf.ones_like(x)
  high = highest_code(bits)
  return tf.clip_by_value(tf.round(tf.math.divide_no_nan(x, scale)), -high, high) * scale


def weight_scale(groups, bits):
  """Returns the scale of each group of weights.

  One bit: the mean magnitude, which minimizes the squared error (Rastegari et al. 2016, equation
    6). Up to 4 bits: the range, 0.3 to 1.0 of the largest magnitude, with the least squared error.
  More: the largest magnitude over the highest code.

  Args:
    groups: [groups, weights] float array.

  Returns:
    [groups] float32 array.
  """
  groups = np.asarray(groups, np.float64)
  magnitude = np.abs(groups)
  if bits == 1:
    return magnitude.mean(axis=1).astype(np.float32)
  high = highest_code(bits)
  full = magnitude.max(axis=1) / high
  if bits > SEARCH_BITS:
    return full.astype(np.float32)
  best, least = full, np.full(len(full), np.inf)
  for share in _SEARCH_SHARES:
    scale = full * share
    divisor = np.where(scale > 0, scale, 1.0)[:, None]
    error = (
      (np.minimum(np.round(magnitude / divisor), high) * scale[:, None] - magnitude) ** 2
    ).sum(axis=1)
    better = error < least
    best, least = np.where(better, scale, best), np.minimum(error, least)
  return best.astype(np.float32)


def nudged_range(low, high, bits):
  """Returns (low, high) moved so that real zero is an integer code, as TensorFlow's fake quantizer
  does.

  Args:
    low, high: floats, low <= 0 <= high, low < high.
    bits: 1 to 16.
  """
  levels = 2**bits - 1
  low, high = np.float32(low), np.float32(high)
  if bits == 1:
    return (0.0, float(high)) if high >= -low else (float(low), 0.0)
  scale = (high - low) / np.float32(levels)
  zero_point = np.clip(np.floor(np.float64(-low / scale) + 0.5), 0, levels).astype(np.float32)
  return float(-zero_point * scale), float((np.float32(levels) - zero_point) * scale)


def quantize_affine(x, low, high, bits):
  """Returns x on 2^bits levels between nudged low and high; gradient 1 inside, 0 outside."""
  if bits > 1 and tf.config.list_physical_devices('GPU'):
    return _quantize_by_clipping(x, low, high, bits)
  if bits > 1:
    return tf.quantization.fake_quant_with_min_max_vars(x, low, high, num_bits=bits)
  step = tf.where(high >= -low, high, low)
  clipped = tf.clip_by_value(x, tf.minimum(step, 0.0), tf.maximum(step, 0.0))
  return ste.replace(clipped, tf.round(tf.math.divide_no_nan(clipped, step)) * step)


def _quantize_by_clipping(x, low, high, bits):
  """The same as TensorFlow's fake quantizer, whose gradient has no deterministic GPU kernel."""
  levels = 2.0**bits - 1.0
  scale = (high - low) / levels
  zero_point = tf.clip_by_value(tf.floor(0.5 - low / scale), 0.0, levels)
  clipped = tf.clip_by_value(x, -zero_point * scale, (levels - zero_point) * scale)
  value = tf.quantization.fake_quant_with_min_max_vars(x, low, high, num_bits=bits)
  return ste.replace(clipped, tf.stop_gradient(value))


@keras.saving.register_keras_serializable(package='pocketsize')
class WeightQuantizer(KernelQuantizer):
  """Symmetric quantizer of a kernel; straight-through gradient.

  The scale is set from the kernel by `fit` (see `weight_scale`): between two fits the grid stands
  still and a training step pays for one rounding only.
  """

  def build_rows(self):
    shape = self.groups.broadcast or (self.groups.count, 1)
    self.scale = self.add_weight(name='scale', shape=shape, initializer='zeros', trainable=False)

  def fit(self, kernel):
    scales = self.groups.fit(kernel, lambda rows: weight_scale(rows, self.bits))
    self.scale.assign(scales.reshape(self.scale.shape))

  def call(self, kernel, training=None):
    if self.groups.broadcast is not None:
      values = quantize_symmetric(kernel, self.scale, self.bits)
    else:
      values = self.groups.join(
        quantize_symmetric(self.groups.split(kernel), self.scale, self.bits)
      )
    return ste.replace(kernel, values)

  def grid(self, kernel):
    if self.groups.broadcast is None:
      return None
    return Grid(keras.ops.convert_to_numpy(self.scale), self.bits)

  def codes(self, kernel):
    scale = self.per_row(self.scale)
    high = 0.5 if self.bits == 1 else highest_code(self.bits)
    step = 2.0 * scale if self.bits == 1 else scale
    rows = self.groups.split(np.asarray(kernel, np.float64))
    divisor = np.where(step > 0.0, step, 1.0)[:, None]
    codes = self.groups.join(np.round(rows / divisor + high).astype(np.int32))
    return Codes(codes, self.bits, self.groups, step, np.full_like(step, high))


@keras.saving.register_keras_serializable(package='pocketsize')
class ActivationQuantizer(Transform):
  """Affine quantizer of an activation over a running average of its range.

  The first batch that it sees sets the range, later training batches move it by 1 - momentum.

  Args:
    bits: 1 to 16.
    momentum: of the running average, in [0, 1).
    nonnegative: the input is never negative (it comes from a ReLU), so only its maximum is taken.
  """

  order = 20

  def __init__(self, bits=8, momentum=0.99, nonnegative=False, **kwargs):
    super().__init__(**kwargs)
    self.bits = bits
    self.momentum = momentum
    self.nonnegative = nonnegative

  def build(self, shape):
    self.low = self.add_weight(name='low', shape=(), initializer='zeros', trainable=False)
    self.high = self.add_weight(name='high', shape=(), initializer='zeros', trainable=False)
    self.built = True

  @property
  def has_range(self):
    """Whether it has seen data."""
    return float(self.high) > float(self.low)

  def range(self):
    """Returns (low, high), nudged: real zero is an integer code."""
    return nudged_range(float(self.low), float(self.high), self.bits)

  def measure(self, x):
    """Returns what `set_range` takes the mean of over batches: the extremes of x."""
    return float(keras.ops.min(x)), float(keras.ops.max(x))

  def set_range(self, low, high):
    """Sets the range, which always contains 0."""
    low = min(low, 0.0)
    self.low.assign(low)
    self.high.assign(max(high, 0.0, low + LEAST_WIDTH))

  def observe(self, x):
    """Moves the range toward that of batch x; returns the range to use for it."""
    x = tf.stop_gradient(x)
    unseen = tf.equal(self.low.value, self.high.value)
    share = tf.where(unseen, 1.0, 1.0 - self.momentum)
    least = 0.0 if self.nonnegative else tf.minimum(tf.reduce_min(x), 0.0)
    most = tf.maximum(tf.maximum(tf.reduce_max(x), 0.0), least + LEAST_WIDTH)
    high = self.high + share * (most - self.high)
    self.high.assign(high)
    if self.nonnegative:
      return self.low.value, high
    low = self.low + share * (least - self.low)
    self.low.assign(low)
    return low, high

  def call(self, x, training=None):
    low, high = self.observe(x) if training else (self.low.value, self.high.value)
    return quantize_affine(x, low, high, self.bits)

  def get_config(self):
    return {
      **super().get_config(),
      'bits': self.bits,
      'momentum': self.momentum,
      'nonnegative': self.nonnegative,
    }
