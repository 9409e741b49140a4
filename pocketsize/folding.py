"""Which batch norms fold into the layer before them, and what they multiply and add."""

import keras
import numpy as np

from pocketsize import targets


def batch_norm_factor(variance, epsilon, gamma=None):
  """Returns what a batch norm multiplies by, [channels]: gamma / sqrt(variance + epsilon).

  Args:
    variance, gamma: [channels] float arrays or tensors; gamma None for a batch norm without scale.
    epsilon: positive.
  """
  factor = (variance + epsilon) ** -0.5
  return factor if gamma is None else factor * gamma


def batch_norm_factors(layer, weights=None):
  """Returns (factor, offset), [channels] float64: a BatchNormalization is x * factor + offset.

  Args:
    layer: the BatchNormalization.
    weights: {attribute: [channels] array} to compute with in place of the layer's own.
  """
  values = {
    name: keras.ops.convert_to_numpy((weights or {}).get(name, getattr(layer, name)))
    for name in ('gamma', 'beta', 'moving_mean', 'moving_variance')
    if getattr(layer, name) is not None
  }
  mean, variance = (values[name].astype(np.float64) for name in ('moving_mean', 'moving_variance'))
  factor = batch_norm_factor(variance, layer.epsilon, values.get('gamma'))
  offset = -mean * factor
  return factor, offset + values['beta'] if layer.center else offset


def foldable(graph, separates):
  """Returns {node of a linear conv or dense layer: node of the batch norm that is its only reader}.

  Args:
    graph: a `Graph`.
    separates: separates(node, batch norm node) says whether something between them forbids it.
  """
  nodes = {}
  for node in graph.nodes:
    if type(node.operation) is not keras.layers.BatchNormalization or len(node.inputs) != 1:
      continue
    tensor = node.inputs[0]
    before = graph.producer(tensor)
    if (
      _is_linear(before.operation)
      and node.operation.axis in (-1, len(graph.shape(tensor)) - 1)
      and graph.consumers(tensor) == [node]
      and tensor not in graph.outputs
      and not separates(before, node)
    ):
      nodes[before] = node
  return nodes


def followers(graph):
  """Returns {path of a layer: path of the batch norm that folds into every call of it}.

  A layer that is called several times is there if the same batch norm follows each call.

  Args:
    graph: a `Graph`.
  """
  pairs = foldable(graph, lambda before, after: False)
  found = {}
  for node in graph.nodes:
    found.setdefault(node.path, set()).add(pairs[node].path if node in pairs else None)
  return {path: min(after) for path, after in found.items() if len(after) == 1 and after != {None}}


def _is_linear(layer):
  return (
    bool(targets.weight_points(layer))
    and not isinstance(layer, keras.layers.EinsumDense)
    and layer.activation in (None, keras.activations.linear)
    and getattr(layer, 'data_format', 'channels_last') == 'channels_last'
  )
