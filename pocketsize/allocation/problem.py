"""What is to be decided: one choice for each variable, so that their cost stays within a budget.

All allocators speak in levels: `levels[i]` is the place of variable i's value among its choices,
which are in the order of rising cost. So bits and ratios, of layers or of groups of channels, are
one thing to them, and more is always dearer.
"""

import math
from typing import NamedTuple

import numpy as np

from pocketsize.errors import UserError

# Sums of floats may exceed by their rounding what they equal.
_ROUNDING = 1e-9


class Variable(NamedTuple):
  """One decision.

  Attributes:
    name: path of a layer, or name of a group of channels.
    choices: the legal values in the order of rising cost: bits ascending, ratios descending.
    features: numbers that describe it to an agent; the same number of them for all variables.
  """

  name: str
  choices: tuple[float, ...]
  features: tuple[float, ...] = ()


class Term(NamedTuple):
  """A part of the cost that depends on the levels of one variable or of a few.

  Attributes:
    places: numbers of the variables.
    table: float array with an axis for each of them, of the size of its choices; falls along none.
  """

  places: tuple[int, ...]
  table: np.ndarray


class Cost(NamedTuple):
  """A cost as a sum of tables, so that it is exact for a solver too.

  Attributes:
    name: with its unit, for messages and plots, such as 'mean weight bits'.
    terms: list of `Term`s.
    constant: what no variable changes.
  """

  name: str
  terms: list
  constant: float = 0.0

  def of(self, levels):
    """Returns the cost of [variables] integer levels."""
    parts = (term.table[tuple(levels[place] for place in term.places)] for term in self.terms)
    return float(self.constant + math.fsum(parts))


class Problem:
  """Variables, what they cost together, and what that may be at most.

  Args:
    variables: list of `Variable`s.
    cost: a `Cost` of them.
    budget: the largest legal cost; None for none.

  Raises:
    UserError: there is no variable, one has no choice, a table does not fit the choices or falls
      along them, or the cheapest choices exceed the budget.
  """

  def __init__(self, variables, cost, budget=None):
    if not variables:
      raise UserError('There must be a layer to allot to. Received: no layers.')
    for variable in variables:
      if not variable.choices:
        raise UserError(f'There must be a choice for {variable.name!r}. Received: none.')
    self.variables = list(variables)
    self.cost = cost
    self.budget = math.inf if budget is None else float(budget)
    self.sizes = np.array([len(variable.choices) for variable in self.variables])
    for term in cost.terms:
      self._check(term)
    least = cost.of(self.lowest)
    if not self._fits(least):
      raise UserError(
        f'No choice meets the budget: the cheapest has {least:.6g} {cost.name}. '
        f'Received: at most {self.budget:.6g}.'
      )

  @property
  def lowest(self):
    """The levels of the cheapest choice."""
    return np.zeros(len(self.variables), int)

  @property
  def highest(self):
    """The levels of the dearest choice, whatever the budget."""
    return self.sizes - 1

  def is_met(self, levels):
    """Returns whether the cost of `levels` is within the budget."""
    return self._fits(self.cost.of(levels))

  def values(self, levels):
    """Returns {name: value} of [variables] levels."""
    return {
      variable.name: variable.choices[level]
      for variable, level in zip(self.variables, levels, strict=True)
    }

  def levels(self, values):
    """Returns the levels of {name: value}.

    Raises:
      UserError: a name is missing or unknown, or a value is not among its choices.
    """
    names = [variable.name for variable in self.variables]
    if sorted(values) != sorted(names):
      raise UserError(
        f'There must be a value for each of {", ".join(names)}. Received: {", ".join(values)}.'
      )
    for variable in self.variables:
      if values[variable.name] not in variable.choices:
        legal = ', '.join(f'{choice:g}' for choice in sorted(variable.choices))
        raise UserError(
          f'The value for {variable.name!r} must be one of {legal}. '
          f'Received: {values[variable.name]}.'
        )
    return np.array([each.choices.index(values[each.name]) for each in self.variables])

  def nearest(self, value):
    """Returns the levels whose values are nearest to one value, the cheaper of two; any cost."""
    return np.array(
      [int(np.argmin(np.abs(np.array(each.choices) - value))) for each in self.variables]
    )

  def highest_allowed(self, levels, place):
    """Returns the highest level of variable `place` that meets the budget, or -1.

    Args:
      levels: of the other variables; with 0 for those that are still to be decided, the answer
        leaves enough for them.
      place: number of the variable; its own level is ignored.
    """
    levels = np.array(levels)
    low, high = -1, self.sizes[place] - 1
    while low < high:
      levels[place] = (low + high + 1) // 2
      low, high = (levels[place], high) if self.is_met(levels) else (low, levels[place] - 1)
    return int(low)

  def repaired(self, levels):
    """Returns the levels that are legal and within the budget, and lower than `levels` if at all.

    While the budget is exceeded, the variable that stands highest among its choices goes down by
    one; of several, the one that saves most; of several, the first.

    Args:
      levels: [variables] numbers.
    """
    levels = np.clip(np.asarray(levels, int), 0, self.highest)
    while not self.is_met(levels):
      heights = np.where(levels > 0, levels / np.maximum(self.highest, 1), -1.0)
      candidates = np.flatnonzero(heights == heights.max())
      lower = [levels - (np.arange(len(levels)) == place) for place in candidates]
      levels = min(lower, key=self.cost.of)
    return levels

  def _check(self, term):
    """Raises a UserError for a `Term` by which the cheapest choice would not be the cheapest."""
    table, sizes = np.asarray(term.table), tuple(self.sizes[list(term.places)].tolist())
    if table.shape != sizes:
      raise UserError(
        f'A table of costs must have an axis for each of its variables, of {sizes} choices. '
        f'Received: shape {table.shape}.'
      )
    steps = [np.diff(table, axis=axis) for axis in range(table.ndim)]
    # Also refuses what is not a number.
    if not all((step >= -_ROUNDING * (1.0 + np.abs(table).max())).all() for step in steps):
      names = ', '.join(self.variables[place].name for place in term.places)
      raise UserError(f'Costs must not fall along the choices. Received: those of {names} do.')

  def _fits(self, cost):
    return cost <= self.budget * (1.0 + _ROUNDING) + _ROUNDING
