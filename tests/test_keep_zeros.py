"""Quantizing what is sparse or has fewer channels keeps its zeros and its shape."""

import json

import keras
import numpy as np
import pytest
import stored_integers
import tensorflow as tf
from conversion_models import randomized
from keras import layers
from test_stored_integers import net
from toys import compile_for_logits, images, labels

import pocketsize
from learners import main
from learners.non_uniform import NonUniformLearner
from learners.uniform import UniformLearner
from nets.convnet_at_digits import ModelHelper
from pocketsize import conversion, packed
from pocketsize.channel_graph import ChannelGraph
from pocketsize.compressor import CompressionCallback
from pocketsize.quantization.uniform import WEIGHT_RANGES
from pocketsize.shrink import mask, shrink
from pocketsize.sparsity.frozen_zeros import FrozenZeros
from pocketsize.sparsity.magnitude import magnitude_mask

KERNELS = ('channel', 'tensor', 'bucket', 'dense')


def sparse(ratio):
  """Returns a net without the smallest weights of each kernel."""
  model = net()
  for path in KERNELS:
    kernel = model.get_layer(path).kernel
    kernel.assign(kernel * magnitude_mask(kernel, ratio))
  return model


def zeros(model):
  return {path: np.array(model.get_layer(path).kernel) == 0.0 for path in KERNELS}


def compressed(model, **config):
  return pocketsize.compress(
    model,
    [
      {'end_bits': 0, **config},
      {'end_bits': 0, **config, 'granularity': 'bucket', 'bucket_size': 7, 'op_names': ['bucket']},
    ],
    calibration=[images(16)],
  )


def train(model, stack, optimizer=None, steps=6):
  compile_for_logits(model, 0.1)
  if optimizer:
    model.compile(optimizer, model.loss)
  model.fit(
    images(16 * steps),
    labels(16 * steps),
    batch_size=16,
    verbose=0,
    callbacks=[CompressionCallback(stack)],
  )
  return model


KINDS = [
  *({'algorithm': 'uniform', 'weight_range': kind} for kind in WEIGHT_RANGES),
  *({'algorithm': 'non-uniform', 'mode': mode} for mode in ('weights', 'clusters', 'both')),
]
NAMES = [config.get('weight_range') or config['mode'] for config in KINDS]


@pytest.mark.parametrize(('bits', 'ratio'), [(1, 0.5), (2, 0.9), (4, 0.5), (8, 0.9)])
@pytest.mark.parametrize('config', KINDS, ids=NAMES)
def test_every_quantizer_maps_zero_to_zero(config, bits, ratio):
  source = sparse(ratio)
  before = zeros(source)
  model, _ = compressed(source, **config, weight_bits=bits)
  after = zeros(pocketsize.strip(model))
  for path, was in before.items():
    assert was.mean() == pytest.approx(ratio, abs=0.02)
    assert after[path][was].all()
    assert not after[path].all()


def test_the_gradient_of_a_zero_is_zero_and_everything_else_passes():
  transform = FrozenZeros()
  x = tf.Variable([-1.0, 0.0, 2.0, -0.0])
  with tf.GradientTape() as tape:
    y = transform(x)
    loss = tf.reduce_sum(y * [3.0, 4.0, 5.0, 6.0])
  assert y.numpy().tolist() == [-1.0, 0.0, 2.0, 0.0]
  assert tape.gradient(loss, x).numpy().tolist() == [3.0, 0.0, 5.0, 0.0]


@pytest.mark.parametrize(
  ('config', 'optimizer'),
  [
    ({'algorithm': 'uniform', 'weight_bits': 4}, keras.optimizers.AdamW),
    ({'algorithm': 'uniform', 'weight_bits': 3, 'weight_range': 'dorefa'}, None),
    ({'algorithm': 'non-uniform', 'weight_bits': 3, 'mode': 'both'}, keras.optimizers.AdamW),
  ],
  ids=['4-bit-adamw', 'dorefa', 'centres-adamw'],
)
def test_zeros_stay_through_training_into_every_file(config, optimizer, tmp_path):
  model, stack = compressed(sparse(0.9), **config)
  before, start = zeros(model.source), np.array(model.source.get_layer('tensor').kernel)
  train(model, stack, optimizer and optimizer(0.01, weight_decay=0.01))
  assert np.abs(np.array(model.source.get_layer('tensor').kernel) - start).max() > 1e-3
  final = pocketsize.strip(model)
  after = zeros(final)
  for path, was in before.items():
    assert after[path][was].all() and not after[path].all()
  zero_weights = sum(int(was.sum()) for was in after.values())
  if config['weight_bits'] < 32:
    packed.write(model, tmp_path / 'net.packed')
    read = packed.read(tmp_path / 'net.packed')
    assert zero_weights == sum(int((read[f'{path}/kernel'] == 0).sum()) for path in KERNELS)
  for file in conversion.export(model, tmp_path):
    if file.format in conversion.formats.QUANTIZED_FORMATS and config['weight_bits'] < 32:
      stored = [codes for codes, *_ in stored_integers.read(file.path).kernels]
      found = sum(int((codes == 0).sum()) for codes in stored if codes.size > 20)
      assert found >= zero_weights, file.format


@pytest.mark.parametrize('algorithm', ['uniform', 'non-uniform'])
def test_zeros_are_weights_like_others_on_request(algorithm):
  model, stack = compressed(sparse(0.9), algorithm=algorithm, weight_bits=8, keep_zeros=False)
  assert not any(isinstance(transform, FrozenZeros) for transform in model.transforms)
  before = zeros(model.source)
  train(model, stack)
  assert not zeros(model.source)['tensor'][before['tensor']].all()


def test_a_flag_of_each_learner_says_so():
  for config, flag in (
    (UniformLearner.Config, 'uql_keep_zeros'),
    (NonUniformLearner.Config, 'nuql_keep_zeros'),
  ):
    assert config().quantization().keep_zeros
    assert not config(**{flag: False}).quantization().keep_zeros


def test_a_sparse_pretrained_model_stays_sparse_in_a_run(tmp_path):
  helper = ModelHelper(ModelHelper.Config())
  model = helper.build()
  kernels = [layer.name for layer in model.layers if isinstance(layer, layers.Conv2D)]
  for name in kernels:
    kernel = model.get_layer(name).kernel
    kernel.assign(kernel * magnitude_mask(kernel, 0.75))
  model.save(tmp_path / 'sparse.keras')
  arguments = [
    f'--work_dir={tmp_path}/run',
    f'--pretrained={tmp_path}/sparse.keras',
    '--learner=uniform',
    '--uql_weight_bits=3',
    '--uql_activation_bits=8',
    '--uql_quant_epochs=1',
    '--nb_epochs_rat=0.03',
    '--export_formats=tflite_int8',
    '--tflite_int4',
  ]
  assert main.run_with(ModelHelper, ['run.py', *arguments]) == 0
  final = keras.models.load_model(tmp_path / 'run' / 'final.keras', compile=False)
  for name in kernels:
    was = np.array(model.get_layer(name).kernel) == 0.0
    assert (np.array(final.get_layer(name).kernel)[was] == 0.0).all()
  report = json.loads((tmp_path / 'run' / 'report.json').read_text())
  sparsity = {layer['name']: layer['sparsity'] for layer in report['layers']}
  assert min(sparsity[name] for name in kernels) >= 0.74
  assert '3-bit weights as int4 codes of the same scale' in report['files'][0]['note']


def test_kernels_without_zeros_or_of_zeros_alone_are_left_alone():
  source = sparse(0.5)
  source.get_layer('channel').kernel.assign(np.ones((3, 3, 3, 6)))
  source.get_layer('dense').kernel.assign(np.zeros((6, 4)))
  model, _ = compressed(source, algorithm='uniform')
  frozen = [each.path for each in model.placements if isinstance(each.transform, FrozenZeros)]
  assert frozen == ['tensor', 'bucket']


def test_masks_of_pruning_are_their_own_on_a_sparse_model():
  source = sparse(0.5)
  model, stack = pocketsize.compress(
    source,
    [{'algorithm': 'uniform', 'weight_bits': 4}, {'algorithm': 'magnitude', 'ratio': 0.75}],
    calibration=[images(16)],
  )
  assert stack.statistics()['sparsity'] == pytest.approx(0.75, abs=0.01)
  for path, now in zeros(pocketsize.strip(model)).items():
    assert now[zeros(source)[path]].all() and now.mean() >= 0.73


def test_a_model_with_fewer_channels_keeps_its_shape_and_a_masked_one_its_zeros(tmp_path):
  source = randomized(net(), seed=1)
  (group,) = [group for group in ChannelGraph(source).groups if 'tensor' in group.members]
  keep = {group.name: np.arange(group.size) < 2}
  small = shrink(source, keep)
  shapes = [tuple(weight.shape) for weight in small.weights]
  assert (3, 3, 6, 2) in shapes
  model, stack = compressed(small, algorithm='uniform', weight_bits=4)
  train(model, stack)
  final = pocketsize.strip(model)
  assert [tuple(weight.shape) for weight in final.weights] == shapes
  for file in conversion.export(model, tmp_path, conversion.formats.QUANTIZED_FORMATS):
    sizes = sorted(codes.size for codes, *_ in stored_integers.read(file.path).kernels)
    assert sizes[-2:] == [3 * 3 * 6 * 2, 3 * 3 * 3 * 6]
    conversion.open_file(file.path)(images(2))
  model, stack = compressed(mask(source, keep), algorithm='uniform', weight_bits=4)
  train(model, stack)
  kernel = np.array(pocketsize.strip(model).get_layer('tensor').kernel)
  assert (kernel[..., 2:] == 0).all() and kernel[..., :2].any()
