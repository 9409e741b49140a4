"""What a model costs: parameters, multiply-accumulates, bits."""

import math
from typing import NamedTuple

import numpy as np

from pocketsize import targets


class LayerCost(NamedTuple):
  """One layer's cost for one sample.

  Attributes:
    name: path of the layer.     params: weights of all kinds, batch norm's among them.
    macs: multiply-accumulates; additions of biases and batch norm are not counted.
    channels: output channels, None where the layer has no weights.
  """

  name: str
  params: int
  macs: int
  channels: int | None


def node_macs(graph, node):
  """Returns the multiply-accumulates of one call of a weighted layer, for one sample.

  Every weight of a convolution is used once for each output position (for each input position if
  transposed), every weight of a dense layer once for each position of the other axes.
  """
  layer = node.operation
  name = type(layer).__name__
  points = targets.weight_points(layer)
  if not points:
    return 0
  weights = sum(math.prod(getattr(layer, point).shape) for point in points)
  shape = graph.shape(node.inputs[0] if name.endswith('Transpose') else node.outputs[0])
  if name == 'Dense':
    return weights * _size(shape[1:-1])
  if name == 'EinsumDense':
    inputs, kernel = layer.equation.split('->')[0].split(',')
    summed = _size(
      size for letter, size in zip(kernel, layer.kernel.shape, strict=True) if letter in inputs
    )
    return weights * max(_size(graph.shape(node.inputs[0])[1:]) // summed, 1)
  axes = shape[1:-1] if layer.data_format == 'channels_last' else shape[2:]
  return weights * _size(axes)


def _size(shape):
  """Returns the product of a shape; unknown sizes count 1."""
  return math.prod(size or 1 for size in shape)


def layer_costs(graph):
  """Returns a `LayerCost` for each layer of a `Graph` that has weights, in order of execution."""
  macs = {}
  for node in graph.nodes:
    macs[node.path] = macs.get(node.path, 0) + node_macs(graph, node)
  return [
    LayerCost(
      path,
      layer.count_params(),
      macs[path],
      _channels(layer, graph.shape(next(n for n in graph.nodes if n.path == path).outputs[0])),
    )
    for path, layer in graph.layers.items()
    if layer.weights
  ]


def _channels(layer, shape):
  """Returns the size of the axis of channels in the shape of a layer's output."""
  if getattr(layer, 'data_format', None) == 'channels_first':
    return shape[1]
  axis = getattr(layer, 'axis', -1)  # Some normalize over several: the last is as good as any.
  return shape[axis if isinstance(axis, int) else -1]


def macs(graph):
  """Returns the multiply-accumulates of a whole `Graph`, for one sample."""
  return sum(node_macs(graph, node) for node in graph.nodes)


def weight_macs(graph):
  """Returns {(layer, attribute of its weight): multiply-accumulates for one sample, all calls}."""
  found = {}
  for node in graph.nodes:
    points = targets.weight_points(node.operation)
    sizes = {point: math.prod(getattr(node.operation, point).shape) for point in points}
    for point, size in sizes.items():
      key = node.operation, point
      found[key] = found.get(key, 0.0) + node_macs(graph, node) * size / sum(sizes.values())
  return found


def weight_slices(channels):
  """Returns the slices of a `ChannelGraph` that multiply-accumulates shrink with."""
  return [
    part
    for part in channels.slices
    if part.role in ('in', 'out') and part.weight in targets.weight_points(part.layer)
  ]


def macs_share(channels):
  """Returns a function from `keep`, of `ChannelGraph.dropped`, to the share of MACs that it leaves.

  The function takes `selected` besides, {path: [inputs] bool}, as `shrink` does.

  Args:
    channels: a `ChannelGraph`.
  """
  parts, slices = weight_macs(channels.graph), weight_slices(channels)

  def remaining(keep, selected=None):
    is_dropped = channels.dropped(keep)
    left = dict(parts)
    for part in slices:
      kept = ~is_dropped(part.ids)
      for path in channels.graph.paths(part.layer) if selected and part.role == 'in' else ():
        kept &= selected.get(path, True)
      left[part.layer, part.weight] *= float(np.mean(kept))
    return sum(left.values()) / sum(parts.values())

  return remaining


def nonzero(weights):
  """Returns how many values of arrays are not zero."""
  return int(sum(np.count_nonzero(weight) for weight in weights))
