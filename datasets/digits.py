"""Digits: 1,797 handwritten digits of 8x8 pixels that ship with scikit-learn (UCI, Alpaydin 1998).

Nothing to download and a minute to train: the data set of examples and tests.
"""

import numpy as np
from sklearn.datasets import load_digits

from datasets.augmentation import random_crop
from datasets.dataset import InMemoryDataset

TRAIN_SIZE = 1437
_SPLIT_SEED = 1797


class Digits(InMemoryDataset):
  """x [batch, 8, 8, 1] in [0, 1], y 0 to 9; 1,437 samples to train and 360 to test.

  The split is a fixed random one, as neighbours in the file were written by the same person.
  In training an image is padded by one pixel and cut out at a random place.
  """

  def __init__(self, nb_smpls_val=180):
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(labels))
    images = images.astype(np.uint8).reshape(-1, 8, 8, 1)[order]
    labels = labels.astype(np.int64)[order]
    super().__init__(
      (images[:TRAIN_SIZE], labels[:TRAIN_SIZE]),
      (images[TRAIN_SIZE:], labels[TRAIN_SIZE:]),
      nb_smpls_val,
    )

  def preprocess(self, x, rng=None):
    if rng is not None:
      x = random_crop(x, 1, rng)
    return x.astype(np.float32) / np.float32(16)
