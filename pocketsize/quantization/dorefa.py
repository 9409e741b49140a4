"""DoReFa quantizer of kernels (Zhou et al. 2016, arXiv:1606.06160, equations 9 and 10)."""

import keras
import numpy as np
import tensorflow as tf

from pocketsize import ste
from pocketsize.quantization.kernel_quantizer import KernelQuantizer
from pocketsize.transform import Codes, Grid


@keras.saving.register_keras_serializable(package='pocketsize')
class Dorefa(KernelQuantizer):
  """Weights through tanh onto 2^bits levels of which zero is none.

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
