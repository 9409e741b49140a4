"""Images mixed with other images, for a teacher to say what they are."""

import tensorflow as tf

from datasets.dataset import Dataset


class Mixed(Dataset):
  """A data set of which training images are mixed: x = m * x + (1 - m) * another x of the batch.

  That is equation 1 of Zhang et al. 2018 (arXiv:1710.09412) with alpha = 1, the larger part first,
  m in [1/2, 1]. Labels stay those of the larger part, which is too little to train on: such images
  are for a student that learns from a teacher (Beyer et al. 2022, arXiv:2106.05237, section 3).
  Batches are still a pure function of (seed, step, shard), and evaluation sees images as they are.

  Args:
    dataset: a `Dataset`.
    share: probability that an image is mixed, in [0, 1].
  """

  def __init__(self, dataset, share):
    self._dataset = dataset
    self._share = share

  def size(self, split):
    return self._dataset.size(split)

  def load(self, split, *, batch, shard=(0, 1), seed=0, training=False, start=0):
    data = self._dataset.load(
      split, batch=batch, shard=shard, seed=seed, training=training, start=start
    )
    if not training:
      return data
    fold = tf.random.experimental.stateless_fold_in
    of_worker = fold(tf.constant([seed, 0], tf.int64), shard[0])
    return data.enumerate(start).map(
      lambda step, pair: (mixed(pair[0], self._share, fold(of_worker, step)), pair[1])
    )


def mixed(x, share, seed):
  """Returns a batch of images, each mixed with another of them with probability `share`.

  Args:
    x: [batch, ...] float32 tensor.
    share: in [0, 1].
    seed: [2] integers; the result is a pure function of it and `x`.
  """
  order_seed, part_seed, choice_seed = tf.unstack(tf.random.experimental.stateless_split(seed, 3))
  batch = tf.shape(x)[0]
  others = tf.gather(x, tf.random.experimental.stateless_shuffle(tf.range(batch), order_seed))
  part = tf.random.stateless_uniform([batch], part_seed, 0.5, 1.0)
  chosen = tf.random.stateless_uniform([batch], choice_seed) < share
  part = tf.reshape(tf.where(chosen, part, 1.0), [batch, *[1] * (x.shape.rank - 1)])
  return part * x + (1.0 - part) * others
