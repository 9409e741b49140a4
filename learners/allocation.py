"""The search for what each layer gets, as the first phase of a run.

What may be chosen is the learner's: a `Problem`, and the kernels that go with each choice. A search
changes no model. What it leaves are the values in allocation.json, with which the run goes on from
the float model as with a list of the user's.
"""

import contextlib
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from learners.judge import Judge
from learners.learner import Learner
from learners.progress import SearchReport
from learners.training import Diverged
from pocketsize.allocation import allocators, costs
from pocketsize.allocation.plot import plot
from pocketsize.allocation.scoring import Scorer
from pocketsize.allocation.traces import traces
from pocketsize.files import write_json
from pocketsize.graph import Graph

RESULT = 'allocation.json'
# Images of a scoring step.
SCORE_BATCH = 250
# Images of a product for second derivatives: of as many numbers as 8 of 224 x 224 pixels at most.
TRACE_BATCH = 32
_TRACE_NUMBERS = 8 * 224 * 224 * 3


class Task(NamedTuple):
  """What a learner wants to be decided.

  Attributes:
    problem: `Problem`.
    candidates, rollouts, rollouts_min: see `allocators.Ground`.
    layers: [variables] tuples of the paths of each one's layers.
    value: what the values are, with their unit.
    random_order: see `allocators.Ground`.
    reward: (figure that nets are judged by, cost) -> number; None for what --score_by says.
    middle: value of all variables with which a search begins; None for the dearest that meets the
      budget.
    tuning: `Tuning` of a model in a roll-out, or None.
  """

  problem: object
  candidates: object
  rollouts: int
  rollouts_min: int
  layers: list
  value: str
  random_order: bool = True
  reward: Callable | None = None
  middle: float | None = None
  tuning: object = None


class Allotting(Learner):
  """A learner that can search.

  Attributes:
    allotted: {variable name: value} once that is decided, else None.
  """

  allotted = None

  def check(self):
    if self.config.searches:
      # Too few images for a search are refused now, in the data set's words.
      self.dataset.size(self._split)
      self.own_batches(0)
    super().check()

  def allot(self, model, make):
    """Sets `allotted`: to what an earlier start of the run found, or what is found now.

    Args:
      model: the float Keras model; it is not changed.
      make: gives the `Task`; called if something is to be found.
    """
    found = self.recorded(RESULT)
    if found is None:
      with self._timed('allocation'):
        task = make()
        outcome, maximised = self._searched(model, task)
      # Drawn first: a run that ends between the two draws again, from the roll-outs that it has.
      self._on_chief(lambda: self._draw(task, outcome, maximised))
      found = self._result(task.problem, outcome)
      self._on_chief(lambda: write_json(self.folder / RESULT, found))
    self.allotted = found['values']

  def _searched(self, model, task):
    """Returns (the `Outcome` of a `Task`, what it maximised in words)."""
    problem, judge = task.problem, self._judge(model)
    batches = judge.marked(self.held_out(self.config.nb_smpls_score, SCORE_BATCH))
    scorer = Scorer(
      model,
      batches,
      judge.evaluator(),
      self.own_images(self.config.nb_smpls_score_bn),
    )
    # The first figure of an evaluator is the one that a net is judged by.
    judged = next(iter(scorer.score({})))

    def score(levels):
      if task.tuning:
        # What cannot be trained at this rate says nothing about the other choices.
        with contextlib.suppress(Diverged):
          return task.tuning.score(self, model, problem.values(levels), batches, judge)
      return scorer.score(task.candidates.kernels(levels))

    def reward(figures, cost):
      if task.reward:
        return task.reward(figures[judged], cost)
      return -figures['loss'] if self.config.score_by == 'loss' else figures[judged]

    graph = Graph(model)
    with SearchReport(self.allocator, task.rollouts, quiet=not self.runtime.is_chief) as shown:
      ground = allocators.Ground(
        problem=problem,
        sizes=[int(costs.weights(graph, layers).sum()) for layers in task.layers],
        candidates=task.candidates,
        scorer=scorer,
        traces=lambda path: self._traces(model, task, judge, path, shown.follow),
        score=score,
        reward=reward,
        rollouts=task.rollouts,
        rollouts_min=task.rollouts_min,
        start=self.config.search_start,
        middle=None if task.middle is None else problem.nearest(task.middle),
        random_order=task.random_order,
        agent=self.config.agent(),
        seed=self.run.seed,
        folder=self.folder,
        about={'allocation': self.allocator, 'seed': self.run.seed},
        workers=self._workers,
        broadcast=self.runtime.broadcast,
        track=shown.track,
        follow=shown.follow,
      )
      outcome = allocators.allocate(self.allocator, ground)
    if task.reward:
      return outcome, 'reward'
    return outcome, {'loss': '-loss', 'metric': judged}[self.config.score_by]

  def _result(self, problem, outcome):
    """Returns what allocation.json says."""
    return {
      'allocation': self.allocator,
      'values': problem.values(outcome.levels),
      'cost': {
        'name': problem.cost.name,
        'value': problem.cost.of(outcome.levels),
        # JSON has no infinity.
        'budget': problem.budget if math.isfinite(problem.budget) else None,
      },
      'rollouts': len(outcome.records),
    }

  def _draw(self, task, outcome, maximised):
    plot(
      outcome.records,
      task.problem,
      self.folder / 'search.png',
      reward=f'{maximised} on held-out images',
      value=task.value,
      title=f'{self.helper.name}, {self.allocator}',
    )

  @property
  def allocator(self):
    """The name of the allocator: of --allocation, or the agent, as in PocketFlow."""
    return self.config.allocation or 'rl'

  @property
  def _workers(self):
    return {
      'rank': self.runtime.rank,
      'size': self.runtime.size,
      'total': self.runtime.allreduce_sum,
    }

  @property
  def _split(self):
    """What choices are scored on: with --eval_split=val the held-out images are for the result."""
    return 'fit' if self.run.eval_split == 'val' else 'val'

  def held_out(self, samples, batch):
    """Returns `samples` held-out training images as a list of (x, y), spread over all there are.

    With --eval_split=val, when these are for the result, images that are trained on.
    """
    size = self.dataset.size(self._split)
    samples = min(samples, size)
    batch = min(batch, samples)
    every = size // samples
    # Of one image of so many there are up to twice as many as wanted: those are spread in turn.
    count = math.ceil(size / every)
    wanted = np.isin(np.arange(count), np.arange(samples) * count // samples)
    data = self.dataset.load(self._split, batch=batch, shard=(0, every)).unbatch().enumerate()
    data = data.filter(lambda number, _: tf.gather(wanted, number)).batch(batch)
    return [(x.numpy(), y.numpy()) for _, (x, y) in data]

  def own_batches(self, start):
    """Returns endless training batches of no held-out image, the same on all workers."""
    return self.dataset.load(
      'fit',
      batch=self.run.batch_size,
      seed=self.run.seed,
      training=True,
      start=start,
    )

  def own_images(self, samples):
    """Returns `samples` images or more, the first of `own_batches`, as a list of whole batches."""
    batches = self.own_batches(0).take(math.ceil(samples / self.run.batch_size))
    return [x.numpy() for x, _ in batches]

  def _judge(self, model):
    return Judge(self.helper, self.distillation(model) if self.run.enbl_dst else None)

  def _traces(self, model, task, judge, path, follow):
    """Returns {path: mean diagonal of the Hessian} of all layers that are decided about."""
    shapes = [each.shape[1:] for each in model.inputs]
    if any(None in shape for shape in shapes):
      ((x, _),) = self.held_out(1, 1)
      shapes = [x.shape[1:]]
    numbers = sum(math.prod(shape) for shape in shapes)
    batch = max(1, min(TRACE_BATCH, _TRACE_NUMBERS // numbers))
    return traces(
      model,
      judge.loss,
      judge.marked(self.held_out(self.config.nb_smpls_trace, batch)),
      # Each once, and in one order on all workers.
      list(dict.fromkeys(path for layers in task.layers for path in layers)),
      iterations=self.config.hawq_iterations,
      tolerance=self.config.hawq_tolerance,
      seed=self.run.seed,
      path=path,
      follow=follow,
      **self._workers,
    )
