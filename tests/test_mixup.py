"""Mixed images: what they are made of, and who gets them."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from datasets.dataset import Dataset
from datasets.digits import Digits
from datasets.mixup import Mixed, mixed
from learners import phases
from learners.channels import ChannelLearner
from nets.convnet_at_digits import ModelHelper
from tests.test_learners import run


def parts(share, seed=(1, 2), batch=400):
  """Returns [batch, batch]: how much of every image is in each mixed one."""
  return mixed(tf.eye(batch), share, tf.constant(seed, tf.int64)).numpy()


def test_a_mixed_image_is_the_larger_part_of_itself_and_the_rest_of_one_other():
  matrix = parts(1.0)
  own = np.diagonal(matrix)
  np.testing.assert_allclose(matrix.sum(axis=1), 1.0, rtol=1e-6)
  assert ((matrix > 0).sum(axis=1) <= 2).all()
  assert own.min() >= 0.5 and own.max() <= 1.0
  # Uniform on [1/2, 1]: the mean of 400 has a standard error of 0.007.
  assert abs(own.mean() - 0.75) < 0.03
  # Everybody is the other one once.
  np.testing.assert_array_equal(((matrix - np.diag(own)) > 0).sum(axis=0).max(), 1)


@pytest.mark.parametrize('share', [0.0, 0.3, 1.0])
def test_a_share_is_mixed(share):
  own = np.diagonal(parts(share))
  # Four standard errors of 400 draws; an image may be paired with itself.
  assert abs(np.mean(own < 1.0) - share) <= 4 * np.sqrt(share * (1 - share) / 400) + 2 / 400


def test_mixing_is_a_function_of_the_seed():
  np.testing.assert_array_equal(parts(0.5), parts(0.5))
  assert (parts(0.5) != parts(0.5, seed=(1, 3))).any()


def load(data, **arguments):
  found = data.load('train', batch=16, seed=2**32 - 1, training=True, **arguments)
  return [(x.numpy(), y.numpy()) for x, y in itertools.islice(found, 4)]


def test_batches_are_a_function_of_seed_step_and_worker():
  data = Mixed(Digits(), 1.0)
  whole, again, late = load(data), load(data), load(data, start=2)
  plain = load(Digits())
  for (x, y), (same, _), (source, labels) in zip(whole, again, plain, strict=True):
    np.testing.assert_array_equal(x, same)
    np.testing.assert_array_equal(y, labels)
    assert x.shape == source.shape and np.abs(x - source).max() > 0.1
  np.testing.assert_array_equal(late[0][0], whole[2][0])
  np.testing.assert_array_equal(late[1][0], whole[3][0])


class Same(Dataset):
  """Every batch of every worker has the same images."""

  def size(self, split):
    return 16

  def load(self, split, *, batch, shard=(0, 1), seed=0, training=False, start=0):
    x = np.arange(batch, dtype=np.float32)[:, None]
    return tf.data.Dataset.from_tensors((x, x[:, 0])).repeat()


def test_every_step_and_worker_mixes_otherwise():
  batches = [x for rank in (0, 1) for x, _ in load(Mixed(Same(), 1.0), shard=(rank, 2))]
  for one, other in itertools.combinations(batches, 2):
    assert (one != other).any()


def test_evaluation_sees_images_as_they_are():
  data = Mixed(Digits(), 1.0)
  assert data.size('test') == Digits().size('test')
  for (x, y), (source, labels) in zip(
    data.load('test', batch=100), Digits().load('test', batch=100), strict=True
  ):
    np.testing.assert_array_equal(x, source)
    np.testing.assert_array_equal(y, labels)


CHANNEL = (
  '--learner=channel',
  '--cp_prune_option=uniform',
  '--cp_nb_batches=1',
  '--enbl_dst',
  '--export_formats=none',
  '--batch_size=32',
  '--nb_epochs_rat=0.01',
)


@pytest.fixture
def watched(monkeypatch):
  """Returns (shares mixed so far, how many at each trace of the task loss, images to select by)."""
  shares, losses, chosen_from = [], [], []
  task_loss, images = ModelHelper.loss, ChannelLearner.images

  class Watched(phases.Mixed):
    def __init__(self, dataset, share):
      super().__init__(dataset, share)
      shares.append(share)

  def loss(self, y, outputs):
    losses.append(len(shares))
    return task_loss(self, y, outputs)

  def selected_by(self, samples):
    chosen_from.extend(images(self, samples))
    return chosen_from

  monkeypatch.setattr(phases, 'Mixed', Watched)
  monkeypatch.setattr(ModelHelper, 'loss', loss)
  monkeypatch.setattr(ChannelLearner, 'images', selected_by)
  return shares, losses, chosen_from


def test_the_student_gets_mixed_images_and_no_labels(tmp_path, watched):
  """The float model, which has no teacher, is trained with labels on images as they are."""
  shares, losses, chosen_from = watched
  assert run(tmp_path, *CHANNEL, '--dst_mixup=1') == 0
  # For the selection, then for the training of the compressed model.
  assert shares == [1.0, 1.0]
  assert set(losses) == {0}
  assert np.abs(chosen_from[0] - first_images()).max() > 0.1


def test_nothing_is_mixed_unless_asked_for(tmp_path, watched, float_file):
  shares, _, chosen_from = watched
  assert run(tmp_path, *CHANNEL, f'--pretrained={float_file}') == 0
  assert shares == []
  np.testing.assert_array_equal(chosen_from[0], first_images())


def first_images():
  return next(iter(Digits().load('train', batch=32, training=True)))[0].numpy()
