"""What rules are made of: labels, what dropped channels are, and the registry."""

import enum
from typing import NamedTuple

import keras
import numpy as np

MIXES = 'reads all channels to compute one'
OTHER_AXIS = 'reads channels along another axis than its own'
# They read more than one channel to compute one.
_MIXING_ACTIVATIONS = ('softmax', 'log_softmax', 'sparsemax', 'glu')
_PLAIN_ACTIVATIONS = (keras.layers.ReLU, keras.layers.LeakyReLU, keras.layers.ELU)
_RULES = {}


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


def rule(*names, several=False):
  """Decorator: `rule(channels, node, inputs)` returns the `Labels` of the output of these types.

  Args:
    names: class names of layers and of operators; one of each may share a name.
    several: whether it reads several tensors.
  """

  def add(function):
    for name in names:
      if _RULES.setdefault(name, (function, several))[0] is not function:
        raise ValueError(f'There are two rules for {name}.')
    return function

  return add


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
    if name not in _RULES:
      raise Frozen('has no rule for channels')
    if any(node.operation is other.operation for other in channels.refused):
      raise Frozen('cannot change at another of its calls')
    function, several = _RULES[name]
    if len(inputs) > 1 and not several:
      raise Frozen('reads a second tensor, such as a mask')
    return [function(channels, node, inputs)]
  except Frozen as error:
    reason = f'layer {node.path!r} ({name}) {error}'
    channels.refused.append(node)
    channels.freeze_layer(node.operation, reason)
    for labels in inputs:
      channels.freeze(labels.ids, reason)
    return [_fixed(channels, shape, reason) for shape in shapes]


def _fixed(channels, shape, reason):
  size = shape[-1] if len(shape) > 1 and shape[-1] else 1
  return Labels(max(len(shape) - 1, 0), channels.new(size, reason))


def rank_of(channels, node):
  """Returns the number of axes of a node's first input, the batch's among them."""
  return len(channels.graph.shape(node.inputs[0]))


def channel_axis(layer, rank):
  """Returns the axis that `layer` takes for that of the channels."""
  return 1 if getattr(layer, 'data_format', 'channels_last') == 'channels_first' else rank - 1


def at_channel_axis(channels, node, labels):
  """Returns `labels`; raises `Frozen` if they lie along another axis than the layer's own."""
  if labels.axis != channel_axis(node.operation, rank_of(channels, node)):
    raise Frozen(OTHER_AXIS)
  return labels


def need_zero(channels, labels, what):
  """Makes dropped channels zero where their constant cannot be taken up exactly."""
  if labels.dropped == Dropped.SHIFT:
    channels.zero(labels.ids)
  elif labels.dropped == Dropped.CONSTANT and not channels.are_frozen(labels.ids):
    raise Frozen(f'{what}, and a dropped channel is a constant there')


def made_by(channels, node, count):
  """Returns (channels that a layer makes, what they are behind its activation)."""
  ids = channels.make(node, count)
  try:
    return ids, through_activation(node.operation, Dropped.ZERO)
  except Frozen as error:
    channels.freeze(ids, f'layer {node.path!r} {error}')
    return ids, Dropped.ZERO


def through_activation(layer, dropped):
  """Returns what dropped channels are behind the activation that `layer` has of its own.

  Raises:
    Frozen: the activation mixes channels, or has weights.
  """
  activation = getattr(layer, 'activation', None)
  if activation is None:
    return dropped
  name = getattr(activation, '__name__', '')
  if name in _MIXING_ACTIVATIONS or isinstance(activation, keras.layers.Softmax):
    raise Frozen(MIXES)
  if isinstance(activation, keras.Layer) and not isinstance(activation, _PLAIN_ACTIVATIONS):
    raise Frozen('has a layer as activation')
  zero = float(activation(keras.ops.zeros((1, 1)))[0, 0])
  return dropped if zero == 0.0 else Dropped.CONSTANT
