"""What each layer's choices cost the loss, as tables that add up: by curvature, or measured.

In all of them more is never worse: where a table would rise along its levels, it keeps the least
so far. A higher level costs more and may hold whatever a lower one does. That it looks worse is
chance in a measurement, or in a fit, and an exact solver would build on it.
"""

import json
import pathlib

import numpy as np

from pocketsize.allocation.workers import on_first
from pocketsize.errors import UserError
from pocketsize.files import write_json

# What the losses of all choices are compared with.
_BASE = 'all at their base'


def hawq_losses(problem, traces, variants):
  """Returns the terms of Omega in HAWQ-v2 (Dong et al. 2020, arXiv:1911.03852):

  Omega_i = mean tr(H_i) ||Q(W_i) - W_i||^2. That is twice what the loss grows by, to second order,
  if errors are like noise: of one size in all weights of a layer, and independent. Where a variable
  decides about several layers, theirs are added.

  At a minimum of the loss no trace is negative. One that is estimated so, of a net that is not
  quite there or from few vectors, would reward errors, and zero in its place would call any error
  free. So it counts as the least positive one: the layer is the least sensitive of all, and still
  the better the more bits it has. If none is positive all count as 1: the squared errors decide.

  Args:
    problem: a `Problem`.
    traces: {path: mean diagonal of the Hessian} of all layers that a variable decides about.
    variants: has `errors(name)`, {path: [choices] squared errors} of the layers of a variable; a
      `Variants` or `Reconstructed`.

  Returns:
    List of [choices] float64 arrays, one for each variable; they fall along the levels.
  """
  least = min((trace for trace in traces.values() if trace > 0.0), default=1.0)
  return [
    _falling(
      sum(
        max(traces[path], least) * errors for path, errors in variants.errors(variable.name).items()
      )
    )
    for variable in problem.variables
  ]


def measured_losses(
  problem,
  kernels,
  scorer,
  *,
  base=None,
  points=None,
  path=None,
  track=iter,
  rank=0,
  size=1,
  total=lambda array: array,
):
  """Returns how much the evaluator's 'loss' grows if one variable alone leaves its highest level.

  With `points` only so many levels of each variable are measured, evenly from the lowest to the
  highest; those between are interpolated.

  Args:
    problem: a `Problem`.
    kernels: `kernels(levels)` returns the {path: {point: array}} of [variables] levels.
    scorer: has `score(kernels)`, which returns {'loss': float, ...}; a `Scorer`.
    base: [variables] levels of the others; None: `problem.highest`. What is the same in all
      entries of a variable is of no influence on a choice, so eight bits can stand for float.
    points: levels to measure of each variable, at least 2; None for all.
    path: of a JSON file that keeps what was measured; what it has is not measured again. Of what
      losses follow from it knows the base: remove it once the model or the scorer change. Only rank
      0 reads and writes it. None: in memory only.
    track: `track(rounds)` gives a list's entries one by one; it may show progress.
    rank, size: number of this worker, and how many there are; each measures its part.
    total: sums an array over the workers.

  Returns:
    List of [choices] float64 arrays, one for each variable; they fall along the levels.

  Raises:
    UserError: `points` is below 2, a loss is not finite, or the file is of another problem.
  """
  if points is not None and points < 2:
    raise UserError(f'`points` must be at least 2, or None for all. Received: {points}.')
  base = problem.highest if base is None else np.asarray(base)
  tasks = _tasks(problem, base, points)
  keys = list(tasks)
  # What rank 0 has read and the others have not is their sum.
  record = on_first(lambda: _Record(problem, base, path), rank, total) or _Record(problem, base)
  known = total(np.array([record.losses.get(key, 0.0) for key in keys]))
  is_known = total(np.array([key in record.losses for key in keys], float)) > 0.0
  missing = np.flatnonzero(~is_known)
  for start in track(range(0, len(missing), size)):
    turn, found = missing[start : start + size], np.zeros(len(keys))
    if rank < len(turn):
      found[turn[rank]] = scorer.score(kernels(tasks[keys[turn[rank]]]))['loss']
    found = total(found)
    if not np.isfinite(found).all():
      raise UserError(f'Every measured loss must be finite. Received: {found[turn].tolist()}.')
    known += found
    record.add({keys[place]: float(found[place]) for place in turn})
  losses = dict(zip(keys, known - known[keys.index(_BASE)], strict=True))
  return [
    _between(
      {
        level: losses[_key(variable, level)]
        for level in range(len(variable.choices))
        if _key(variable, level) in losses
      }
      | {int(top): 0.0},
      len(variable.choices),
    )
    for variable, top in zip(problem.variables, base, strict=True)
  ]


def _tasks(problem, base, points):
  """Returns {key: [variables] levels} of all that is to be measured, `base` among them."""
  tasks = {_BASE: base}
  for number, variable in enumerate(problem.variables):
    count = len(variable.choices)
    even = np.round(np.linspace(0, count - 1, min(points or count, count))).astype(int)
    for level in even[even != base[number]]:
      tasks[_key(variable, level)] = np.where(np.arange(len(base)) == number, level, base)
  return tasks


def _between(loss_by_level, count):
  """Returns the [count] losses, linear between those that are known, and falling."""
  levels = sorted(loss_by_level)
  return _falling(np.interp(np.arange(count), levels, [loss_by_level[each] for each in levels]))


def _falling(losses):
  return np.minimum.accumulate(np.asarray(losses, np.float64))


def _key(variable, level):
  return f'{variable.name} {variable.choices[level]:g}'


class _Record:
  """Losses by choice, in a file if there is a path."""

  def __init__(self, problem, base, path=None):
    self._path = path and pathlib.Path(path)
    # What the losses were measured beside.
    self._others = {name: float(choice) for name, choice in problem.values(base).items()}
    self.losses = self._read() if self._path and self._path.exists() else {}

  def add(self, losses):
    self.losses |= losses
    if self._path:
      write_json(self._path, {'others': self._others, 'losses': self.losses})

  def _read(self):
    try:
      content = json.loads(self._path.read_text())
      others, losses = content['others'], dict(content['losses'])
    except (ValueError, KeyError, TypeError) as error:
      raise UserError(
        f'{self._path} holds no measured losses: remove it to measure anew. Received: {error!r}.'
      ) from error
    if others != self._others:
      raise UserError(
        f'{self._path} holds losses beside other choices: give another path, or remove it. '
        f'Received: {others}.'
      )
    return losses
