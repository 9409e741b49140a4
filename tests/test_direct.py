"""Direct allocations by hand, and against all solutions of small problems."""

import numpy as np
import pytest
from allocations import problems
from hypothesis import given
from hypothesis import strategies as st

from pocketsize.allocation.direct import heuristic, listed, uniform
from pocketsize.allocation.problem import Cost, Problem, Term, Variable
from pocketsize.errors import UserError


def problem_of(choices, weights, budget, of=lambda value: value):
  """Variables 'a', 'b', ... whose cost is the mean of their values, weighted."""
  variables = [Variable(name, each) for name, each in zip('abcd', choices, strict=False)]
  terms = [
    Term((place,), weight * np.array([of(value) for value in each]) / sum(weights))
    for place, (each, weight) in enumerate(zip(choices, weights, strict=True))
  ]
  return Problem(variables, Cost('mean', terms), budget)


@pytest.mark.parametrize(
  ('budget', 'expected'), [(2, 0), (3.9, 0), (4, 1), (7, 1), (8, 2), (99, 2)]
)
def test_the_highest_common_level(budget, expected):
  problem = problem_of([(2, 4, 8)] * 3, [1, 2, 3], budget)
  assert uniform(problem).tolist() == [expected] * 3


def test_a_common_value_where_a_layer_has_other_choices():
  choices = [(2, 4, 8), (8,), (3, 4, 5, 8)]
  # Two layers' bits and the other's 8, of weights 1, 1, 2: the least, 2 + 8 + 2 * 3, is 16 / 4.
  expected = {4: [2, 8, 3], 4.9: [2, 8, 3], 5: [4, 8, 4], 5.5: [4, 8, 5], 7.9: [4, 8, 5]}
  for budget, values in expected.items():
    problem = problem_of(choices, [1, 1, 2], budget)
    assert list(problem.values(uniform(problem)).values()) == values
  problem = problem_of(choices, [1, 1, 2], 8)
  assert list(problem.values(uniform(problem)).values()) == [8, 8, 8]


def test_a_common_ratio_falls_with_the_level():
  choices = [(0.9, 0.5, 0.0), (0.5, 0.0), (0.0,)]

  def ratios(budget):
    problem = problem_of(choices, [1, 1, 1], budget, lambda ratio: 1 - ratio)
    return list(problem.values(uniform(problem)).values())

  # Kept: 0.1 + 0.5 + 1; 0.5 + 0.5 + 1; 3.
  assert ratios(1.6 / 3) == [0.9, 0.5, 0.0]
  assert ratios(2 / 3) == [0.5, 0.5, 0.0]
  assert ratios(0.99) == [0.5, 0.5, 0.0]
  assert ratios(1) == [0.0, 0.0, 0.0]


@given(problems())
def test_the_common_choice_against_all_of_them(problem):
  levels = uniform(problem)
  assert problem.is_met(levels)
  for value in range(1, 5):
    common = np.minimum(value, problem.sizes) - 1
    if problem.is_met(common):
      assert (common <= levels).all()
  assert (
    levels.tolist() == np.minimum(levels.max() + 1, problem.sizes).tolist()
    or (levels + 1 == np.minimum(levels.max() + 1, problem.sizes)).all()
  )


def test_the_height_falls_with_the_logarithm_of_the_size():
  # ln n / ln 16: 0.25, 0.5 and 1. Five levels, so level k begins at these plus k / 4.
  sizes, choices = [2, 4, 16], [(1, 2, 3, 4, 5)] * 3

  def levels(budget):
    return heuristic(problem_of(choices, [1, 1, 1], budget), sizes).tolist()

  # s = 0.5: 1, 0, 0; s = 0.75: 2, 1, 0; s = 1: 3, 2, 0; s = 1.25: 4, 3, 1.
  assert levels(1) == [0, 0, 0]
  assert levels(4 / 3) == [1, 0, 0]
  assert levels(5.9 / 3) == [1, 0, 0]
  assert levels(6 / 3) == [2, 1, 0]
  assert levels(8 / 3) == [3, 2, 0]
  assert levels(11 / 3) == [4, 3, 1]
  assert levels(99) == [4, 4, 4]


@given(problems(), st.data())
def test_the_heuristic_meets_every_budget_as_closely_as_it_can(problem, data):
  sizes = np.array([data.draw(st.integers(2, 10**6)) for _ in problem.sizes])
  levels = heuristic(problem, sizes)
  assert problem.is_met(levels)
  heights = np.log(sizes) / np.log(sizes).max()
  found = problem.lowest
  for shift in np.linspace(0, 2.001, 400):
    # Away from where a level begins, so that rounding decides nothing.
    next_ = np.clip(np.floor((shift - heights) * problem.highest + 1e-12), 0, problem.highest)
    if problem.is_met(next_.astype(int)):
      found = next_
  assert (levels >= found).all()
  for one in range(len(sizes)):
    for other in range(len(sizes)):
      if sizes[one] <= sizes[other] and problem.sizes[one] == problem.sizes[other]:
        assert levels[one] >= levels[other]


@pytest.mark.parametrize('sizes', [[2, 3], [2, 3, 1], [2, 3, float('nan')]])
def test_sizes_that_do_not_fit(sizes):
  with pytest.raises(UserError, match='`sizes` must be 3 numbers of at least 2'):
    heuristic(problem_of([(1, 2)] * 3, [1, 1, 1], 2), sizes)


def test_a_list_of_the_user():
  problem = problem_of([(2, 4, 8)] * 2, [1, 3], 5)
  assert listed(problem, {'b': 4, 'a': 8}).tolist() == [2, 1]
  with pytest.raises(UserError, match='cost at most 5 mean. Received: values that cost 5.5.'):
    listed(problem_of([(2, 5, 7)] * 2, [1, 3], 5), {'a': 7, 'b': 5})
  with pytest.raises(UserError, match="'a' must be one of 2, 4, 8. Received: 3"):
    listed(problem, {'a': 3, 'b': 4})
