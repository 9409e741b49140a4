"""Compressors, stacks of them, and the registry that finds an algorithm by its name."""

import abc
import enum
import importlib
import pkgutil
import warnings

import keras

import pocketsize
from pocketsize.errors import UserError

_REGISTRY = {}


class Stage(enum.Enum):
  """How far a model is compressed: only a checkpoint of stage FULL may count as a result."""

  UNCOMPRESSED = 0
  PARTIAL = 1
  FULL = 2


class Compressor(abc.ABC):
  """An algorithm over time: where its transforms go, and what happens to them at a step.

  Args:
    rules: sequence of `targets.Rule`, whose configurations are of type `Config`; last match wins.

  Attributes:
    skipped: {path: reason} of the layers left alone; filled by `plan`.
    trains_source: whether the weights of the user's model train, or only those of transforms; known
      once `plan` was called.
    order: the highest `order` of its transforms; known once a stack was planned that it is part of.
  """

  Config = None
  trains_source = True
  order = 0

  def __init__(self, rules=()):
    self.rules = tuple(rules)
    self.skipped = {}

  @abc.abstractmethod
  def plan(self, graph):
    """Returns the list of `Placement`s for a `Graph`."""

  def bind(self, model):  # noqa: B027 (an algorithm without state of its own has nothing to bind)
    """Takes hold of an `Instrumented` model that was made from `plan`, or loaded."""

  def update(self, step):  # noqa: B027
    """Prepares transforms for optimizer step `step` (from 0), or for use after so many steps.

    Pure in the step and the weights: calling it twice changes nothing.
    """

  def observe(self, node, outputs):  # noqa: B027
    """Sees what a node of the bound model computes for a training batch, before its `loss`."""

  def loss(self, x, y, outputs):
    """Returns a term to add to the training loss, for a batch."""
    return 0.0

  def stage(self, step):
    """Returns the `Stage` once `step` optimizer steps are done and `update(step)` was called."""
    return Stage.FULL

  def statistics(self):
    """Returns a flat {name: number} of what is to be watched during training."""
    return {}


class Stack(Compressor):
  """Several compressors as one: placements joined, losses added.

  Args:
    compressors: iterable of `Compressor`.

  Attributes:
    step: of the last `update`; 0 before the first.
  """

  def __init__(self, compressors=()):
    super().__init__()
    self.compressors = list(compressors)
    self.step = 0

  def plan(self, graph):
    placements = []
    for compressor in self.compressors:
      planned = compressor.plan(graph)
      compressor.order = max((placement.transform.order for placement in planned), default=0)
      placements += planned
    # What one compressor leaves alone and another takes is not left alone; one without rules leaves
    # nothing.
    choosers = [compressor for compressor in self.compressors if compressor.rules]
    self.skipped = {
      path: reason
      for compressor in reversed(choosers)
      for path, reason in compressor.skipped.items()
      if all(path in other.skipped for other in choosers)
    }
    return placements

  @property
  def trains_source(self):
    return all(compressor.trains_source for compressor in self.compressors)

  def bind(self, model):
    # What they bind to trains what the stack trains.
    model.stack = self
    for compressor in self.compressors:
      compressor.bind(model)

  def update(self, step):
    self.step = step
    # Scales are fitted to what the masks of this step leave.
    for compressor in sorted(self.compressors, key=lambda compressor: compressor.order):
      compressor.update(step)

  def observe(self, node, outputs):
    for compressor in self.compressors:
      compressor.observe(node, outputs)

  def loss(self, x, y, outputs):
    return sum(compressor.loss(x, y, outputs) for compressor in self.compressors)

  def stage(self, step):
    stages = {compressor.stage(step) for compressor in self.compressors}
    if len(stages) > 1:
      return Stage.PARTIAL
    return stages.pop() if stages else Stage.UNCOMPRESSED

  def statistics(self):
    return {
      name: value
      for compressor in self.compressors
      for name, value in compressor.statistics().items()
    }


class CompressionCallback(keras.callbacks.Callback):
  """Calls `stack.update(step)` before every optimizer step of `fit` and after the last.

  It then warns of a compression that is not complete: it comes last in the list of callbacks, so
  that it sees the weights that others restore.

  Args:
    stack: a bound `Stack`.
    step: the step at which this `fit` begins; None for the optimizer's own count, or that of the
      stack's last update if it is higher, as with a new optimizer in a second `compile`.
  """

  def __init__(self, stack, step=None):
    super().__init__()
    self.stack = stack
    self.step = step

  def on_train_begin(self, logs=None):
    if self.model.steps_per_execution != 1:
      raise UserError(
        'Compression has work to do before every step: compile the model with '
        f'steps_per_execution=1. Received: {self.model.steps_per_execution}.'
      )
    if self.step is None:
      self.step = max(int(self.model.optimizer.iterations), self.stack.step)

  def on_train_batch_begin(self, batch, logs=None):
    self.stack.update(self.step)
    self.step += 1

  def on_train_end(self, logs=None):
    # What is due after the last step, such as the masks of the full ratio.
    self.stack.update(self.step)
    if self.stack.stage(self.step) is Stage.PARTIAL:
      warnings.warn(
        f'After {self.step} steps the compression is on its way: its schedule ends later, or '
        'weights of an earlier step were restored. Before the model is stripped or exported, train '
        'on (where weights were restored, with a `step` of this callback before end_step), or give '
        'an end_step before the first epoch whose weights may be the best.',
        stacklevel=2,
      )


def register(name):
  """Class decorator: registers a compressor as 'algorithm' `name` of a config_list."""

  def add(cls):
    if _REGISTRY.setdefault(name, cls) is not cls:
      raise ValueError(f'Two compressors are registered as {name!r}: {_REGISTRY[name]} and {cls}.')
    return cls

  return add


def discover():
  """Returns {name: Compressor class} of every algorithm in the package, found by walking it."""
  for module in pkgutil.walk_packages(pocketsize.__path__, 'pocketsize.'):
    importlib.import_module(module.name)
  return dict(sorted(_REGISTRY.items()))


def find(name):
  """Returns the compressor class registered as `name`; UserError with the legal names."""
  registry = discover()
  if name not in registry:
    raise UserError(f'`algorithm` must be one of {", ".join(registry)}. Received: {name!r}.')
  return registry[name]
