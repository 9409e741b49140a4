"""Element by element: activations, sums, products; and concatenation."""

import keras
import numpy as np

from pocketsize.channel_rules.base import (
  MIXES,
  Dropped,
  Frozen,
  Labels,
  need_zero,
  rank_of,
  rule,
  through_activation,
)
from pocketsize.graph import IDENTITIES


@rule(
  *IDENTITIES,
  'Activation',
  'ReLU',
  'LeakyReLU',
  'ELU',
  'Rescaling',
  'Relu',
  'Relu6',
  'Sigmoid',
  'Silu',
  'Tanh',
  'Gelu',
  'Elu',
  'Selu',
  'Celu',
  'Softplus',
  'Softsign',
  'HardSigmoid',
  'HardSilu',
  'HardTanh',
  'LeakyRelu',
  'LogSigmoid',
  'Mish',
  'Clip',
  'Abs',
  'Absolute',
  'Negative',
  'Square',
  'Sqrt',
  'Exp',
  'Cast',
)
def _elementwise(channels, node, inputs):
  layer, labels = node.operation, inputs[0]
  through_activation(layer, labels.dropped)
  if type(layer).__name__ == 'Rescaling' and np.size(layer.scale) + np.size(layer.offset) > 2:
    raise Frozen('has a constant for each channel')
  if _has_arrays(node):
    raise Frozen('has an array of constants')
  zero = keras.ops.zeros([1] * rank_of(channels, node))
  args, kwargs = node.arguments.fill_in({id(node.symbols[0]): zero})
  try:
    value = keras.ops.convert_to_numpy(node.operation(*args, **kwargs))
  except ValueError as error:
    # An operator's own array, such as the bounds of a clip, does not fit one value.
    raise Frozen('has an array of constants') from error
  if np.shape(value) != np.shape(zero):
    raise Frozen('has an array of constants')
  if not np.isfinite(value).all():
    raise Frozen('is not finite at zero')
  return labels if not value.any() else labels._replace(dropped=Dropped.CONSTANT)


@rule('Normalization')
def _normalization(channels, node, inputs):
  raise Frozen('has a constant for each channel')


@rule('Softmax', 'LogSoftmax')
def _softmax(channels, node, inputs):
  if inputs[0].axis in np.atleast_1d(node.operation.axis) % rank_of(channels, node):
    raise Frozen(MIXES)
  shape = channels.graph.shape(node.inputs[0])
  if any(shape[axis] is None for axis in np.atleast_1d(node.operation.axis) % len(shape)):
    raise Frozen('has an unknown number of summands')
  return inputs[0]._replace(dropped=Dropped.CONSTANT)


# CustomScaleLayer is x + scale * y, of InceptionResNetV2.
@rule(
  'Add',
  'Subtract',
  'Multiply',
  'Average',
  'Maximum',
  'Minimum',
  'Divide',
  'TrueDivide',
  'CustomScaleLayer',
  several=True,
)
def _joining(channels, node, inputs):
  """Element by element, with broadcasting: what meets at a place goes together."""
  name = type(node.operation).__name__
  if name == 'Average' and not isinstance(node.operation, keras.Layer):
    raise Frozen('has no rule for channels')
  if _has_arrays(node):
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
      need_zero(channels, wide[0]._replace(dropped=state), 'multiplies all channels alike')
  elif name in ('TrueDivide', 'Divide'):
    if len(node.inputs) > 1 or not isinstance(node.arguments.args[0], keras.KerasTensor):
      raise Frozen('divides by channels')
    state = dropped[0]
  else:
    if narrow:
      raise Frozen('adds the same to all channels')
    state = max(dropped)
    if any(np.any(keras.ops.convert_to_numpy(value)) for value in _constants(node)):
      state = Dropped.CONSTANT
  return Labels(axis, ids, state)


def _constants(node):
  leaves = keras.tree.flatten((node.arguments.args, node.arguments.kwargs))
  return [leaf for leaf in leaves if not isinstance(leaf, keras.KerasTensor | None)]


def _has_arrays(node):
  return any(np.size(value) > 1 for value in _constants(node))


@rule('Concatenate', several=True)
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
      need_zero(channels, labels._replace(dropped=dropped), 'joins different constants')
  return inputs[0]._replace(dropped=Dropped.ZERO)
