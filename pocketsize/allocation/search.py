"""A search over roll-outs: a searcher proposes levels, they are scored, the searcher is told.

What was scored is in a file after every round, so that a search goes on where it was killed. The
searcher's own state is in no file: the recorded roll-outs are asked for and told again, which gives
the same state to the last bit, since searchers depend on the seed and their history alone.
"""

import json
import math
import pathlib
import time
from typing import NamedTuple

import numpy as np

from pocketsize.allocation.workers import on_first
from pocketsize.errors import UserError
from pocketsize.files import write_json

# More differences than that say no more than the first of them.
_SHOWN = 3


class Record(NamedTuple):
  """One roll-out.

  Attributes:
    number: its place in the search, from 0.
    levels: list of [variables] int.
    score: what `score` returned: a number, or {name: number}.
    reward: what the search maximises.
    cost: of the levels, in the unit of the problem's cost.
    seconds: that scoring took; 0 for levels that had been scored before.
  """

  number: int
  levels: list
  score: float | dict
  reward: float
  cost: float
  seconds: float


class Outcome(NamedTuple):
  """What a search found: the [variables] levels that it chose, and all its `Record`s."""

  levels: np.ndarray
  records: list


def search(
  problem,
  searcher,
  score,
  rollouts,
  *,
  path,
  about,
  first=(),
  reward=lambda score, cost: score,
  rank=0,
  size=1,
  total=np.array,
  broadcast=lambda value: value,
  track=lambda done, best: None,
):
  """Scores `rollouts` choices and returns the best of them; goes on with what `path` holds.

  Every round has as many roll-outs as there are workers, each scored by one of them. A choice that
  was scored in an earlier round has the score that it had.

  Args:
    problem: a `Problem`.
    searcher: has `ask() -> levels` and `tell(levels, reward)`; needed on rank 0 only.
    score: levels -> number or {name: number}, the same names for all levels.
    rollouts: how many, those of `first` and of an earlier start among them; at least 1.
    path: the search's file (JSON), read and written by rank 0.
    about: JSON-able dict of what proposals and scores depend on besides the problem, such as the
      searcher's name and seed.
    first: list of levels to score before the searcher is asked; it is told of them.
    reward: (score, cost) -> number to be maximised; without it the score must be a number.
    rank, size: this worker and how many there are; all of them return the same.
    total: array -> its sum over the ranks.   broadcast: object -> rank 0's.
    track: called after each round with the number of roll-outs done and the best `Record`.

  Raises:
    UserError: the file is about another search, a choice exceeds the budget, a reward is not
      finite, or there are fewer roll-outs than choices in `first`.
  """
  first = [_as_list(levels) for levels in first]
  if rollouts < max(1, len(first)):
    raise UserError(f'There must be at least {max(1, len(first))} roll-outs. Received: {rollouts}.')
  course = _Course(problem, searcher, rollouts, first, size)
  header = _header(problem, about, rollouts, first, size)
  records = broadcast(on_first(lambda: _resumed(course, path, header), rank, total))
  scores = {tuple(record.levels): record.score for record in records}
  while len(records) < rollouts:
    done = len(records)
    proposals = broadcast(on_first(lambda done=done: course.proposals(done), rank, total))
    mine = scores.get(tuple(proposals[rank])) if rank < len(proposals) else None
    seconds = 0.0
    if rank < len(proposals) and mine is None:
      began = time.monotonic()
      mine = score(np.array(proposals[rank]))
      seconds = time.monotonic() - began
    # Rank 0 has a roll-out in every round, so its names are there even for those who have none.
    names = broadcast(sorted(mine) if rank == 0 and isinstance(mine, dict) else None)
    rows = np.zeros((len(proposals), 1 + len(names or [None])))
    if rank < len(proposals):
      rows[rank] = [seconds, *([mine[name] for name in names] if names else [mine])]
    for levels, (seconds, *values) in zip(proposals, total(rows).tolist(), strict=True):
      found = dict(zip(names, values, strict=True)) if names else values[0]
      records.append(_record(problem, len(records), levels, found, reward, seconds))
      scores.setdefault(tuple(levels), found)
    if rank == 0:
      course.tell(records[-len(proposals) :])
      write_json(path, {**header, **_state(problem, records)})
    track(len(records), best(records))
  return Outcome(np.array(best(records).levels), records)


def best(records):
  """Returns the record of the highest reward; of equal ones the cheapest, of those the first."""
  return min(records, key=lambda record: (-record.reward, record.cost, record.number))


class _Course:
  """Whose turn it is: the choices given first, then the searcher's, in rounds."""

  def __init__(self, problem, searcher, rollouts, first, size):
    self._problem, self._searcher = problem, searcher
    self._rollouts, self._first, self._size = rollouts, first, size

  def proposals(self, done):
    """Returns the lists of levels of the round that begins after `done` roll-outs."""
    numbers = range(done, min(done + self._size, self._rollouts))
    given = [self._first[number] for number in numbers if number < len(self._first)]
    asked = [_as_list(self._searcher.ask()) for _ in numbers[len(given) :]]
    for number, levels in zip(numbers, given + asked, strict=True):
      if not self._problem.is_met(levels):
        raise UserError(
          f'Roll-out {number} must have at most {self._problem.budget:.6g} '
          f'{self._problem.cost.name}. Received: {self._problem.cost.of(levels):.6g}.'
        )
    return given + asked

  def tell(self, records):
    """Tells the searcher of a round."""
    for record in records:
      self._searcher.tell(np.array(record.levels), record.reward)

  def replay(self, records, path):
    """Leads the searcher through recorded rounds; UserError if it proposes anything else."""
    for start in range(0, len(records), self._size):
      proposals = self.proposals(start)
      done = records[start : start + len(proposals)]
      for record, levels in zip(done, proposals, strict=True):
        if record.levels != levels:
          raise _mismatch(path, [f'roll-out {record.number} is {record.levels}, not {levels}'])
      self.tell(done)


def _resumed(course, path, header):
  """Returns the records of an earlier start, after the searcher was led through them."""
  try:
    content = json.loads(pathlib.Path(path).read_text())
    records = [Record(**fields) for fields in content.pop('records')]
  except FileNotFoundError:
    return []
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f'{path} is damaged: {error}. Remove it, or give another folder.') from error
  earlier = {name: content.get(name) for name in header}
  if differing := list(_differences(earlier, json.loads(json.dumps(header)))):
    raise _mismatch(path, differing)
  # A search that is over has nothing left to ask.
  if len(records) < header['rollouts']:
    course.replay(records, path)
  return records


def _mismatch(path, differing):
  return UserError(
    f'{path} holds the roll-outs of another search: {"; ".join(differing[:_SHOWN])}. '
    f'Remove the work folder {pathlib.Path(path).parent}, or give another one.'
  )


def _differences(there, here, name=''):
  """Yields in words where two JSON values differ."""
  if isinstance(there, dict) and isinstance(here, dict):
    for key in [*there, *(key for key in here if key not in there)]:
      yield from _differences(there.get(key), here.get(key), f'{name}.{key}'.lstrip('.'))
  elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
    for index, pair in enumerate(zip(there, here, strict=True)):
      yield from _differences(*pair, f'{name}[{index}]')
  elif there != here:
    yield f'{name} is {there!r} there and {here!r} here'


def _header(problem, about, rollouts, first, size):
  """What a file must say for its records to be this search's, in words that a person can read."""
  return {
    'about': about,
    'workers': size,
    'rollouts': rollouts,
    'problem': {
      'cost': problem.cost.name,
      'budget': problem.budget if math.isfinite(problem.budget) else None,
      'cheapest': problem.cost.of(problem.lowest),
      'dearest': problem.cost.of(problem.highest),
      'variables': [
        {'name': variable.name, 'choices': [float(choice) for choice in variable.choices]}
        for variable in problem.variables
      ],
    },
    'first': first,
  }


def _state(problem, records):
  """What has been found so far."""
  chosen = best(records)
  values = {name: float(value) for name, value in problem.values(chosen.levels).items()}
  return {
    'done': len(records),
    'best': {**chosen._asdict(), 'values': values},
    'records': [record._asdict() for record in records],
  }


def _record(problem, number, levels, found, reward, seconds):
  cost = problem.cost.of(levels)
  value = float(reward(found, cost))
  if not math.isfinite(value):
    raise UserError(
      f'The reward of roll-out {number} must be a finite number. '
      f'Received: {value} for {problem.values(levels)}.'
    )
  return Record(number, levels, found, value, cost, seconds)


def _as_list(levels):
  return [int(level) for level in levels]
