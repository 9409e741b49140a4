"""What each type of layer does with channels: one rule a type.

A rule reads the `Labels` of the inputs and returns those of the output. On the way it makes, ties
and freezes channels, and says which weights and arguments shrink with them. Layers and operators of
the same class name share a rule. A rule that cannot say what happens raises `Frozen`: the channels
that touch the layer then stay as they are.
"""

import enum
from typing import NamedTuple

import keras
import numpy as np


class Dropped(enum.IntEnum):
  """What a dropped channel is at some place of the network."""

  ZERO = 0
  SHIFT = 1  # a constant that is zero if normalizations give up their shift
  CONSTANT = 2


class Labels(NamedTuple):
  """The channels of a tensor.

  Attributes:
    axis: where they lie, counted from the batch's 0.
    ids: [size of that axis] channels; along all other axes they are the same.
    dropped: what the dropped ones among them are.
  """

  axis: int
  ids: np.ndarray
  dropped: Dropped = Dropped.ZERO


class Frozen(Exception):
  """A rule's word that the channels around a layer must stay; its text says why."""


# Stands for an unknown size of an axis while channels' numbers are moved.
_UNKNOWN = 8
# They read more than one channel to compute one.
_MIXING_ACTIVATIONS = ('softmax', 'log_softmax', 'sparsemax', 'glu')
_MIXES = 'reads all channels to compute one'
_OTHER_AXIS = 'reads channels along another axis than its own'


def apply(channels, node, inputs):
  """Returns the `Labels` of a node's outputs.

  Args:
    channels: the `ChannelGraph` in the making.
    node: a `Node`.
    inputs: `Labels` of its inputs.
  """
  shapes = [channels.graph.shape(number) for number in node.outputs]
  if node.is_input:
    return [_fixed(channels, shape, 'they are an input of the model') for shape in shapes]
  name = type(node.operation).__name__
  try:
    if name not in RULES:
      raise Frozen('has no rule for channels')
    return [RULES[name](channels, node, inputs)]
  except Frozen as error:
    reason = f'layer {node.path!r} ({name}) {error}'
    for labels in inputs:
      channels.freeze(labels.ids, reason)
    return [_fixed(channels, shape, reason) for shape in shapes]


def _fixed(channels, shape, reason):
  size = shape[-1] if len(shape) > 1 and shape[-1] else 1
  return Labels(max(len(shape) - 1, 0), channels.new(size, reason))


def _rank(channels, node):
  return len(channels.graph.shape(node.inputs[0]))


def _channel_axis(layer, rank):
  return 1 if getattr(layer, 'data_format', 'channels_last') == 'channels_first' else rank - 1


def _at_channel_axis(channels, node, labels):
  if labels.axis != _channel_axis(node.operation, _rank(channels, node)):
    raise Frozen(_OTHER_AXIS)
  return labels


def _needs_zero(channels, labels, what):
  """Makes dropped channels zero where their constant cannot be taken up exactly."""
  if labels.dropped == Dropped.SHIFT:
    channels.zero(labels.ids)
  elif labels.dropped == Dropped.CONSTANT:
    raise Frozen(f'{what}, and a dropped channel is a constant there')


def _made(channels, node, count):
  """Returns (channels that a layer makes, what they are behind its activation)."""
  ids = channels.make(node, count)
  try:
    return ids, _through_activation(node.operation, Dropped.ZERO)
  except Frozen as error:
    channels.freeze(ids, f'layer {node.path!r} {error}')
    return ids, Dropped.ZERO


def _through_activation(layer, dropped):
  activation = getattr(layer, 'activation', None)
  if activation is None:
    return dropped
  name = getattr(activation, '__name__', '')
  if name in _MIXING_ACTIVATIONS or isinstance(activation, keras.layers.Softmax):
    raise Frozen(_MIXES)
  if getattr(activation, 'weights', None):
    raise Frozen('has an activation with weights of its own')
  return dropped if float(activation(keras.ops.zeros((1, 1)))[0, 0]) == 0.0 else Dropped.CONSTANT


# Layers with weights.


def _convolution(channels, node, inputs):
  layer, labels = node.operation, _at_channel_axis(channels, node, inputs[0])
  transposed, groups = 'Transpose' in type(layer).__name__, getattr(layer, 'groups', 1)
  whole = not transposed and groups == 1
  if whole and (layer.padding == 'valid' or max(layer.kernel_size) == 1):
    channels.folds[layer] = labels.ids
  else:
    _needs_zero(channels, labels, 'reads beyond the border')
  out, dropped = _made(channels, node, layer.filters)
  parts = np.split(labels.ids, groups)
  for part in parts[1:]:
    channels.tie(parts[0], part)
  if groups > 1:
    outs = np.split(out, groups)
    for part in outs[1:]:
      channels.tie(outs[0], part)
  channels.slice(layer, 'kernel', -1 if transposed else -2, parts[0], 'in')
  channels.slice(layer, 'kernel', -2 if transposed else -1, out, 'out')
  channels.slice(layer, 'bias', -1, out, 'out')
  channels.changes[layer] = lambda kept: {'filters': kept(out)}
  return Labels(labels.axis, out, dropped)


def _depthwise(channels, node, inputs):
  layer, labels = node.operation, _at_channel_axis(channels, node, inputs[0])
  out = np.repeat(labels.ids, layer.depth_multiplier)
  channels.slice(layer, 'kernel', -2, labels.ids, 'out')
  channels.slice(layer, 'bias', -1, out, 'out')
  return Labels(labels.axis, out, _through_activation(layer, Dropped.ZERO))


def _separable(channels, node, inputs):
  layer, labels = node.operation, _at_channel_axis(channels, node, inputs[0])
  out, dropped = _made(channels, node, layer.filters)
  channels.slice(layer, 'depthwise_kernel', -2, labels.ids, 'out')
  channels.slice(
    layer, 'pointwise_kernel', -2, np.repeat(labels.ids, layer.depth_multiplier), 'in'
  )
  channels.slice(layer, 'pointwise_kernel', -1, out, 'out')
  channels.slice(layer, 'bias', -1, out, 'out')
  channels.changes[layer] = lambda kept: {'filters': kept(out)}
  return Labels(labels.axis, out, dropped)


def _dense(channels, node, inputs):
  layer, labels = node.operation, inputs[0]
  if labels.axis != _rank(channels, node) - 1:
    raise Frozen(_OTHER_AXIS)
  channels.folds[layer] = labels.ids
  out, dropped = _made(channels, node, layer.units)
  channels.slice(layer, 'kernel', -2, labels.ids, 'in')
  channels.slice(layer, 'kernel', -1, out, 'out')
  channels.slice(layer, 'bias', -1, out, 'out')
  channels.changes[layer] = lambda kept: {'units': kept(out)}
  return Labels(labels.axis, out, dropped)


def _batch_norm(channels, node, inputs):
  layer, labels = node.operation, inputs[0]
  if layer.axis % _rank(channels, node) != labels.axis:
    raise Frozen('normalizes along another axis than that of the channels')
  channels.slice(layer, 'gamma', -1, labels.ids, 'out')
  # Without a factor the mean must go, so that (0 - mean) / deviation is zero.
  for weight in ('beta', 'moving_mean'):
    channels.slice(layer, weight, -1, labels.ids, 'shift')
  channels.slice(layer, 'moving_variance', -1, labels.ids, 'other')
  return labels._replace(dropped=Dropped.SHIFT if channels.keep_shift else Dropped.ZERO)


def _layer_norm(channels, node, inputs):
  layer, labels, rank = node.operation, inputs[0], _rank(channels, node)
  if labels.axis in [axis % rank for axis in np.atleast_1d(layer.axis)]:
    raise Frozen('takes mean and variance over the channels')
  if layer.center:
    raise Frozen('adds a shift that is not one for each channel')
  return labels._replace(dropped=Dropped.ZERO)


def _group_norm(channels, node, inputs):
  layer, labels = node.operation, inputs[0]
  if layer.axis % _rank(channels, node) != labels.axis:
    raise Frozen('normalizes along another axis than that of the channels')
  # A group has a mean and a variance of its own, so whole groups can go.
  columns = np.reshape(labels.ids, (layer.groups if layer.groups > 0 else len(labels.ids), -1)).T
  for column in columns[1:]:
    channels.tie(columns[0], column)
  channels.slice(layer, 'gamma', -1, labels.ids, 'out')
  channels.slice(layer, 'beta', -1, labels.ids, 'shift')
  channels.changes[layer] = lambda kept: {'groups': kept(columns[0])}
  return labels._replace(dropped=Dropped.SHIFT if channels.keep_shift else Dropped.ZERO)


def _prelu(channels, node, inputs):
  layer, labels = node.operation, inputs[0]
  if layer.alpha.shape[labels.axis - 1] == len(labels.ids):
    axis = labels.axis - _rank(channels, node)
    channels.slice(layer, 'alpha', axis, labels.ids, 'other')
  if labels.dropped and any(size > 1 for size in layer.alpha.shape[:-1]):
    _needs_zero(channels, labels, 'has a factor for each position')
  return labels


# Layers without weights.


def _elementwise(channels, node, inputs):
  layer, labels = node.operation, inputs[0]
  _through_activation(layer, labels.dropped)
  if type(layer).__name__ == 'Rescaling' and np.size(layer.scale) + np.size(layer.offset) > 2:
    raise Frozen('has a constant for each channel')
  zero = keras.ops.zeros([1 if size is None else size for size in _probe_shape(channels, node)])
  args, kwargs = node.arguments.fill_in({id(node.symbols[0]): zero})
  stays_zero = not np.any(keras.ops.convert_to_numpy(node.operation(*args, **kwargs)))
  return labels if stays_zero else labels._replace(dropped=Dropped.CONSTANT)


def _probe_shape(channels, node):
  return [1] * _rank(channels, node)


def _normalization(channels, node, inputs):
  raise Frozen('has a constant for each channel')


def _softmax(channels, node, inputs):
  if inputs[0].axis in np.atleast_1d(node.operation.axis) % _rank(channels, node):
    raise Frozen(_MIXES)
  return inputs[0]._replace(dropped=Dropped.CONSTANT)


def _joining(channels, node, inputs):
  """Element by element, with broadcasting: what meets at a place goes together."""
  name = type(node.operation).__name__
  leaves = keras.tree.flatten((node.arguments.args, node.arguments.kwargs))
  constants = [leaf for leaf in leaves if not isinstance(leaf, keras.KerasTensor)]
  if any(np.size(leaf) > 1 for leaf in constants):
    raise Frozen('has an array of constants')
  rank = max(len(channels.graph.shape(number)) for number in node.inputs)
  offsets = [rank - len(channels.graph.shape(number)) for number in node.inputs]
  aligned = [
    labels._replace(axis=labels.axis + offset)
    for labels, offset in zip(inputs, offsets, strict=True)
  ]
  wide = [labels for labels in aligned if len(labels.ids) > 1] or aligned
  axis, ids = wide[0].axis, wide[0].ids
  if any(labels.axis != axis for labels in wide):
    raise Frozen('joins channels along different axes')
  for labels in wide[1:]:
    channels.tie(ids, labels.ids)
  narrow = [labels for labels in aligned if len(labels.ids) != len(ids)]
  for labels in narrow:
    channels.freeze(labels.ids, f'layer {node.path!r} joins it to many channels')
  dropped = [labels.dropped for labels in wide]
  if name == 'Multiply':
    state = min(dropped)
    if narrow:
      _needs_zero(channels, wide[0]._replace(dropped=state), 'multiplies all channels alike')
  elif name in ('TrueDivide', 'Divide'):
    if len(node.inputs) > 1:
      raise Frozen('divides channels by each other')
    state = dropped[0]
  else:
    if narrow:
      raise Frozen('adds the same to all channels')
    state = max(dropped)
    if any(isinstance(leaf, int | float) and leaf for leaf in constants):
      state = Dropped.CONSTANT
  return Labels(axis, ids, state)


def _concatenate(channels, node, inputs):
  axis = node.operation.axis % len(channels.graph.shape(node.outputs[0]))
  if len({labels.axis for labels in inputs}) > 1:
    raise Frozen('joins channels along different axes')
  dropped = max(labels.dropped for labels in inputs)
  if axis == inputs[0].axis:
    return Labels(axis, np.concatenate([labels.ids for labels in inputs]), dropped)
  for labels in inputs[1:]:
    channels.tie(inputs[0].ids, labels.ids)
    if dropped:
      _needs_zero(channels, labels._replace(dropped=dropped), 'joins different constants')
  return inputs[0]._replace(dropped=Dropped.ZERO)


def _pooling(channels, node, inputs):
  return _at_channel_axis(channels, node, inputs[0])


def _global_pooling(channels, node, inputs):
  labels = _at_channel_axis(channels, node, inputs[0])
  rank = len(channels.graph.shape(node.outputs[0]))
  return labels._replace(axis=_channel_axis(node.operation, rank))


def _reduction(channels, node, inputs):
  """A mean, maximum or sum over axes without channels."""
  labels, rank, axes = inputs[0], _rank(channels, node), node.operation.axis
  axes = range(rank) if axes is None else np.atleast_1d(axes) % rank
  if labels.axis in axes:
    raise Frozen(_MIXES)
  gone = 0 if node.operation.keepdims else sum(axis < labels.axis for axis in axes)
  return labels._replace(axis=labels.axis - gone)


def _upsampling(channels, node, inputs):
  return _at_channel_axis(channels, node, inputs[0])


def _borders(layer, attribute, rank):
  """Returns (the pairs of a padding or cropping, the first axis that they are about)."""
  first = 1 if _channel_axis(layer, rank) == rank - 1 else 2
  return np.reshape(getattr(layer, attribute), (-1, 2)).tolist(), first


def _change_borders(channels, layer, attribute, pairs, place, counts):
  def arguments(kept):
    changed = [tuple(pair) for pair in pairs]
    changed[place] = counts(kept)
    return {attribute: tuple(changed) if len(changed) > 1 else changed[0]}

  channels.changes[layer] = arguments


def _cropping(channels, node, inputs):
  """Crops spatial axes, one of which may be the channels' after a permutation."""
  labels, layer, rank = inputs[0], node.operation, _rank(channels, node)
  if labels.axis == _channel_axis(layer, rank):
    return labels
  pairs, first = _borders(layer, 'cropping', rank)
  before, after = pairs[labels.axis - first]
  stop = len(labels.ids) - after
  head, tail = labels.ids[:before], labels.ids[stop:]
  _change_borders(
    channels,
    layer,
    'cropping',
    pairs,
    labels.axis - first,
    lambda kept: (kept(head), kept(tail)),
  )
  return labels._replace(ids=labels.ids[before:stop])


def _padding(channels, node, inputs):
  """Zeros along spatial axes, one of which may be the channels' after a permutation."""
  labels, layer, rank = inputs[0], node.operation, _rank(channels, node)
  pairs, first = _borders(layer, 'padding', rank)
  place = labels.axis - first
  inner = labels.axis != _channel_axis(layer, rank)
  if any(sum(pair) for index, pair in enumerate(pairs) if not inner or index != place):
    _needs_zero(channels, labels, 'puts zeros around')
    labels = labels._replace(dropped=Dropped.ZERO)
  if not inner:
    return labels
  head, tail = channels.new(pairs[place][0]), channels.new(pairs[place][1])
  _change_borders(
    channels, layer, 'padding', pairs, place, lambda kept: (kept(head), kept(tail))
  )
  return labels._replace(ids=np.concatenate([head, labels.ids, tail]))


def _pad(channels, node, inputs):
  """`keras.ops.pad`."""
  labels, operation, rank = inputs[0], node.operation, _rank(channels, node)
  widths = np.broadcast_to(np.reshape(operation.pad_width, (-1, 2)), (rank, 2)).tolist()
  if operation.mode != 'constant' or len(node.inputs) > 1 or any(node.arguments.args[1:]):
    raise Frozen('puts other values than zeros around')
  if any(sum(pair) for axis, pair in enumerate(widths) if axis != labels.axis):
    _needs_zero(channels, labels, 'puts zeros around')
    labels = labels._replace(dropped=Dropped.ZERO)
  head, tail = (channels.new(width) for width in widths[labels.axis])

  def arguments(kept):
    changed = [tuple(pair) for pair in widths]
    changed[labels.axis] = (kept(head), kept(tail))
    return {'pad_width': tuple(changed)}

  channels.changes[node] = arguments
  return labels._replace(ids=np.concatenate([head, labels.ids, tail]))


def _reshaping(channels, node, inputs):
  """Runs the operation on the channels' numbers, and looks along which axis they lie after it."""
  labels = inputs[0]
  shape = [1, *(size or _UNKNOWN for size in channels.graph.shape(node.inputs[0])[1:])]
  view = [-1 if axis == labels.axis else 1 for axis in range(len(shape))]
  numbers = np.broadcast_to(labels.ids.reshape(view), shape).astype('float32')
  args, kwargs = node.arguments.fill_in({id(node.symbols[0]): keras.ops.convert_to_tensor(numbers)})
  moved = keras.ops.convert_to_numpy(node.operation(*args, **kwargs)).astype(int)
  for axis in range(1, moved.ndim):
    rows = np.moveaxis(moved, axis, -1).reshape(-1, moved.shape[axis])
    if (rows == rows[0]).all() and (len(rows[0]) > 1 or len(labels.ids) == 1):
      _change_reshaping(channels, node, labels, axis, rows[0])
      return labels._replace(axis=axis, ids=rows[0])
  raise Frozen('mixes channels with other axes')


def _change_reshaping(channels, node, labels, axis, ids):
  operation = node.operation
  if isinstance(operation, keras.layers.Reshape) and operation.target_shape[axis - 1] != -1:
    channels.changes[operation] = lambda kept: {
      'target_shape': _replaced(operation.target_shape, axis - 1, kept(ids))
    }
  elif type(operation).__name__ == 'Reshape' and operation.newshape[axis] != -1:
    channels.changes[node] = lambda kept: {
      'newshape': _replaced(operation.newshape, axis, kept(ids))
    }
  elif type(operation).__name__ == 'GetItem' and len(ids) != len(labels.ids):
    start = labels.ids.tolist().index(ids[0])
    stop = start + len(ids)
    if (labels.ids[start:stop] != ids).any():
      raise Frozen('takes channels that do not lie side by side')
    channels.changes[node] = lambda kept: {
      'axis': labels.axis,
      'start': kept(labels.ids[:start]),
      'stop': kept(labels.ids[:stop]),
    }


def _replaced(values, index, value):
  return (*values[:index], value, *values[index + 1 :])


def _all(rule, names):
  return dict.fromkeys(names.split(), rule)


RULES = {
  **_all(_convolution, 'Conv1D Conv2D Conv3D Conv1DTranspose Conv2DTranspose Conv3DTranspose'),
  **_all(_depthwise, 'DepthwiseConv1D DepthwiseConv2D'),
  **_all(_separable, 'SeparableConv1D SeparableConv2D'),
  **_all(_dense, 'Dense'),
  **_all(_batch_norm, 'BatchNormalization'),
  **_all(_layer_norm, 'LayerNormalization'),
  **_all(_group_norm, 'GroupNormalization'),
  **_all(_normalization, 'Normalization'),
  **_all(_prelu, 'PReLU'),
  **_all(
    _elementwise,
    'Activation ReLU LeakyReLU ELU Rescaling Identity ActivityRegularization Dropout '
    'SpatialDropout1D SpatialDropout2D SpatialDropout3D GaussianDropout GaussianNoise '
    'AlphaDropout Relu Relu6 Sigmoid Silu Tanh Gelu Elu Selu Celu Softplus Softsign HardSigmoid '
    'HardSilu HardTanh LeakyRelu LogSigmoid Mish Clip Abs Absolute Negative Square Sqrt Exp Cast',
  ),
  **_all(_softmax, 'Softmax LogSoftmax'),
  **_all(_joining, 'Add Subtract Multiply Average Maximum Minimum Divide TrueDivide'),
  **_all(_concatenate, 'Concatenate'),
  **_all(
    _pooling,
    'AveragePooling1D AveragePooling2D AveragePooling3D MaxPooling1D MaxPooling2D MaxPooling3D',
  ),
  **_all(
    _global_pooling,
    'GlobalAveragePooling1D GlobalAveragePooling2D GlobalAveragePooling3D GlobalMaxPooling1D '
    'GlobalMaxPooling2D GlobalMaxPooling3D',
  ),
  **_all(_reduction, 'Mean Max Min Sum'),
  **_all(_upsampling, 'UpSampling1D UpSampling2D UpSampling3D'),
  **_all(_cropping, 'Cropping1D Cropping2D Cropping3D'),
  **_all(_padding, 'ZeroPadding1D ZeroPadding2D ZeroPadding3D'),
  **_all(_pad, 'Pad'),
  **_all(
    _reshaping,
    'Flatten Reshape Permute RepeatVector Transpose Squeeze ExpandDims GetItem',
  ),
}
