"""The integer program against all solutions, and its speed."""

import ctypes
import time

import numpy as np
import pytest
from allocations import everything, problems
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketsize.allocation.exact import minimise
from pocketsize.allocation.problem import Cost, Problem, Term, Variable
from pocketsize.errors import UserError


def total(losses, levels):
  return sum(each[level] for each, level in zip(losses, levels, strict=True))


def check(problem, losses):
  levels = minimise(problem, losses)
  assert problem.is_met(levels)
  best = min(total(losses, each) for each in everything(problem))
  assert total(losses, levels) == pytest.approx(best, rel=1e-9, abs=1e-12)


@settings(max_examples=150)
@given(problems(), st.data())
def test_tables_of_one_and_more_places_against_all_solutions(problem, data):
  rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
  kind = data.draw(st.sampled_from(['falling', 'any', 'whole', 'steep']))
  losses = []
  for size in problem.sizes:
    each = rng.normal(size=size)
    if kind == 'falling':
      each = np.sort(each)[::-1]
    if kind == 'whole':
      each = np.round(3 * each)
    losses.append(4.0 ** (5 * each) if kind == 'steep' else each)
  check(problem, losses)


@settings(max_examples=20)
@given(problems(most=8, choices=3, places=2), st.integers(0, 2**32 - 1))
def test_up_to_eight_variables_against_all_solutions(problem, seed):
  rng = np.random.default_rng(seed)
  check(problem, [np.sort(rng.random(size))[::-1] for size in problem.sizes])


def test_by_hand():
  """Of 10 bits for two equal layers the one that suffers more gets 8."""
  variables = [Variable('a', (2, 4, 8)), Variable('b', (2, 4, 8))]
  terms = [Term((place,), np.array([2.0, 4, 8])) for place in range(2)]
  problem = Problem(variables, Cost('bits', terms), 10)
  losses = [np.array([9.0, 5, 0]), np.array([10.0, 1, 0])]
  # 5 + 1 of (4, 4), 0 + 10 of (8, 2), 9 + 0 of (2, 8).
  assert minimise(problem, losses).tolist() == [1, 1]
  assert minimise(problem, [losses[0] * 2, losses[1] / 2]).tolist() == [2, 0]


def test_the_cheapest_of_levels_that_lose_the_same():
  variables = [Variable('a', (2, 4, 8)), Variable('b', (2, 4, 8))]
  terms = [Term((place,), np.array([2.0, 4, 8])) for place in range(2)]
  losses = [np.array([1.0, 1, 1]), np.array([3.0, 0, 0])]
  for budget in (None, 10, 6):
    assert minimise(Problem(variables, Cost('bits', terms), budget), losses).tolist() == [0, 1]


@pytest.mark.parametrize('excess', [2.5e-9, 4e-9, 1e-7])
@pytest.mark.parametrize(('count', 'legal'), [(3, 1), (6, 2)])
def test_a_solution_that_is_over_the_budget_by_next_to_nothing_is_none(count, legal, excess):
  """HiGHS takes it for one, the problem does not: each such must be excluded."""
  variables = [Variable(f'v{place}', (1, 2)) for place in range(count)]
  table = np.array([0.0, (1.0 + excess) / (legal + 1)])
  terms = [Term((place,), table) for place in range(count)]
  problem = Problem(variables, Cost('units', terms), 1.0)
  levels = minimise(problem, [np.array([place + 1.0, 0.0]) for place in range(count)])
  assert levels.tolist() == [0] * (count - legal) + [1] * legal


def test_losses_of_very_different_sizes():
  """Beside the first layer's the others' are nothing, and yet they decide."""
  variables = [Variable(name, (1, 2)) for name in 'abc']
  terms = [Term((place,), np.array([0.0, 1.0])) for place in range(3)]
  problem = Problem(variables, Cost('units', terms), 2.0)
  losses = [np.array([1e12, 0]), np.array([1e-12, 0]), np.array([1.1e-12, 0])]
  assert minimise(problem, losses).tolist() == [1, 0, 1]


@pytest.mark.parametrize(('count', 'seed'), [(10, 0), (10, 1), (54, 0), (200, 0), (200, 5)])
def test_many_layers_of_seven_choices(count, seed, capfd):
  """No layer can get a bit more, nor two trade one, to lose less. The solver prints nothing."""
  rng = np.random.default_rng(seed)
  bits = np.arange(2, 9)
  sizes = np.round(np.exp(rng.uniform(5, 14, count)))
  losses = list(np.exp(rng.normal(0, 2, (count, 1))) * sizes[:, None] * 4.0**-bits)
  terms = [Term((place,), size * bits / sizes.sum()) for place, size in enumerate(sizes)]
  variables = [Variable(f'v{place}', tuple(bits.tolist())) for place in range(count)]
  problem = Problem(variables, Cost('bits', terms), 4.0)
  began = time.monotonic()
  levels = minimise(problem, losses)
  # Of 200 layers less than a second where nothing else runs.
  assert time.monotonic() - began < 30.0
  ctypes.CDLL(None).fflush(None)
  assert capfd.readouterr() == ('', '')
  assert problem.is_met(levels)
  cost, least = problem.cost.of(levels), total(losses, levels)
  for place in np.flatnonzero(levels < 6):
    higher = levels + (np.arange(count) == place)
    more = cost + sizes[place] / sizes.sum()
    assert more > 4.0
    for other in np.flatnonzero(levels > 0):
      if other != place and more - sizes[other] / sizes.sum() <= 4.0:
        assert total(losses, higher - (np.arange(count) == other)) >= least * (1 - 1e-9)


def test_pairs_of_19_units_with_16_choices():
  rng = np.random.default_rng(0)
  kept = np.arange(1, 17) / 16
  weights = rng.uniform(0.2, 1, 18)
  terms = [
    Term((place, place + 1), weight * np.outer(kept, kept) / weights.sum())
    for place, weight in enumerate(weights)
  ]
  losses = [scale * (1 - kept) ** 2 for scale in np.exp(rng.normal(0, 1, 19))]
  variables = [Variable(f'v{place}', tuple(kept.tolist())) for place in range(19)]
  problem = Problem(variables, Cost('share of MACs', terms), 0.5)
  levels = minimise(problem, losses)
  assert 0.49 < problem.cost.of(levels) <= 0.5 * (1 + 1e-8)
  # Better than each step up or down, with what it takes elsewhere.
  for place in range(19):
    higher = np.minimum(levels + (np.arange(19) == place), 15)
    if not np.array_equal(higher, levels):
      assert not problem.is_met(higher) or total(losses, higher) >= total(losses, levels)


@pytest.mark.parametrize(
  ('losses', 'message'),
  [
    ([[1, 0]], '2, 2 of them'),
    ([[1, 0], [1, 0, 0]], r'Received: shapes \(2,\), \(3,\)'),
    ([[1, 0], [1, float('nan')]], "must be finite. Received: 1.0, nan for 'b'"),
    ([[float('inf'), 0], [1, 0]], "must be finite. Received: inf, 0.0 for 'a'"),
  ],
)
def test_losses_that_make_no_sense(losses, message):
  variables = [Variable(name, (1, 2)) for name in 'ab']
  terms = [Term((place,), np.array([0.0, 1.0])) for place in range(2)]
  with pytest.raises(UserError, match=message):
    minimise(Problem(variables, Cost('units', terms), 1), losses)
