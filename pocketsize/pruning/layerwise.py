"""Channel pruning layer by layer: choose inputs, reconstruct the layer's outputs, go on.

The course that He et al. 2017 (arXiv:1707.06168) and its kin have in common. How channels are
chosen and kernels refitted is a method's business: `lasso`, `ista`, `proximal`.

Deviation: channels that several layers read, with units of more than one reader, are chosen before
the first layer is touched, from what all their readers read in the original model.
"""

import keras
import numpy as np

from pocketsize.channel_graph import ChannelGraph
from pocketsize.copies import copied
from pocketsize.graph import Graph
from pocketsize.pruning import units as units_module
from pocketsize.pruning.gram import Problem
from pocketsize.pruning.sampling import Sampling
from pocketsize.pruning.walk import Walk, extended
from pocketsize.shrink import shrink
from pocketsize.sparsity.magnitude import Mask
from pocketsize.transform import Placement

MEMORY = 2**31
# A batch norm that makes a channel smaller than this has nothing to make up for.
_LEAST_SCALE = 1e-3


class Layerwise:
  """One model's course. Steps are done in order, each once; state lies in `variables`.

  Args:
    model: the original model; it is not changed.
    units: list of `units.Unit`.
    counts: {unit name: channels to keep}.
    method: has `select(problems, places, size, count)` and `reconstruct(problem, rows)`.
    batches: list of input batches.
    points: output positions that are sampled of each sample; None for all.
    seed: of the positions.
    total: sums an array over the workers, each of which has samples of its own.
    memory: see `Walk`.

  Attributes:
    original: the model that was given.
    model: the pruned model, in the original's shape: kernels have zeros for what is not read.
    steps: names of the steps: 'survey', and the layers' paths.
    variables: of the state, to be saved between two steps.
    errors: {path: squared error of the outputs, relative to their squares} of this process' steps.
  """

  def __init__(
    self,
    model,
    units,
    counts,
    method,
    batches,
    *,
    points=10,
    seed=0,
    total=lambda array: array,
    memory=MEMORY,
  ):
    self.original, self.model, self._batches = model, copied(model), batches
    self._reference = copied(model)
    self._original = Graph(self._reference)
    self._current = Graph(self.model)
    self._units, self._counts, self._method = units, counts, method
    self._total, self._memory = total, memory
    self._sampling = Sampling(self._original, points, seed)
    self._chosen = {
      unit.name: keras.Variable(np.full(unit.size, -1.0, 'float32'), trainable=False)
      for unit in units
    }
    readers, _ = units_module.readers(ChannelGraph(model))
    named = {path for unit in units for path in unit.readers}
    self.steps = [
      'survey',
      *(
        path
        for path in readers
        if path in named or type(self._original.layers[path]).__name__ != 'Dense'
      ),
    ]
    self._sizes = {path: len(ids) for path, ids in readers.items()}
    self.variables = [
      *self.model.weights,
      *self._reference.weights,
      *self._chosen.values(),
    ]
    self.errors = {}
    self._earlier_seconds, self._walk = 0.0, None
    self.restart()

  def restart(self):
    """Says that the current model was changed from outside, such as by training."""
    self._earlier_seconds = self.forward_seconds
    self._walk = Walk(self._original, self._current, self._batches, self._memory)

  def rebase(self):
    """Says that the current model was trained: what is left to prune follows it from here on.

    Kernels, batch norms and outputs have moved together, so those of the original no longer fit.
    """
    self._reference.set_weights(self.model.get_weights())
    self.restart()

  @property
  def forward_seconds(self):
    """Seconds spent on the forward passes that give layers their inputs, in this process."""
    return self._earlier_seconds + (self._walk.seconds if self._walk else 0.0)

  def do(self, step):
    """Does one of `steps`."""
    if step == 'survey':
      self._survey()
    else:
      self._prune(step)

  @property
  def selected(self):
    """{path: [inputs] bool}: what each reader selects; readers of undecided units are missing."""
    found = {}
    for unit in self._units:
      chosen = np.array(self._chosen[unit.name])
      if (chosen < 0).any():
        continue
      for path, places in unit.readers.items():
        selected = found.setdefault(path, np.ones(len(places), bool))
        inside = places >= 0
        selected[inside] &= chosen[places[inside]] > 0
    return found

  def masks(self):
    """Returns `Placement`s that keep the kernels' zeros while `model` is trained."""
    placements = []
    for path, chosen in self.selected.items():
      kernel = self._current.layers[path].kernel
      mask = Mask()
      mask.build(kernel.shape)
      mask.mask.assign(np.broadcast_to(chosen[:, None], kernel.shape))
      placements.append(Placement(path, 'kernel', mask))
    return placements

  @property
  def keep(self):
    """{group name: [channels] bool}: what at least one layer selects."""
    return units_module.remaining(ChannelGraph(self.model), self.selected)

  def shrunk(self):
    """Returns the pruned model without the channels that no layer selects: an ordinary one."""
    return shrink(self.model, self.keep, selected=self.selected)

  def _survey(self):
    """Chooses for the units with several readers, from what they read in the original model."""
    joint = [unit for unit in self._units if len(unit.readers) > 1]
    problems = self.problems(dict.fromkeys(path for unit in joint for path in unit.readers))
    for unit in joint:
      self._choose(unit, problems)

  def problems(self, paths):
    """Returns {path: `Problem`} of layers in the original model, from one pass over the samples.

    Args:
      paths: in the same order on all workers, which sum them one after the other.
    """
    return self._sampling.problems(paths, self._batches, self._total)

  def _choose(self, unit, problems):
    count = self._counts[unit.name]
    chosen = np.ones(unit.size, bool)
    if count < unit.size:
      chosen = self._method.select(
        [problems[path] for path in unit.readers], list(unit.readers.values()), unit.size, count
      )
    self._chosen[unit.name].assign(chosen.astype('float32'))

  def _prune(self, path):
    problem = self._problem(path)
    for unit in self._units:
      if list(unit.readers) == [path]:
        self._choose(unit, {path: problem})
    selected = self.selected
    rows = problem.rows_of(selected.get(path, np.ones(self._sizes[path], bool)))
    before = self.steps[: self.steps.index(path)]
    # In front of the first pruned layer there is nothing to make up for.
    if not rows.all() or any(not selected[step].all() for step in before if step in selected):
      kernel = self._method.reconstruct(problem, rows)
      layer = self._current.layers[path]
      layer.kernel.assign(kernel.reshape(layer.kernel.shape))
      self.errors[path] = problem.error(kernel) / max(problem.energy, np.finfo(float).tiny)

  def _problem(self, path):
    """Returns the layer's regression, with the current model's inputs."""
    node = self._original.nodes[self._sampling.index[path]]
    problem = Problem(node.operation)
    past = self._past(node)
    for number, (original, current) in enumerate(self._walk.at(self._sampling.index[path])):
      read = np.asarray(current[node.inputs[0]])
      offset = None
      if past is not None:
        tensor, positions, scale = past
        wanted, got = (
          np.asarray(extended(graph, positions, values)[tensor])
          for graph, values in ((self._original, original), (self._current, current))
        )
        offset = (wanted - got) * scale
      places = self._sampling.places(path, read.shape, number)
      problem.add(read, np.asarray(original[node.inputs[0]]), places, offset)
    problem.reduce(self._total)
    return problem

  def _past(self, node):
    """Returns what a layer makes up for, if it ends in an addition, or None.

    That is (the other summand, positions of the nodes that compute it, factor for its error).

    Residual compensation (He et al. 2017, section 3.3): the layer makes up for the error that the
    other branch has already, through a batch norm between the layer and the addition if need be.
    """
    graph, scale = self._original, np.ones(1, np.float32)
    if getattr(node.operation, 'activation', None) not in (None, keras.activations.linear):
      return None
    tensor = node.outputs[0]
    consumers = graph.consumers(tensor)
    if len(consumers) == 1 and type(consumers[0].operation).__name__ == 'BatchNormalization':
      layer = consumers[0].operation
      if layer.axis not in (-1, len(graph.shape(tensor)) - 1):
        return None
      factor = 1.0 / np.sqrt(np.array(layer.moving_variance) + layer.epsilon)
      factor = factor if layer.gamma is None else factor * np.array(layer.gamma)
      small = np.abs(factor) < _LEAST_SCALE
      scale = np.where(small, 0.0, 1.0 / np.where(small, 1.0, factor)).astype(np.float32)
      tensor = consumers[0].outputs[0]
      consumers = graph.consumers(tensor)
    if len(consumers) != 1 or type(consumers[0].operation).__name__ != 'Add':
      return None
    others = [number for number in consumers[0].inputs if number != tensor]
    if len(others) != 1 or graph.shape(others[0]) != graph.shape(tensor):
      return None
    positions = self._ahead(others[0], self._sampling.index[node.path])
    return None if positions is None else (others[0], positions, scale)

  def _ahead(self, tensor, index):
    """Returns positions of the nodes from `index` on that compute `tensor`.

    None if one of them is still to be pruned.
    """
    nodes, needed, positions = self._original.nodes, {tensor}, []
    for position in reversed(range(index, len(nodes))):
      if needed.isdisjoint(nodes[position].outputs):
        continue
      if nodes[position].path in self.steps:
        return None
      needed.update(nodes[position].inputs)
      positions.append(position)
    return positions[::-1]
