"""A learner: the order of phases from a float model to files that were run."""

import abc
import contextlib
import functools
import time

from learners.phases import Phases
from pocketsize import configure, conversion, report, schedules
from pocketsize.compressor import Stack
from pocketsize.copies import copied
from pocketsize.distillation import Distillation, DistillationConfig
from pocketsize.errors import UserError
from pocketsize.files import write_json
from pocketsize.freezing import FreezeBatchNorm
from pocketsize.graph import Graph
from pocketsize.instrument import instrument
from pocketsize.saving import save_model


class Learner(Phases, abc.ABC):
  """A run: train, compress, export, report. A subclass adds its flags and its compressors.

  Attributes:
    Config: frozen dataclass of `option`s: the learner's flags.
  """

  Config: type

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
      vars(self).pop('structure', None)  # A large net would take its memory twice.
    with self._on_chief(self._opened_folder) or contextlib.nullcontext():
      {'train': self.train, 'eval': self.evaluate}[self.run.exec_mode]()

  def check(self):
    """Raises a UserError for what would else be found out after hours of training."""
    self._check_batch_norm()
    model = self.structure
    stack = self._stack(model)
    if self.run.enbl_dst:
      stack.compressors.append(self.distillation(model))
    conversion.check_formats(configure.attach(model, stack), self.run.formats)

  def _check_batch_norm(self):
    """Raises a UserError for flags of batch norm that would have no effect."""
    delay, steps = self.run.freeze_bn_delay, self._steps(self.epochs())
    for name, is_set in (
      ('freeze_bn_delay', delay is not None),
      ('nb_batches_bn', self.run.nb_batches_bn > 0),
    ):
      if is_set and not self.epochs():
        raise UserError(
          f'--{name} is about the training of a compressed model, which --learner={self.name} has '
          f'not. Received: --{name}={getattr(self.run, name)}.'
        )
    if delay is not None and delay >= steps:
      raise UserError(
        f'--freeze_bn_delay must be below the {steps} steps for which the compressed model is '
        f'trained, or batch norms are never frozen. Received: {delay}.'
      )

  def _stack(self, model):
    """Returns the `Stack` of what compresses a model."""
    stack = Stack(self.compressors(Graph(model), self._steps(self.epochs())))
    if self.run.freeze_bn_delay is not None:
      stack.compressors.append(FreezeBatchNorm(self.run.freeze_bn_delay))
    return stack

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
    self._reseed()
    student = self.prepared(copied(float_model))
    stack = self._stack(student)
    if self.epochs() and self.run.enbl_dst:
      stack.compressors.append(self.distillation(float_model, self.surviving(float_model)))
    model = configure.attach(student, stack)
    plan = report.plan(model, stack)
    plan['skipped'] |= self.skipped
    self._on_chief(lambda: write_json(self.folder / 'plan.json', plan))
    if not self.epochs():
      return model
    self._on_chief(lambda: self._calibrate(model))
    steps = self._steps(self.epochs())
    self._fit('compressed', model, self.epochs(), self.tuning_rate, **self.tuning(steps))
    stack.update(steps)
    self._re_estimate_batch_norm(model)
    return self.finished(model)

  @functools.cached_property
  def structure(self):
    """The float model for checks; its weights need not be trained.

    Made once: a net takes its initial weights from Keras' random state, so each that a learner made
    for its checks would change those of the real one. (A teacher that is read from a file does.)
    """
    return self._loaded(self.run.pretrained) if self.run.pretrained else self.helper.build()

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
