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


class InMemoryDataset(Dataset):
  """A data set that fits into memory in its raw form; a subclass parses and preprocesses.

  Args:
    train, test: (x, y) each; x an [samples, height, width, channels] array in raw values, y
      [samples] integers.
    nb_smpls_val: samples of the training set that are held out as 'val'.
  """

  def __init__(self, train, test, nb_smpls_val):
    self._raw = {'train': train, 'test': test}
    self._nb_smpls_val = nb_smpls_val

  @abc.abstractmethod
  def preprocess(self, x, rng=None):
    """Returns the float32 images for the net.

    Args:
      x: [batch, height, width, channels] raw images, a copy that may be changed.
      rng: np.random.Generator for augmentation, or None in evaluation.
    """

  def size(self, split):
    return len(self._indices(split))

  def load(self, split, *, batch, shard=(0, 1), seed=0, training=False, start=0):
    if training:
      steps = self.steps_per_epoch(split, batch, shard[1])
      return self._as_tensors(
        lambda: self._training_batches(split, batch, steps, shard, seed, start), split, batch
      )
    rank, workers = shard
    samples = len(self._indices(split)[rank::workers])
    return self._as_tensors(
      lambda: self._evaluation_batches(split, batch, shard), split, None
    ).apply(tf.data.experimental.assert_cardinality(-(-samples // batch)))

  def _training_batches(self, split, batch, steps, shard, seed, start):
    """Yields (x, y) for ever, from step `start` on; `steps` is the length of an epoch."""
    images, labels = self._arrays(split)
    indices = self._indices(split)
    rank, workers = shard
    epoch, first = divmod(start, steps)
    while True:
      order = indices[np.random.default_rng((seed, epoch)).permutation(len(indices))]
      for k in range(first, steps):
        begin = (k * workers + rank) * batch
        chosen = order[begin : begin + batch]
        rng = np.random.default_rng((seed, epoch, k, rank))
        yield self.preprocess(images[chosen], rng), labels[chosen]
      epoch, first = epoch + 1, 0

  def _evaluation_batches(self, split, batch, shard):
    images, labels = self._arrays(split)
    rank, workers = shard
    indices = self._indices(split)[rank::workers]
    for begin in range(0, len(indices), batch):
      chosen = indices[begin : begin + batch]
      yield self.preprocess(images[chosen]), labels[chosen]

  def _as_tensors(self, batches, split, batch):
    shape = self._arrays(split)[0].shape[1:]
    signature = (tf.TensorSpec((batch, *shape), tf.float32), tf.TensorSpec((batch,), tf.int64))
    return tf.data.Dataset.from_generator(batches, output_signature=signature).prefetch(4)

  def _arrays(self, split):
    return self._raw['test' if split == 'test' else 'train']

  def _indices(self, split):
    """The places of a split's samples in its arrays, ascending."""
    if split not in SPLITS:
      raise ValueError(f'Argument `split` must be one of {SPLITS}. Received: split={split!r}.')
    samples = len(self._arrays(split)[1])
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
