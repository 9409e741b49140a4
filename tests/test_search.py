"""The loop over roll-outs: records, the best one, going on after a kill, workers."""

import json
import math
import pickle
import threading

import numpy as np
import pytest
from budgets import RandomSearcher, layers, mean_bits

from pocketsize.allocation.search import Record, best, search
from pocketsize.allocation.studies import tpe
from pocketsize.errors import UserError

ABOUT = {'allocator': 'scripted', 'seed': 3}
HALVES = mean_bits((0.5, 0.5), budget=5.0)


class Scripted:
  """Asks what it was given, and remembers in which order it was asked and told."""

  def __init__(self, levels):
    self._levels = list(levels)
    self.course = []

  def ask(self):
    self.course.append('ask')
    return np.array(self._levels.pop(0))

  def tell(self, levels, reward):
    self.course.append((levels.tolist(), reward))


def run(tmp_path, searcher, score=sum, rollouts=3, problem=HALVES, **options):
  options = {'path': tmp_path / 'search.json', 'about': ABOUT, **options}
  return search(problem, searcher, score, rollouts, **options)


def test_roll_outs_are_scored_told_and_recorded(tmp_path):
  searcher = Scripted([[1, 0], [0, 4]])
  tracked = []
  outcome = run(
    tmp_path,
    searcher,
    first=[[2, 2]],
    reward=lambda score, cost: 10 * score - cost,
    track=lambda done, chosen: tracked.append((done, chosen.number)),
  )
  # The mean of 2 + level bits is 4, 2.5 and 4.
  assert [record[:5] for record in outcome.records] == [
    (0, [2, 2], 4.0, 36.0, 4.0),
    (1, [1, 0], 1.0, 7.5, 2.5),
    (2, [0, 4], 4.0, 36.0, 4.0),
  ]
  assert searcher.course == [([2, 2], 36.0), 'ask', ([1, 0], 7.5), 'ask', ([0, 4], 36.0)]
  assert outcome.levels.tolist() == [2, 2]
  assert tracked == [(1, 0), (2, 0), (3, 0)]


def test_the_best_is_the_highest_then_the_cheapest_then_the_first():
  rewards_and_costs = [(1.0, 2.0), (3.0, 5.0), (3.0, 4.0), (3.0, 4.0), (2.0, 0.0)]
  records = [Record(i, [i], r, r, c, 0.0) for i, (r, c) in enumerate(rewards_and_costs)]
  assert best(records).number == 2
  assert best(records[::-1]).number == 2


def test_the_file_says_what_was_searched_and_found(tmp_path):
  run(tmp_path, Scripted([[1, 0], [0, 4]]), lambda levels: {'b': 1, 'a': sum(levels)}, 2,
      reward=lambda score, cost: score['a'])  # fmt: skip
  content = json.loads((tmp_path / 'search.json').read_text())
  assert content['problem'] == {
    'cost': 'mean weight bits',
    'budget': 5.0,
    'cheapest': 2.0,
    'dearest': 8.0,
    'variables': [
      {'name': name, 'choices': [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]}
      for name in ('layer0', 'layer1')
    ],
  }
  assert (content['about'], content['workers'], content['done']) == (ABOUT, 1, 2)
  assert content['best']['values'] == {'layer0': 2.0, 'layer1': 6.0}
  assert content['best']['score'] == {'a': 4.0, 'b': 1.0}
  assert [record['levels'] for record in content['records']] == [[1, 0], [0, 4]]


def test_what_was_scored_is_not_scored_again(tmp_path):
  scored = []

  def score(levels):
    scored.append(levels.tolist())
    return float(levels[0])

  outcome = run(tmp_path, Scripted([[1, 0], [2, 0], [1, 0]]), score)
  assert scored == [[1, 0], [2, 0]]
  assert [record.reward for record in outcome.records] == [1.0, 2.0, 1.0]
  assert outcome.records[2].seconds == 0.0


class Killed(Exception):
  pass


@pytest.mark.parametrize('size', [1, 3])
def test_a_killed_search_goes_on_as_if_it_had_not_been(tmp_path, size):
  problem, score = layers(4, seed=1)
  scored = []

  def dying(levels):
    if len(scored) >= 15:
      raise Killed
    scored.append(levels.tolist())
    return score(levels)

  def start(folder, function):
    if size == 1:
      return run(folder, tpe(problem), function, 24, problem, first=[[1, 1, 1, 1]])
    return workers(folder, size, lambda: tpe(problem), function, 24, problem)[0]

  whole = start(tmp_path / 'whole', score)
  with pytest.raises(Killed):
    start(tmp_path / 'killed', dying)
  done = json.loads((tmp_path / 'killed' / 'search.json').read_text())['done']
  assert 0 < done < 24 and done % size == 0
  outcome = start(
    tmp_path / 'killed', lambda levels: scored.append(levels.tolist()) or score(levels)
  )
  assert [r[:5] for r in outcome.records] == [r[:5] for r in whole.records]
  assert outcome.levels.tolist() == whole.levels.tolist()
  # What is in the file is not scored again.
  assert len(scored) <= 24 + size


def test_a_finished_search_needs_no_searcher(tmp_path):
  first = run(tmp_path, Scripted([[1, 0], [2, 0], [0, 0]]))
  again = run(tmp_path, None, score=None)
  assert again.records == first.records


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'about': {**ABOUT, 'seed': 4}}, 'about.seed is 3 there and 4 here'),
    ({'about': {'seed': 3}}, "about.allocator is 'scripted' there and None here"),
    ({'about': {**ABOUT, 'net': 'a'}}, "about.net is None there and 'a' here"),
    ({'rollouts': 5}, 'rollouts is 4 there and 5 here'),
    ({'size': 2}, 'workers is 1 there and 2 here'),
    ({'first': [[1, 1]]}, r'first is \[\] there and \[\[1, 1\]\] here'),
    ({'problem': mean_bits((0.5, 0.5), 4.0)}, 'problem.budget is 5.0 there and 4.0 here'),
    (
      {'problem': mean_bits((0.5, 0.5), 5.0, (2.0, 3.0, 8.0))},
      r'problem.variables\[0\].choices is ',
    ),
    ({'problem': mean_bits((0.5, 0.4), 5.0)}, 'problem.cheapest is 2.0 there and 1.8 here'),
    ({'searcher': Scripted([[1, 0], [3, 0]])}, r'roll-out 1 is \[2, 0\], not \[3, 0\]'),
  ],
)
def test_a_file_of_another_search_is_refused(tmp_path, options, message):
  def dying(levels):
    if levels[0] == 0:
      raise Killed
    return float(levels[0])

  with pytest.raises(Killed):
    run(tmp_path, Scripted([[1, 0], [2, 0], [0, 0]]), dying, rollouts=4)
  options = {'rollouts': 4, 'searcher': Scripted([[1, 0], [2, 0], [0, 0]]), **options}
  with pytest.raises(UserError, match=f'{message}.* Remove the work folder .*, or give another'):
    run(tmp_path, options.pop('searcher'), **options)


@pytest.mark.parametrize('text', ['{', '[]', '{}', '{"records": [{"number": 0}]}'])
def test_a_damaged_file_is_refused(tmp_path, text):
  (tmp_path / 'search.json').write_text(text)
  with pytest.raises(UserError, match='search.json is damaged'):
    run(tmp_path, Scripted([]))


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_refused(tmp_path, value):
  with pytest.raises(UserError, match=r"roll-out 0 must be a finite number.*\{'layer0': 3.0"):
    run(tmp_path, Scripted([[1, 0]]), lambda levels: value)


def test_a_choice_above_the_budget_is_refused(tmp_path):
  with pytest.raises(UserError, match='Roll-out 0 must have at most 5 mean weight bits.*: 8'):
    run(tmp_path, Scripted([]), first=[[6, 6]])


@pytest.mark.parametrize(('rollouts', 'first'), [(0, []), (1, [[0, 0], [1, 1]])])
def test_too_few_roll_outs_are_refused(tmp_path, rollouts, first):
  with pytest.raises(UserError, match=f'at least {max(1, len(first))} roll-outs.*: {rollouts}'):
    run(tmp_path, Scripted([]), rollouts=rollouts, first=first)


def workers(folder, size, make_searcher, score, rollouts, problem, **options):
  """Runs a search on `size` threads that hold each other as Horovod's processes do."""
  barrier = threading.Barrier(size, timeout=60)
  table = [None] * size
  results, errors = [None] * size, []

  def gathered(rank, value):
    # Processes share no objects.
    table[rank] = pickle.dumps(value)
    barrier.wait()
    values = [pickle.loads(each) for each in table]
    barrier.wait()
    return values

  def work(rank):
    try:
      results[rank] = run(
        folder,
        make_searcher() if rank == 0 else None,
        score,
        rollouts,
        problem,
        rank=rank,
        size=size,
        total=lambda array: sum(gathered(rank, array)),
        broadcast=lambda value: gathered(rank, value)[0],
        **options,
      )
    except threading.BrokenBarrierError:
      pass
    except Exception as error:
      errors.append(error)
      barrier.abort()

  threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  if errors:
    raise errors[0]
  return results


@pytest.mark.parametrize('rollouts', [1, 4, 7])
@pytest.mark.parametrize('has_names', [False, True])
def test_workers_share_the_roll_outs_and_return_the_same(tmp_path, rollouts, has_names):
  problem, score = layers(4, seed=1)
  scored = []

  def named(levels):
    scored.append((threading.get_ident(), levels.tolist()))
    return {'loss': -score(levels), 'accuracy': score(levels)} if has_names else score(levels)

  results = workers(
    tmp_path,
    3,
    lambda: RandomSearcher(problem, 0),
    named,
    rollouts,
    problem,
    first=[[2, 2, 2, 2]],
    reward=lambda found, cost: found['accuracy'] if has_names else found,
  )
  alone = run(
    tmp_path / 'alone', RandomSearcher(problem, 0), score, rollouts, problem, first=[[2, 2, 2, 2]]
  )
  for outcome in results:
    assert outcome.records == results[0].records
    assert [r.levels for r in outcome.records] == [r.levels for r in alone.records]
    assert [r.reward for r in outcome.records] == [r.reward for r in alone.records]
    assert outcome.levels.tolist() == alone.levels.tolist()
  assert len(scored) == rollouts
  assert len({ident for ident, _ in scored}) == min(3, rollouts)


def test_the_searcher_is_asked_and_told_in_rounds(tmp_path):
  searcher = Scripted([[1, 0], [2, 0], [3, 0], [4, 0]])
  workers(tmp_path, 2, lambda: searcher, lambda levels: levels[0], 5, HALVES, first=[[0, 0]])
  kinds = ['ask' if each == 'ask' else each[0][0] for each in searcher.course]
  assert kinds == ['ask', 0, 1, 'ask', 'ask', 2, 3, 'ask', 4]


def test_an_error_of_one_worker_is_raised_there(tmp_path):
  def score(levels):
    if levels[0] == 3:
      raise UserError('no such score')
    return levels[0]

  with pytest.raises(UserError, match='no such score'):
    workers(tmp_path, 2, lambda: Scripted([[1, 0], [3, 0]]), score, 2, HALVES)
