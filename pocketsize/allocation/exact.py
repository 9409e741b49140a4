"""The best allocation when losses add up: an integer program, solved exactly by HiGHS.

x[i, k] is 1 where variable i has level k: minimise sum losses[i][k] x[i, k] with sum_k x[i, k] = 1
and the cost within the budget. A term of several variables is made linear by one y for each entry
of its table, of which the sum over all entries with level k of variable i is x[i, k] (the local
marginal polytope): where x is integral, y is 1 at one entry, that of the levels.
"""

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from pocketsize.allocation.direct import uniform
from pocketsize.errors import UserError

# HiGHS takes 1e-6 for nothing, in the objective and in the budget. With the loss of a solution that
# is known, and with the budget, at these numbers that is 1e-8 and 1e-9 of them.
_LOSS = 1e2
_BUDGET = 1e3
# So many choices are all tried: HiGHS may miss the best one if its cost is next to the budget.
_FEW = 1000


def minimise(problem, losses):
  """Returns the [variables] levels with the least sum of losses within the budget.

  Of levels of a variable that have the same loss the lowest is taken.

  Args:
    problem: a `Problem`.
    losses: list of [choices] float arrays, one for each variable.

  Raises:
    UserError: losses that do not fit the variables or are not finite, or the solver gave up.
  """
  losses = _checked(problem, losses)
  best = np.array([int(np.argmin(each)) for each in losses])
  if problem.is_met(best):
    return best
  excess = [each - each.min() for each in losses]
  if np.prod(problem.sizes, dtype=float) <= _FEW:
    return _tried(problem, excess)
  levels = uniform(problem)
  bound, found = np.inf, _total(excess, levels)
  # Again with the loss of the answer, if that is so much less that HiGHS saw little of it.
  while 0.0 < found < 0.1 * bound:
    bound = found
    levels = _within(problem, excess, bound)
    found = _total(excess, levels)
  return levels


def _tried(problem, losses):
  """Returns the best of all levels that meet the budget; of equal ones the first."""
  every = (np.array(levels) for levels in np.ndindex(*problem.sizes))
  return min(filter(problem.is_met, every), key=lambda levels: _total(losses, levels))


def _total(losses, levels):
  return sum(float(each[level]) for each, level in zip(losses, levels, strict=True))


def _within(problem, losses, bound):
  """Returns the best levels, given that some that are legal lose `bound` together."""
  # So no level of the answer loses more. What those lose that are not open does not matter.
  is_open = [_undominated(each) & (each <= bound * (1.0 + 1e-9)) for each in losses]
  shares = [np.minimum(each, bound) / bound for each in losses]
  program = _Program(problem, [_LOSS * share for share in shares], is_open)
  levels = program.solve()
  while not problem.is_met(levels):
    program.exclude(levels)
    levels = program.solve()
  return levels


def _checked(problem, losses):
  losses = [np.asarray(each, float) for each in losses]
  shapes = [each.shape for each in losses]
  if shapes != [(size,) for size in problem.sizes]:
    raise UserError(
      '`losses` must have a value for each choice of each variable, so '
      f'{", ".join(map(str, problem.sizes))} of them. Received: shapes '
      f'{", ".join(map(str, shapes))}.'
    )
  for variable, each in zip(problem.variables, losses, strict=True):
    if not np.isfinite(each).all():
      raise UserError(
        f'`losses` must be finite. Received: {", ".join(map(str, each))} for {variable.name!r}.'
      )
  return losses


def _undominated(losses):
  """Returns which levels lose less than all cheaper ones."""
  return losses < np.concatenate([[np.inf], np.minimum.accumulate(losses)[:-1]])


class _Program:
  """The integer program: x of all variables one after the other, then y of all terms.

  Args:
    problem: a `Problem` with a finite budget.
    losses: list of [choices] arrays, at least 0.
    is_open: list of [choices] bools, the levels that may be taken.
  """

  def __init__(self, problem, losses, is_open):
    self._starts = np.concatenate([[0], np.cumsum(problem.sizes)])
    self._levels = [
      np.arange(each, end) for each, end in zip(self._starts[:-1], self._starts[1:], strict=True)
    ]
    self._size, self._rows, self._sums = self._starts[-1], [], []
    for columns in self._levels:
      self._equal({column: 1.0 for column in columns}, 1.0)
    costs = np.zeros(self._size)
    for term in problem.cost.terms:
      if len(term.places) == 1:
        costs[self._levels[term.places[0]]] += term.table
      else:
        costs = np.concatenate([costs, np.ravel(term.table)])
        self._add_entries(term)
    self._losses = np.zeros(self._size)
    self._losses[: self._starts[-1]] = np.concatenate(losses)
    self._upper = np.ones(self._size)
    self._upper[: self._starts[-1]] = np.concatenate(is_open)
    # What the problem itself takes for rounding is legal here.
    room = problem.budget - problem.cost.constant + 1e-9 * (1.0 + abs(problem.budget))
    scale = _BUDGET / max(np.abs(costs).max(), abs(room))
    self._limits = [LinearConstraint(costs[None] * scale, -np.inf, room * scale)]

  def _equal(self, row, total):
    """Adds the equation sum_c row[c] v[c] = total."""
    self._rows.append(row)
    self._sums.append(total)

  def _add_entries(self, term):
    numbers = self._size + np.arange(term.table.size).reshape(term.table.shape)
    self._size += term.table.size
    for axis, place in enumerate(term.places):
      for column, entries in zip(self._levels[place], np.moveaxis(numbers, axis, 0), strict=True):
        self._equal({**{entry: 1.0 for entry in entries.ravel()}, column: -1.0}, 0.0)

  def exclude(self, levels):
    """Forbids what HiGHS found and is over the budget by less than it can see."""
    row = np.zeros(self._size)
    row[self._starts[:-1] + levels] = 1.0
    self._limits.append(LinearConstraint(row[None], -np.inf, len(levels) - 1.0))

  def solve(self):
    """Returns the best [variables] levels."""
    columns = np.concatenate([list(row) for row in self._rows])
    values = np.concatenate([list(row.values()) for row in self._rows])
    lines = np.repeat(np.arange(len(self._rows)), [len(row) for row in self._rows])
    equations = sparse.csr_array((values, (lines, columns)), shape=(len(self._rows), self._size))
    answer = milp(
      self._losses,
      integrality=np.arange(self._size) < self._starts[-1],
      bounds=Bounds(0.0, self._upper),
      constraints=[LinearConstraint(equations, self._sums, self._sums), *self._limits],
      # HiGHS' presolve calls programs infeasible that are not, where choices are near the budget.
      options={'mip_rel_gap': 0.0, 'presolve': False},
    )
    if answer.x is None:
      raise UserError(f'The integer program has no answer. Received: {answer.message}')
    return np.array([int(np.argmax(answer.x[columns])) for columns in self._levels])
