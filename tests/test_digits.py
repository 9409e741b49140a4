"""The digits: sizes, range, a split that does not move."""

import numpy as np
import pytest

from datasets.digits import Digits


@pytest.fixture(scope='module')
def digits():
  return Digits()


def _gather(data):
  batches = list(data.as_numpy_iterator())
  return np.concatenate([x for x, _ in batches]), np.concatenate([y for _, y in batches])


def test_sizes(digits):
  sizes = {split: digits.size(split) for split in ('train', 'fit', 'val', 'test')}
  assert sizes == {'train': 1437, 'fit': 1257, 'val': 180, 'test': 360}


def test_all_images_are_there_once_and_in_the_unit_range(digits):
  from sklearn.datasets import load_digits

  images = np.concatenate([_gather(digits.load(s, batch=500))[0] for s in ('train', 'test')])
  assert images.shape == (1797, 8, 8, 1) and images.min() == 0 and images.max() == 1
  ours = sorted(map(bytes, (images * 16).astype(np.uint8)))
  assert ours == sorted(map(bytes, load_digits().images.astype(np.uint8)))


def test_the_split_is_fixed_and_every_class_is_tested(digits):
  x, y = _gather(digits.load('test', batch=77))
  other = _gather(Digits().load('test', batch=360))
  np.testing.assert_array_equal(x, other[0])
  np.testing.assert_array_equal(y, other[1])
  assert np.bincount(y, minlength=10).min() >= 20


def test_training_images_are_shifted_by_at_most_one_pixel(digits):
  train, _ = _gather(digits.load('train', batch=1437))
  padded = np.pad(train, ((0, 0), (1, 1), (1, 1), (0, 0)))
  windows = {
    padded[:, top : top + 8, left : left + 8][i].tobytes()
    for top in range(3)
    for left in range(3)
    for i in range(len(train))
  }
  x, _ = next(digits.load('train', batch=64, training=True).as_numpy_iterator())
  assert all(image.tobytes() in windows for image in x)
