"""TPE and the Gaussian process: within the budget, repeatable, told what was scored, worth it."""

import numpy as np
import optuna
import pytest
from allocations import problems
from budgets import RandomSearcher, layers, mean_bits, proposals
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketsize.allocation.gaussian_process import expected_improvement
from pocketsize.allocation.studies import Study, gp, spread, tpe

BOTH = pytest.mark.parametrize('make', [tpe, gp])


def assert_legal(problem, levels):
  assert levels.shape == (len(problem.variables),) and levels.dtype.kind == 'i'
  assert np.all((levels >= 0) & (levels <= problem.highest))
  assert problem.is_met(levels)


@given(problems(), st.integers(0, 99))
def test_what_is_spread_is_within_the_budget(problem, seed):
  assert_legal(problem, spread(problem, np.random.default_rng(seed)))


def test_what_is_spread_reaches_all_levels_and_the_budget():
  problem = mean_bits(np.full(10, 0.1), budget=4.0)
  rng = np.random.default_rng(0)
  levels = np.array([spread(problem, rng) for _ in range(100)])
  assert set(levels.ravel()) == set(range(7))
  assert np.mean([problem.cost.of(each) for each in levels]) > 3.8


def test_a_budget_that_all_meet_leaves_levels_uniform():
  problem = mean_bits(np.full(10, 0.1), budget=None)
  rng = np.random.default_rng(0)
  # Rounding leaves half of a step to the lowest and the highest level: their mean is still 3.
  levels = np.array([spread(problem, rng) for _ in range(200)])
  assert abs(levels.mean() - 3.0) < 0.15


@BOTH
@settings(max_examples=8)
@given(problem=problems(), seed=st.integers(0, 99))
def test_budgets_are_never_exceeded(make, problem, seed):
  searcher = make(problem, seed, startup=2)
  for reward in range(3):
    # Rounds of two, also where fewer levels are left than are asked for.
    for levels in [searcher.ask(), searcher.ask()]:
      assert_legal(problem, levels)
      searcher.tell(levels, float(reward % 2))


@BOTH
def test_the_same_seed_and_history_give_the_same_proposals(make):
  problem, score = layers(5, seed=0)
  first = proposals(make(problem, seed=1, startup=5), score, 12)
  np.testing.assert_array_equal(proposals(make(problem, seed=1, startup=5), score, 12), first)
  other_seed = proposals(make(problem, seed=2, startup=5), score, 12)
  other_history = proposals(make(problem, seed=1, startup=5), lambda levels: -score(levels), 12)
  assert np.any(other_seed != first)
  np.testing.assert_array_equal(other_history[:5], first[:5])
  assert np.any(other_history[5:] != first[5:])


@BOTH
def test_the_proposals_of_a_round_differ(make):
  problem, score = layers(5, seed=0)
  searcher = make(problem, seed=1, startup=4)
  for _ in range(5):
    asked = [searcher.ask() for _ in range(4)]
    assert len({tuple(levels) for levels in asked}) == 4
    for levels in asked:
      searcher.tell(levels, score(levels))


class Dearest(optuna.samplers.BaseSampler):
  """Suggests the highest levels, and remembers which trials it has seen."""

  def infer_relative_search_space(self, study, trial):
    return {}

  def sample_relative(self, study, trial, search_space):
    states = optuna.trial.TrialState
    self.complete = study.get_trials(states=(states.COMPLETE,))
    self.running = [
      each for each in study.get_trials(states=(states.RUNNING,)) if each.number != trial.number
    ]
    return {}

  def sample_independent(self, study, trial, param_name, param_distribution):
    return param_distribution.high


def test_a_study_is_told_the_repaired_point():
  problem = mean_bits((0.25, 0.75), budget=4.0)
  sampler = Dearest()
  study = Study(problem, sampler, startup=0, seed=0)
  # From 8 bits each down to 4 bits, the one that saves most first.
  study.tell(np.array([6, 0]), 0.25)
  asked = study.ask()
  np.testing.assert_array_equal(asked, problem.repaired([6, 6]))
  study.ask()
  assert [(each.params, each.value) for each in sampler.complete] == [
    ({'layer0': 6, 'layer1': 0}, 0.25)
  ]
  assert [each.params for each in sampler.running] == [
    dict(zip(('layer0', 'layer1'), asked.tolist(), strict=True))
  ]
  study.tell(asked, 0.5)
  study.ask()
  assert sampler.complete[1].params == sampler.running[0].params | {'layer0': asked[0]}
  assert sampler.complete[1].value == 0.5


def test_expected_improvement_by_hand():
  found = expected_improvement(np.array([1.0, 3.0, 0.0, 2.0]), np.array([1.0, 0.0, 0.0, 1.0]), 1.0)
  # phi(0); what is known; nothing; Phi(1) + phi(1).
  np.testing.assert_allclose(found, [0.39894228, 2.0, 0.0, 0.84134475 + 0.24197072], rtol=1e-7)


def test_expected_improvement_against_samples():
  samples = np.random.default_rng(0).normal(0.3, 2.0, 400_000)
  slow = np.maximum(samples - 1.1, 0).mean()
  # The standard error is 2 / sqrt(400000) = 0.003 at most.
  assert abs(expected_improvement(np.array([0.3]), np.array([2.0]), 1.1)[0] - slow) < 0.01


def test_studies_are_quiet(capfd):
  problem, score = layers(3, seed=0)
  proposals(tpe(problem, startup=2), score, 4)
  out = capfd.readouterr()
  assert (out.out, out.err) == ('', '')


@BOTH
def test_a_model_beats_random_search(make):
  """What is lost at the best of 40 roll-outs, over what random search then loses: three seeds."""
  shares = []
  for seed in range(3):
    problem, score = layers(12, seed)
    lost = [
      1 - max(map(score, proposals(searcher, score, 40)))
      for searcher in (make(problem, seed), RandomSearcher(problem, seed))
    ]
    shares.append(lost[0] / lost[1])
  assert np.mean(shares) < 0.9, shares
