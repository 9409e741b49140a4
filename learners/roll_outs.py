"""Roll-outs that train: a choice is scored by a model that was tuned with it for a few steps."""

from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from learners.checkpoint import Checkpoints
from learners.runtime import SilentRuntime
from learners.training import Schedule, train
from pocketsize import configure
from pocketsize.compressor import Stack
from pocketsize.copies import copied
from pocketsize.distillation import Distillation, DistillationConfig
from pocketsize.instrument import instrument
from pocketsize.targets import WEIGHTS_BY_TYPE


class Tuning(NamedTuple):
  """How a model is tuned before it is scored, by Adam; every worker tunes models of its own.

  Attributes:
    compressors: {name: value} -> list of compressors that act in full from the first step.
    layerwise_steps, layerwise_rate: of bringing what each layer with weights gives near to what it
      gives in the float model, all layers side by side; and its learning rate.
    global_steps, global_rate: of the training that follows, by the loss of the run's own.
    rate_flags: that set the rates, for the error if training diverges.
  """

  compressors: Callable
  layerwise_steps: int
  layerwise_rate: float
  global_steps: int
  global_rate: float
  rate_flags: str

  def score(self, learner, model, values, batches, judge):
    """Returns the evaluator's figures of a model that was tuned.

    Args:
      learner: the `Learner`.
      model: the float Keras model; it is not changed.
      values: {name: value} that is tried.
      batches: of the evaluation, a list of (x, y) that `judge` marked.
      judge: `Judge`.
    """
    # What a copy draws, as the seeds of Dropout, does not depend on what was scored before.
    keras.utils.set_random_seed(learner.run.seed)
    stack = Stack(self.compressors(values))
    student = configure.attach(copied(model), stack)
    # Of batches that are the same on all workers: a score does not depend on who computes it.
    learner.calibrate(student, learner.own_batches(0))
    stack.update(0)
    if self.layerwise_steps:
      layers = Distillation(
        instrument(model),
        DistillationConfig(0.0, feature_weight=1.0, feature_layers=tuple(WEIGHTS_BY_TYPE)),
      )
      student.stack = Stack([*stack.compressors, layers])
      student.stack.bind(student)
      self._train(
        learner, student, self.layerwise_steps, self.layerwise_rate, lambda y, outputs: 0.0
      )
      student.stack = stack
    if self.global_steps:
      if judge.distillation:
        # Made before the search: workers that read a teacher's file wait for each other, and not
        # all of them score in every round.
        student.stack = Stack([*stack.compressors, judge.distillation])
        student.stack.bind(student)
      self._train(learner, student, self.global_steps, self.global_rate, learner.helper.loss)
    evaluator, predict = judge.evaluator(), tf.function(student, autograph=False)
    for x, y in batches:
      outputs = keras.tree.map_structure(np.asarray, predict(x, training=False))
      evaluator.update(y, outputs)
    return evaluator.result()

  def _train(self, learner, model, steps, rate, loss):
    schedule = Schedule(
      'tuning a roll-out',
      steps,
      lambda step: rate,
      0.0,
      0.0,
      save_step=steps,
      summary_step=steps,
      optimizer='adam',
      rate_flags=self.rate_flags,
    )
    train(
      model,
      learner.own_batches,
      loss,
      schedule,
      checkpoints=Checkpoints(learner.folder / 'checkpoints', 'roll-out'),
      runtime=SilentRuntime(),
      log_dir=None,
    )
