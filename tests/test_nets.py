"""Nets: shapes, counts worked out by hand, schedules, pretrained weights."""

import importlib.util

import keras
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter

from nets import convnet_at_digits, lenet_at_cifar10, pretrained, resnet_at_cifar10
from pocketsize.configure import compress
from pocketsize.errors import UserError

NETS = {
  'convnet': (convnet_at_digits, (8, 8, 1)),
  'lenet': (lenet_at_cifar10, (32, 32, 3)),
  'resnet_20': (resnet_at_cifar10, (32, 32, 3)),
}


def _helper(module, **options):
  return module.ModelHelper(module.ModelHelper.Config(**options))


def _images(shape, batch=3, seed=0):
  return np.random.default_rng(seed).normal(size=(batch, *shape)).astype(np.float32)


def _trainable(model):
  return sum(weight.numpy().size for weight in model.trainable_weights)


@pytest.mark.parametrize('name', NETS)
def test_logits_come_out_and_stock_keras_loads_it(name, tmp_path):
  module, shape = NETS[name]
  helper = _helper(module)
  model = helper.build()
  x = _images(shape)
  assert helper.name == model.name == name
  assert tuple(model(x).shape) == (3, 10)
  assert model.layers[-1].activation is keras.activations.linear
  assert all(type(layer).__module__.startswith('keras.') for layer in model.layers)
  model.save(tmp_path / 'model.keras')
  loaded = keras.models.load_model(tmp_path / 'model.keras')
  np.testing.assert_array_equal(loaded(x), model(x))


def test_the_padded_shortcut_saves_and_converts(tmp_path):
  model = _helper(resnet_at_cifar10, shortcut='pad').build()
  x = _images((32, 32, 3), batch=1)
  model.save(tmp_path / 'model.keras')
  np.testing.assert_array_equal(keras.models.load_model(tmp_path / 'model.keras')(x), model(x))
  interpreter = Interpreter(model_content=tf.lite.TFLiteConverter.from_keras_model(model).convert())
  interpreter.allocate_tensors()
  interpreter.set_tensor(interpreter.get_input_details()[0]['index'], x)
  interpreter.invoke()
  output = interpreter.get_tensor(interpreter.get_output_details()[0]['index'])
  np.testing.assert_allclose(output, model(x), atol=1e-4)


def test_parameter_counts():
  # The table of He et al. 2015: 0.27, 0.46, 0.66, 0.85 million.
  sizes = {20: 269722, 32: 464154, 44: 658586, 56: 853018}
  for size, expected in sizes.items():
    assert _trainable(_helper(resnet_at_cifar10, resnet_size=size, shortcut='pad').build()) == (
      expected
    )
  # Two projections: 16 x 32 + 32 x 64 kernel weights, gamma and beta of 32 and 64 channels.
  assert _trainable(_helper(resnet_at_cifar10).build()) == 269722 + 512 + 2048 + 64 + 128
  # 5x5x3x32 + 32, 5x5x32x64 + 64, 1600x256 + 256, 256x10 + 10.
  assert _trainable(_helper(lenet_at_cifar10).build()) == 2432 + 51264 + 409856 + 2570


def test_strided_convolutions_pad_as_torch_does():
  model = _helper(resnet_at_cifar10, shortcut='pad').build()
  x = _images((32, 32, 16), batch=1)
  padding, convolution = (
    model.get_layer(f'stage2_block1_{name}') for name in ('padding1', 'conv1')
  )
  kernel = convolution.kernel.numpy()
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  output = np.array(convolution(padding(x)))
  assert output.shape == (1, 16, 16, 32)
  for row, column in ((0, 0), (5, 9), (15, 15)):
    window = padded[0, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
    expected = np.tensordot(window, kernel, 3)
    np.testing.assert_allclose(output[0, row, column], expected, atol=1e-4)


def test_the_padded_shortcut_takes_every_second_pixel_and_adds_zero_channels():
  model = _helper(resnet_at_cifar10, shortcut='pad').build()
  subsample = model.get_layer('stage3_block1_shortcut_subsample')
  x = subsample.input
  way = keras.Model(model.input, [x, model.get_layer('stage3_block1_add').input[1]])
  before, after = (np.array(value) for value in way(_images((32, 32, 3))))
  np.testing.assert_array_equal(after[..., 16:48], before[:, ::2, ::2])
  assert not after[..., :16].any() and not after[..., 48:].any()


@pytest.mark.parametrize(
  'module, epoch, rate',
  [
    (resnet_at_cifar10, 0, 0.1),
    (resnet_at_cifar10, 99.99, 0.1),
    (resnet_at_cifar10, 100, 0.01),
    (resnet_at_cifar10, 150, 0.001),
    (resnet_at_cifar10, 249, 0.0001),
    (lenet_at_cifar10, 0, 0.01),
    (lenet_at_cifar10, 200, 0.00001),
  ],
)
def test_learning_rates_are_pocketflows(module, epoch, rate):
  assert _helper(module).learning_rate(epoch) == pytest.approx(rate)


def test_the_epochs_ratio_scales_length_and_schedule():
  helper = _helper(resnet_at_cifar10, nb_epochs_rat=0.1)
  assert helper.epochs() == 25
  assert [helper.learning_rate(e) for e in (9.9, 10, 15, 20)] == pytest.approx(
    [0.1, 0.01, 0.001, 0.0001]
  )


def test_defaults_are_pocketflows():
  config = resnet_at_cifar10.ModelHelper.Config()
  assert (config.lrn_rate_init, config.loss_w_dcy, config.batch_size_norm) == (0.1, 2e-4, 128)
  config = lenet_at_cifar10.ModelHelper.Config()
  assert (config.lrn_rate_init, config.loss_w_dcy, config.momentum) == (0.01, 5e-4, 0.9)


@pytest.mark.parametrize(
  'options, message',
  [
    ({'resnet_size': 21}, r'--resnet_size must be one of 20, 32, 44, 56. Received: 21.'),
    ({'shortcut': 'none'}, r"--shortcut must be one of projection, pad. Received: 'none'."),
    ({'momentum': 1.0}, r'--momentum must be .* below 1\. Received: 1\.0\.'),
    ({'nb_epochs_rat': 0.0}, r'--nb_epochs_rat must be .* above 0'),
  ],
)
def test_nonsense_options_are_refused(options, message):
  with pytest.raises(UserError, match=message):
    resnet_at_cifar10.ModelHelper.Config(**options)


def test_the_loss_is_the_evaluators():
  helper = _helper(convnet_at_digits)
  y, logits = np.array([1, 2, 0]), _images((10,))
  evaluator = helper.evaluator()
  evaluator.update(y, logits)
  assert float(helper.loss(y, logits)) == pytest.approx(evaluator.result()['loss'], abs=1e-6)


def test_dataset_is_that_of_the_net():
  x, y = next(_helper(convnet_at_digits).dataset().load('val', batch=9).as_numpy_iterator())
  assert x.shape == (9, 8, 8, 1) and y.shape == (9,)
  with pytest.raises(UserError, match='Received: /nowhere'):
    _helper(lenet_at_cifar10, data_dir_local='/nowhere').dataset()


def _save(model, path):
  if path.suffix == '.npz':
    np.savez(path, **{weight.path: weight.numpy() for weight in model.weights})
  elif path.suffix == '.h5':
    model.save_weights(path)
  else:
    model.save(path)


KINDS = ('w.keras', 'w.weights.h5', 'w.npz')


@pytest.mark.parametrize('kind', KINDS)
def test_pretrained_weights_arrive(kind, tmp_path):
  helper = _helper(convnet_at_digits)
  source, target = helper.build(), helper.build()
  source.get_layer('bn1').moving_mean.assign(np.arange(32))
  _save(source, tmp_path / kind)
  helper.load_pretrained(target, tmp_path / kind)
  for one, other in zip(source.weights, target.weights, strict=True):
    np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_a_quantized_model_is_no_pretrained_one(tmp_path):
  helper = _helper(convnet_at_digits)
  quantized, _ = compress(helper.build(), [{'algorithm': 'uniform'}])
  quantized.save(tmp_path / 'quantized.keras')
  with pytest.raises(UserError, match=r'such as final\.keras.* quantized already\.$'):
    helper.load(tmp_path / 'quantized.keras')


def _stack(*channels, dropout=False):
  x = inputs = keras.Input((8, 8, 1))
  for index, count in enumerate(channels):
    x = keras.layers.Conv2D(count, 3, name=f'conv{index}')(x)
    x = keras.layers.Dropout(0.5)(x) if dropout else x
  return keras.Model(inputs, x)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(
  'stored, wanted, message',
  [
    (
      (4, 5),
      (4, 6),
      r'weight conv1/kernel has shape \(3, 3, 4, 5\), the model wants \(3, 3, 4, 6\)$',
    ),
    ((4,), (4, 6), r'conv1/kernel'),
    ((4, 6), (4,), r'the model wants (2|no such array)'),
  ],
)
def test_the_first_mismatch_is_named_and_nothing_changes(kind, stored, wanted, message, tmp_path):
  helper = _helper(convnet_at_digits)
  _save(_stack(*stored), tmp_path / kind)
  model = _stack(*wanted)
  before = model.get_weights()
  with pytest.raises(UserError, match=rf'^Pretrained file .*{kind}: .*{message}'):
    helper.load_pretrained(model, tmp_path / kind)
  for weight, old in zip(model.get_weights(), before, strict=True):
    np.testing.assert_array_equal(weight, old)


def test_a_shallower_net_is_no_pruned_one():
  def net(*channels):
    x = inputs = keras.Input((8, 8, 1))
    for index, count in enumerate(channels):
      x = keras.layers.Conv2D(count, 3, padding='same', name=f'conv{index}')(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(10, name='dense')(x))

  assert pretrained.is_pruned(net(4, 4), net(8, 8))
  assert not pretrained.is_pruned(net(4), net(8, 8))


def test_normalization_computes_with_the_weights_that_it_got(tmp_path):
  x = np.arange(6, dtype='float32').reshape(2, 3)

  def net():
    inputs = keras.Input((3,))
    normalization = keras.layers.Normalization()
    outputs = normalization(inputs)
    return keras.Model(inputs, outputs), normalization

  (source, adapted), (target, _) = net(), net()
  adapted.adapt(x)
  source.save(tmp_path / 'w.keras')
  _helper(convnet_at_digits).load_pretrained(target, tmp_path / 'w.keras')
  np.testing.assert_array_equal(target(x), source(x))


def test_random_and_optimizer_states_in_a_weights_file_are_no_weights(tmp_path):
  source, target = _stack(4, 6, dropout=True), _stack(4, 6, dropout=True)
  source.compile(keras.optimizers.SGD(0.1, momentum=0.9))
  source.optimizer.build(source.trainable_variables)
  source.save_weights(tmp_path / 'w.weights.h5')
  _helper(convnet_at_digits).load_pretrained(target, tmp_path / 'w.weights.h5')
  np.testing.assert_array_equal(source.get_weights()[2], target.get_weights()[2])


@pytest.mark.parametrize('kind', KINDS)
def test_missing_and_damaged_files_are_refused(kind, tmp_path):
  helper = _helper(convnet_at_digits)
  model = helper.build()
  with pytest.raises(UserError, match=f'{kind}: must exist'):
    helper.load_pretrained(model, tmp_path / kind)
  with pytest.raises(UserError, match='must be a file. Received: a folder'):
    helper.load_pretrained(model, tmp_path)
  for content in (b'', b'nonsense'):
    (tmp_path / kind).write_bytes(content)
    with pytest.raises(UserError, match=f'{kind}: cannot be read: it is not a whole'):
      helper.load_pretrained(model, tmp_path / kind)
  _save(model, tmp_path / kind)
  whole = (tmp_path / kind).read_bytes()
  (tmp_path / kind).write_bytes(whole[: len(whole) // 2])
  with pytest.raises(UserError, match=f'{kind}: '):
    helper.load_pretrained(model, tmp_path / kind)


def test_an_unknown_kind_of_file_is_refused(tmp_path):
  (tmp_path / 'w.ckpt').touch()
  helper = _helper(convnet_at_digits)
  with pytest.raises(UserError, match='must end in .keras, .weights.h5 or .npz'):
    helper.load_pretrained(helper.build(), tmp_path / 'w.ckpt')


@pytest.mark.parametrize(
  'net', ['convnet_at_digits', 'lenet_at_cifar10', 'resnet_at_cifar10', 'resnet_at_ilsvrc12']
)
def test_every_net_has_its_run_script(net):
  module = importlib.import_module(f'nets.{net}')
  assert net.endswith(f'_at_{module.ModelHelper.dataset_name}')
  assert importlib.util.find_spec(f'nets.{net}_run')


@pytest.mark.shared
def test_torch_names_that_are_missing_are_named(shared):
  helper = _helper(resnet_at_cifar10, shortcut='projection')
  with pytest.raises(UserError, match=r"has no array 'layer2\.0\.shortcut\.0\.weight'"):
    helper.load_pretrained(helper.build(), shared / 'weights' / 'resnet20_cifar10.npz')


@pytest.mark.shared
def test_public_resnet_20_has_its_published_accuracy(shared):
  helper = _helper(resnet_at_cifar10, shortcut='pad', data_dir_local=str(shared / 'data'))
  model = helper.build()
  helper.load_pretrained(model, shared / 'weights' / 'resnet20_cifar10.npz')
  evaluator = helper.evaluator()
  predict = tf.function(lambda x: model(x, training=False))
  for x, y in helper.dataset().load('test', batch=500):
    evaluator.update(y.numpy(), predict(x).numpy())
  # Of 10,000 images one may have two classes between which rounding decides.
  assert evaluator.result()['accuracy'] == pytest.approx(0.9173, abs=1.5e-4)


@pytest.mark.slow
def test_the_digits_net_learns():
  keras.utils.set_random_seed(0)
  helper = _helper(convnet_at_digits)
  data, model = helper.dataset(), helper.build()
  steps = data.steps_per_epoch('train', 64)
  schedule = keras.callbacks.LearningRateScheduler(lambda epoch, _: helper.learning_rate(epoch))
  model.compile(keras.optimizers.SGD(momentum=helper.config.momentum), loss=helper.loss)
  model.fit(
    data.load('train', batch=64, training=True),
    steps_per_epoch=steps,
    epochs=int(helper.epochs()),
    callbacks=[schedule],
    verbose=0,
  )
  evaluator = helper.evaluator()
  for x, y in data.load('test', batch=360):
    evaluator.update(y.numpy(), model(x, training=False).numpy())
  assert evaluator.result()['accuracy'] >= 0.97
