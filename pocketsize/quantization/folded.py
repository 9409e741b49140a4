"""Kernels quantized as they are with batch norm folded in (Krishnamoorthi 2018, arXiv:1806.08342).

Section 3.2.2, with correction: what is put on levels is the kernel times gamma / sqrt(moving
variance + epsilon); batch norm itself goes on with the statistics of its batch. The paper folds,
convolves and corrects the output; here the levels are divided by the factor again before the layer
computes with them, which is the same and needs no second convolution.
"""

import keras
import numpy as np
import tensorflow as tf

from pocketsize import folding, targets
from pocketsize.quantization.groups import Groups
from pocketsize.quantization.kernel_quantizer import KernelQuantizer
from pocketsize.transform import Grid, Placement

# A channel that its batch norm makes smaller than this is erased: its own size counts.
LEAST_FACTOR = 1e-15


@tf.custom_gradient
def gradient_times(x, factor):
  """Returns x; its gradient is multiplied by `factor`, which broadcasts against it."""
  return tf.identity(x), lambda upstream: (upstream * factor, None)


@keras.saving.register_keras_serializable(package='pocketsize')
class FoldedQuantizer(KernelQuantizer):
  """Returns quantizer(kernel * f) / f, with a factor f for each output channel.

  The factor is a constant to the gradient. In its derivative the kernel cancels out, and what is
  left is the rounding error: noise for gamma, which learns through the batch norm itself.

  Scales that are trained are those of kernel * f, so their gradient is in other units than without
  folding: it is multiplied by the mean of f^2 over the weights of a row, and a step then changes a
  scale as much, relative to its size, as it would there.

  Args:
    quantizer: the `KernelQuantizer`.

  Attributes:
    factor: weight that broadcasts against the kernel; all ones until `set_factor`.
  """

  def __init__(self, quantizer, **kwargs):
    super().__init__(
      quantizer.bits, quantizer.granularity, quantizer.channel_axes, quantizer.bucket_size, **kwargs
    )
    self.quantizer = quantizer

  def build_rows(self):
    if not self.quantizer.built:
      self.quantizer.build(self.groups.shape)
    shape = Groups(self.groups.shape, 'channel', self.channel_axes).broadcast
    self.factor = self.add_weight(name='factor', shape=shape, initializer='ones', trainable=False)

  @property
  def without_grid(self):
    return self.quantizer.without_grid

  @property
  def refits(self):
    return self.quantizer.refits

  @property
  def is_fitted(self):
    return self.quantizer.is_fitted

  def set_factor(self, factor):
    """Sets the factors of the output channels, a [channels] array or tensor.

    A factor of 0, of a channel that batch norm erases, counts as 1: whatever the kernel is there,
    nothing comes of it, and it must be able to come back.
    """
    factor = tf.cast(factor, tf.float32)
    factor = tf.where(tf.abs(factor) < LEAST_FACTOR, tf.ones_like(factor), factor)
    self.factor.assign(tf.reshape(factor, self.factor.shape))

  def fit(self, kernel):
    self.quantizer.fit(np.asarray(kernel) * keras.ops.convert_to_numpy(self.factor))

  def call(self, kernel, training=None):
    kernel, factor = tf.convert_to_tensor(kernel), tf.convert_to_tensor(self.factor)
    if self.refits:
      return self.quantizer(kernel * factor) / factor
    size = self._mean_square(factor)
    quantized = self.quantizer(gradient_times(kernel, 1.0 / size) * factor)
    return gradient_times(quantized / factor, size)

  def _mean_square(self, factor):
    """Returns the mean of the squared factors over each row, a tensor of the kernel's shape."""
    squares = self.groups.split(tf.broadcast_to(tf.square(factor), self.groups.shape))
    present = self.groups.split(tf.ones(self.groups.shape))
    total, count = (tf.reduce_sum(each, axis=1, keepdims=True) for each in (squares, present))
    return self.groups.join(tf.broadcast_to(total / count, squares.shape))

  def grid(self, kernel):
    factor = keras.ops.convert_to_numpy(self.factor).astype(np.float64)
    grid = self.quantizer.grid(kernel * factor)
    # What is read is positive: where the factor is negative, the codes have the other sign.
    return grid and Grid(grid.scale / np.abs(factor), grid.bits)

  def codes(self, kernel):
    factor = keras.ops.convert_to_numpy(self.factor)
    codes = self.quantizer.codes(np.asarray(kernel, np.float64) * factor)
    return codes._replace(factor=factor)

  def get_config(self):
    # The quantizer says what `KernelQuantizer` would.
    config = super(KernelQuantizer, self).get_config()
    return {**config, 'quantizer': keras.saving.serialize_keras_object(self.quantizer)}

  @classmethod
  def from_config(cls, config):
    quantizer = keras.saving.deserialize_keras_object(config['quantizer'])
    return cls(**{**config, 'quantizer': quantizer})


def folded(placements, graph, wanted):
  """Returns `placements` with a `FoldedQuantizer` where a batch norm follows a kernel.

  Args:
    placements: of quantizers, and of what goes before them.
    graph: `Graph` of the model.
    wanted: wanted(path) says whether the kernel of a layer is quantized folded.
  """
  followers = folding.followers(graph)

  def is_folded(path, point, transform):
    # What keeps zeros stands at a kernel too.
    if path not in followers or not wanted(path) or not isinstance(transform, KernelQuantizer):
      return False
    return point == targets.weight_points(graph.layers[path])[-1]

  return [
    Placement(path, point, FoldedQuantizer(transform))
    if is_folded(path, point, transform)
    else placement
    for placement in placements
    for path, point, transform in [placement]
  ]


class Factors:
  """Keeps the factors of the folded quantizers of an `Instrumented` model up with its batch norms.

  Args:
    model: `Instrumented`.
  """

  def __init__(self, model):
    self._model = model
    followers = folding.followers(model.graph)
    self._pairs = [
      (transform, followers[path])
      for path, _, transform in model.placements
      if isinstance(transform, FoldedQuantizer)
    ]
    # Because it is called before every step.
    self._compiled = tf.function(self._update, autograph=False)

  def update(self):
    """Sets all factors from the batch norms as deployed."""
    if self._pairs:
      self._compiled()

  def _update(self):
    for quantizer, path in self._pairs:
      layer = self._model.graph.layers[path]
      variance = self._deployed(path, 'moving_variance')
      gamma = self._deployed(path, 'gamma') if layer.scale else None
      quantizer.set_factor(folding.batch_norm_factor(variance, layer.epsilon, gamma))

  def _deployed(self, path, point):
    return tf.cast(self._model.transformed(path, point), tf.float64)
