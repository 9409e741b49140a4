"""Kernels of layers that read fewer channels, made once and reused by all roll-outs.

A layer's regression on what it reads (`gram.Problem`) is gathered once, in the original model.
Which channels of a unit stay at each count, and the kernel that then gives the layer's outputs best
by least squares, follow from it without another image, so a roll-out costs one evaluation.

Deviation: PocketFlow refits every layer in every roll-out, to what it reads in the model that is
pruned ahead of it. Here it is what the layer reads in the original model. The final model is pruned
layer by layer, with `Layerwise`.
"""

import numpy as np

from pocketsize.allocation.kept import MEMORY, Kept


class Reconstructed:
  """Candidates of a channel problem.

  Args:
    units: list of `units.Unit`s, the problem's variables in order.
    choices: {unit name: channels kept at each level, ascending}.
    problems: {path: `gram.Problem`} of all their readers, from the original model.
    method: has `select(problems, places, size, count)` and `reconstruct(problem, rows)`.
    memory: bytes for kernels that are kept, see `kept.Kept`.
  """

  def __init__(self, units, choices, problems, method, memory=MEMORY):
    self._units, self._choices = units, choices
    self._problems, self._method = problems, method
    # In order, so that all workers have the same.
    self._readers = list(dict.fromkeys(path for unit in units for path in unit.readers))
    self._chosen, self._kept = {}, Kept(memory)

  def kernels(self, levels):
    """Returns {path: {'kernel': array}} of all readers at [units] levels."""
    return {path: {'kernel': self._kernel(path, levels)} for path in self._readers}

  def errors(self, name):
    """Returns {path: [choices] squared changes} of what reads unit `name`, the others whole."""
    place = [unit.name for unit in self._units].index(name)
    whole = np.array([len(self._choices[unit.name]) - 1 for unit in self._units])
    alone = [
      np.where(np.arange(len(whole)) == place, level, whole) for level in range(whole[place] + 1)
    ]
    return {
      path: np.array([self._change(path, levels) for levels in alone])
      for path in self._units[place].readers
    }

  def _change(self, path, levels):
    """Returns the squared change of a reader's kernel."""
    return np.sum(
      np.square(self._kernel(path, levels).ravel() - self._problems[path].kernel.ravel())
    )

  def _kernel(self, path, levels):
    """Returns the kernel of a reader, refitted if it reads fewer channels than there are."""
    read = [
      (place, int(levels[place])) for place, unit in enumerate(self._units) if path in unit.readers
    ]
    return self._kept.get((path, *read), lambda: self._made(path, read))

  def _made(self, path, read):
    problem = self._problems[path]
    chosen = np.ones(problem.inputs, bool)
    for place, level in read:
      places = self._units[place].readers[path]
      inside = places >= 0
      chosen[inside] &= self._selected(place, level)[places[inside]]
    kernel = problem.kernel
    if not chosen.all():
      kernel = self._method.reconstruct(problem, problem.rows_of(chosen))
    return kernel.astype(np.float32).reshape(problem.layer.kernel.shape)

  def _selected(self, place, level):
    """Returns [size] bool: the channels of a unit that stay at a level."""
    if (place, level) not in self._chosen:
      unit = self._units[place]
      count = self._choices[unit.name][level]
      selected = np.ones(unit.size, bool)
      if count < unit.size:
        problems = [self._problems[path] for path in unit.readers]
        selected = self._method.select(problems, list(unit.readers.values()), unit.size, count)
      self._chosen[place, level] = selected
    return self._chosen[place, level]
