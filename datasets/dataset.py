"""What a data set is to the rest: splits, and batches that are a pure function of (seed, step)."""

import abc

import numpy as np
import tensorflow as tf

from pocketsize.errors import UserError

SPLITS = ('train', 'fit', 'val', 'test')

# The held-out part must be the same in every run, whatever its `--seed`: a search that picks a
# compression on 'val' and the training that follows it may not see each other's samples.
_HELD_OUT_SEED = 20181031


class Dataset(abc.ABC):
  """Images and labels in four splits.

  'train' is the whole training set; 'fit' and 'val' are the training set cut in two; 'test' is
  the rest.
  """

  @abc.abstractmethod
  def size(self, split):
    """Returns the number of samples of a split."""

  @abc.abstractmethod
  def load(self, split, *, batch, shard=(0, 1), seed=0, training=False, start=0):
    """Returns a tf.data.Dataset of (x, y): x float32 NHWC and ready for the net, y int64 [batch].

    Args:
      split: 'train', 'fit', 'val' or 'test'.
      batch: samples of one worker's batch.
      shard: (rank, workers). In training the workers' batches of a step are disjoint parts of
        one global batch; in evaluation a worker gets every `workers`-th sample.
      seed: at least 0; of the order of the samples and the augmentation. Training only.
      training: True for endless, augmented, shuffled batches that are a pure function of
        (seed, step, shard); False for each sample once, in order, the last batch smaller.
      start: the step at which training begins, so that a resumed run sees what it would have.

    Raises:
      UserError: training, and the split is smaller than one global batch.
    """

  def steps_per_epoch(self, split, batch, workers=1):
    """Returns the number of whole global batches in a split, at least 1.

    Raises:
      UserError: the split is smaller than one global batch.
    """
    steps = self.size(split) // (batch * workers)
    if not steps:
      raise UserError(
        f'The batches of all workers together must fit into the split {split!r} of '
        f'{self.size(split)} samples. Received: {batch} samples a batch x {workers} worker(s) = '
        f'{batch * workers}.'
      )
    return steps


class IndexedDataset(Dataset):
  """A data set of numbered samples: which of them a split and a step of training have.

  Args:
    nb_smpls_val: samples of the training set that are held out as 'val'.
  """

  def __init__(self, nb_smpls_val):
    self._nb_smpls_val = nb_smpls_val

  @abc.abstractmethod
  def _count(self, part):
    """The number of samples in 'train' or 'test'."""

  def size(self, split):
    return len(self._indices(split))

  def _indices(self, split):
    """The numbers of a split's samples within its part, ascending."""
    if split not in SPLITS:
      raise ValueError(f'Argument `split` must be one of {SPLITS}. Received: split={split!r}.')
    samples = self._count(_part(split))
    if split in ('train', 'test'):
      return np.arange(samples)
    if not 1 <= self._nb_smpls_val < samples:
      raise UserError(
        f'--nb_smpls_val must leave samples on both sides of the cut: at least 1 and below the '
        f'{samples} training samples. Received: {self._nb_smpls_val}.'
      )
    order = np.random.default_rng(_HELD_OUT_SEED).permutation(samples)
    held_out, rest = np.split(order, [self._nb_smpls_val])
    return np.sort(held_out if split == 'val' else rest)

  def _training_choices(self, split, batch, shard, seed, start):
    """Returns an endless iterator over (chosen [batch], rng) from step `start` on."""
    steps = self.steps_per_epoch(split, batch, shard[1])
    return _choices(self._indices(split), batch, steps, shard, seed, start)

  def _evaluation_choices(self, split, batch, shard):
    """Returns the chosen samples of every batch, the last one smaller."""
    rank, workers = shard
    indices = self._indices(split)[rank::workers]
    return [indices[begin : begin + batch] for begin in range(0, len(indices), batch)]


def _part(split):
  return 'test' if split == 'test' else 'train'


def _choices(indices, batch, steps, shard, seed, start):
  """Yields (chosen, rng) for ever; `steps` is the length of an epoch."""
  rank, workers = shard
  epoch, first = divmod(start, steps)
  while True:
    order = indices[np.random.default_rng((seed, epoch)).permutation(len(indices))]
    for k in range(first, steps):
      begin = (k * workers + rank) * batch
      yield order[begin : begin + batch], np.random.default_rng((seed, epoch, k, rank))
    epoch, first = epoch + 1, 0


class InMemoryDataset(IndexedDataset):
  """A data set that fits into memory in its raw form; a subclass parses and preprocesses.

  Args:
    train, test: (x, y) each; x an [samples, height, width, channels] array in raw values, y
      [samples] integers.
    nb_smpls_val: samples of the training set that are held out as 'val'.
  """

  def __init__(self, train, test, nb_smpls_val):
    super().__init__(nb_smpls_val)
    self._raw = {'train': train, 'test': test}

  @abc.abstractmethod
  def preprocess(self, x, rng=None):
    """Returns the float32 images for the net.

    Args:
      x: [batch, height, width, channels] raw images, a copy that may be changed.
      rng: np.random.Generator for augmentation, or None in evaluation.
    """

  def load(self, split, *, batch, shard=(0, 1), seed=0, training=False, start=0):
    if training:
      self.steps_per_epoch(split, batch, shard[1])  # refuses too small a split at once
      return self._as_tensors(
        lambda: self._batches(split, self._training_choices(split, batch, shard, seed, start)),
        split,
        batch,
      )
    choices = self._evaluation_choices(split, batch, shard)
    return self._as_tensors(
      lambda: self._batches(split, ((chosen, None) for chosen in choices)), split, None
    ).apply(tf.data.experimental.assert_cardinality(len(choices)))

  def _batches(self, split, choices):
    images, labels = self._raw[_part(split)]
    for chosen, rng in choices:
      yield self.preprocess(images[chosen], rng), labels[chosen]

  def _as_tensors(self, batches, split, batch):
    shape = self._raw[_part(split)][0].shape[1:]
    signature = (tf.TensorSpec((batch, *shape), tf.float32), tf.TensorSpec((batch,), tf.int64))
    return tf.data.Dataset.from_generator(batches, output_signature=signature).prefetch(4)

  def _count(self, part):
    return len(self._raw[part][1])
