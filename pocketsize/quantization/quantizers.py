"""Uniform quantizers of weights and activations, and the arithmetic they stand on.

Weights: symmetric, narrow range (Jacob et al. 2018, arXiv:1712.05877, section 3.1). Activations:
affine with an integer zero point, ranges as running averages (section 3).
"""

import abc

import keras
import numpy as np
import tensorflow as tf

from pocketsize import ste
from pocketsize.quantization import ranges
from pocketsize.quantization.kernel_quantizer import KernelQuantizer
from pocketsize.quantization.range_quantizer import LEAST_WIDTH, RangeQuantizer
from pocketsize.quantization.row_ranges import SHARES, affine_grid
from pocketsize.transform import Codes, Grid

BITS = range(1, 17)
# Up to this many bits a kernel's range is searched for the least squared error: with few levels,
# cutting the tails costs less than a coarse step. Above it the range is the largest magnitude.
SEARCH_BITS = 4


def highest_code(bits):
  """Returns the largest code of a symmetric quantizer: 127 for 8 bits; 1 for 2 and for 1."""
  return max(2 ** (bits - 1) - 1, 1)


def quantize_symmetric(x, scale, bits):
  """Returns x on the grid: round(clip(x / scale, -h, h)) * scale with h = 2^(bits-1) - 1.

  One bit is the sign, +scale above 0 and -scale below (Rastegari et al. 2016); exact zeros, such as
  pruned weights, stay. A scale of 0 gives 0.

  Args:
    x: float tensor or array.
    scale: broadcasts against x, not negative.
    bits: 1 to 16.
  """
  if bits == 1:
    return tf.sign(x) * scale
  high = highest_code(bits)
  return tf.clip_by_value(tf.round(tf.math.divide_no_nan(x, scale)), -high, high) * scale


def weight_scale(groups, bits, start=ranges.AUTO):
  """Returns the scale of each group of weights.

  One bit: the mean magnitude of the weights that are not 0, which minimizes the squared error
    (Rastegari et al. 2016, equation 6), whatever `start` is.
  Up to 4 bits, and with 'mse': the range, 0.3 to 1.0 of the largest magnitude, with the least
    squared error.
  Else: the larger end of the range that `start` finds over the highest code; with 'auto' that is
    the largest magnitude.

  Args:
    groups: [groups, weights] float array.
    bits: 1 to 16.
    start: one of `ranges.NAMES`.

  Returns:
    [groups] float32 array.
  """
  groups = np.asarray(groups, np.float64)
  magnitude = np.abs(groups)
  if bits == 1:
    count = np.count_nonzero(magnitude, axis=1)
    return (magnitude.sum(axis=1) / np.maximum(count, 1)).astype(np.float32)
  high = highest_code(bits)
  if start == 'mse' or (start == ranges.AUTO and bits <= SEARCH_BITS):
    return _searched_scale(magnitude, high)
  ends = ranges.initialiser(start, bits, symmetric=True).of_rows(groups)
  return (np.maximum(-ends[0], ends[1]) / high).astype(np.float32)


def _searched_scale(magnitude, high):
  """Returns the [groups] scales with the least squared error of magnitudes, [groups, weights]."""
  full = magnitude.max(axis=1) / high
  best, least = full, np.full(len(full), np.inf)
  for share in SHARES:
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
  scale, zero_point = affine_grid(low, high, bits)
  return float(-zero_point * scale), float((np.float32(2**bits - 1) - zero_point) * scale)


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


class SymmetricQuantizer(KernelQuantizer):
  """A quantizer of a kernel on levels that are whole multiples of a scale, see `WeightQuantizer`.

  Args:
    start: how the scale is found in the kernel, one of `ranges.NAMES`.
    others: as for `KernelQuantizer`.
  """

  def __init__(self, *args, start=ranges.AUTO, **kwargs):
    super().__init__(*args, **kwargs)
    self.start = start

  @abc.abstractmethod
  def scales(self):
    """Returns the rows' scales, a tensor that broadcasts against the kernel, or [buckets, 1]."""

  def fitted_scales(self, kernel):
    """Returns the scales that fit `kernel`, an array of the shape of `scales`."""
    found = self.groups.fit(kernel, lambda rows: weight_scale(rows, self.bits, self.start))
    return found.reshape(self.groups.broadcast or (self.groups.count, 1))

  def grid(self, kernel):
    if self.groups.broadcast is None:
      return None
    return Grid(keras.ops.convert_to_numpy(self.scales()), self.bits)

  def codes(self, kernel):
    scale = self.per_row(self.scales())
    high = 0.5 if self.bits == 1 else highest_code(self.bits)
    step = 2.0 * scale if self.bits == 1 else scale
    rows = self.groups.split(np.asarray(kernel, np.float64))
    divisor = np.where(step > 0.0, step, 1.0)[:, None]
    codes = self.groups.join(np.round(rows / divisor + high).astype(np.int32))
    return Codes(codes, self.bits, self.groups, step, np.full_like(step, high))

  def get_config(self):
    return {**super().get_config(), 'start': self.start}


@keras.saving.register_keras_serializable(package='pocketsize')
class WeightQuantizer(SymmetricQuantizer):
  """Symmetric quantizer of a kernel; straight-through gradient.

  The scale is set from the kernel by `fit` (see `weight_scale`): between two fits the grid stands
  still and a training step pays for one rounding only.
  """

  def build_rows(self):
    shape = self.groups.broadcast or (self.groups.count, 1)
    self.scale = self.add_weight(name='scale', shape=shape, initializer='zeros', trainable=False)

  def fit(self, kernel):
    self.scale.assign(self.fitted_scales(kernel))

  def scales(self):
    return self.scale.value

  def call(self, kernel, training=None):
    return ste.replace(
      kernel,
      self.by_rows(kernel, lambda values: quantize_symmetric(values, self.scale, self.bits)),
    )


@keras.saving.register_keras_serializable(package='pocketsize')
class ActivationQuantizer(RangeQuantizer):
  """Affine quantizer of an activation over a running average of its range.

  The first batch that it sees sets the range, later training batches move it by 1 - momentum.

  Args:
    bits: 1 to 16.
    momentum: of the running average, in [0, 1).
    nonnegative, start: as for `RangeQuantizer`.
  """

  def __init__(self, bits=8, momentum=0.99, nonnegative=False, start=ranges.AUTO, **kwargs):
    super().__init__(bits, nonnegative, start, **kwargs)
    self.momentum = momentum

  def build(self, shape):
    self.low = self.add_weight(name='low', shape=(), initializer='zeros', trainable=False)
    self.high = self.add_weight(name='high', shape=(), initializer='zeros', trainable=False)
    self.built = True

  @property
  def has_range(self):
    return float(self.high) > float(self.low)

  def range(self):
    return nudged_range(float(self.low), float(self.high), self.bits)

  def set_range(self, low, high):
    low = 0.0 if self.nonnegative else low
    self.low.assign(low)
    self.high.assign(max(high, low + LEAST_WIDTH))

  def observe(self, x):
    x = tf.stop_gradient(x)
    unseen = tf.equal(self.low.value, self.high.value)
    share = tf.where(unseen, 1.0, 1.0 - self.momentum)
    least, most = self.ends(x)
    high = self.high + share * (most - self.high)
    self.high.assign(high)
    if not self.nonnegative:
      self.low.assign(self.low + share * (least - self.low))

  def call(self, x, training=None):
    if training:
      self.observe(x)
    return quantize_affine(x, self.low.value, self.high.value, self.bits)

  def get_config(self):
    return {**super().get_config(), 'momentum': self.momentum}
