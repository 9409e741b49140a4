"""What the phases of a run are made of: models from files, batches, training, rank 0's own work."""

import contextlib
import dataclasses
import json
import pathlib
import time

import keras

from datasets.mixup import Mixed
from learners.checkpoint import Checkpoints
from learners.results import Results
from learners.training import Schedule, train
from learners.workfolder import WorkFolder
from pocketsize import calibration
from pocketsize.compressor import Stack
from pocketsize.distillation import Distillation
from pocketsize.errors import UserError
from pocketsize.saving import save_model

CALIBRATION_BATCHES = 8


class Phases:
  """What a learner does its phases with.

  Args:
    helper: the net's `ModelHelper`.
    run: `RunConfig`.
    config: the learner's own `Config`.
    runtime: the workers' `Runtime`.
    command: the command line, for the report.

  Attributes:
    name: the value of --learner.
    skipped: {path: why a layer was left alone before the compressors came}.
  """

  name: str

  def __init__(self, helper, run, config, runtime, command=''):
    self.helper = helper
    self.run = run
    self.config = config
    self.runtime = runtime
    self.command = command
    self.folder = pathlib.Path(
      run.work_dir or f'runs/{helper.name}_at_{helper.dataset_name}/{self.name}'
    )
    self.seconds = {}
    self.skipped = {}
    self.dataset = helper.dataset()
    self.results = Results(self.folder, self.name, helper, run, self.dataset)
    self.training_split = 'train' if run.eval_split == 'test' else 'fit'
    self.steps_per_epoch = self.dataset.steps_per_epoch(
      self.training_split, run.batch_size, runtime.size
    )

  def _opened_folder(self):
    parts = (self.run, self.helper.config, self.config)
    everything = {name: value for part in parts for name, value in dataclasses.asdict(part).items()}
    everything |= {
      'net': f'{self.helper.name}_at_{self.helper.dataset_name}',
      'workers': self.runtime.size,
    }
    return WorkFolder(self.folder, everything, read_only=self.run.exec_mode == 'eval')

  def _on_chief(self, task):
    """Returns the result of `task` on rank 0, None elsewhere; its UserError is raised on all."""
    result = message = None
    if self.runtime.is_chief:
      try:
        result = task()
      except UserError as error:
        message = str(error)
    message = self.runtime.broadcast(message)
    if message:
      raise UserError(message)
    return result

  @contextlib.contextmanager
  def _timed(self, name):
    began = time.monotonic()
    yield
    self.seconds[name] = round(time.monotonic() - began, 2)

  def _loaded(self, path):
    """Returns the net, or what pruning left of it, from a file that only rank 0 needs to have."""
    model = self._on_chief(lambda: self.helper.load(path))
    structure = self.runtime.broadcast(model.to_json() if model else None)
    model = model or keras.models.model_from_json(structure)
    self.runtime.broadcast_variables(model.weights)
    return model

  def kept(self, name, make):
    """Returns the model in file `name` of the work folder, on every rank; made first if missing.

    Args:
      make: gives the Keras model; called on every rank, which together may have to make it.
    """
    path = self.folder / name
    if not self.runtime.broadcast(path.exists()):
      model = make()
      self._on_chief(lambda: save_model(model, path))
    self._reseed()
    return self._loaded(path)

  def _reseed(self):
    """Makes what models draw when they are made, as the seeds of Dropout, follow from the run's
    seed alone: not from what was drawn before, which differs where a run goes on.
    """
    keras.utils.set_random_seed(self.run.seed)

  def recorded(self, name):
    """Returns what a .json file of the work folder holds, on all ranks; None if there is none."""
    path = self.folder / name

    def read():
      try:
        return json.loads(path.read_text())
      except FileNotFoundError:
        return None
      except ValueError as error:
        raise UserError(
          f'{path} is damaged: {error}. Remove the work folder, or give another --work_dir.'
        ) from error

    return self.runtime.broadcast(self._on_chief(read))

  def _calibrate(self, model):
    if not self._checkpoints('compressed').latest:
      self.calibrate(model, self.training_batches())

  def calibrate(self, model, batches):
    """Sets the ranges of an `Instrumented` model from the first (x, y) of training batches."""
    calibration.calibrate(model, (x for x, _ in batches.take(CALIBRATION_BATCHES)))

  def _re_estimate_batch_norm(self, model):
    if self.run.nb_batches_bn:
      batches = self.training_batches().take(self.run.nb_batches_bn)
      with self._timed('batch_norm'):
        calibration.re_estimate_batch_norm(
          model, (x for x, _ in batches), total=self.runtime.allreduce_sum
        )

  def training_batches(self, start=0, *, mixed=False, split=None):
    """Returns this worker's endless (x, y) batches from step `start` on.

    Args:
      mixed: whether images are mixed as --dst_mixup says; `y` means little then.
      split: of the data set; None for that of the training.
    """
    dataset = Mixed(self.dataset, self.run.dst_mixup) if mixed else self.dataset
    return dataset.load(
      split or self.training_split,
      batch=self.run.batch_size,
      shard=(self.runtime.rank, self.runtime.size),
      seed=self.run.seed,
      training=True,
      start=start,
    )

  def _steps(self, epochs):
    return max(round(epochs * self.steps_per_epoch), 1)

  def _checkpoints(self, phase):
    return Checkpoints(self.folder / 'checkpoints', phase)

  def _fit(self, phase, model, epochs, learning_rate, *, loss=None, **changes):
    """Trains; `loss(y, outputs)` is the net's by default, `changes` are fields of `Schedule`.

    Where a teacher is in the model's stack, images may be mixed, and have no labels then.
    """
    taught = any(isinstance(each, Distillation) for each in (model.stack or Stack()).compressors)
    mixed = loss is None and taught and self.run.dst_mixup > 0
    steps = self._steps(epochs)
    schedule = Schedule(
      f'{phase} training',
      steps,
      lambda step: learning_rate(step, steps),
      self.helper.config.momentum,
      self.helper.config.loss_w_dcy,
      self.run.save_step,
      self.run.summ_step,
    )._replace(**changes)
    with self._timed(f'{phase}_training'):
      train(
        model,
        lambda start: self.training_batches(start, mixed=mixed),
        loss or ((lambda y, outputs: 0.0) if mixed else self.helper.loss),
        schedule,
        checkpoints=self._checkpoints(phase),
        runtime=self.runtime,
        log_dir=self.folder / 'tensorboard' / phase,
      )
