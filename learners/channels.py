"""What the channel pruning learners share: the course of a selection, kept step by step."""

import abc
import math

import numpy as np

from learners.channel_targets import kept_counts
from learners.learner import Learner
from learners.progress import ProgressReport
from pocketsize.channel_graph import ChannelGraph
from pocketsize.errors import UserError
from pocketsize.files import write_json
from pocketsize.pruning import units
from pocketsize.pruning.layerwise import Layerwise


class ChannelLearner(Learner):
  """Chooses channels, drops them from the model, and fine-tunes what is left.

  A subclass says how channels are chosen. After each step of the selection its state is kept, so
  that a run goes on where it stopped; the smaller model is kept as pruned.keras.
  """

  # Rounds the exact number of channels to keep.
  rounding = staticmethod(np.floor)

  @abc.abstractmethod
  def method(self):
    """Returns what `Layerwise` takes as `method`."""

  @abc.abstractmethod
  def ratios(self, convolutions):
    """Returns the shares of input channels to drop: {path: ratio}, and that of dense layers.

    Args:
      convolutions: paths of all convolutions but depthwise ones, in the order of execution.
    """

  @abc.abstractmethod
  def samples(self):
    """Returns (images, positions of each) from which layers are reconstructed; None for all."""

  def compressors(self, graph, steps):
    return []

  def epochs(self):
    return self.helper.epochs()

  def check(self):
    self.plan(self.source())
    super().check()

  def prepared(self, model):
    found, counts, self.skipped = self.plan(model)
    self._on_chief(lambda: self._describe(found, counts))
    return self.kept('pruned.keras', lambda: self._pruned(model, found, counts))

  def plan(self, model):
    """Returns (list of `Unit`s, {unit name: channels to keep}, {path: why it is left alone})."""
    channels = ChannelGraph(model)
    found, skipped = units.units(channels, self.config.channel_trunk)
    if not found:
      reasons = '; '.join(f'{path}: {reason}' for path, reason in skipped.items())
      raise UserError(f'Model {model.name!r} has no channels to prune: {reasons or "no groups"}.')
    by_path, dense = self.ratios(
      [
        path
        for path, layer in channels.graph.layers.items()
        if type(layer).__name__ in units.CONVOLUTIONS
      ]
    )
    ratios = {unit.name: min(by_path.get(path, dense) for path in unit.readers) for unit in found}
    counts = kept_counts(
      self.config, channels, found, ratios, self.multiple(), self.rounding, self.folder
    )
    return found, counts, skipped

  def multiple(self):
    """Returns what every layer keeps a multiple of."""
    return self.config.channel_multiple

  def _describe(self, found, counts):
    """Writes channels.json."""
    entries = [
      {
        'name': unit.name,
        'channels': unit.size,
        'kept': counts[unit.name],
        'readers': list(unit.readers),
      }
      for unit in found
    ]
    write_json(self.folder / 'channels.json', entries)

  def _pruned(self, model, found, counts):
    course = self.course(model, found, counts)
    checkpoints = self._checkpoints('selection')
    done = checkpoints.restore(course.variables) if self.runtime.is_chief else 0
    done = self.runtime.broadcast(done)
    self.runtime.broadcast_variables(course.variables)
    steps = self.steps(course)
    with self._timed('selection'):
      for number in ProgressReport.over(
        'choosing channels',
        range(done, len(steps)),
        name=lambda number: steps[number],
        quiet=not self.runtime.is_chief,
      ):
        self.do(course, steps[number])
        # Sums over the workers are alike on all of them; this makes it certain.
        self.runtime.broadcast_variables(course.variables)
        self._on_chief(lambda done=number + 1: checkpoints.save(done, course.variables))
    self.seconds['selection_forward'] = round(course.forward_seconds, 2)
    return course.shrunk()

  def course(self, model, found, counts):
    """Returns the `Layerwise` of a model, for the samples that this worker has."""
    samples, points = self.samples()
    return Layerwise(
      model,
      found,
      counts,
      self.method(),
      self.images(samples),
      points=points,
      seed=self.run.seed,
      total=self.runtime.allreduce_sum,
      memory=int(self.config.channel_memory * 2**30),
    )

  def images(self, samples):
    """Returns this worker's share of `samples` training images, as batches."""
    batches = math.ceil(samples / (self.run.batch_size * self.runtime.size))
    data = self.dataset.load(
      self.training_split,
      batch=self.run.batch_size,
      shard=(self.runtime.rank, self.runtime.size),
      seed=self.run.seed,
      training=True,
    )
    return [x.numpy() for x, _ in data.take(batches)]

  def steps(self, course):
    """Returns the names of the steps of a selection, in order."""
    return course.steps

  def do(self, course, step):
    """Does one step."""
    course.do(step)


def read_ratios(path, flag, paths):
  """Returns {path: number} from a file of numbers, comma-separated, one for each of `paths`.

  Args:
    flag: that gave the file, for the error.

  Raises:
    UserError: the file is missing, has something else, or another number of numbers.
  """
  try:
    with open(path) as file:
      words = file.read().strip().strip(',').split(',')
    numbers = [float(word) for word in words]
  except (OSError, TypeError) as error:
    raise UserError(f'--{flag} must be a file. Received: {path} ({error}).') from error
  except ValueError as error:
    raise UserError(
      f'--{flag} must be a file of numbers, comma-separated. Received: {path} ({error}).'
    ) from error
  if len(numbers) != len(paths):
    raise UserError(
      f'--{flag} must have one number for each of the {len(paths)} convolutions '
      f'{", ".join(paths)}. Received: {len(numbers)} numbers.'
    )
  return dict(zip(paths, numbers, strict=True))
