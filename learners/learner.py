"""A learner: the order of phases from a float model to files that were run."""

import abc
import contextlib
import dataclasses
import pathlib
import time

import keras

from datasets.mixup import Mixed
from learners.checkpoint import Checkpoints
from learners.results import Results
from learners.training import Schedule, train
from learners.workfolder import WorkFolder
from pocketsize import calibration, configure, conversion, report, schedules
from pocketsize.compressor import Stack
from pocketsize.distillation import Distillation, DistillationConfig
from pocketsize.errors import UserError
from pocketsize.files import write_json
from pocketsize.graph import Graph, copied
from pocketsize.instrument import instrument
from pocketsize.saving import save_model

CALIBRATION_BATCHES = 8


class Learner(abc.ABC):
  """A run: train, compress, export, report. A subclass adds its flags and its compressors.

  Args:
    helper: the net's `ModelHelper`.
    run: `RunConfig`.
    config: the learner's own `Config`.
    runtime: the workers' `Runtime`.
    command: the command line, for the report.

  Attributes:
    name: the value of --learner.
    Config: frozen dataclass of `option`s: the learner's flags.
    skipped: {path: why `prepared` left it alone}.
  """

  name: str
  Config: type

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

  @abc.abstractmethod
  def compressors(self, graph, steps):
    """Returns the list of compressors for a `Graph`, to be trained for `steps` steps."""

  @abc.abstractmethod
  def epochs(self):
    """Returns the epochs for which a compressed model is trained, a float."""

  def execute(self):
    """Does what --exec_mode says, as the only run in its work folder."""
    if self.run.exec_mode == 'train':
      self.check()
    with self._on_chief(self._opened_folder) or contextlib.nullcontext():
      {'train': self.train, 'eval': self.evaluate}[self.run.exec_mode]()

  def check(self):
    """Raises a UserError for what would else be found out after hours of training."""
    model = self.source()
    stack = Stack(self.compressors(Graph(model), self._steps(self.epochs())))
    if self.run.enbl_dst:
      stack.compressors.append(self.distillation(model))
    conversion.check_formats(configure.attach(model, stack), self.run.formats)

  def _opened_folder(self):
    parts = (self.run, self.helper.config, self.config)
    everything = {name: value for part in parts for name, value in dataclasses.asdict(part).items()}
    everything |= {
      'net': f'{self.helper.name}_at_{self.helper.dataset_name}',
      'workers': self.runtime.size,
    }
    return WorkFolder(self.folder, everything, read_only=self.run.exec_mode == 'eval')

  def train(self):
    """Trains, compresses, exports and runs the files; returns the report on rank 0."""
    began = time.monotonic()
    float_model = self._float_model()
    model = self._compressed_model(float_model)

    def finish():
      self.results.save(model)
      return self.results.write_report(float_model, model, self.seconds, began, self.command)

    return self._on_chief(finish)

  def evaluate(self):
    """Measures again what the work folder holds and prints the table; changes no file."""
    float_model = self._loaded(self._on_chief(lambda: self.results.existing('float.keras')))
    self._on_chief(lambda: self.results.show_again(float_model))

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

  # Phases.

  def _float_model(self):
    """Returns the float model: kept by an earlier start, pretrained, or trained now."""
    kept = self.folder / 'float.keras'
    source = self.runtime.broadcast(kept if kept.exists() else self.run.pretrained)
    model = self._loaded(source) if source else self.helper.build()
    if not source:
      self._train_float(model)
    if source != kept:
      self._on_chief(lambda: save_model(model, kept))
    return model

  def _loaded(self, path):
    """Returns the net, or what pruning left of it, from a file that only rank 0 needs to have."""
    model = self._on_chief(lambda: self.helper.load(path))
    structure = self.runtime.broadcast(model.to_json() if model else None)
    model = model or keras.models.model_from_json(structure)
    self.runtime.broadcast_variables(model.weights)
    return model

  def _train_float(self, model):
    workers = self.run.batch_size * self.runtime.size / self.helper.config.batch_size_norm
    instrumented = instrument(model)
    Stack(self.float_compressors()).bind(instrumented)
    self._fit(
      'float',
      instrumented,
      self.helper.epochs(),
      lambda step, steps: workers * self.helper.learning_rate(step / self.steps_per_epoch),
    )

  def float_compressors(self):
    """Returns what acts while the float model is trained: nothing, as a rule."""
    return []

  def _compressed_model(self, float_model):
    """Returns the `Instrumented` model, trained."""
    student = self.prepared(copied(float_model))
    steps = self._steps(self.epochs())
    stack = Stack(self.compressors(Graph(student), steps))
    if self.epochs() and self.run.enbl_dst:
      stack.compressors.append(self.distillation(float_model, self.surviving(float_model)))
    model = configure.attach(student, stack)
    plan = report.plan(model, stack)
    plan['skipped'] |= self.skipped
    self._on_chief(lambda: write_json(self.folder / 'plan.json', plan))
    if not self.epochs():
      return model
    self._on_chief(lambda: self._calibrate(model))
    self._fit('compressed', model, self.epochs(), self.tuning_rate, **self.tuning(steps))
    stack.update(steps)
    return self.finished(model)

  def source(self):
    """Returns the structure of the float model, for checks; its weights need not be trained."""
    return self._loaded(self.run.pretrained) if self.run.pretrained else self.helper.build()

  def kept(self, name, make):
    """Returns the model in file `name` of the work folder, on every rank; made first if missing.

    Args:
      make: gives the Keras model; called on every rank, which together may have to make it.
    """
    path = self.folder / name
    if not self.runtime.broadcast(path.exists()):
      model = make()
      self._on_chief(lambda: save_model(model, path))
    return self._loaded(path)

  def prepared(self, model):
    """Returns what is to be trained, made from a copy of the float model: as a rule that itself."""
    return model

  def finished(self, model):
    """Returns what is shipped, `Instrumented`, made from the trained one: as a rule that itself."""
    return model

  def tuning_rate(self, step, steps):
    """Returns the learning rate at a step of the training of a compressed model."""
    workers = self.run.batch_size * self.runtime.size / self.helper.config.batch_size_norm
    initial = workers * (self.run.lrn_rate_ft or 0.1 * self.helper.config.lrn_rate_init)
    return schedules.cosine(step, steps, initial)

  def tuning(self, steps):
    """Returns {field of `Schedule`: value} of what is otherwise when a compressed model is trained.

    Such as its optimizer or, as a number or a function of the step, its weight decay.
    """
    return {}

  def surviving(self, model):
    """Returns {path: positions along a layer's channels that `prepared` left of those of `model`}.

    Layers that lost none are missing.
    """
    return {}

  def distillation(self, teacher, channels=None):
    """Returns the `Distillation` that the flags ask for.

    Args:
      teacher: the float model.
      channels: what `surviving` says of the student.
    """
    if self.run.save_path_dst:
      teacher = self._loaded(self.run.save_path_dst)
    config = DistillationConfig(
      self.run.loss_w_dst,
      self.run.tempr_dst,
      self.run.loss_w_dst_features,
      tuple(self.run.dst_features.split(',')),
    )
    return Distillation(instrument(teacher), config, channels=channels)

  def _calibrate(self, model):
    if self._checkpoints('compressed').latest:
      return
    batches = self.training_batches().take(CALIBRATION_BATCHES)
    calibration.calibrate(model, (x for x, _ in batches))

  def training_batches(self, start=0, *, mixed=False):
    """Returns this worker's endless (x, y) batches from step `start` on.

    Args:
      mixed: whether images are mixed as --dst_mixup says; `y` means little then.
    """
    dataset = Mixed(self.dataset, self.run.dst_mixup) if mixed else self.dataset
    return dataset.load(
      self.training_split,
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
