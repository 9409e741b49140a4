"""Levels, values and budgets, against all solutions of small problems."""

import numpy as np
import pytest
from allocations import everything, problems
from hypothesis import given
from hypothesis import strategies as st

from pocketsize.allocation.problem import Cost, Problem, Term, Variable
from pocketsize.errors import UserError


def bits_problem(budget=None):
  """Two layers of 1 and 3 weights with 2, 4 or 8 bits, and one of 4 that has 8."""
  variables = [Variable('a', (2, 4, 8)), Variable('b', (2, 4, 8)), Variable('c', (8,))]
  tables = [np.array([2.0, 4, 8]) / 8, np.array([6.0, 12, 24]) / 8, np.array([32.0]) / 8]
  terms = [Term((place,), table) for place, table in enumerate(tables)]
  return Problem(variables, Cost('mean weight bits', terms), budget)


def test_the_cost_is_the_sum_of_the_tables_and_the_constant():
  pair = Term((2, 0), np.array([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]]))
  cost = Cost('units', [Term((1,), np.array([0.5, 0.25])), pair], 1000.0)
  assert cost.of(np.array([1, 0, 2])) == 1000.0 + 0.5 + 200.0
  assert cost.of([0, 1, 1]) == 1010.25


def test_lowest_and_highest():
  problem = bits_problem()
  assert problem.lowest.tolist() == [0, 0, 0] and problem.highest.tolist() == [2, 2, 0]
  assert problem.sizes.tolist() == [3, 3, 1] and problem.is_met(problem.highest)


def test_a_budget_by_hand():
  # 2 + 2 * 3 + 8 * 4 bits of 8 weights are 5.
  assert bits_problem(5).is_met([0, 0, 0]) and not bits_problem(5).is_met([1, 0, 0])
  # With 4 bits for the first layer it is a quarter more, with 4 for the second three quarters.
  problem = bits_problem(5.75)
  assert problem.highest_allowed([0, 0, 0], 0) == 2 and problem.highest_allowed([0, 0, 0], 1) == 1
  assert problem.highest_allowed([1, 2, 0], 2) == -1
  assert problem.repaired([2, 2, 0]).tolist() == [1, 0, 0]


def test_of_the_highest_the_one_that_saves_most_goes_down():
  # Down from (2, 2): the second saves 1.5, then the first stands highest, and so on.
  assert bits_problem(6.75).repaired([2, 2, 0]).tolist() == [2, 1, 0]
  assert bits_problem(6.5).repaired([9, 9, 9]).tolist() == [2, 1, 0]
  assert bits_problem(6.4).repaired([9, 9, 9]).tolist() == [1, 1, 0]


def test_a_sum_that_is_rounded_up_meets_its_own_budget():
  terms = [Term((place,), np.array([0.1, 0.2])) for place in range(3)]
  variables = [Variable(name, (1, 2)) for name in 'abc']
  problem = Problem(variables, Cost('units', terms), 0.1 + 0.1 + 0.1 - 1e-12)
  assert problem.is_met([0, 0, 0]) and not problem.is_met([1, 0, 0])


@given(problems(), st.data())
def test_the_highest_allowed_level_against_all_levels(problem, data):
  levels = [data.draw(st.integers(0, size - 1)) for size in problem.sizes]
  place = data.draw(st.integers(0, len(levels) - 1))
  legal = [
    level
    for level in range(problem.sizes[place])
    if problem.is_met([*levels[:place], level, *levels[place + 1 :]])
  ]
  before = list(levels)
  assert problem.highest_allowed(levels, place) == max(legal, default=-1)
  assert levels == before


@given(problems(), st.data())
def test_repaired_levels_are_legal_and_never_above_what_was_asked(problem, data):
  asked = np.array([data.draw(st.floats(0, 6)) for _ in problem.sizes])
  got = problem.repaired(asked)
  assert problem.is_met(got) and (got >= 0).all() and (got <= problem.highest).all()
  assert (got <= asked).all()
  assert problem.repaired(got).tolist() == got.tolist()
  whole = np.minimum(asked.astype(int), problem.highest)
  if problem.is_met(whole):
    assert got.tolist() == whole.tolist()


@given(problems(most=3))
def test_values_and_levels_are_inverse(problem):
  for levels in everything(problem):
    values = problem.values(levels)
    assert list(values) == [variable.name for variable in problem.variables]
    assert problem.levels(dict(reversed(values.items()))).tolist() == levels.tolist()


def test_values_by_hand():
  assert bits_problem().values([0, 2, 0]) == {'a': 2, 'b': 8, 'c': 8}
  assert bits_problem().levels({'a': 2.0, 'b': 8, 'c': 8}).tolist() == [0, 2, 0]


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    ({'a': 2, 'b': 2}, 'a value for each of a, b, c. Received: a, b.'),
    ({'a': 2, 'b': 2, 'c': 8, 'd': 8}, 'a value for each of a, b, c. Received: a, b, c, d.'),
    ({'a': 2, 'b': 3, 'c': 8}, "value for 'b' must be one of 2, 4, 8. Received: 3."),
  ],
)
def test_values_that_do_not_fit(values, message):
  with pytest.raises(UserError, match=message):
    bits_problem().levels(values)


def test_problems_that_make_no_sense():
  cost = Cost('units', [])
  with pytest.raises(UserError, match='must be a layer to allot to. Received: no layers'):
    Problem([], cost)
  with pytest.raises(UserError, match="must be a choice for 'a'. Received: none"):
    Problem([Variable('a', ())], cost)
  with pytest.raises(UserError, match='cheapest has 5 mean weight bits. Received: at most 4.9'):
    bits_problem(4.9)


@pytest.mark.parametrize(
  ('places', 'table', 'message'),
  [
    ((0,), [3.0, 1.0], 'Costs must not fall along the choices. Received: those of a do.'),
    ((0, 1), [[1.0, 2.0, 3.0], [1.0, 3.0, 2.0]], 'Received: those of a, b do.'),
    ((0,), [1.0, np.nan], 'Received: those of a do.'),
    ((0,), [1.0, 2.0, 3.0], r'of \(2,\) choices. Received: shape \(3,\).'),
    ((1, 0), [[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]], r'of \(3, 2\) choices. Received: shape \(2, 3\)'),
  ],
)
def test_tables_by_which_the_cheapest_would_not_be_the_cheapest(places, table, message):
  variables = [Variable('a', (1, 2)), Variable('b', (1, 2, 3))]
  with pytest.raises(UserError, match=message):
    Problem(variables, Cost('units', [Term(places, np.array(table))]), 9.0)
