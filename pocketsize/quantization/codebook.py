"""Kernels of shared, trained values (Han et al. 2016, Deep Compression, arXiv:1510.00149)."""

import keras
import numpy as np
import tensorflow as tf

from pocketsize.quantization import centre_grid
from pocketsize.quantization import centres as centres_
from pocketsize.quantization.kernel_quantizer import KernelQuantizer
from pocketsize.transform import Codes, Grid

BITS = range(1, 9)


@tf.custom_gradient
def nearest(rows, present, centres):
  """Returns the nearest centre of each weight; of two as near, the lower one.

  A binary search among the middles of the sorted centres: no tensor is larger than the kernel, and
  centres that cross while they train are told apart again.

  The gradient g goes to the weights unchanged, and to centre k as the mean over its n_k weights:

    dL / dc_k = 1 / n_k * sum over the weights of k of g

  Deviation: the paper has the sum (equation 3). A centre moves n_k weights at once, and the loss
  curves n_k times as much along it as along one weight: with the sum, a learning rate that suits
  the weights is n_k times too large for it, with n_k in the thousands and different in each layer.
  With the mean one rate suits both. It is also what happens to a centre that is the mean of its
  weights: while they stay nearest to it, a step of SGD moves it as it moves their mean. (1 /
  sqrt(n_k), as of Esser et al. 2020 for steps, would still be too large by sqrt(n_k).)

  Args:
    rows: [rows, weights] tensor.
    present: of that shape, 1, or 0 for what is no weight and only fills up a row.
    centres: [rows, levels] tensor, in any order.
  """
  order = tf.argsort(centres, axis=1, stable=True)
  ascending = tf.gather(centres, order, axis=1, batch_dims=1)
  middles = (ascending[:, 1:] + ascending[:, :-1]) * 0.5
  places = tf.searchsorted(middles, rows, side='left')
  chosen = tf.gather(order, places, axis=1, batch_dims=1)

  def gradient(upstream):
    count, levels = centres.shape
    segments = tf.reshape(chosen + levels * tf.range(count)[:, None], [-1])

    def total(values):
      return tf.math.unsorted_segment_sum(tf.reshape(values, [-1]), segments, count * levels)

    mean = total(upstream) / tf.maximum(total(present), 1.0)
    return upstream, None, tf.reshape(mean, [count, levels])

  return tf.gather(centres, chosen, axis=1, batch_dims=1), gradient


@keras.saving.register_keras_serializable(package='pocketsize')
class Codebook(KernelQuantizer):
  """Maps each weight to the nearest of the centres of its row; straight-through gradient.

  A row has 2 ** bits centres; as many as weights, but two at least, where it has fewer weights.

  Args:
    bits: 1 to 8.
    granularity, channel_axes, bucket_size: as of `KernelQuantizer`.
    start: where `fit` puts the centres: 'quantile', 'uniform' or 'kmeans' (see `centres`).
    trains: whether the centres are trained by gradient.
    keep_zeros: in a row that has weights of exactly 0, such as pruned ones, the centre nearest to 0
      is exactly 0 and stays there.
    centre_bits: 8 for centres that the kernel is mapped to as the nearest of an int8 grid of their
      row (see `centre_grid`), so that files hold them exactly, or 32 for float centres. Buckets
      have float centres: no format has their grid.
  """

  without_grid = 'of float centres, which no format has'

  def __init__(
    self,
    bits=4,
    granularity='tensor',
    channel_axes=(-1,),
    bucket_size=256,
    start='kmeans',
    trains=True,
    keep_zeros=True,
    centre_bits=32,
    **kwargs,
  ):
    super().__init__(bits, granularity, channel_axes, bucket_size, **kwargs)
    self.start = start
    self.trains = trains
    self.keep_zeros = keep_zeros
    self.centre_bits = centre_bits

  def build_rows(self):
    levels = max(min(2**self.bits, self.groups.members, self.groups.size), 2)
    self.centres = self.add_weight(
      name='centres',
      shape=(self.groups.count, levels),
      initializer='zeros',
      trainable=self.trains,
    )

  def fit(self, kernel):
    start = centres_.STARTS[self.start]
    self._set(kernel, lambda rows, centres: start(rows, centres.shape[1]))

  def follow(self, kernel):
    """Moves the centres to the means of the weights of `kernel` that are nearest to them."""
    self._set(kernel, centres_.follow)

  def _set(self, kernel, find):
    kernel = np.asarray(kernel, np.float32)
    present = self.groups.split(np.ones_like(kernel))
    rows = np.where(present > 0.0, self.groups.split(kernel), np.nan)
    centres = keras.ops.convert_to_numpy(self.centres)
    found = centres_.beside_zero(rows, centres, find) if self.keep_zeros else find(rows, centres)
    self.centres.assign(found)

  def deployed_centres(self, kernel):
    """Returns the centres that `kernel` is mapped to, [rows, levels], with 0 where it must be.

    Args:
      kernel: tensor.
    """
    centres = tf.convert_to_tensor(self.centres)
    # The grid does not depend on the kernel: it is the same for the weights and as deployed.
    deployed = centre_grid.on_grid(centres) if self._has_grid else centres
    if not self.keep_zeros:
      return deployed
    zeros = self.groups.split(tf.cast(tf.equal(kernel, 0.0), centres.dtype))
    sparse = tf.reduce_any(zeros > 0.0, axis=1, keepdims=True)
    least = tf.one_hot(tf.argmin(tf.abs(centres), axis=1), centres.shape[1], True, False)
    return tf.where(sparse & least, 0.0, deployed)

  def call(self, kernel, training=None):
    kernel = tf.convert_to_tensor(kernel)
    present = self.groups.split(tf.ones_like(kernel))
    rows = nearest(self.groups.split(kernel), present, self.deployed_centres(kernel))
    return self.groups.join(rows)

  @property
  def _has_grid(self):
    return self.centre_bits == 8 and self.groups.broadcast is not None

  def grid(self, kernel):
    if not self._has_grid:
      return None
    _, scales = centre_grid.codes_and_scales(tf.convert_to_tensor(self.centres))
    return Grid(scales.numpy().reshape(self.groups.broadcast), self.centre_bits)

  def codes(self, kernel):
    kernel = np.asarray(kernel, np.float32)
    centres = keras.ops.convert_to_numpy(self.deployed_centres(tf.constant(kernel)))
    centres = np.sort(centres, axis=1)
    # In double precision the middle of two neighbouring float32 numbers is neither of them.
    middles = 0.5 * (centres[:, 1:].astype(np.float64) + centres[:, :-1])
    codes = tf.searchsorted(middles, self.groups.split(kernel.astype(np.float64)), side='left')
    return Codes(self.groups.join(codes.numpy()), self.bits, self.groups, centres=centres)

  def get_config(self):
    return {
      **super().get_config(),
      'start': self.start,
      'trains': self.trains,
      'keep_zeros': self.keep_zeros,
      'centre_bits': self.centre_bits,
    }
