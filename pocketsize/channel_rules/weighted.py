"""Layers with weights: convolutions, dense layers, normalizations."""

import numpy as np

from pocketsize.channel_rules.base import (
  OTHER_AXIS,
  Dropped,
  Frozen,
  Labels,
  at_channel_axis,
  made_by,
  need_zero,
  rank_of,
  rule,
  through_activation,
)


def _made(channels, node, argument, weight, axis=-1):
  """Returns (channels that a layer makes, what dropped ones are), and says what shrinks with them.

  Args:
    argument: of the layer, that counts them.
    weight, axis: the kernel that makes them, and where they lie in it.
  """
  layer = node.operation
  out, dropped = made_by(channels, node, getattr(layer, argument))
  channels.slice(layer, weight, axis, out, 'out')
  channels.slice(layer, 'bias', -1, out, 'out')
  channels.changes[layer] = lambda kept: {argument: kept(out)}
  return out, dropped


@rule('Conv1D', 'Conv2D', 'Conv3D', 'Conv1DTranspose', 'Conv2DTranspose', 'Conv3DTranspose')
def _convolution(channels, node, inputs):
  layer, labels = node.operation, at_channel_axis(channels, node, inputs[0])
  transposed, groups = 'Transpose' in type(layer).__name__, getattr(layer, 'groups', 1)
  whole = not transposed and groups == 1
  if whole and (layer.padding == 'valid' or max(layer.kernel_size) == 1):
    channels.read(layer, labels)
  else:
    need_zero(channels, labels, 'reads beyond the border')
  out, dropped = _made(channels, node, 'filters', 'kernel', -2 if transposed else -1)
  parts = np.split(labels.ids, groups)
  for part in parts[1:]:
    channels.tie(parts[0], part)
  if groups > 1:
    outs = np.split(out, groups)
    for part in outs[1:]:
      channels.tie(outs[0], part)
  channels.slice(layer, 'kernel', -1 if transposed else -2, parts[0], 'in')
  return Labels(labels.axis, out, dropped)


@rule('DepthwiseConv1D', 'DepthwiseConv2D')
def _depthwise(channels, node, inputs):
  layer, labels = node.operation, at_channel_axis(channels, node, inputs[0])
  out = np.repeat(labels.ids, layer.depth_multiplier)
  channels.slice(layer, 'kernel', -2, labels.ids, 'out')
  channels.slice(layer, 'bias', -1, out, 'out')
  return Labels(labels.axis, out, through_activation(layer, Dropped.ZERO))


@rule('SeparableConv1D', 'SeparableConv2D')
def _separable(channels, node, inputs):
  layer, labels = node.operation, at_channel_axis(channels, node, inputs[0])
  out, dropped = _made(channels, node, 'filters', 'pointwise_kernel')
  channels.slice(layer, 'depthwise_kernel', -2, labels.ids, 'out')
  channels.slice(layer, 'pointwise_kernel', -2, np.repeat(labels.ids, layer.depth_multiplier), 'in')
  return Labels(labels.axis, out, dropped)


@rule('Dense')
def _dense(channels, node, inputs):
  layer, labels = node.operation, inputs[0]
  if labels.axis != rank_of(channels, node) - 1:
    raise Frozen(OTHER_AXIS)
  channels.read(layer, labels)
  out, dropped = _made(channels, node, 'units', 'kernel')
  channels.slice(layer, 'kernel', -2, labels.ids, 'in')
  return Labels(labels.axis, out, dropped)


@rule('BatchNormalization')
def _batch_norm(channels, node, inputs):
  layer, labels = node.operation, inputs[0]
  if layer.axis % rank_of(channels, node) != labels.axis:
    raise Frozen('normalizes along another axis than that of the channels')
  if layer.gamma is None:
    need_zero(channels, labels, 'has no factor')
  channels.slice(layer, 'gamma', -1, labels.ids, 'out')
  # Without a factor the mean must go, so that (0 - mean) / deviation is zero.
  for weight in ('beta', 'moving_mean'):
    channels.slice(layer, weight, -1, labels.ids, 'shift')
  channels.slice(layer, 'moving_variance', -1, labels.ids, 'other')
  return labels._replace(dropped=Dropped.SHIFT if channels.keep_shift else Dropped.ZERO)


@rule('LayerNormalization')
def _layer_norm(channels, node, inputs):
  layer, labels, rank = node.operation, inputs[0], rank_of(channels, node)
  if labels.axis in [axis % rank for axis in np.atleast_1d(layer.axis)]:
    raise Frozen('takes mean and variance over the channels')
  if layer.center:
    raise Frozen('adds a shift that is not one for each channel')
  # Less its mean a constant is zero; the root mean square takes none off.
  if getattr(layer, 'rms_scaling', False):
    need_zero(channels, labels, 'takes no mean off')
  return labels._replace(dropped=Dropped.ZERO)


@rule('GroupNormalization')
def _group_norm(channels, node, inputs):
  layer, labels = node.operation, inputs[0]
  if layer.axis % rank_of(channels, node) != labels.axis:
    raise Frozen('normalizes along another axis than that of the channels')
  if layer.gamma is None:
    need_zero(channels, labels, 'has no factor')
  # A group has a mean and a variance of its own, so whole groups can go.
  columns = np.reshape(labels.ids, (layer.groups if layer.groups > 0 else len(labels.ids), -1)).T
  for column in columns[1:]:
    channels.tie(columns[0], column)
  channels.slice(layer, 'gamma', -1, labels.ids, 'out')
  channels.slice(layer, 'beta', -1, labels.ids, 'shift')
  channels.changes[layer] = lambda kept: {'groups': kept(columns[0])}
  return labels._replace(dropped=Dropped.SHIFT if channels.keep_shift else Dropped.ZERO)


@rule('PReLU')
def _prelu(channels, node, inputs):
  layer, labels = node.operation, inputs[0]
  if layer.alpha.shape[labels.axis - 1] == len(labels.ids):
    axis = labels.axis - rank_of(channels, node)
    channels.slice(layer, 'alpha', axis, labels.ids, 'other')
  others = [size for axis, size in enumerate(layer.alpha.shape) if axis != labels.axis - 1]
  if labels.dropped and any(size > 1 for size in others):
    need_zero(channels, labels, 'has a factor for each position')
  return labels
