"""What all quantizers of activations have in common: bits, and a range to start and to deploy."""

import abc

import tensorflow as tf

from pocketsize.quantization import ranges
from pocketsize.quantization.calibrated import Calibrated

# The least width of a range: where data are all zero there is a range nevertheless.
LEAST_WIDTH = 1e-6


class RangeQuantizer(Calibrated):
  """Maps an activation to 2^bits levels at equal steps, of which real zero is one.

  The range is unset at first. Calibration sets it (`set_range`), or the first training batch.

  Args:
    bits: 1 to 16.
    nonnegative: the input is never negative, as behind a ReLU, so its range begins at 0.
    start: how calibration finds the range, one of `ranges.NAMES`.

  Attributes:
    symmetric: whether a range with two ends is symmetric around 0.
  """

  symmetric = False
  is_shareable = True

  def __init__(self, bits=8, nonnegative=False, start=ranges.AUTO, **kwargs):
    super().__init__(**kwargs)
    self.bits = bits
    self.nonnegative = nonnegative
    self.start = start

  def initialiser(self):
    return ranges.initialiser(self.start, self.bits, self.symmetric)

  @abc.abstractmethod
  def range(self):
    """Returns (low, high), nudged: real zero is an integer code."""

  @abc.abstractmethod
  def set_range(self, low, high):
    """Sets the range from floats, low <= 0 <= high, which may both be 0."""

  @abc.abstractmethod
  def observe(self, x):
    """Takes a training batch, a tensor, into account before it is quantized."""

  def ends(self, x):
    """Returns the (low, high) of a batch, tensors, low <= 0 < high."""
    low = tf.constant(0.0) if self.nonnegative else tf.minimum(tf.reduce_min(x), 0.0)
    return low, tf.maximum(tf.maximum(tf.reduce_max(x), 0.0), low + LEAST_WIDTH)

  def get_config(self):
    return {
      **super().get_config(),
      'bits': self.bits,
      'nonnegative': self.nonnegative,
      'start': self.start,
    }
