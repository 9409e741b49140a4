"""Taylor importance of channels (Molchanov et al. 2019, arXiv:1906.10771).

What dropping a channel does to the loss is, to first order, the sum of gradient * weight over the
weights that become zero; its square is the importance, averaged over batches. The sum is taken over
each layer (kernel and bias of a convolution, factor and shift of a normalization); a channel that
several layers make or scale has the sum of its importances in them.

In training a batch norm takes away whatever size a kernel in front of it has, so that the kernel's
sum is zero and the batch norm's own, the gate of the paper, speaks for the channel.
"""

import numpy as np
import tensorflow as tf

from pocketsize.errors import UserError


def contributions(gradient, weight, axis):
  """Returns the [channels] sums of gradient * weight over all axes but `axis`, negative."""
  product = tf.cast(gradient * weight, tf.float32)
  rank = len(product.shape)
  return tf.reduce_sum(product, [other for other in range(rank) if other != rank + axis])


def is_observed(part):
  """Returns whether a `Slice` counts: it makes or scales channels, and has a gradient."""
  return part.role in ('out', 'shift') and part.weight != 'moving_mean'


class LayerSums:
  """Sums over the slices of each layer, as vectors with a place for each layer's channels.

  Args:
    channels: a `ChannelGraph`.
    parts: list of its `Slice`s; one that comes twice counts twice.
  """

  def __init__(self, channels, parts):
    self._sizes = {group.name: group.size for group in channels.groups}
    self._offsets, self._size, self.indices = {}, 0, []
    for part in parts:
      index = np.full(len(part.ids), -1)
      for name, places in channels.places(part.ids).items():
        if (id(part.layer), name) not in self._offsets:
          self._offsets[id(part.layer), name] = self._size
          self._size += self._sizes[name]
        known = places >= 0
        index[known] = self._offsets[id(part.layer), name] + places[known]
      self.indices.append(index)

  def squares(self, sums):
    """Returns the [places] squares of what the `sums`, a [channels] tensor a slice, amount to."""
    # Negative numbers, of channels that cannot be dropped, are left out.
    places = np.concatenate(self.indices)
    return tf.square(tf.math.unsorted_segment_sum(tf.concat(sums, 0), places, self._size))

  def at_slices(self, values):
    """Returns for each slice what a [places] tensor has for its channels; 0 for other channels."""
    return [
      tf.where(index >= 0, tf.gather(values, np.maximum(index, 0)), 0.0) for index in self.indices
    ]

  def from_slices(self, values):
    """Returns the [places] array of which `at_slices` made `values`."""
    found = np.zeros(self._size)
    for index, each in zip(self.indices, values, strict=True):
      found[index[index >= 0]] = np.asarray(each)[index >= 0]
    return found

  def scores(self, values):
    """Returns {group name: [channels]} sums over the layers of a [places] array."""
    totals = {name: np.zeros(size) for name, size in self._sizes.items()}
    for (_, name), offset in self._offsets.items():
      totals[name] += values[offset : offset + self._sizes[name]]
    return totals


def taylor_scores(model, channels, batches, loss):
  """Returns {group name: [channels] importances}, what `filters.choose` takes as scores.

  The model is computed as in inference and nothing of it changes, so kernels count as well as the
  normalizations behind them.

  Args:
    model: the model of `channels`, or an `Instrumented` of it.
    channels: a `ChannelGraph`.
    batches: iterable of (x, y); a handful of training batches.
    loss: `loss(y, outputs)`, a tensor of which the mean is taken.

  Raises:
    UserError: there is no batch.
  """
  parts = [part for part in channels.slices if is_observed(part)]
  weights = [getattr(part.layer, part.weight).value for part in parts]
  layer_sums = LayerSums(channels, parts)
  squares = []
  for x, y in batches:
    with tf.GradientTape() as tape:
      tape.watch(weights)
      value = tf.reduce_mean(loss(y, model(x, training=False)))
    gradients = tape.gradient(value, weights, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    sums = [
      contributions(gradient, weight, part.axis)
      for gradient, weight, part in zip(gradients, weights, parts, strict=True)
    ]
    squares.append(layer_sums.squares(sums).numpy())
  if not squares:
    raise UserError('Taylor scores need data: `batches` must give at least one. Received none.')
  return layer_sums.scores(np.mean(squares, axis=0, dtype=np.float64))
