"""Allocations without a search: one height for all, lower for larger layers, or a user's own."""

import numpy as np

from pocketsize.errors import UserError


def uniform(problem):
  """Returns the highest common choice that meets the budget, as [variables] levels.

  Where all variables have the same number of choices, that is one level for all. Otherwise it is
  one value: each variable takes its dearest choice that is not dearer than it, or its cheapest if
  all are. So with 2 to 8 bits and a layer that has 8 in any case, the others share their bits.

  Args:
    problem: a `Problem` whose choices all rise or all fall with the levels.
  """
  if len(set(problem.sizes)) == 1:
    candidates = [np.full(len(problem.sizes), level) for level in range(problem.sizes[0])]
  else:
    candidates = _common_values(problem)
  return _highest_met(problem, candidates)


def _common_values(problem):
  """Returns the levels of each common value, from the cheapest to the dearest."""
  choices = [variable.choices for variable in problem.variables]
  falls = any(each[-1] < each[0] for each in choices)
  signed = [np.array(each, float) * (-1.0 if falls else 1.0) for each in choices]
  return [
    np.array([max(int(np.sum(each <= value)) - 1, 0) for each in signed])
    for value in np.unique(np.concatenate(signed))
  ]


def heuristic(problem, sizes):
  """Returns levels that are the lower the larger a layer is, as [variables] ints.

  After PocketFlow's `heurist`, whose ratio of layer i grows as ln(n_i): the height of a layer among
  its choices, from 0 to 1, is s - ln(n_i) / max_j ln(n_j), clipped, and its level the highest that
  does not lie above it. s is the largest with which the budget is met.

  Args:
    problem: a `Problem`.
    sizes: [variables] numbers of weights, each at least 2.

  Raises:
    UserError: another number of sizes, or one below 2.
  """
  sizes = np.asarray(sizes, float)
  if sizes.shape != problem.sizes.shape or not (sizes >= 2.0).all():
    raise UserError(
      f'`sizes` must be {len(problem.sizes)} numbers of at least 2. Received: {sizes.tolist()}.'
    )
  offsets = np.log(sizes) / np.log(sizes).max()
  # The s at which each level begins.
  begins = [
    offset + np.arange(1, top + 1) / max(top, 1)
    for offset, top in zip(offsets, problem.highest, strict=True)
  ]
  shifts = [0.0, *np.unique(np.concatenate(begins))]
  return _highest_met(
    problem,
    [np.array([int(np.sum(each <= shift)) for each in begins]) for shift in shifts],
  )


def listed(problem, values):
  """Returns the levels of a user's own values.

  Args:
    problem: a `Problem`.
    values: {name of a variable: value}.

  Raises:
    UserError: the values exceed the budget, or see `Problem.levels`.
  """
  levels = problem.levels(values)
  if not problem.is_met(levels):
    raise UserError(
      f'The listed values must cost at most {problem.budget:.6g} {problem.cost.name}. '
      f'Received: values that cost {problem.cost.of(levels):.6g}.'
    )
  return levels


def _highest_met(problem, candidates):
  """Returns the last of rising candidates that meets the budget, of which the first does."""
  low, high = 0, len(candidates) - 1
  while low < high:
    middle = (low + high + 1) // 2
    low, high = (middle, high) if problem.is_met(candidates[middle]) else (low, middle - 1)
  return candidates[low]
