"""Quantizer of kernels with an integer zero point (Jacob et al. 2018, arXiv:1712.05877, eq. 1)."""

import keras
import numpy as np
import tensorflow as tf

from pocketsize import ste
from pocketsize.quantization import ranges
from pocketsize.quantization.kernel_quantizer import KernelQuantizer
from pocketsize.quantization.quantizers import SEARCH_BITS
from pocketsize.quantization.row_ranges import affine_grid
from pocketsize.transform import Codes, Grid


@keras.saving.register_keras_serializable(package='pocketsize')
class AsymmetricWeightQuantizer(KernelQuantizer):
  """Values (code - zero point) * scale with codes from 0 to 2^bits - 1; straight-through gradient.

  Zero is a value. The range of a row is found by `fit`. Codes less the zero point are a grid
  of bits + 1 bits, for up to 7 bits; for 8 bits files hold int8 by output channel.

  Args:
    start: how the range is found in the kernel, one of `ranges.NAMES`; 'auto' is the least squared
      error up to 4 bits, else the extremes.
    others: as for `KernelQuantizer`.
  """

  without_grid = 'with zero points that no format has'

  def __init__(self, *args, start=ranges.AUTO, **kwargs):
    super().__init__(*args, **kwargs)
    self.start = start

  def build_rows(self):
    shape = self.groups.broadcast or (self.groups.count, 1)
    self.scale = self.add_weight(name='scale', shape=shape, initializer='zeros', trainable=False)
    self.zero_point = self.add_weight(
      name='zero_point', shape=shape, initializer='zeros', trainable=False
    )

  def fit(self, kernel):
    searched = self.start == ranges.AUTO and self.bits <= SEARCH_BITS
    initialiser = ranges.initialiser('mse' if searched else self.start, self.bits)

    def grids(rows):
      return np.stack(affine_grid(*initialiser.of_rows(rows), self.bits), axis=1)

    scale, zero_point = self.groups.fit(kernel, grids).T
    self.scale.assign(scale.reshape(self.scale.shape))
    self.zero_point.assign(zero_point.reshape(self.scale.shape))

  def _quantize(self, values):
    codes = tf.round(tf.math.divide_no_nan(values, self.scale)) + self.zero_point
    codes = tf.clip_by_value(codes, 0.0, 2.0**self.bits - 1.0)
    return (codes - self.zero_point) * self.scale

  def call(self, kernel, training=None):
    return ste.replace(kernel, self.by_rows(kernel, self._quantize))

  def grid(self, kernel):
    if self.groups.broadcast is None or self.bits > 7:
      return None
    return Grid(keras.ops.convert_to_numpy(self.scale), self.bits + 1)

  def codes(self, kernel):
    scale, zero_point = self.per_row(self.scale), self.per_row(self.zero_point)
    rows = self.groups.split(np.asarray(kernel, np.float64))
    divisor = np.where(scale > 0.0, scale, 1.0)[:, None]
    codes = self.groups.join(np.round(rows / divisor + zero_point[:, None]).astype(np.int32))
    return Codes(codes, self.bits, self.groups, scale, zero_point)

  def get_config(self):
    return {**super().get_config(), 'start': self.start}
