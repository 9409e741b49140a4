"""Two models side by side, computed up to a layer, batch by batch, in bounded memory."""

import time

import numpy as np

from pocketsize import fused_bn
from pocketsize.pruning.batches import in_order


class Walk:
  """What the layers of a model and of its pruned copy read, for a fixed set of samples.

  Tensors at the place that was asked for last are kept, so that going through all layers in order
  costs one forward pass of each model; those that would exceed the memory are computed again from
  the last place that fitted.

  Memory: samples * (live elements at the kept place) * 4 bytes * 2 models, at most `memory`, and
  one batch's tensors besides.

  Args:
    original, current: `Graph`s of two models with the same layers, float inputs in both.
    batches: list of input batches, as the models take them: arrays [batch, ...], or lists or dicts
      of them for several inputs.
    memory: bytes for kept tensors; the inputs themselves do not count.

  Attributes:
    samples: how many.
    seconds: spent on computing the models.
  """

  def __init__(self, original, current, batches, memory):
    self.graphs = (original, current)
    self.memory = memory
    self.seconds = 0.0
    self._kept = []
    for batch in batches:
      arrays = in_order(original.model, batch)
      self._kept.append([dict(zip(graph.inputs, arrays, strict=True)) for graph in self.graphs])
    # Of each batch's kept tensors; who reads only some of the batches leaves the others behind.
    self._places = [0] * len(self._kept)
    self.samples = sum(len(next(iter(kept[0].values()))) for kept in self._kept)

  def at(self, index):
    """Yields for each batch ({tensor: value} of the original, of the current model).

    The tensors are those that are live in front of node number `index`: written before it and read
    at or after it. Layers of the current model before `index` must not change any more.

    Args:
      index: position in `Graph.nodes`, not below that of an earlier call.
    """
    first = max(self._places, default=0)
    if index < first:
      raise ValueError(f'A walk goes forward: from node {first} to {index} it cannot.')
    live = self.live(index)
    keeps = self._size(live) <= self.memory
    for number, kept in enumerate(self._kept):
      began = time.monotonic()
      values = [dict(part) for part in kept]
      for graph, part in zip(self.graphs, values, strict=True):
        for position in range(self._places[number], index):
          node = graph.nodes[position]
          graph.step(node, part, _compute, training=False)
          for tensor in {*node.inputs, *node.outputs} - live:
            # An output of the model may have no reader.
            if graph.last_readers.get(tensor, position) == position:
              del part[tensor]
      self.seconds += time.monotonic() - began
      if keeps:
        self._kept[number], self._places[number] = values, index
      yield tuple(values)

  def live(self, index):
    """Returns the numbers of the tensors that are written before a node and read at or after it."""
    graph = self.graphs[0]
    later = {number for node in graph.nodes[index:] for number in node.inputs}
    earlier = {number for node in graph.nodes[:index] for number in node.outputs}
    inputs = {node.outputs[0] for node in graph.nodes[index:] if node.is_input}
    return (later | inputs) & (earlier | set(graph.inputs))

  def _size(self, live):
    graph = self.graphs[0]
    inputs = set(graph.inputs)
    elements = sum(
      int(np.prod([size or 1 for size in graph.shape(number)[1:]])) for number in live - inputs
    )
    return 4 * len(self.graphs) * self.samples * elements


def extended(graph, positions, values):
  """Returns {tensor: value}: `values` and what the nodes at `positions`, in order, make of them."""
  values = dict(values)
  for position in positions:
    graph.step(graph.nodes[position], values, _compute, training=False)
  return values


def _compute(node, args, kwargs):
  if node.is_input:
    return args[0]
  if fused_bn.applicable(node.operation, args, kwargs):
    return fused_bn.batch_norm(node.operation, args[0], training=False)
  return node.operation(*args, **kwargs)
