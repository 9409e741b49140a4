"""Batches of an in-memory data set: a pure function of seed, step and shard."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.augmentation import random_crop, random_flip
from datasets.dataset import InMemoryDataset
from pocketsize.errors import UserError


class Numbered(InMemoryDataset):
  """Image i is full of i; augmentation adds noise below 1/2, so that rounding finds i again."""

  def __init__(self, train=23, test=7, nb_smpls_val=5):
    def numbers(count):
      return np.arange(count).reshape(-1, 1, 1, 1), np.arange(count, dtype=np.int64)

    super().__init__(numbers(train), numbers(test), nb_smpls_val)

  def preprocess(self, x, rng=None):
    noise = 0 if rng is None else rng.uniform(0, 0.4, size=x.shape)
    return (x + noise).astype(np.float32)


def _take(count, **arguments):
  data = Numbered().load(**{'split': 'train', 'batch': 4, 'training': True, **arguments})
  return list(itertools.islice(data.as_numpy_iterator(), count))


def _evaluate(split, **arguments):
  return [y for _, y in Numbered().load(split, **arguments).as_numpy_iterator()]


def _assert_equal(one, other):
  assert len(one) == len(other)
  for (x, y), (other_x, other_y) in zip(one, other, strict=True):
    np.testing.assert_array_equal(x, other_x)
    np.testing.assert_array_equal(y, other_y)


@settings(max_examples=15)
@given(
  start=st.integers(0, 17), rank=st.integers(0, 1), workers=st.just(2), seed=st.integers(0, 2**40)
)
def test_beginning_at_a_step_equals_skipping_to_it(start, rank, workers, seed):
  # 23 samples, 2 workers of 4: an epoch has 2 steps, so that 17 steps cross many epochs.
  common = {'shard': (rank, workers), 'seed': seed}
  _assert_equal(_take(3, start=start, **common), _take(start + 3, **common)[start:])


@settings(max_examples=15)
@given(workers=st.integers(1, 5), step=st.integers(0, 6), seed=st.integers(0, 99))
def test_shards_cut_the_global_batch_of_one_worker_in_parts(workers, step, seed):
  parts = [_take(1, shard=(rank, workers), seed=seed, start=step)[0][1] for rank in range(workers)]
  whole = _take(1, batch=4 * workers, seed=seed, start=step)[0][1]
  np.testing.assert_array_equal(np.concatenate(parts), whole)
  assert len(set(whole)) == 4 * workers


def test_an_epoch_shows_no_sample_twice_and_the_next_is_in_another_order():
  batches = [y for _, y in _take(10)]
  epochs = np.concatenate(batches[:5]), np.concatenate(batches[5:])
  assert all(len(set(epoch)) == 20 for epoch in epochs)
  assert not np.array_equal(*epochs)


def test_the_seed_changes_order_and_augmentation():
  (x, y), (other_x, other_y) = _take(1, seed=1)[0], _take(1, seed=2)[0]
  assert not np.array_equal(y, other_y)
  assert not np.array_equal(x[:, 0, 0, 0] - y, other_x[:, 0, 0, 0] - other_y)


def test_augmentation_differs_between_epochs_and_workers():
  def noise(**arguments):
    x, y = _take(1, **arguments)[0]
    return (x[:, 0, 0, 0] - y).round(4).tolist()

  # With 23 samples and 2 workers of 4, step 2 is the first of the second epoch.
  draws = [noise(start=step, shard=(rank, 2)) for step in (0, 1, 2) for rank in (0, 1)]
  assert all(one != other for one, other in itertools.combinations(draws, 2))


def test_images_and_labels_stay_together():
  for x, y in _take(12):
    np.testing.assert_array_equal(np.round(x[:, 0, 0, 0]), y)


def test_training_shapes_are_static_and_evaluation_has_a_length():
  data = Numbered().load('train', batch=4, training=True)
  assert [tuple(spec.shape) for spec in data.element_spec] == [(4, 1, 1, 1), (4,)]
  assert int(Numbered().load('train', batch=4).cardinality()) == 6


def test_a_dataset_can_be_walked_twice_with_the_same_result():
  data = Numbered().load('train', batch=4, training=True, start=3)
  _assert_equal(*(list(itertools.islice(data.as_numpy_iterator(), 4)) for _ in range(2)))


def test_evaluation_gives_each_sample_once_in_order():
  batches = _evaluate('test', batch=4)
  assert [len(batch) for batch in batches] == [4, 3]
  np.testing.assert_array_equal(np.concatenate(batches), np.arange(7))


def test_evaluation_shards_take_every_nth_sample():
  assert [list(np.concatenate(_evaluate('test', batch=2, shard=(r, 3)))) for r in range(3)] == [
    [0, 3, 6],
    [1, 4],
    [2, 5],
  ]
  assert _evaluate('test', batch=2, shard=(7, 8)) == []


def test_fit_and_val_are_the_training_set_cut_in_two():
  fit, val = (np.concatenate(_evaluate(split, batch=4)) for split in ('fit', 'val'))
  assert len(val) == 5 and sorted([*fit, *val]) == list(range(23))
  assert set(np.concatenate([y for _, y in _take(8, split='fit')])) <= set(fit)


def test_too_small_a_split_names_both_numbers():
  with pytest.raises(UserError, match=r"'train' of 23 samples.* 8 samples a batch x 3 .* = 24\."):
    Numbered().load('train', batch=8, shard=(0, 3), training=True)
  assert Numbered().steps_per_epoch('train', 23) == 1
  assert Numbered().steps_per_epoch('train', 5, workers=2) == 2


@pytest.mark.parametrize('held_out', [0, 23, 5000])
def test_a_cut_that_leaves_nothing_is_refused_but_not_needed_elsewhere(held_out):
  data = Numbered(nb_smpls_val=held_out)
  assert data.size('train') == 23
  with pytest.raises(UserError, match=rf'--nb_smpls_val must .* Received: {held_out}\.'):
    data.size('val')


def test_an_unknown_split_is_refused():
  with pytest.raises(ValueError, match="must be one of .*'val'.* Received: split='dev'"):
    Numbered().size('dev')


def test_crops_against_the_slow_loop():
  x = np.random.default_rng(0).integers(0, 256, size=(50, 6, 5, 3)).astype(np.uint8)
  fast = random_crop(x, 2, np.random.default_rng(7))
  rng = np.random.default_rng(7)
  top, left = (rng.integers(0, 4, size=50, endpoint=True) for _ in range(2))
  padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
  slow = [padded[i, top[i] : top[i] + 6, left[i] : left[i] + 5] for i in range(50)]
  np.testing.assert_array_equal(fast, slow)
  assert set(top) == set(left) == set(range(5))


def test_flips_mirror_columns_of_about_half():
  x = np.arange(400 * 6).reshape(400, 1, 3, 2)
  flipped = random_flip(x.copy(), np.random.default_rng(0))
  mirrored = flipped[:, 0, 0, 0] == x[:, 0, 2, 0]
  np.testing.assert_array_equal(flipped[mirrored], x[mirrored, :, ::-1])
  np.testing.assert_array_equal(flipped[~mirrored], x[~mirrored])
  assert 160 < mirrored.sum() < 240  # 4 standard deviations of 400 fair coins
