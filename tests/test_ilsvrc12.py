"""ILSVRC-12: photographs on disk as batches, and the residual nets for them."""

import itertools
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from datasets import ilsvrc12
from datasets.ilsvrc12 import Ilsvrc12
from learners import main
from nets.resnet_at_ilsvrc12 import ModelHelper
from pocketsize import cost
from pocketsize.channel_graph import ChannelGraph
from pocketsize.errors import UserError
from pocketsize.graph import Graph
from pocketsize.pruning import units
from tools.docs import flops

ROOT = pathlib.Path(__file__).resolve().parents[1]
CLASSES = ('n01', 'n02', 'n03')
TRAIN, VAL = 4, 2  # photographs of each class


def _grey(value, height=30, width=40):
  return np.full((height, width, 3), value, np.uint8)


def _write(path, pixels):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(tf.io.encode_jpeg(pixels, quality=100).numpy())


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Photograph i of the training set is grey of 10 + 10 i, of the validation set 5 + 10 i."""
  folder = tmp_path_factory.mktemp('ilsvrc12')
  for part, count, first in (('train', TRAIN, 10), ('val', VAL, 5)):
    for label, name in enumerate(CLASSES):
      for each in range(count):
        grey = _grey(first + 10 * (label * count + each))
        _write(folder / part / name / f'{name}_{each}.JPEG', grey)
      (folder / part / name / 'notes.txt').touch()
  return folder


@pytest.fixture(scope='module')
def data(folder):
  return Ilsvrc12(folder, nb_smpls_val=3)


def _take(data, count, **arguments):
  batches = data.load(**{'split': 'train', 'batch': 2, 'training': True, **arguments})
  return list(itertools.islice(batches.as_numpy_iterator(), count))


def _numbers(x, first=10):
  """The numbers of grey photographs, back from their pixels."""
  return np.round((np.mean(x + ilsvrc12.MEAN, axis=(1, 2, 3)) - first) / 10).astype(int)


def _assert_equal(one, other):
  for (x, y), (other_x, other_y) in zip(one, other, strict=True):
    np.testing.assert_array_equal(x, other_x)
    np.testing.assert_array_equal(y, other_y)


def test_folders_are_classes_and_splits(data):
  assert data.classes == [*CLASSES]
  assert [data.size(split) for split in ('train', 'fit', 'val', 'test')] == [12, 9, 3, 6]
  with pytest.raises(UserError, match=r'--nb_smpls_val must .* 12 training .* Received: 10000\.'):
    Ilsvrc12(data._places['train'].parent).size('val')


def test_evaluation_gives_each_photograph_once_in_order(data):
  batches = list(data.load('test', batch=4).as_numpy_iterator())
  assert [x.shape for x, _ in batches] == [(4, 224, 224, 3), (2, 224, 224, 3)]
  x, y = (np.concatenate(parts) for parts in zip(*batches, strict=True))
  assert x.dtype == np.float32 and y.dtype == np.int64
  np.testing.assert_array_equal(_numbers(x, 5), range(6))
  np.testing.assert_array_equal(y, np.arange(6) // VAL)
  assert int(data.load('test', batch=4).cardinality()) == 2
  shards = [
    np.concatenate([_numbers(x, 5) for x, _ in data.load('test', batch=2, shard=(rank, 4))])
    for rank in range(4)
  ]
  assert [shard.tolist() for shard in shards] == [[0, 4], [1, 5], [2], [3]]


def test_training_photographs_keep_their_labels_and_shapes_are_static(data):
  for x, y in _take(data, 7):
    np.testing.assert_array_equal(_numbers(x) // TRAIN, y)
  specs = data.load('train', batch=2, training=True).element_spec
  assert [tuple(spec.shape) for spec in specs] == [(2, 224, 224, 3), (2,)]
  epoch = np.concatenate([_numbers(x) for x, _ in _take(data, 6)])
  assert sorted(epoch) == list(range(12))


@pytest.mark.parametrize('start, rank', [(1, 0), (3, 1), (5, 0)])
def test_beginning_at_a_step_equals_skipping_to_it(folder, start, rank, tmp_path):
  # Photographs of noise, so that crops and flips are seen; an epoch has 2 steps.
  rng = np.random.default_rng(0)
  for part, number in itertools.product(('train', 'val'), range(8)):
    noise = rng.integers(0, 256, size=(40, 30, 3)).astype(np.uint8)
    _write(tmp_path / part / 'n' / f'{number}.JPEG', noise)
  noisy = Ilsvrc12(tmp_path)
  common = {'shard': (rank, 2), 'seed': 7}
  whole = _take(noisy, start + 2, **common)
  _assert_equal(_take(noisy, 2, start=start, **common), whole[start:])
  assert not np.array_equal(whole[0][0], _take(noisy, 1, shard=(rank, 2), seed=8)[0][0])


def test_shards_cut_the_global_batch_of_one_worker_in_parts(data):
  parts = [_numbers(_take(data, 1, shard=(rank, 3))[0][0]) for rank in range(3)]
  whole = _numbers(_take(data, 1, batch=6)[0][0])
  np.testing.assert_array_equal(np.concatenate(parts), whole)
  with pytest.raises(UserError, match=r"'train' of 12 samples.* = 15\."):
    data.load('train', batch=5, shard=(0, 3), training=True)


def test_the_centre_is_that_of_the_short_side_at_256_pixels(tmp_path):
  # 512 x 1024 pixels become 256 x 512, of which rows 16 to 239 and columns 144 to 367 stay.
  pixels = np.zeros((512, 1024, 3), np.uint8)
  pixels[:, :, 0] = np.linspace(0, 255, 1024)
  pixels[:, :, 1] = np.linspace(0, 255, 512)[:, None]
  for part in ('train', 'val'):
    _write(tmp_path / part / 'n' / 'a.jpg', pixels)
  ((x, _),) = Ilsvrc12(tmp_path).load('test', batch=1).as_numpy_iterator()
  found = x[0] + ilsvrc12.MEAN
  np.testing.assert_allclose(found[100, :, 0], np.arange(144.5, 368) / 2, atol=4)
  np.testing.assert_allclose(found[:, 100, 1], np.arange(16.5, 240), atol=4)


def test_crops_cover_what_inceptions_do(tmp_path):
  # The red and green planes are coordinates: the crop's corners can be read off.
  pixels = np.zeros((200, 200, 3), np.uint8)
  pixels[:, :, 0] = np.arange(200)
  pixels[:, :, 1] = np.arange(200)[:, None]
  for part, number in itertools.product(('train', 'val'), range(4)):
    _write(tmp_path / part / 'n' / f'{number}.jpg', pixels)
  x = np.concatenate([x for x, _ in _take(Ilsvrc12(tmp_path), 60, batch=4)]) + ilsvrc12.MEAN
  across = x[:, 112, -1, 0] - x[:, 112, 0, 0]
  height = x[:, -1, 112, 1] - x[:, 0, 112, 1]
  assert 90 < np.sum(across < 0) < 150  # flipped: 4 standard deviations of 240 fair coins
  areas, aspects = np.abs(across) * height / 200**2, np.abs(across) / height
  assert 0.04 < areas.min() < 0.2 and areas.max() > 0.7
  assert 0.7 < aspects.min() < 0.85 and 1.2 < aspects.max() < 1.4


@pytest.mark.parametrize('content', [b'', b'nonsense', 'half'])
def test_a_file_that_is_no_jpeg_is_named(content, tmp_path):
  for part in ('train', 'val'):
    _write(tmp_path / part / 'n' / 'a.JPEG', _grey(9))
  path = tmp_path / 'val' / 'n' / 'b.JPEG'
  whole = (tmp_path / 'val' / 'n' / 'a.JPEG').read_bytes()
  path.write_bytes(whole[: len(whole) // 2] if content == 'half' else content)
  with pytest.raises(tf.errors.OpError, match=rf'UserError: {path} must be a whole JPEG'):
    list(Ilsvrc12(tmp_path).load('test', batch=2))


def test_png_under_the_name_of_jpeg_is_read(tmp_path):
  for part in ('train', 'val'):
    _write(tmp_path / part / 'n' / 'a.JPEG', _grey(9))
  (tmp_path / 'val' / 'n' / 'a.JPEG').write_bytes(tf.io.encode_png(_grey(25)).numpy())
  ((x, _),) = Ilsvrc12(tmp_path).load('test', batch=1).as_numpy_iterator()
  np.testing.assert_allclose(x[0] + ilsvrc12.MEAN, 25, atol=1e-3)


def test_folders_that_are_no_data_are_refused(folder, tmp_path):
  with pytest.raises(UserError, match='has no download .* POCKETSIZE_DATA_DIR_ILSVRC12'):
    Ilsvrc12(None)
  with pytest.raises(UserError, match=r'must hold train/<synset>.* Received: .*nowhere/train, '):
    Ilsvrc12(tmp_path / 'nowhere')
  (tmp_path / 'train').mkdir()
  with pytest.raises(UserError, match='whose train has no folders'):
    Ilsvrc12(tmp_path)
  (tmp_path / 'train' / 'n01').mkdir()
  with pytest.raises(UserError, match='val, which cannot be read: No such file'):
    Ilsvrc12(tmp_path)
  (tmp_path / 'val' / 'n09').mkdir(parents=True)
  with pytest.raises(UserError, match='no class that the training set has not.*: n09'):
    Ilsvrc12(tmp_path)
  (tmp_path / 'val' / 'n09').rmdir()
  with pytest.raises(UserError, match='train/n01 must have photographs'):
    Ilsvrc12(tmp_path)
  _write(tmp_path / 'train' / 'n01' / 'a.JPEG', _grey(1))
  with pytest.raises(UserError, match='val must have photographs'):
    Ilsvrc12(tmp_path)


def _helper(**options):
  return ModelHelper(ModelHelper.Config(**options))


@pytest.fixture(scope='module')
def resnet_18():
  return _helper(nb_classes=1000).build()


def _trainable(model):
  return sum(weight.numpy().size for weight in model.trainable_weights)


def test_resnet_18_has_the_known_shapes_and_counts(resnet_18, tmp_path):
  assert resnet_18.name == 'resnet_18'
  assert tuple(resnet_18(np.zeros((1, 224, 224, 3), np.float32)).shape) == (1, 1000)
  assert all(type(layer).__module__.startswith('keras.') for layer in resnet_18.layers)
  shapes = [resnet_18.get_layer(f'stage{stage}_block2_add').output.shape for stage in range(1, 5)]
  assert shapes == [(None, 56, 56, 64), (None, 28, 28, 128), (None, 14, 14, 256), (None, 7, 7, 512)]
  # 11,689,512 are torchvision's; the projection of stage 1 adds 64 x 64 and gamma and beta.
  assert _trainable(resnet_18) == 11_689_512 + 64 * 64 + 2 * 64
  # In units of 64 x 64 x 56 x 56: conv0 147/16, the first stage 4 x 9 + 1, each other one
  # 9/2 + 3 x 9 + 1/2.
  expected = int((147 / 16 + 37 + 3 * 32) * 64 * 64 * 56 * 56) + 512 * 1000
  assert cost.macs(Graph(resnet_18)) == expected


def test_resnet_50_has_the_known_counts():
  model = _helper(resnet_size=50, nb_classes=1000).build()
  # torchvision's, which has stride 2 in the 3x3 convolutions as well.
  assert _trainable(model) == 25_557_032
  assert cost.macs(Graph(model)) == 4_089_184_256
  assert model.get_layer('stage3_block1_conv1').output.shape == (None, 28, 28, 256)
  assert model.get_layer('stage3_block1_conv2').output.shape == (None, 14, 14, 256)


@pytest.mark.parametrize('size', [34, 101])
def test_the_size_is_the_number_of_layers_with_weights(size):
  layers = _helper(resnet_size=size, nb_classes=10).build().layers
  weighted = [
    layer
    for layer in layers
    if isinstance(layer, keras.layers.Conv2D | keras.layers.Dense)
    and not layer.name.endswith('shortcut_conv')
  ]
  assert len(weighted) == size


def test_the_number_of_classes_is_given_or_that_of_the_data(folder):
  helper = _helper(data_dir_local=str(folder), nb_smpls_val=3)
  assert helper.build().output_shape == (None, 3)
  assert helper.dataset().size('fit') == 9
  assert _helper(data_dir_local='/nowhere', nb_classes=7).build().output_shape == (None, 7)
  assert _helper(data_dir_local=str(folder), nb_classes=4).dataset().classes == [*CLASSES]
  with pytest.raises(UserError, match=r'--nb_classes must be at least the 3 .* Received: 2\.'):
    _helper(data_dir_local=str(folder), nb_classes=2).dataset()
  with pytest.raises(UserError, match='Received: /nowhere/train'):
    _helper(data_dir_local='/nowhere').build()


def test_defaults_are_pocketflows():
  helper = _helper()
  config = helper.config
  assert (config.lrn_rate_init, config.batch_size_norm, config.loss_w_dcy) == (0.1, 256, 1e-4)
  assert (config.momentum, config.resnet_size, helper.epochs()) == (0.9, 18, 100)
  rates = [helper.learning_rate(epoch) for epoch in (29.9, 30, 60, 80, 90)]
  assert rates == pytest.approx([0.1, 1e-2, 1e-3, 1e-4, 1e-5])
  with pytest.raises(UserError, match='--resnet_size must be one of 18, 34, 50, 101, 152, 200'):
    _helper(resnet_size=20)


@pytest.mark.parametrize('ratio, published', flops.PUBLISHED.items())
def test_the_published_flops_are_counted_to_the_last_digit(ratio, published, resnet_18):
  graph = Graph(resnet_18)
  counted = 100 * flops.kept_share(graph, ratio, dense_reads=False)
  possible = 100 * flops.kept_share(graph, ratio, dense_reads=True)
  assert counted == pytest.approx(published, abs=0.0051)
  # The sum of stage 4's first block: a 1x1 of 1/2 and a 3x3 of 9 units keep their outputs.
  kept = int(512 * (1 - ratio)) / 512, int(256 * (1 - ratio)) / 256
  more = (9 * kept[0] + kept[1] / 2) * (1 - kept[0]) / (147 / 16 + 37 + 96)
  assert possible - counted == pytest.approx(100 * more, abs=1e-6)


@pytest.mark.parametrize('ratio', flops.PUBLISHED)
def test_a_plan_of_chn_pruned_rmt_leaves_what_can_be_taken_out(ratio, resnet_18):
  """Samplers, all convolutions but the first; 0.03 points for the dense layer, which is counted."""
  channels = ChannelGraph(resnet_18)
  found = [unit for unit in units.units(channels, 'sampler')[0] if unit.name != 'conv0']
  kept = units.expected(channels, found, units.counts(found, ratio))
  possible = flops.kept_share(channels.graph, ratio, dense_reads=True)
  assert abs(cost.macs_share(channels)(*kept) - possible) < 3e-4


def test_the_page_of_flops_is_that_of_the_code():
  assert flops.PAGE.read_text().partition(flops.MARK)[2] == '\n' + flops.table()


SHORT = ['--learner=full-prec', '--nb_epochs_rat=0.01', '--batch_size_eval=6']
SHORT += ['--export_formats=none']


@pytest.mark.slow
def test_the_run_script_trains(folder, tmp_path):
  arguments = [f'--data_dir_local={folder}', f'--work_dir={tmp_path}', '--batch_size=6']
  done = subprocess.run(
    [sys.executable, 'nets/resnet_at_ilsvrc12_run.py', *SHORT, *arguments],
    cwd=ROOT,
    env=os.environ | {'PYTHONPATH': str(ROOT), 'TF_CPP_MIN_LOG_LEVEL': '2'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert (tmp_path / 'report.json').is_file()
  assert keras.models.load_model(tmp_path / 'final.keras').output_shape == (None, 3)


class TinyHelper(ModelHelper):
  """A net of one layer on the same data."""

  def build(self):
    x = inputs = keras.Input((224, 224, 3))
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(1)(x))


def test_a_run_names_a_damaged_file(tmp_path, capfd):
  for part, name in itertools.product(('train', 'val'), 'ab'):
    _write(tmp_path / part / 'n' / f'{name}.JPEG', _grey(1))
  path = tmp_path / 'train' / 'n' / 'b.JPEG'
  path.write_text('nonsense')
  arguments = [f'--data_dir_local={tmp_path}', f'--work_dir={tmp_path / "run"}', '--batch_size=2']
  assert main.run_with(TinyHelper, ['resnet_at_ilsvrc12_run.py', *SHORT, *arguments]) == 2
  said = capfd.readouterr().err
  assert said.splitlines()[-1] == (
    f'{path} must be a whole JPEG photograph. Received: a file that is none, is damaged or is gone.'
  )
  assert 'Traceback' not in said


@pytest.mark.shared
def test_the_sample_of_ten_classes(shared):
  data = Ilsvrc12(shared / 'data' / 'ilsvrc12-subset')
  assert len(data.classes) == 10 and data.classes[0] == 'n01440764'
  assert (data.size('train'), data.size('test')) == (600, 300)
  x, y = (
    np.concatenate(parts)
    for parts in zip(*data.load('test', batch=100).as_numpy_iterator(), strict=True)
  )
  assert np.bincount(y).tolist() == [30] * 10
  # The official means, so the average is near 0 and the deviation that of photographs.
  assert abs(x.mean()) < 10 and 55 < x.std() < 85
