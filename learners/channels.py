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
from pocketsize.pruning import marginal, units
from pocketsize.pruning.layerwise import Layerwise

# Output positions of each image by which channels are ranked, where a learner takes all of them.
RANKING_POINTS = 10


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
    channels, found, _ = self.plan(self.structure)
    if self.config.target != 'latency':
      self.check_target(channels, found)
    super().check()

  def prepared(self, model):
    channels, found, self.skipped = self.plan(model)
    kept = self._kept_counts(model, channels, found)
    return self.kept('pruned.keras', lambda: self._pruned(model, found, kept))

  def plan(self, model):
    """Returns (`ChannelGraph`, list of `Unit`s, {path: why it is left alone})."""
    channels = ChannelGraph(model)
    found, skipped = units.units(channels, self.config.channel_trunk)
    if not found:
      reasons = '; '.join(f'{path}: {reason}' for path, reason in skipped.items())
      raise UserError(f'Model {model.name!r} has no channels to prune: {reasons or "no groups"}.')
    return channels, found, skipped

  def check_target(self, channels, found):
    """Raises a UserError if so many channels cannot be dropped; for targets that need no timing."""
    self.counts(channels, found)

  def counts(self, channels, found, scores=None):
    """Returns {unit name: channels to keep}; `scores` as `kept_counts` takes them."""
    ratios = self.unit_ratios(channels, found)
    return kept_counts(
      self.config, channels, found, ratios, self.multiple(), self.rounding, self.folder, scores
    )

  def unit_ratios(self, channels, found):
    """Returns {unit name: share to drop} that `ratios` means; 0 for units that stay whole."""
    convolutions = [
      path
      for path, layer in channels.graph.layers.items()
      if type(layer).__name__ in units.CONVOLUTIONS
    ]
    by_path, dense = self.ratios(convolutions)
    return {unit.name: min(by_path.get(path, dense) for path in unit.readers) for unit in found}

  def _kept_counts(self, model, channels, found):
    """Returns the counts of channels.json, decided now if there is none; the same on all ranks."""
    path = self.folder / 'channels.json'
    entries = self.recorded('channels.json')
    if entries is None:
      counts = self.decided(model, channels, found)
      entries = [
        {
          'name': unit.name,
          'channels': unit.size,
          'kept': counts[unit.name],
          'readers': list(unit.readers),
        }
        for unit in (found if counts else ())
      ]
      self._on_chief(lambda: write_json(path, entries))
      entries = self.runtime.broadcast(entries)
    counts = {entry['name']: entry['kept'] for entry in entries}
    self._refuse_others('channels.json', counts, [unit.name for unit in found])
    return counts

  def decided(self, model, channels, found):
    """Returns {unit name: channels to keep} on rank 0."""
    scores = None
    if self.config.target_scope == 'network':
      # In one order on all workers, as a set would not be.
      readers = dict.fromkeys(path for unit in found for path in unit.readers)
      scores = marginal.worths(channels, found, self.survey(model).problems(readers))
    return self._on_chief(lambda: self.counts(channels, found, scores))

  def _refuse_others(self, name, received, groups):
    """Raises a UserError if a file of the work folder is not about these groups of channels."""
    if sorted(received) != sorted(groups):
      raise UserError(
        f'{self.folder / name} must be about the groups of channels {", ".join(groups)}. Remove '
        f'the work folder, or give another --work_dir. Received: {", ".join(received)}.'
      )

  def survey(self, model, split=None):
    """Returns a `Layerwise` that looks at all layers of a model at once, and prunes nothing.

    Args:
      model: a Keras model.
      split: as `images` takes it.
    """
    samples, points = self.samples()
    return Layerwise(
      model,
      [],
      {},
      None,
      self.images(samples, split),
      points=points or RANKING_POINTS,
      seed=self.run.seed,
      total=self.runtime.allreduce_sum,
    )

  def multiple(self):
    """Returns what every layer keeps a multiple of."""
    return self.config.channel_multiple

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
    keep = {name: np.flatnonzero(kept).tolist() for name, kept in course.keep.items()}
    self._on_chief(lambda: write_json(self.folder / 'kept.json', keep))
    return course.shrunk()

  def surviving(self, model):
    kept = self.recorded('kept.json')
    if kept is None:
      return {}
    channels = ChannelGraph(model)
    self._refuse_others('kept.json', kept, [group.name for group in channels.groups])
    keep = {
      group.name: np.isin(np.arange(group.size), kept[group.name]) for group in channels.groups
    }
    return units.positions(channels, keep)

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

  def images(self, samples, split=None):
    """Returns this worker's share of `samples` training images, as batches.

    Args:
      split: as `training_batches` takes it.
    """
    return [x for x, _ in self.batches(samples, mixed=self.run.dst_mixup > 0, split=split)]

  def batches(self, samples, mixed=False, split=None):
    """Returns this worker's share of `samples` training images with their labels, as batches.

    Args:
      mixed, split: as `training_batches` takes them.
    """
    batches = math.ceil(samples / (self.run.batch_size * self.runtime.size))
    data = self.training_batches(mixed=mixed, split=split).take(batches)
    return [(x.numpy(), y.numpy()) for x, y in data]

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
