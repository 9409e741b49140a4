"""All allocators by name, on small problems with synthetic candidates."""

import dataclasses
import itertools
import json
import types
from typing import NamedTuple

import numpy as np
import pytest

from pocketsize.allocation import allocators, direct
from pocketsize.allocation.problem import Cost, Problem, Term, Variable
from pocketsize.rl.ddpg import DdpgConfig
from tests import budgets

SEARCHES = ('rl', 'tpe', 'gp')
each_allocator = pytest.mark.parametrize('name', allocators.ALLOCATORS)
each_search = pytest.mark.parametrize('name', SEARCHES)
# Behind the 10 with which studies begin, there are some that a model proposes.
ROLL_OUTS = 13
SHARES = (0.1, 0.2, 0.3, 0.4)
# By layer; the second is the most sensitive for its size.
TRACES = (3.0, 40.0, 0.5, 1.0)


def bits():
  """Four layers of 2 to 8 bits, 4 in the mean."""
  return budgets.mean_bits(SHARES, 4.0)


def channels():
  """Ratios of three groups in a chain, whose cost is of pairs."""
  choices = (0.75, 0.5, 0.25, 0.0)
  kept = 1.0 - np.array(choices)
  terms = [
    Term((0,), 0.2 * kept),
    Term((0, 1), 0.5 * np.outer(kept, kept)),
    Term((1, 2), 0.3 * np.outer(kept, kept)),
  ]
  variables = [Variable(f'layer{place}', choices, (1.0,)) for place in range(3)]
  return Problem(variables, Cost('share of MACs', terms), 0.5)


PROBLEMS = {'bits': bits, 'channels': channels}
each_problem = pytest.mark.parametrize('make', PROBLEMS.values(), ids=PROBLEMS)


class Candidates:
  """Levels stand for kernels; the error of a layer is a fourth of itself with each level more."""

  def __init__(self, problem):
    self._tops = {each.name: len(each.choices) for each in problem.variables}

  def kernels(self, levels):
    return tuple(int(level) for level in levels)

  def errors(self, name):
    return {name: 0.25 ** np.arange(self._tops[name])}


def loss(levels):
  """What levels lose: for each layer its share of 1 less 0.6 with each level."""
  weights = np.array(TRACES[: len(levels)])
  return float(weights / weights.sum() @ 0.6 ** np.asarray(levels, float))


def ground(problem, folder, seed=0, **changes):
  """Returns (`Ground`, list of the levels that are scored)."""
  scored = []

  def score(levels):
    scored.append([int(level) for level in levels])
    return {'accuracy': 1.0 - loss(levels), 'loss': loss(levels)}

  fields = {
    'problem': problem,
    'sizes': [int(1000 * share) for share in SHARES[: len(problem.variables)]],
    'candidates': Candidates(problem),
    'scorer': types.SimpleNamespace(score=lambda levels: {'loss': loss(levels)}),
    'traces': lambda path: {
      each.name: trace for each, trace in zip(problem.variables, TRACES, strict=False)
    },
    'score': score,
    'reward': lambda found, cost: -found['loss'],
    'rollouts': ROLL_OUTS,
    'rollouts_min': 4,
    'middle': None,
    'random_order': True,
    'agent': DdpgConfig(batch_size=8),
    'seed': seed,
    'folder': folder,
    'about': {'seed': seed},
  }
  return allocators.Ground(**(fields | changes)), scored


def least(problem, tables):
  """Returns the least sum of tables within the budget, of all levels that there are."""
  return min(
    sum(table[level] for table, level in zip(tables, levels, strict=True))
    for levels in itertools.product(*map(range, problem.sizes))
    if problem.is_met(levels)
  )


class Run(NamedTuple):
  """What an allocator did: the problem, its outcome, what was scored, the files, what was shown."""

  problem: Problem
  outcome: object
  scored: list
  files: dict
  shown: list


@pytest.fixture(scope='module')
def allotted(tmp_path_factory):
  """Returns the `Run` of an allocator, each once."""
  kept = {}

  def get(name, make=bits, seed=0, again=False):
    if (name, make, seed, again) not in kept:
      problem, folder, shown = make(), tmp_path_factory.mktemp(name), []
      given, scored = ground(
        problem, folder, seed, track=lambda done, best: shown.append((done, best.reward))
      )
      if name != 'hawq':
        given = dataclasses.replace(
          given, traces=lambda path: pytest.fail('nobody needs curvature')
        )
      outcome = allocators.allocate(name, given)
      files = {path.name: json.loads(path.read_text()) for path in folder.iterdir()}
      kept[name, make, seed, again] = Run(problem, outcome, scored, files, shown)
    return kept[name, make, seed, again]

  return get


@each_problem
@each_allocator
def test_the_budget_is_met_and_what_is_chosen_was_scored(allotted, name, make):
  problem, outcome, scored, *_ = allotted(name, make)
  levels = outcome.levels.tolist()
  assert problem.is_met(levels) and len(levels) == len(problem.variables)
  assert [record.number for record in outcome.records] == list(
    range(ROLL_OUTS if name in SEARCHES else 1)
  )
  chosen = next(record for record in outcome.records if record.levels == levels)
  assert chosen.reward == max(record.reward for record in outcome.records)
  for record in outcome.records:
    assert record.levels in scored and problem.is_met(record.levels)
    assert record.reward == -record.score['loss'] == -loss(record.levels)
    assert record.cost == problem.cost.of(record.levels)


@each_allocator
def test_the_files_that_an_allocator_leaves(allotted, name):
  expected = {'sensitivity': {'losses.json'}, **dict.fromkeys(SEARCHES, {'search.json'})}
  assert set(allotted(name).files) == expected.get(name, set())


@each_allocator
def test_the_same_seed_gives_the_same(allotted, name):
  one, other = (
    [record._replace(seconds=0.0) for record in allotted(name, again=again).outcome.records]
    for again in (False, True)
  )
  assert one == other


@pytest.mark.parametrize('name', ('tpe', 'gp'))
def test_a_search_depends_on_its_seed(allotted, name):
  one, other = (
    [record.levels for record in allotted(name, seed=seed).outcome.records] for seed in (0, 1)
  )
  assert one[0] == other[0] and one != other


@pytest.mark.parametrize('name', ('tpe', 'gp'))
def test_a_search_begins_where_it_is_told(tmp_path, name):
  given, scored = ground(bits(), tmp_path, rollouts=2, middle=np.array([4, 0, 3, 0]))
  allocators.allocate(name, given)
  assert scored[0] == [4, 0, 3, 0]


@each_search
def test_a_search_begins_with_the_uniform_choice_and_says_how_far_it_is(allotted, name):
  run = allotted(name)
  assert run.outcome.records[0].levels == direct.uniform(bits()).tolist()
  rewards = [record.reward for record in run.outcome.records]
  assert run.shown == [(done, max(rewards[:done])) for done in range(1, ROLL_OUTS + 1)]
  content = run.files['search.json']
  assert content['about'] == {'seed': 0}
  assert content['rollouts'] == content['done'] == ROLL_OUTS


@each_search
@pytest.mark.parametrize('start', ('hawq', 'sensitivity'))
def test_a_search_begins_around_another_choice(tmp_path, monkeypatch, name, start):
  around, searcher = [], allocators.AgentSearcher
  monkeypatch.setattr(
    allocators,
    'AgentSearcher',
    lambda problem, count, least, middle, **options: (
      around.append(middle.tolist()) or searcher(problem, count, least, middle, **options)
    ),
  )
  given, scored = ground(bits(), tmp_path, start=start)
  wanted = allocators.allocate(start, given).levels.tolist()
  scored.clear()
  outcome = allocators.allocate(name, given)
  assert scored[:2] == [[2, 2, 2, 2], wanted] and wanted != scored[0]
  assert around == ([wanted] if name == 'rl' else [])
  assert outcome.records[0].levels == scored[0]
  assert max(record.reward for record in outcome.records) >= -loss(wanted)


def test_all_workers_take_part_in_where_a_search_begins(tmp_path, monkeypatch):
  """Sums over the workers wait for each of them."""
  asked, searched = [], []
  monkeypatch.setattr(allocators, 'search', lambda *given, **options: searched.append(options))
  given, _ = ground(bits(), tmp_path, start='hawq', workers={'rank': 1, 'size': 2})
  traces = given.traces
  given = dataclasses.replace(given, traces=lambda path: asked.append('traces') or traces(path))
  allocators.ALLOCATORS['rl'](given)
  assert asked == ['traces']
  assert len(searched[0]['first']) == 2


@each_problem
@pytest.mark.parametrize('name', ['hawq', 'sensitivity', 'uniform', 'heuristic'])
def test_all_workers_go_on_with_the_choice_of_the_first(name, make, tmp_path):
  there = [int(level) for level in make().lowest]
  given, scored = ground(make(), tmp_path, broadcast=lambda levels: there)
  outcome = allocators.allocate(name, given)
  assert outcome.levels.tolist() == there == scored[0] == outcome.records[0].levels


@each_problem
def test_hawq_and_sensitivity_are_the_best_of_their_tables(tmp_path, make):
  problem = make()
  given, _ = ground(problem, tmp_path)
  count = len(problem.variables)
  weights = np.array(TRACES[:count]) / sum(TRACES[:count])
  tables = {
    'hawq': [
      trace * 0.25 ** np.arange(size)
      for trace, size in zip(TRACES[:count], problem.sizes, strict=True)
    ],
    'sensitivity': [
      weight * (0.6 ** np.arange(size) - 0.6 ** (size - 1))
      for weight, size in zip(weights, problem.sizes, strict=True)
    ],
  }
  for name, each in tables.items():
    levels = allocators.allocate(name, given).levels
    total = sum(table[level] for table, level in zip(each, levels, strict=True))
    assert total == pytest.approx(least(problem, each), rel=1e-9)


def test_the_direct_ones_are_direct(tmp_path):
  problem = bits()
  given, _ = ground(problem, tmp_path)
  assert allocators.allocate('uniform', given).levels.tolist() == [2, 2, 2, 2]
  heuristic = allocators.allocate('heuristic', given).levels
  np.testing.assert_array_equal(heuristic, direct.heuristic(problem, given.sizes))
  # Larger layers have fewer bits.
  assert list(heuristic) == sorted(heuristic, reverse=True) and len(set(heuristic)) > 1


def test_losses_of_many_levels_are_measured_at_some(tmp_path):
  problem = budgets.mean_bits((0.5, 0.5), 9.0, tuple(range(1, 18)))
  asked = []
  scorer = types.SimpleNamespace(
    score=lambda levels: asked.append(levels) or {'loss': -float(sum(levels))}
  )
  given, _ = ground(problem, tmp_path, scorer=scorer)
  allocators.allocate('sensitivity', given)
  # All at their highest; of each variable every second level below it.
  assert len(asked) == len(set(asked)) == 1 + 2 * (allocators.POINTS - 1)
