"""Regressions of a model's layers (`gram.Problem`), from output positions drawn at random."""

import numpy as np

from pocketsize.pruning.batches import in_order
from pocketsize.pruning.gram import Problem, output_places
from pocketsize.pruning.units import CONVOLUTIONS


def is_regression(layer):
  """Returns whether a layer multiplies one kernel with patches of all its inputs."""
  return type(layer).__name__ in (*CONVOLUTIONS, 'Dense') and getattr(layer, 'groups', 1) == 1


class Sampling:
  """Which output positions of each layer are looked at.

  Args:
    graph: `Graph` of the original model.
    points: positions of each sample; None for all.
    seed: of the positions, which are a function of it, the layer and the batch.

  Attributes:
    index: {path: number of the layer's last call among the graph's nodes}.
  """

  def __init__(self, graph, points=10, seed=0):
    self._graph, self._points, self._seed = graph, points, seed
    self.index = {node.path: index for index, node in enumerate(graph.nodes)}

  def places(self, path, shape, number):
    """Returns [batch, points] numbers of output positions, or None for all of them.

    Args:
      path: of the layer.   shape: of what it reads.   number: of the batch.
    """
    count = output_places(self._graph.layers[path], shape)
    if self._points is None or self._points >= count:
      return None
    rng = np.random.default_rng([self._seed, self.index[path], number])
    return rng.integers(0, count, (shape[0], self._points))

  def problems(self, paths, batches, total=lambda array: array):
    """Returns {path: `Problem`} of layers in the original model, from one pass over the samples.

    Args:
      paths: in the same order on all workers, which sum them one after the other.
      batches: list of input batches, as the model takes them.
      total: sums an array over the workers, each of which has samples of its own.
    """
    problems = {path: Problem(self._graph.layers[path]) for path in paths}
    for number, batch in enumerate(batches if problems else ()):

      def call(node, args, kwargs, number=number):
        if node.path in problems:
          places = self.places(node.path, args[0].shape, number)
          problems[node.path].add(args[0], args[0], places)
        return args[0] if node.is_input else node.operation(*args, **kwargs)

      self._graph.run(in_order(self._graph.model, batch), call, training=False)
    for problem in problems.values():
      problem.reduce(total)
    return problems
