"""tfmot's quantization-aware training: where it quantizes, that it trains our own variables."""

import importlib
import os
import re
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from keras import layers
from toys import MODELS, assert_resumes, compile_for_logits, conv_net, fit, images, need_tfmot

import pocketsize
from pocketsize import calibration, configure, conversion
from pocketsize.compressor import Stack, Stage
from pocketsize.errors import UserError, first_sentence
from pocketsize.quantization import tfmot_bridge
from pocketsize.quantization.last_value import LastValueQuantizer
from pocketsize.quantization.tfmot import Tfmot, TfmotConfig
from pocketsize.quantization.twin_layer import Switched

need_tfmot()


def attached(model, **config):
  """Returns (the calibrated model that tfmot trains, its stack)."""
  stack = Stack([Tfmot(TfmotConfig(**config))])
  instrumented = configure.attach(model, stack)
  calibration.calibrate(instrumented, [images(64, channels=model.inputs[0].shape[-1])])
  return compile_for_logits(instrumented), stack


def without_tfmot(model, x):
  """Returns what our own quantizers compute, in whose place tfmot's layers do."""
  return np.array(model.run(x, training=False, activate=lambda transform, x: transform(x)))


def places(model):
  return {
    (path, point): getattr(transform, 'granularity', None)
    for path, point, transform in model.placements
  }


def each_kind_net():
  """Every layer type with a kernel that tfmot quantizes, and every place of an activation."""
  keras.utils.set_random_seed(6)
  x = inputs = keras.Input((8, 8, 3), name='images')
  x = layers.Conv2D(4, 3, padding='same', activation='gelu', name='conv')(x)
  x = layers.DepthwiseConv2D(3, depth_multiplier=2, padding='same', name='depthwise')(x)
  x = layers.BatchNormalization(momentum=0.9, name='bn')(x)
  x = layers.SeparableConv2D(4, 3, strides=2, padding='same', name='separable')(x)
  x = layers.ReLU(name='relu')(x)
  x = layers.Dropout(0.25, name='dropout')(x)
  x = layers.Conv2DTranspose(4, 3, strides=2, padding='same', name='transpose')(x)
  y = layers.AveragePooling2D(2, name='average')(x)
  z = layers.Conv2D(4, 1, strides=2, use_bias=False, name='shortcut')(x)
  x = layers.Add(name='add')([y, z])
  x = layers.Activation('relu', name='activation')(x)
  x = layers.Flatten(name='flatten')(layers.MaxPooling2D(2, name='max')(x))
  x = layers.Dense(4, activation='tanh', name='head')(x)
  return keras.Model(inputs, x, name='each_kind')


def refused_net():
  """Four layers that tfmot refuses, among convolutions that it quantizes."""
  keras.utils.set_random_seed(7)
  x = inputs = keras.Input((8, 8, 3), name='images')
  x = layers.Conv2D(4, 3, activation='elu', name='odd_activation')(x)
  x = layers.Conv2D(4, 3, activation='relu', name='conv0')(x)
  x = layers.BatchNormalization(name='alone')(x)
  gate = layers.Conv2D(4, 1, activation='sigmoid', name='gate')(x)
  x = layers.Multiply(name='gated')([x, gate])
  x = layers.Activation('elu', name='elu')(x)
  x = layers.GlobalAveragePooling2D(name='pool')(x)
  return keras.Model(inputs, layers.Dense(4, name='head')(x), name='refused_net')


@keras.saving.register_keras_serializable('test_tfmot')
class Halves(layers.Layer):
  """The first two channels, scaled, and the others."""

  def build(self, shape):
    self.scale = self.add_weight(shape=(2,), initializer='ones', name='scale')

  def call(self, x):
    return x[..., :2] * self.scale, x[..., 2:]


@keras.saving.register_keras_serializable('test_tfmot')
class Tower(keras.Model):
  """A subclassed model, whose layers nobody sees."""

  def __init__(self, **kwargs):
    super().__init__(**kwargs)
    self.conv = layers.Conv2D(4, 1)
    self.drop = layers.Dropout(0.25)

  def build(self, shape):
    self.conv.build(shape)

  def call(self, x, training=None):
    return self.drop(self.conv(x), training=training)


def foreign_net():
  """What tf_keras has no layer for, also in a nested model, among layers that tfmot quantizes."""
  keras.utils.set_random_seed(8)
  x = inputs = keras.Input((8, 8, 3))
  x = layers.LayerNormalization(name='norm')(layers.Conv2D(4, 3, name='conv')(x))
  one, other = Halves(name='halves')(x)
  x = layers.Concatenate(name='join')([layers.Conv2D(2, 1, name='one')(one), other, one])
  base = keras.Model(inputs, x, name='base')
  x = inputs = keras.Input((8, 8, 3), name='images')
  x = layers.ELU(name='elu')(base(x))
  x = layers.Conv2D(4, 1, activation='relu', name='relu')(x[:, 1:, ::2])
  x = Tower(name='tower')(keras.ops.multiply(x, x))
  x = layers.GlobalAveragePooling2D(name='pool')(x)
  return keras.Model(inputs, layers.Dense(4, name='head')(x), name='foreign_net')


def test_places_are_those_of_tfmot():
  model, stack = attached(conv_net())
  assert places(model) == {
    ('images', 'output'): None,
    ('conv0', 'kernel'): 'channel',
    ('relu0', 'output'): None,
    ('conv1', 'kernel'): 'channel',
    ('relu1', 'output'): None,
    ('pool', 'output'): None,
    ('head', 'kernel'): 'tensor',
    ('head', 'output'): None,
  }
  assert stack.skipped == {}


def test_each_kind_of_layer_is_quantized_where_tfmot_does():
  model, stack = attached(each_kind_net())
  assert places(model) == {
    ('images', 'output'): None,
    ('conv', 'kernel'): 'channel',
    ('conv', 'preactivation'): None,
    ('conv', 'output'): None,
    ('depthwise', 'kernel'): 'channel',
    ('bn', 'output'): None,
    ('separable', 'depthwise_kernel'): 'tensor',
    ('separable', 'pointwise_kernel'): 'tensor',
    ('separable', 'output'): None,
    ('relu', 'output'): None,
    ('transpose', 'kernel'): 'tensor',
    ('transpose', 'output'): None,
    ('average', 'output'): None,
    ('shortcut', 'kernel'): 'channel',
    ('shortcut', 'output'): None,
    ('activation', 'output'): None,
    ('head', 'kernel'): 'tensor',
    ('head', 'preactivation'): None,
  }
  assert stack.skipped == {}


@pytest.mark.parametrize('given', [None, '0', '1'])
def test_processes_that_are_started_later_have_the_keras_that_they_had(monkeypatch, given):
  """tfmot sets the variable when it is imported, which a process does once."""
  monkeypatch.delenv('TF_USE_LEGACY_KERAS', raising=False)
  if given:
    monkeypatch.setenv('TF_USE_LEGACY_KERAS', given)

  def imported(*_):
    os.environ['TF_USE_LEGACY_KERAS'] = '1'
    return types.SimpleNamespace(quantization=types.SimpleNamespace(keras='tfmot'))

  monkeypatch.setattr(tfmot_bridge, 'require', imported)
  assert tfmot_bridge.tfmot() == 'tfmot'
  assert os.environ.get('TF_USE_LEGACY_KERAS') == given


def test_a_kernel_before_a_relu_layer_is_not_forgotten():
  inputs = keras.Input((8, 8, 3), name='images')
  x = layers.ReLU(name='relu')(layers.Conv2D(4, 3, name='conv')(inputs))
  x = layers.Activation('relu', name='activation')(
    layers.Dense(4, name='dense')(layers.Flatten()(x))
  )
  model, _ = attached(keras.Model(inputs, x))
  assert places(model) == {
    ('images', 'output'): None,
    ('conv', 'kernel'): 'channel',
    ('relu', 'output'): None,
    ('dense', 'kernel'): 'tensor',
    ('activation', 'output'): None,
  }
  np.testing.assert_allclose(model(images()), without_tfmot(model, images()), atol=1e-6)


@pytest.mark.parametrize('make', [*MODELS.values(), each_kind_net, refused_net, foreign_net])
def test_what_tfmot_trains_is_what_our_quantizers_compute(make):
  """The grids are the same: before and after training, and all that trains has moved."""
  model, stack = attached(make())
  np.testing.assert_allclose(model(images()), without_tfmot(model, images()), atol=1e-6)
  before = [np.array(variable) for variable in model.source.trainable_variables]
  fit(model, stack, 0, 8)
  for variable, old in zip(model.source.trainable_variables, before, strict=True):
    assert np.abs(np.array(variable) - old).max() > 0, variable.path
  np.testing.assert_allclose(model(images()), without_tfmot(model, images()), atol=1e-6)
  assert np.abs(model(images()) - model.source(images())).max() > 1e-4


@pytest.mark.parametrize('make', [each_kind_net, foreign_net])
def test_a_saved_model_needs_no_tfmot(make, tmp_path):
  model, stack = attached(make())
  fit(model, stack, 0, 8)
  model.save(tmp_path / 'model.keras')
  loaded = keras.models.load_model(tmp_path / 'model.keras', compile=False)
  assert loaded.computed_by is None
  np.testing.assert_allclose(loaded(images()), model(images()), atol=1e-6)


def test_the_int8_file_agrees_with_the_twin_and_with_the_file_of_tensorflow(tmp_path):
  """A step of the output at most from the twin, and from the file that TensorFlow makes of it."""
  model, stack = attached(conv_net())
  fit(model, stack, 0, 8)
  (file,) = conversion.export(model, tmp_path, ['tflite_int8'])
  x = images(32, seed=9)
  (got,) = conversion.open_file(file.path)(x)
  low, high = model.transforms_at('head', 'output')[0].range()
  step = (high - low) / 255
  assert np.abs(got - model(x)).max() <= 1.01 * step
  assert (np.abs(got - model(x)) < 0.01 * step).mean() > 0.9
  function = tf.function(
    lambda x: model(x, training=False), input_signature=[tf.TensorSpec((None, 8, 8, 3))]
  )
  converter = tf.lite.TFLiteConverter.from_concrete_functions([function.get_concrete_function()])
  converter.optimizations = [tf.lite.Optimize.DEFAULT]
  (tmp_path / 'tensorflow.tflite').write_bytes(converter.convert())
  (expected,) = conversion.open_file(tmp_path / 'tensorflow.tflite')(x)
  assert np.abs(got - expected).max() <= 1.01 * step
  assert (np.abs(got - expected) < 0.01 * step).mean() > 0.9
  assert conversion.inspection.count_ops(file.path)[1] == 0


def test_refused_layers_stay_float_and_are_reported():
  model, stack = attached(refused_net())
  assert stack.skipped == {
    'odd_activation': (
      'tfmot refuses it: Only some Keras activations under `keras.activations` are supported'
    ),
    'alone': 'tfmot has no quantization for a BatchNormalization here',
    'gated': 'tfmot has no quantization for a Multiply here',
    'elu': (
      'tfmot refuses it: Activation elu not supported by Default8BitActivationQuantizeConfig'
    ),
  }
  quantized = {path for path, _ in places(model)}
  assert quantized == {'images', 'conv0', 'gate', 'pool', 'head'}


def test_what_tf_keras_has_not_stays_float_and_is_reported():
  model, stack = attached(foreign_net(), quant_delay=1)
  assert {re.sub(r'_\d+$', '', path): reason for path, reason in stack.skipped.items()} == {
    path: f'the tf_keras twin has no {what}, it stays float'
    for path, what in {
      'base/norm': 'LayerNormalization',
      'base/halves': 'custom Halves',
      'elu': 'ELU',
      'get_item': 'GetItem',
      'multiply': 'Multiply of a constant, or of one tensor twice',
      'tower': 'custom Tower',
    }.items()
  }
  assert places(model) == {
    ('images', 'output'): None,
    ('base/conv', 'kernel'): 'channel',
    ('base/conv', 'output'): None,
    ('base/one', 'kernel'): 'channel',
    ('base/one', 'output'): None,
    ('base/join', 'output'): None,
    ('relu', 'kernel'): 'channel',
    ('relu', 'output'): None,
    ('pool', 'output'): None,
    ('head', 'kernel'): 'tensor',
    ('head', 'output'): None,
  }
  np.testing.assert_allclose(model(images()), model.source(images()), atol=1e-6)
  once, again = (np.array(model(images(), training=True)) for _ in range(2))
  assert np.abs(once - again).max() > 1e-3


def test_masks_and_integers():
  """Of words, of which there are fewer in some rows."""
  inputs = keras.Input((5,), dtype='int32')
  x = layers.Embedding(9, 4, mask_zero=True)(inputs)
  x = layers.LSTM(4, return_sequences=True)(layers.Dense(4, name='inside')(x))
  x = layers.Dense(4, name='head')(layers.GlobalAveragePooling1D()(x))
  stack = Stack([Tfmot(TfmotConfig(quant_delay=1))])
  model = configure.attach(keras.Model(inputs, x), stack)
  rows = np.array([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8]])
  calibration.calibrate(model, [rows])
  np.testing.assert_allclose(model(rows), model.source(rows), atol=1e-6)
  stack.update(1)
  np.testing.assert_allclose(model(rows), without_tfmot(model, rows), atol=1e-6)
  assert {path for path, _ in places(model)} == {'inside', 'head'}


def test_the_int8_file_of_a_model_that_is_partly_float(tmp_path):
  model, stack = attached(foreign_net())
  fit(model, stack, 0, 8)
  (file,) = conversion.export(model, tmp_path, ['tflite_int8'])
  (got,) = conversion.open_file(file.path)(images(32, seed=9))
  low, high = model.transforms_at('head', 'output')[0].range()
  assert np.abs(got - model(images(32, seed=9))).max() <= 1.01 * (high - low) / 255
  assert min(conversion.inspection.count_ops(file.path)) > 0


def test_a_layer_inside_a_nested_model_is_reported_by_its_path():
  inner = keras.Sequential([keras.Input((8, 3)), layers.Conv1D(2, 3, name='odd')], name='inner')
  inputs = keras.Input((8, 3), name='rows')
  x = layers.Dense(4, name='head')(layers.Flatten()(inner(inputs)))
  stack = Stack([Tfmot(TfmotConfig())])
  model = configure.attach(keras.Model(inputs, x), stack)
  assert stack.skipped == {'inner/odd': 'tfmot has no quantization for a Conv1D here'}
  assert ('head', 'kernel') in places(model)


def test_a_model_of_refused_layers_only_is_an_error():
  inputs = keras.Input((8, 3))
  model = keras.Model(inputs, layers.Conv1D(2, 3, name='odd')(inputs), name='odd_net')
  with pytest.raises(UserError, match="no layer of 'odd_net': odd: tfmot has no quantization for"):
    configure.attach(model, Stack([Tfmot(TfmotConfig())]))


def test_a_model_that_tf_keras_has_nothing_of_is_an_error():
  inputs = keras.Input((8, 3))
  model = keras.Model(inputs, layers.ELU(name='odd')(inputs), name='odd_net')
  with pytest.raises(UserError, match="no layer of 'odd_net': odd: the tf_keras twin has no ELU"):
    configure.attach(model, Stack([Tfmot(TfmotConfig())]))


@pytest.mark.parametrize(
  'text, expected',
  [
    ('It is odd. It is\nlong.', 'It is odd'),
    ('<function elu at 0x7f2a> is odd.', 'elu is odd'),
    ('', 'ValueError'),
    (
      'Exception encountered when calling layer "a" (type A).\n\nIt is odd.\n\nCall arguments',
      'It is odd',
    ),
    (
      'Exception encountered when calling layer "a" (type A).\n\nin user code:\n\n    File "a.py", '
      'line 1, in call  *\n        return b(x)\n\n    TypeError: b() is odd\n\n\nCall arguments',
      'b() is odd',
    ),
  ],
)
def test_a_reason_is_the_first_sentence_of_an_error(text, expected):
  assert first_sentence(ValueError(text)) == expected


def test_several_inputs_and_outputs():
  one, other = keras.Input((8, 8, 3), name='one'), keras.Input((8, 8, 3), name='other')
  joined = layers.Concatenate(name='join')([layers.Conv2D(2, 1, name='conv')(one), other])
  outputs = [layers.Conv2D(2, 1, name=name)(joined) for name in ('left', 'right')]
  stack = Stack([Tfmot(TfmotConfig())])
  model = configure.attach(keras.Model([one, other], outputs), stack)
  x = [images(), images(seed=1)]
  calibration.calibrate(model, [x])
  got = model(x, training=False)
  expected = model.run(x, training=False, activate=lambda transform, x: transform(x))
  for left, right in zip(got, expected, strict=True):
    np.testing.assert_allclose(left, right, atol=1e-6)


@pytest.mark.parametrize('bits', [(2, 8), (4, 6), (16, 16)])
def test_other_bits(bits):
  model, stack = attached(conv_net(), weight_bits=bits[0], activation_bits=bits[1])
  fit(model, stack, 0, 3)
  # Of 16 bits some values lie on the border of two levels.
  np.testing.assert_allclose(model(images()), without_tfmot(model, images()), atol=5e-5)
  kernel = model.baked('conv0')[..., 0]
  assert len(np.unique(kernel)) <= 2 ** bits[0] - 1
  if bits == (2, 8):
    assert len(np.unique(kernel)) == 3


def test_before_the_delay_the_model_is_float_and_ranges_follow():
  model, stack = attached(conv_net(), quant_delay=3)
  plain = compile_for_logits(pocketsize.instrument(conv_net()))
  ranges = [np.array(model.transforms_at('relu0', 'output')[0].high)]
  fit(model, stack, 0, 2)
  fit(plain, Stack(), 0, 2)
  ranges.append(np.array(model.transforms_at('relu0', 'output')[0].high))
  assert ranges[0] != ranges[1]
  np.testing.assert_allclose(model(images()), model.source(images()), atol=1e-6)
  for name in ('conv0', 'head'):
    np.testing.assert_allclose(
      model.graph.layers[name].kernel, plain.graph.layers[name].kernel, atol=1e-5
    )
  assert stack.stage(2) is Stage.UNCOMPRESSED and stack.stage(3) is Stage.FULL
  stack.update(3)
  np.testing.assert_allclose(model(images()), without_tfmot(model, images()), atol=1e-6)
  assert np.abs(model(images()) - model.source(images())).max() > 1e-4


def test_after_the_freeze_batch_norms_keep_their_statistics_and_train_on():
  model, stack = attached(conv_net(), freeze_bn_delay=2)
  layer = model.graph.layers['bn0']
  fit(model, stack, 0, 2)
  stack.update(1)
  once = np.array(model(images(), training=True))
  stack.update(2)
  mean, gamma = np.array(layer.moving_mean), np.array(layer.gamma)
  assert np.abs(once - model(images(), training=True)).max() > 1e-3
  np.testing.assert_array_equal(layer.moving_mean, mean)
  fit(model, stack, 2, 4)
  np.testing.assert_array_equal(layer.moving_mean, mean)
  assert np.abs(layer.gamma - gamma).max() > 0
  fit(model, stack, 0, 1)
  assert np.abs(layer.moving_mean - mean).max() > 0


def test_frozen_layers_stay_as_they_are():
  net = MODELS['nested']()
  net.get_layer('base').trainable = False
  before = [np.array(weight) for weight in net.get_layer('base').weights]
  model, stack = attached(net)
  fit(model, stack, 0, 3)
  for weight, old in zip(net.get_layer('base').weights, before, strict=True):
    np.testing.assert_array_equal(weight, old)


def test_ten_and_ten_steps_are_twenty_bit_for_bit(deterministic):
  """With dropout, whose random state is Keras' own."""
  keras.utils.set_random_seed(1)
  config = {'quant_delay': 4, 'freeze_bn_delay': 12}
  assert_resumes(lambda: attached(each_kind_net(), **config), 20, [10])


def test_on_a_gpu_gradients_are_those_of_clipping(monkeypatch):
  quantizer = tfmot_bridge.tfmot().quantizers.MovingAverageQuantizer(8, False, False, False)
  x = tf.constant([-2.0, -0.4, 0.3, 3.0])

  def run():
    weights = {'min_var': tf.Variable(-1.0), 'max_var': tf.Variable(2.0)}
    with tf.GradientTape() as tape:
      tape.watch(x)
      y = Switched(quantizer)(x, True, weights)
    return y.numpy(), tape.gradient(y, x).numpy()

  values, gradient = run()
  monkeypatch.setattr(tf.config, 'list_physical_devices', lambda kind: ['one'])
  for expected, got in zip((values, gradient), run(), strict=True):
    np.testing.assert_array_equal(got, expected)
  assert gradient.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize('package', ['tf_keras', 'tensorflow_model_optimization'])
def test_a_missing_package_is_one_sentence(package, monkeypatch):
  original = importlib.import_module

  def missing(name):
    if name == package:
      raise ImportError(f'No module named {name!r}')
    return original(name)

  monkeypatch.setattr(importlib, 'import_module', missing)
  with pytest.raises(UserError, match=f'{package.replace("_", ".")}.* is needed .*pip install'):
    attached(conv_net())


@pytest.mark.parametrize(
  'config, message',
  [
    ({'weight_bits': 1}, '`weight_bits` must be from 2 to 16. Received: 1'),
    ({'activation_bits': 32}, '`activation_bits` must be from 2 to 16. Received: 32'),
    ({'quant_delay': -1}, '`quant_delay` must be at least 0. Received: -1'),
    ({'freeze_bn_delay': -2}, '`freeze_bn_delay` must be at least 0. Received: -2'),
  ],
)
def test_nonsense_is_refused(config, message):
  with pytest.raises(UserError, match=message):
    TfmotConfig(**config)


@settings(max_examples=30)
@given(
  kernel=arrays.arrays(
    np.float32, (3, 2, 4), elements=st.floats(-4, 4, width=32).map(lambda x: round(x, 3))
  ),
  bits=st.integers(2, 16),
  per_channel=st.booleans(),
)
def test_the_last_value_quantizer_is_the_fake_quantizer_of_tensorflow(kernel, bits, per_channel):
  """Up to the rounding of float32, and of a value in the middle between two levels."""
  quantizer = LastValueQuantizer(bits, 'channel' if per_channel else 'tensor')
  quantizer.build(kernel.shape)
  quantizer.fit(kernel)
  fake = (
    tf.quantization.fake_quant_with_min_max_vars_per_channel
    if per_channel
    else tf.quantization.fake_quant_with_min_max_vars
  )
  expected = fake(
    kernel, quantizer.low.value, quantizer.high.value, num_bits=bits, narrow_range=True
  ).numpy()
  got = quantizer(tf.constant(kernel)).numpy()
  scale = np.broadcast_to(quantizer.scales(), kernel.shape)
  codes = np.abs(kernel.astype(np.float64) / np.where(scale > 0, scale, 1))
  in_the_middle = np.abs(codes % 1 - 0.5) < 1e-2
  np.testing.assert_allclose(got[~in_the_middle], expected[~in_the_middle], atol=4e-6)
  codes = quantizer.grid(got).codes(got)
  np.testing.assert_array_equal((codes * scale).astype(np.float32), got)
