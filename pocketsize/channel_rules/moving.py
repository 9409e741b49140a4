"""What moves, repeats, pads or pools values: the axis of the channels may move with them."""

import keras
import numpy as np

from pocketsize.channel_rules.base import (
  MIXES,
  Dropped,
  Frozen,
  at_channel_axis,
  channel_axis,
  need_zero,
  rank_of,
  rule,
)

# Stands for an unknown size of an axis while channels' places are moved.
_UNKNOWN = 8


@rule(
  'AveragePooling1D',
  'AveragePooling2D',
  'AveragePooling3D',
  'MaxPooling1D',
  'MaxPooling2D',
  'MaxPooling3D',
)
def _pooling(channels, node, inputs):
  return at_channel_axis(channels, node, inputs[0])


@rule(
  'GlobalAveragePooling1D',
  'GlobalAveragePooling2D',
  'GlobalAveragePooling3D',
  'GlobalMaxPooling1D',
  'GlobalMaxPooling2D',
  'GlobalMaxPooling3D',
)
def _global_pooling(channels, node, inputs):
  labels = at_channel_axis(channels, node, inputs[0])
  rank = len(channels.graph.shape(node.outputs[0]))
  return labels._replace(axis=channel_axis(node.operation, rank))


@rule('Mean', 'Max', 'Min', 'Sum')
def _reduction(channels, node, inputs):
  """A mean, maximum or sum over axes without channels."""
  labels, rank, axes = inputs[0], rank_of(channels, node), node.operation.axis
  axes = range(rank) if axes is None else np.atleast_1d(axes) % rank
  if labels.axis in axes:
    raise Frozen(MIXES)
  shape = channels.graph.shape(node.inputs[0])
  if type(node.operation).__name__ == 'Sum' and any(shape[axis] is None for axis in axes):
    need_zero(channels, labels, 'has an unknown number of summands')
  gone = 0 if node.operation.keepdims else sum(axis < labels.axis for axis in axes)
  return labels._replace(axis=labels.axis - gone)


@rule('UpSampling1D', 'UpSampling2D', 'UpSampling3D')
def _upsampling(channels, node, inputs):
  return at_channel_axis(channels, node, inputs[0])


def _borders(layer, attribute, rank):
  """Returns (the pairs of a padding or cropping, the first axis that they are about)."""
  first = 1 if channel_axis(layer, rank) == rank - 1 else 2
  return np.reshape(getattr(layer, attribute), (-1, 2)).tolist(), first


def _change_borders(channels, node, attribute, pairs, place, counts):
  def arguments(kept):
    changed = [tuple(pair) for pair in pairs]
    changed[place] = counts(kept)
    return {attribute: tuple(changed) if len(changed) > 1 else changed[0]}

  channels.changes[node] = arguments


@rule('Cropping1D', 'Cropping2D', 'Cropping3D')
def _cropping(channels, node, inputs):
  """Crops spatial axes, one of which may be the channels' after a permutation."""
  labels, layer, rank = inputs[0], node.operation, rank_of(channels, node)
  if labels.axis == channel_axis(layer, rank):
    return labels
  pairs, first = _borders(layer, 'cropping', rank)
  before, after = pairs[labels.axis - first]
  stop = len(labels.ids) - after
  head, tail = labels.ids[:before], labels.ids[stop:]
  _change_borders(
    channels,
    node,
    'cropping',
    pairs,
    labels.axis - first,
    lambda kept: (kept(head), kept(tail)),
  )
  return labels._replace(ids=labels.ids[before:stop])


@rule('ZeroPadding1D', 'ZeroPadding2D', 'ZeroPadding3D')
def _padding(channels, node, inputs):
  """Zeros along spatial axes, one of which may be the channels' after a permutation."""
  labels, layer, rank = inputs[0], node.operation, rank_of(channels, node)
  pairs, first = _borders(layer, 'padding', rank)
  place = labels.axis - first
  inner = labels.axis != channel_axis(layer, rank)
  if any(sum(pair) for index, pair in enumerate(pairs) if not inner or index != place):
    need_zero(channels, labels, 'puts zeros around')
    labels = labels._replace(dropped=Dropped.ZERO)
  if not inner:
    return labels
  head, tail = channels.new(pairs[place][0]), channels.new(pairs[place][1])
  _change_borders(channels, node, 'padding', pairs, place, lambda kept: (kept(head), kept(tail)))
  return labels._replace(ids=np.concatenate([head, labels.ids, tail]))


@rule('Pad')
def _pad(channels, node, inputs):
  """`keras.ops.pad`."""
  labels, operation, rank = inputs[0], node.operation, rank_of(channels, node)
  widths = np.broadcast_to(np.reshape(operation.pad_width, (-1, 2)), (rank, 2)).tolist()
  if operation.mode != 'constant' or len(node.inputs) > 1 or any(node.arguments.args[1:]):
    raise Frozen('puts other values than zeros around')
  if any(sum(pair) for axis, pair in enumerate(widths) if axis != labels.axis):
    need_zero(channels, labels, 'puts zeros around')
    labels = labels._replace(dropped=Dropped.ZERO)
  head, tail = (channels.new(width) for width in widths[labels.axis])

  def arguments(kept):
    changed = [tuple(pair) for pair in widths]
    changed[labels.axis] = (kept(head), kept(tail))
    return {'pad_width': tuple(changed)}

  channels.changes[node] = arguments
  return labels._replace(ids=np.concatenate([head, labels.ids, tail]))


@rule(
  'Flatten',
  'Reshape',
  'Permute',
  'RepeatVector',
  'Transpose',
  'Squeeze',
  'ExpandDims',
  'GetItem',
  'Take',
)
def _reshaping(channels, node, inputs):
  """Runs the operation on the channels' places, and looks along which axis they lie after it."""
  labels = inputs[0]
  shape = [1, *(size or _UNKNOWN for size in channels.graph.shape(node.inputs[0])[1:])]
  view = [-1 if axis == labels.axis else 1 for axis in range(len(shape))]
  places = np.arange(len(labels.ids), dtype='float32').reshape(view)
  numbers = np.broadcast_to(places, shape)
  args, kwargs = node.arguments.fill_in({id(node.symbols[0]): keras.ops.convert_to_tensor(numbers)})
  moved = keras.ops.convert_to_numpy(node.operation(*args, **kwargs)).astype(int)
  for axis in range(1, moved.ndim):
    rows = np.moveaxis(moved, axis, -1).reshape(-1, moved.shape[axis])
    varies = len(set(rows[0])) > 1 or (len(labels.ids) == 1 and len(rows[0]) == 1)
    if (rows == rows[0]).all() and varies:
      _change_reshaping(channels, node, labels, axis, rows[0])
      return labels._replace(axis=axis, ids=labels.ids[rows[0]])
  raise Frozen('mixes channels with other axes')


def _change_reshaping(channels, node, labels, axis, places):
  operation, ids = node.operation, labels.ids[places]
  if isinstance(operation, keras.layers.Reshape) and operation.target_shape[axis - 1] != -1:
    channels.changes[node] = lambda kept: {
      'target_shape': _replaced(operation.target_shape, axis - 1, kept(ids))
    }
  elif type(operation).__name__ == 'Reshape' and operation.newshape[axis] != -1:
    channels.changes[node] = lambda kept: {
      'newshape': _replaced(operation.newshape, axis, kept(ids))
    }
  elif type(operation).__name__ == 'GetItem' and len(ids) != len(labels.ids):
    start, stop = places[0], places[-1] + 1
    if (places != np.arange(start, stop)).any():
      raise Frozen('takes channels that do not lie side by side')
    channels.changes[node] = lambda kept: {
      'axis': labels.axis,
      'start': kept(labels.ids[:start]),
      'stop': kept(labels.ids[:stop]),
    }

  elif type(operation).__name__ == 'Take' and _reads_axis(channels, node, labels.axis):
    channels.changes[node] = lambda kept: {
      'indices': [
        kept(labels.ids[:place]) for place in places if kept(labels.ids[place : place + 1])
      ]
    }


def _reads_axis(channels, node, axis):
  return node.operation.axis % rank_of(channels, node) == axis


def _replaced(values, index, value):
  return (*values[:index], value, *values[index + 1 :])
