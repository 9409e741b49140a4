"""DoReFa quantizers of kernels and activations (Zhou et al. 2016, arXiv:1606.06160)."""

import keras
import numpy as np
import tensorflow as tf

from pocketsize import ste
from pocketsize.quantization.kernel_quantizer import KernelQuantizer
from pocketsize.quantization.quantizers import nudged_range, quantize_affine
from pocketsize.quantization.range_quantizer import RangeQuantizer
from pocketsize.transform import Codes, Grid


@keras.saving.register_keras_serializable(package='pocketsize')
class Dorefa(KernelQuantizer):
  """Weights through tanh onto 2^bits levels of which zero is none (equations 9 and 10).

  With t = tanh(w) / max |tanh(w)| over the row and n = 2^bits - 1

    q(w) = m (2 i / n - 1),  i = round(n (t / 2 + 1 / 2))

  The gradient is that of m t, with the maximum as a constant.

  Deviation: m is the largest magnitude of the row when `fit` was called last; it is 1 in the paper,
  which trains from random weights. A float model hence begins with weights of their own size.

  The levels are odd multiples of m / n: a grid of bits + 1 bits, for up to 7 bits. Weights of
  exactly 0, such as pruned ones, are no level but stay 0.
  """

  without_grid = 'on levels that no format has'

  def build_rows(self):
    shape = self.groups.broadcast or (self.groups.count, 1)
    # From one level to the next: 2 m / n.
    self.scale = self.add_weight(name='scale', shape=shape, initializer='zeros', trainable=False)

  @property
  def _highest(self):
    return 2.0**self.bits - 1.0

  def fit(self, kernel):
    found = self.groups.fit(kernel, lambda rows: 2.0 * np.abs(rows).max(axis=1) / self._highest)
    self.scale.assign(found.reshape(self.scale.shape))

  def _quantize(self, values):
    bounded = tf.tanh(values)
    axes = [axis for axis, size in enumerate(self.scale.shape) if size == 1]
    # Without stop_gradient the largest weight of a row would get the gradients of all the others.
    largest = tf.stop_gradient(tf.reduce_max(tf.abs(bounded), axis=axes, keepdims=True))
    bounded = tf.math.divide_no_nan(bounded, largest) / 2.0
    codes = tf.round(self._highest * (tf.stop_gradient(bounded) + 0.5))
    levels = tf.where(tf.equal(values, 0.0), 0.0, (codes - self._highest / 2.0) * self.scale)
    return ste.replace(bounded * self._highest * self.scale, levels)

  def call(self, kernel, training=None):
    return self.by_rows(tf.convert_to_tensor(kernel), self._quantize)

  def grid(self, kernel):
    if self.groups.broadcast is None or self.bits > 7:
      return None
    return Grid(keras.ops.convert_to_numpy(self.scale) / np.float32(2.0), self.bits + 1)

  def codes(self, kernel):
    scale = self.per_row(self.scale)
    rows = self.groups.split(np.asarray(kernel, np.float64))
    divisor = np.where(scale > 0.0, scale, 1.0)[:, None]
    # A row of zeros lies between two codes; either stands for it.
    codes = np.clip(np.round(rows / divisor + self._highest / 2.0), 0, self._highest)
    zero_point = np.full_like(scale, self._highest / 2.0)
    return Codes(
      self.groups.join(codes.astype(np.int32)), self.bits, self.groups, scale, zero_point
    )


@keras.saving.register_keras_serializable(package='pocketsize')
class DorefaActivation(RangeQuantizer):
  """Clips what is never negative at 1 and rounds it to 2^bits levels (section 2.3).

  The range is no variable: no data set it, no gradient moves it. The gradient is 1 inside it, else
  0. What a model needs above 1 it must learn to do without.

  Args:
    bits: 1 to 16.
  """

  has_range = True

  def __init__(self, bits=8, **kwargs):
    super().__init__(bits, nonnegative=True, **kwargs)

  def range(self):
    return nudged_range(0.0, 1.0, self.bits)

  def set_range(self, low, high):
    """The range stays [0, 1]."""

  def observe(self, x):
    """The range stays [0, 1]."""

  def call(self, x, training=None):
    return quantize_affine(x, tf.constant(0.0), tf.constant(1.0), self.bits)

  def get_config(self):
    config = super().get_config()
    del config['nonnegative'], config['start']
    return config
