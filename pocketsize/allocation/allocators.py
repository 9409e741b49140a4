"""All allocators by name: from what is known of a problem to levels within its budget.

`list`, the choice of a user, is `direct.listed`: it needs nothing of what the others go by.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from pocketsize.allocation import direct
from pocketsize.allocation.agent import AgentSearcher
from pocketsize.allocation.exact import minimise
from pocketsize.allocation.problem import Problem
from pocketsize.allocation.search import Outcome, Record, search
from pocketsize.allocation.sensitivity import hawq_losses, measured_losses
from pocketsize.allocation.studies import gp, tpe

# Levels of a variable whose losses are measured; those between are interpolated.
POINTS = 9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ground:
  """What allocators may go by.

  Attributes:
    problem: the `Problem`.
    sizes: [variables] numbers of weights.
    candidates: has `kernels(levels)` and `errors(name)`; `Variants` or `Reconstructed`.
    scorer: a `Scorer` of the model that is compressed.
    traces: path of a file to keep them -> {path of a layer: mean diagonal of the Hessian}; called
      if that is needed.
    score: levels -> {name: number}, what a roll-out is worth.
    reward: (score, cost) -> number to be maximised.
    rollouts: how many.   rollouts_min: so many come before an agent is trained.
    random_order: an agent visits the variables in another order in each roll-out.
    agent: `DdpgConfig`.
    seed: of all that is random.
    folder: for search.json, losses.json and traces.json, a path.
    about: what `search` takes by that name.
    start: name of an allocator without roll-outs. Searches score its choice after the uniform one,
      and an agent begins around it.
    middle: [variables] levels within the budget that take the place of both; None: they do not.
    workers: {'rank', 'size', 'total'} as for `search`; {} for one.
    broadcast: object -> rank 0's.
    track: `track(done, best)` after each round of roll-outs; see `search`.
    follow: `follow(rounds)` gives the rounds of measured losses one by one.
  """

  problem: Problem
  sizes: Any
  candidates: Any
  scorer: Any
  traces: Callable
  score: Callable
  reward: Callable
  rollouts: int
  rollouts_min: int
  random_order: bool
  agent: Any
  seed: int
  folder: pathlib.Path
  about: dict
  start: str = 'uniform'
  middle: Any = None
  workers: dict = dataclasses.field(default_factory=dict)
  broadcast: Callable = lambda value: value
  track: Callable = lambda done, best: None
  follow: Callable = iter


def allocate(name, ground):
  """Returns the `Outcome` of an allocator: its levels, and the records of what was scored.

  What has no roll-outs is scored once, to be compared.

  Args:
    name: one of `ALLOCATORS`.
    ground: a `Ground`.
  """
  found = ALLOCATORS[name](ground)
  if isinstance(found, Outcome):
    return found
  # All workers go on with one choice, also where their arithmetic differs in the last bit.
  levels = ground.broadcast([int(level) for level in found])
  began = time.monotonic()
  score, cost = ground.score(np.array(levels)), ground.problem.cost.of(levels)
  seconds = time.monotonic() - began
  record = Record(0, levels, score, float(ground.reward(score, cost)), cost, seconds)
  return Outcome(np.array(levels), [record])


def _uniform(ground):
  return direct.uniform(ground.problem)


def _heuristic(ground):
  return direct.heuristic(ground.problem, ground.sizes)


def _hawq(ground):
  losses = hawq_losses(
    ground.problem, ground.traces(ground.folder / 'traces.json'), ground.candidates
  )
  return minimise(ground.problem, losses)


def _sensitivity(ground):
  losses = measured_losses(
    ground.problem,
    ground.candidates.kernels,
    ground.scorer,
    points=POINTS,
    path=ground.folder / 'losses.json',
    track=ground.follow,
    **ground.workers,
  )
  return minimise(ground.problem, losses)


def _agent(ground):
  return _searched(
    ground,
    lambda start: AgentSearcher(
      ground.problem,
      ground.rollouts,
      ground.rollouts_min,
      start,
      random_order=ground.random_order,
      config=ground.agent,
      seed=ground.seed,
    ),
  )


def _tree_parzen(ground):
  return _searched(ground, lambda start: tpe(ground.problem, ground.seed))


def _gaussian_process(ground):
  return _searched(ground, lambda start: gp(ground.problem, ground.seed))


def _searched(ground, make):
  """Returns the `Outcome` of a search by what `make(levels to begin around)` gives."""
  if ground.middle is None:
    # All workers take part in a start by second derivatives or measured losses.
    first = [direct.uniform(ground.problem), ALLOCATORS[ground.start](ground)]
  else:
    first = [ground.middle]
  first = [[int(level) for level in levels] for levels in first]
  return search(
    ground.problem,
    make(np.array(first[-1])) if ground.workers.get('rank', 0) == 0 else None,
    ground.score,
    ground.rollouts,
    path=ground.folder / 'search.json',
    about=ground.about,
    first=first if first[0] != first[-1] else first[:1],
    reward=ground.reward,
    broadcast=ground.broadcast,
    track=ground.track,
    **ground.workers,
  )


ALLOCATORS = {
  'rl': _agent,
  'hawq': _hawq,
  'sensitivity': _sensitivity,
  'tpe': _tree_parzen,
  'gp': _gaussian_process,
  'uniform': _uniform,
  'heuristic': _heuristic,
}
