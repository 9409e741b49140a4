"""The only training loop: Keras' `fit` over steps, with what a run needs around it.

All that depends on the step is a pure function of it, and a checkpoint holds the rest, so a run
that goes on from a checkpoint ends with the same weights, bit for bit, as one that never stopped.
"""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from learners.progress import ProgressReport
from pocketsize.compressor import CompressionCallback, Stack
from pocketsize.errors import UserError


class Stopped(Exception):
  """A signal asked the run to stop; its state is saved.

  Attributes:
    signal_number: of the signal.     step: optimizer steps that are done.
  """

  def __init__(self, signal_number, step):
    super().__init__(
      f'stopped by {signal.Signals(signal_number).name} after step {step}; the state is saved, '
      'and the same command goes on from there'
    )
    self.signal_number = signal_number
    self.step = step


class Diverged(UserError):
  """The loss or a weight is no finite number any more."""


class Schedule(NamedTuple):
  """How a phase trains.

  Attributes:
    title: of the progress bar.
    steps: optimizer steps of the whole phase.
    learning_rate: step -> learning rate.
    momentum: of SGD, in [0, 1).
    weight_decay: factor w of the L2 penalty w/2 |v|^2 over all weights but batch norm's; a number,
      or step -> number.
    save_step, summary_step: steps between two checkpoints, and between two reports.
    optimizer: 'sgd', or 'adam', which takes no momentum.
    rate_flags: that set the learning rate, for the error if training diverges.
  """

  title: str
  steps: int
  learning_rate: Callable[[int], float]
  momentum: float
  weight_decay: float | Callable[[int], float]
  save_step: int
  summary_step: int
  optimizer: str = 'sgd'
  rate_flags: str = '--lrn_rate_init, --lrn_rate_ft'


def train(model, batches, loss, schedule, *, checkpoints, runtime, log_dir):
  """Trains an `Instrumented` model from its newest checkpoint, or from its weights as they are.

  Args:
    model: `Instrumented`; its `stack`, if it has one, is updated before every step and adds its
      loss.
    batches: `batches(start)` gives an endless tf.data.Dataset of (x, y) from step `start` on.
    loss: `loss(y, outputs)`, a scalar.
    schedule: `Schedule`.
    checkpoints: `Checkpoints` of this phase.
    runtime: the workers' `Runtime`.
    log_dir: folder for TensorBoard.

  Raises:
    UserError: the loss is no longer a number.
    Stopped: SIGINT or SIGTERM came; a checkpoint is written.
  """
  decayed, weight_decay = _decayed(model), schedule.weight_decay
  # What changes with the step is a variable of the compiled step; a number is a constant in it.
  if callable(weight_decay):
    weight_decay = tf.Variable(weight_decay(0), trainable=False, dtype=tf.float32)

  def total_loss(y, outputs):
    return loss(y, outputs) + weight_decay * tf.add_n(
      [tf.nn.l2_loss(weight.value) for weight in decayed]
    )

  if schedule.optimizer == 'adam':
    optimizer = keras.optimizers.Adam(schedule.learning_rate(0))
  else:
    optimizer = keras.optimizers.SGD(schedule.learning_rate(0), momentum=schedule.momentum)
  optimizer.build(model.trainable_variables)
  trainable = {id(variable) for variable in model.trainable_variables}
  state = [variable for variable in model.variables if id(variable) not in trainable]
  model.compile(runtime.distribute(optimizer, state), total_loss, jit_compile=False)
  variables = model.variables + optimizer.variables
  start = checkpoints.restore(variables) if runtime.is_chief else 0
  start = runtime.broadcast(start)
  runtime.broadcast_variables(variables)
  if start >= schedule.steps:
    return
  callbacks = [CompressionCallback(model.stack or Stack(), start)]
  if callable(schedule.weight_decay):
    callbacks.append(
      keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: weight_decay.assign(
          schedule.weight_decay(start + batch)
        )
      )
    )
  with (
    ProgressReport(schedule.title, schedule.steps, start, quiet=not runtime.is_chief) as progress,
    _signals() as caught,
  ):
    if start:
      progress.say(start, {'goes on': 'from its checkpoint'})
    loop = _Loop(start, schedule, checkpoints, variables, runtime, caught, progress, log_dir)
    model.fit(
      batches(start),
      epochs=1,
      steps_per_epoch=schedule.steps - start,
      verbose=0,
      shuffle=False,
      callbacks=[*callbacks, loop],
    )
    # A signal that came while the last checkpoint was written.
    loop.stop_if_asked()


def _decayed(model):
  """Returns the trainable weights of the source model that are not a batch norm's."""
  return [
    weight
    for layer in model.graph.layers.values()
    if not isinstance(layer, keras.layers.BatchNormalization)
    for weight in layer.trainable_weights
  ]


@contextlib.contextmanager
def _signals():
  """Yields a list to which SIGINT and SIGTERM append themselves instead of ending the process."""
  caught = []
  if threading.current_thread() is not threading.main_thread():
    yield caught
    return
  handlers = {
    number: signal.signal(number, lambda number, frame: caught.append(number))
    for number in (signal.SIGINT, signal.SIGTERM)
  }
  try:
    yield caught
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)


class _Loop(keras.callbacks.Callback):
  """What happens around each step: learning rate, checks, reports, checkpoints, signals."""

  def __init__(self, start, schedule, checkpoints, variables, runtime, caught, progress, log_dir):
    super().__init__()
    self.step = start
    self.schedule = schedule
    self.checkpoints = checkpoints
    self.variables_ = variables
    self.runtime = runtime
    self.caught = caught
    self.progress = progress
    self.writer = tf.summary.create_file_writer(str(log_dir)) if runtime.is_chief else None
    self.mark = (start, time.monotonic())

  def on_train_batch_begin(self, batch, logs=None):
    self.model.optimizer.learning_rate = self.schedule.learning_rate(self.step)

  def on_train_batch_end(self, batch, logs=None):
    self.step += 1
    loss = logs['loss']
    diverged, stop = self.runtime.any(not math.isfinite(loss), self.caught)
    if diverged:
      self._diverged('The loss became infinite or not a number')
    self.progress.advance(self.step)
    if self.step % self.schedule.summary_step == 0 or self.step == self.schedule.steps:
      self._summarize(loss)
    if stop or self.step % self.schedule.save_step == 0 or self.step == self.schedule.steps:
      self._save()
    if stop:
      self.stop_if_asked()

  def stop_if_asked(self):
    """Raises `Stopped` on every rank if a signal came on one."""
    (stop,) = self.runtime.any(self.caught)
    if stop:
      number = self.runtime.broadcast(self.caught[0] if self.caught else signal.SIGTERM)
      raise Stopped(number, self.step)

  def _summarize(self, loss):
    """Reports the mean loss since the last report, and starts a new mean."""
    before, then = self.mark
    self.mark = (self.step, time.monotonic())
    speed = (self.step - before) / max(self.mark[1] - then, 1e-9)
    facts = {
      'loss': loss,
      'lr': float(self.model.optimizer.learning_rate),
      'steps_per_second': speed,
      **(self.model.stack.statistics() if self.model.stack else {}),
    }
    self.model.reset_metrics()
    if self.writer:
      self.progress.say(self.step, {name: f'{value:.4g}' for name, value in facts.items()})
      with self.writer.as_default(step=self.step):
        for name, value in facts.items():
          tf.summary.scalar(name, value)
      self.writer.flush()

  def _save(self):
    finite = all(np.isfinite(variable).all() for variable in self.variables_)
    (diverged,) = self.runtime.any(not finite)
    if diverged:
      self._diverged('A weight became infinite or not a number')
    if self.runtime.is_chief:
      self.checkpoints.save(self.step, self.variables_)
    # A worker that leaves early would end the one that still writes.
    self.runtime.barrier()

  def _diverged(self, what):
    kept = self.checkpoints.latest
    raise Diverged(
      f'{what} at step {self.step} of {self.schedule.steps}. '
      f'{f"The last good checkpoint is {kept}" if kept else "No checkpoint was written before"}. '
      f'A lower learning rate ({self.schedule.rate_flags}) usually helps.'
    )
