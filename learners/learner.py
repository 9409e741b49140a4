"""A learner: the order of phases from a float model to files that were run."""

import abc
import contextlib
import dataclasses
import functools
import json
import pathlib
import time

import keras
import numpy as np
import tensorflow as tf

from learners.checkpoint import Checkpoints
from learners.training import Schedule, train
from learners.workfolder import WorkFolder
from pocketsize import calibration, configure, conversion, report, schedules
from pocketsize.compressor import Stack
from pocketsize.distillation import Distillation, DistillationConfig
from pocketsize.errors import UserError
from pocketsize.files import atomic_path, write_json
from pocketsize.graph import Graph
from pocketsize.instrument import Instrumented, instrument, strip
from pocketsize.options import check_options, option

CALIBRATION_BATCHES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
  """What every run has, whatever its learner and net."""

  learner: str = option('full-prec', 'the algorithm')
  exec_mode: str = option('train', 'train and export, or evaluate what a work folder holds', choices=('train', 'eval'))
  work_dir: str | None = option(None, 'folder of the run; unset: runs/<net>/<learner>')
  pretrained: str | None = option(None, 'file of the float model: .keras, .weights.h5 or .npz; unset: it is trained first')
  seed: int = option(0, 'of initial weights, order of samples and augmentation', lower=0)
  batch_size: int = option(128, 'samples of one worker in a training step', lower=1)
  batch_size_eval: int = option(100, 'samples of an evaluation step', lower=1)
  eval_split: str = option('test', 'evaluate on the test split, or on held-out training data (then not trained on)',
                           choices=('test', 'val'))
  lrn_rate_ft: float | None = option(
    None, 'learning rate at which a compressed model starts, down to 0 by a cosine; unset: a tenth of lrn_rate_init', above=0)
  enbl_dst: bool = option(False, 'distill from the float model')
  loss_w_dst: float = option(4.0, 'factor of the distillation loss', lower=0)
  tempr_dst: float = option(4.0, 'temperature of the distillation', above=0)
  save_path_dst: str | None = option(None, "file of another teacher of the net's architecture; unset: the float model")
  summ_step: int = option(100, 'steps between two reports', lower=1)
  save_step: int = option(10000, 'steps between two checkpoints', lower=1)
  export_formats: str = option(','.join(conversion.FORMATS), 'formats to write, comma-separated, or none')
  enbl_multi_gpu: bool = option(False, 'several workers; set by the scripts')
  debug: bool = option(False, 'show a traceback with an error of the user')

  def __post_init__(self):
    check_options(self)
    unknown = [name for name in self.formats if name not in conversion.FORMATS]
    if unknown:
      raise UserError(f'--export_formats must be none, or names out of {", ".join(conversion.FORMATS)}. '
                      f'Received: {unknown[0]!r}.')
    if self.save_path_dst and not self.enbl_dst:
      raise UserError('--save_path_dst names a teacher, but distillation is off: add --enbl_dst, or leave it out.')

  @property
  def formats(self):
    """The names of the formats to write."""
    return [name for name in self.export_formats.split(',') if name and name != 'none']


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
  """

  name: str
  Config: type

  def __init__(self, helper, run, config, runtime, command=''):
    self.helper = helper
    self.run = run
    self.config = config
    self.runtime = runtime
    self.command = command
    self.folder = pathlib.Path(run.work_dir or f'runs/{helper.name}_at_{helper.dataset_name}/{self.name}')
    self.seconds = {}
    everything = {**dataclasses.asdict(run), **dataclasses.asdict(helper.config), **dataclasses.asdict(config)}
    self._work_folder = self._on_chief(lambda: WorkFolder(self.folder, everything))
    self.dataset = helper.dataset()
    self.training_split = 'train' if run.eval_split == 'test' else 'fit'
    self.steps_per_epoch = self.dataset.steps_per_epoch(self.training_split, run.batch_size, runtime.size)

  @abc.abstractmethod
  def compressors(self, graph, steps):
    """Returns the list of compressors for a `Graph`, to be trained for `steps` steps."""

  @abc.abstractmethod
  def epochs(self):
    """Returns the epochs for which a compressed model is trained, a float."""

  def execute(self):
    """Does what --exec_mode says."""
    {'train': self.train, 'eval': self.evaluate}[self.run.exec_mode]()

  def train(self):
    """Trains, compresses, exports and runs the files; returns the report."""
    began = time.monotonic()
    float_model = self._float_model()
    model = self._compressed_model(float_model)
    self._on_chief(lambda: self._save_models(model))
    result = self._on_chief(lambda: self._measure(float_model, model, began))
    self.runtime.barrier()
    return result

  def evaluate(self):
    """Measures what the work folder holds again and prints the table; changes no file."""
    float_model = self.helper.build()
    self.helper.load_pretrained(float_model, self._existing('float.keras'))
    quantized = self.folder / 'quantized.keras'
    path = quantized if quantized.exists() else self._existing('final.keras')
    model = keras.models.load_model(path, compile=False)
    model = model if isinstance(model, Instrumented) else instrument(model)
    files = [conversion.ExportedFile(**{**file, 'path': pathlib.Path(file['path'])})
             for file in json.loads(self._existing('exports/files.json').read_text())]
    self._on_chief(lambda: self._report(float_model, model, files, time.monotonic()))

  def _existing(self, name):
    if not (self.folder / name).exists():
      raise UserError(f'--exec_mode=eval needs a finished run in --work_dir. Received: {self.folder}, which has no {name}.')
    return self.folder / name

  def _on_chief(self, task):
    """Runs `task` on rank 0 and returns its result there, None elsewhere; its UserError is raised on every rank."""
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
    model = self.helper.build()
    kept = self.folder / 'float.keras'
    if kept.exists():
      self.helper.load_pretrained(model, kept)
    elif self.run.pretrained:
      self.helper.load_pretrained(model, self.run.pretrained)
    else:
      self._train_float(model)
    if not kept.exists():
      self._on_chief(lambda: _save_keras(model, kept))
    self.runtime.barrier()
    return model

  def _train_float(self, model):
    workers = self.run.batch_size * self.runtime.size / self.helper.config.batch_size_norm
    instrumented = instrument(model)
    Stack(self.float_compressors()).bind(instrumented)
    self._fit('float', instrumented, self.helper.epochs(),
              lambda step, steps: workers * self.helper.learning_rate(step / self.steps_per_epoch))

  def float_compressors(self):
    """Returns what acts while the float model is trained: nothing, as a rule."""
    return []

  def _compressed_model(self, float_model):
    """Returns the `Instrumented` model, trained."""
    student = self.helper.build()
    student.set_weights(float_model.get_weights())
    steps = self._steps(self.epochs())
    stack = Stack(self.compressors(Graph(student), steps))
    if not stack.compressors:
      return instrument(student)
    if self.run.enbl_dst:
      stack.compressors.append(self.distillation(float_model))
    model = configure.attach(student, stack)
    if not self._checkpoints('compressed').latest:
      self._on_chief(lambda: self._calibrate(model))
    self._on_chief(lambda: write_json(self.folder / 'plan.json', report.plan(model, stack)))
    workers = self.run.batch_size * self.runtime.size / self.helper.config.batch_size_norm
    initial = workers * (self.run.lrn_rate_ft or 0.1 * self.helper.config.lrn_rate_init)
    self._fit('compressed', model, self.epochs(), lambda step, steps: schedules.cosine(step, steps, initial))
    stack.update(steps)
    return model

  def distillation(self, teacher):
    """Returns the `Distillation` that the flags ask for; `teacher` is the float model."""
    if self.run.save_path_dst:
      teacher = self.helper.build()
      self.helper.load_pretrained(teacher, self.run.save_path_dst)
    return Distillation(instrument(teacher), DistillationConfig(self.run.loss_w_dst, self.run.tempr_dst))

  def _calibrate(self, model):
    batches = self.dataset.load(self.training_split, batch=self.run.batch_size, seed=self.run.seed, training=True)
    calibration.calibrate(model, (x for x, _ in batches.take(CALIBRATION_BATCHES)))

  def _steps(self, epochs):
    return max(round(epochs * self.steps_per_epoch), 1)

  def _checkpoints(self, phase):
    return Checkpoints(self.folder / 'checkpoints', phase)

  def _fit(self, phase, model, epochs, learning_rate):
    steps = self._steps(epochs)
    schedule = Schedule(
      f'{phase} training', steps, lambda step: learning_rate(step, steps), self.helper.config.momentum,
      self.helper.config.loss_w_dcy, self.run.save_step, self.run.summ_step)
    batches = functools.partial(
      self.dataset.load, self.training_split, batch=self.run.batch_size, shard=(self.runtime.rank, self.runtime.size),
      seed=self.run.seed, training=True)
    with self._timed(f'{phase}_training'):
      train(model, lambda start: batches(start=start), self.helper.loss, schedule, checkpoints=self._checkpoints(phase),
            runtime=self.runtime, log_dir=self.folder / 'tensorboard' / phase)

  # Results; on rank 0 only.

  def _save_models(self, model):
    _save_keras(strip(model), self.folder / 'final.keras')
    if conversion.is_quantized(model):
      _save_keras(model, self.folder / 'quantized.keras')

  def _measure(self, float_model, model, began):
    formats = [name for name in self.run.formats if name in conversion.formats_for(model)]
    with self._timed('export'):
      files = conversion.export(model, self.folder / 'exports', formats, name=self.helper.name)
    write_json(self.folder / 'exports' / 'files.json', [{**file._asdict(), 'path': str(file.path)} for file in files])
    result = self._report(float_model, model, files, began)
    write_json(self.folder / 'report.json', result)
    return result

  def _report(self, float_model, model, files, began):
    print('evaluating', flush=True)
    with self._timed('evaluation'):
      float_metrics, _ = self._evaluate(instrument(float_model))
      metrics, outputs = self._evaluate(model)
      _, stripped_outputs = self._evaluate(instrument(strip(model)))
    with self._timed('verification'):
      entries = conversion.verify_files(
        files, self._evaluation_batches, {True: outputs, False: stripped_outputs}, self.helper.evaluator())
    self.seconds['total'] = round(time.monotonic() - began, 2)
    result = report.build(
      model, float_metrics=float_metrics, metrics=metrics, files=entries, seconds=self.seconds, command=self.command,
      names={'model': self.helper.name, 'dataset': self.helper.dataset_name, 'learner': self.name},
      bytes_=(_size(self.folder / 'float.keras'), _size(self.folder / 'final.keras')))
    report.show(result)
    return result

  def _evaluation_batches(self):
    """Yields the evaluation split as NumPy (x, y)."""
    return self.dataset.load(self.run.eval_split, batch=self.run.batch_size_eval).as_numpy_iterator()

  def _evaluate(self, model):
    """Returns (metrics, [samples, ...] outputs) of a model on the evaluation split."""
    evaluator = self.helper.evaluator()
    specs = [tf.TensorSpec((None, *x.shape[1:]), x.dtype) for x in model.source.inputs]
    predict = tf.function(lambda *x: model(list(x), training=False), input_signature=specs)
    kept = []
    for x, y in self._evaluation_batches():
      kept.append(predict(x).numpy())
      evaluator.update(y, kept[-1])
    return evaluator.result(), np.concatenate(kept)


def _save_keras(model, path):
  with atomic_path(path) as temporary:
    model.save(temporary)


def _size(path):
  return path.stat().st_size
