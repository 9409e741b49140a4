"""The tf_keras twin: equal outputs for every layer type, and what Keras computes in it."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from toys import MODELS, images

from pocketsize.graph import Graph
from pocketsize.quantization import twin
from pocketsize.quantization.twin import build_twin

pytest.importorskip('tf_keras')

IMAGE, ROW = (6, 6, 4), (6, 4)
# Type: layers of it, each with the shape of its input.
ONE_INPUT = {
  'Conv1D': [(layers.Conv1D(3, 3, 2, 'same', activation='relu'), ROW)],
  'Conv2D': [
    (layers.Conv2D(6, 3, 2, 'same', groups=2, use_bias=False), IMAGE),
    (layers.Conv2D(3, 3, dilation_rate=2, activation='silu'), IMAGE),
  ],
  'DepthwiseConv2D': [(layers.DepthwiseConv2D(3, 2, 'same', depth_multiplier=2), IMAGE)],
  'SeparableConv2D': [(layers.SeparableConv2D(5, 3, depth_multiplier=2), IMAGE)],
  'Conv2DTranspose': [(layers.Conv2DTranspose(3, 3, 2, 'same', output_padding=1), IMAGE)],
  'Dense': [(layers.Dense(3, activation='softmax'), (4,)), (layers.Dense(3), IMAGE)],
  'BatchNormalization': [(layers.BatchNormalization(scale=False, epsilon=0.1), IMAGE)],
  'ReLU': [(layers.ReLU(1.0, 0.1, 0.2), IMAGE)],
  'LeakyReLU': [(layers.LeakyReLU(0.2), IMAGE)],
  'Softmax': [(layers.Softmax(axis=1), IMAGE)],
  'Activation': [(layers.Activation('tanh'), IMAGE)],
  'ZeroPadding1D': [(layers.ZeroPadding1D((1, 2)), ROW)],
  'ZeroPadding2D': [(layers.ZeroPadding2D(((1, 2), (0, 3))), IMAGE)],
  'Cropping1D': [(layers.Cropping1D((1, 2)), ROW)],
  'Cropping2D': [(layers.Cropping2D(((1, 2), (0, 3))), IMAGE)],
  'MaxPooling1D': [(layers.MaxPooling1D(3, 2, 'same'), ROW)],
  'MaxPooling2D': [(layers.MaxPooling2D(3, 2, 'same'), IMAGE)],
  'AveragePooling1D': [(layers.AveragePooling1D(3, 2, 'same'), ROW)],
  'AveragePooling2D': [(layers.AveragePooling2D(3, 2, 'same'), IMAGE)],
  'GlobalMaxPooling1D': [(layers.GlobalMaxPooling1D(), ROW)],
  'GlobalMaxPooling2D': [(layers.GlobalMaxPooling2D(keepdims=True), IMAGE)],
  'GlobalAveragePooling1D': [(layers.GlobalAveragePooling1D(), ROW)],
  'GlobalAveragePooling2D': [(layers.GlobalAveragePooling2D(keepdims=True), IMAGE)],
  'UpSampling1D': [(layers.UpSampling1D(2), ROW)],
  'UpSampling2D': [(layers.UpSampling2D((2, 3), interpolation='bilinear'), IMAGE)],
  'Flatten': [(layers.Flatten(), IMAGE)],
  'Reshape': [(layers.Reshape((-1, 8)), IMAGE)],
  'Permute': [(layers.Permute((3, 1, 2)), IMAGE)],
  'Dropout': [(layers.Dropout(0.5), IMAGE)],
  'SpatialDropout1D': [(layers.SpatialDropout1D(0.5), ROW)],
  'SpatialDropout2D': [(layers.SpatialDropout2D(0.5), IMAGE)],
  'GaussianDropout': [(layers.GaussianDropout(0.5), IMAGE)],
  'GaussianNoise': [(layers.GaussianNoise(0.5), IMAGE)],
  'Rescaling': [
    (layers.Rescaling(2.0, offset=-1.0), IMAGE),
    (layers.Rescaling([1.0, 2.0, 3.0, 4.0]), IMAGE),
  ],
  'Normalization': [
    (layers.Normalization(mean=[1.0, 2.0, 3.0, 4.0], variance=[1.0, 4.0, 0.25, 9.0]), IMAGE),
  ],
}
MERGES = {
  'Add': layers.Add,
  'Subtract': layers.Subtract,
  'Multiply': layers.Multiply,
  'Average': layers.Average,
  'Maximum': layers.Maximum,
  'Minimum': layers.Minimum,
  'Concatenate': layers.Concatenate,
}


def randomized(model):
  """Sets all weights at random, those that scale or are variances positive."""
  rng = np.random.default_rng(5)
  for weight in model.weights:
    positive = not weight.path.endswith(('kernel', 'bias'))
    values = rng.uniform(0.5, 1.5, weight.shape) if positive else rng.normal(size=weight.shape)
    weight.assign(values)
  return model


def assert_equal_outputs(model, *inputs):
  """Between a model and its twin, which is returned, within rounding."""
  built = build_twin(model)
  got = built.model(inputs if len(inputs) > 1 else inputs[0], training=False)
  expected = model(list(inputs) if len(inputs) > 1 else inputs[0], training=False)
  for left, right in zip(keras.tree.flatten(expected), keras.tree.flatten(got), strict=True):
    assert tuple(left.shape) == tuple(right.shape)
    np.testing.assert_allclose(np.array(right), np.array(left), rtol=1e-4, atol=1e-4)
    assert np.ptp(np.array(left)) > 1e-3
  return built


def noise(shape, seed=0):
  return np.random.default_rng(seed).normal(size=(2, *shape)).astype('float32')


def test_every_type_is_tested():
  assert set(twin.TYPES) == {*ONE_INPUT, *MERGES}


@pytest.mark.parametrize(
  'layer, shape',
  [
    pytest.param(*case, id=f'{name}-{number}')
    for name, cases in ONE_INPUT.items()
    for number, case in enumerate(cases)
  ],
)
def test_a_layer_and_its_twin_compute_the_same(layer, shape):
  inputs = keras.Input(shape)
  model = keras.Model(inputs, layer(inputs))
  if not isinstance(layer, layers.Normalization):
    randomized(model)
  assert assert_equal_outputs(model, noise(shape)).refused == {}


@pytest.mark.parametrize('name', MERGES)
def test_a_merge_and_its_twin_compute_the_same(name):
  inputs = [keras.Input((4,)), keras.Input((4,))]
  model = keras.Model(inputs, MERGES[name]()(inputs))
  assert assert_equal_outputs(model, noise((4,)), noise((4,), 1)).refused == {}


def test_operators_several_inputs_and_several_outputs():
  one, other = keras.Input((4, 4, 2)), keras.Input((4, 4, 2))
  total = ops.relu(one + other)
  joined = ops.relu6(ops.maximum(one - other, ops.minimum(one, one * other)))
  padded = ops.pad(joined, ((0, 0), (0, 0), (0, 0), (1, 2)))
  model = keras.Model([one, other], [total, joined, padded])
  assert assert_equal_outputs(model, noise((4, 4, 2)), noise((4, 4, 2), 1)).refused == {}


@pytest.mark.parametrize('name', MODELS)
def test_nested_and_shared_layers_are_laid_flat(name):
  model = randomized(MODELS[name]())
  found = assert_equal_outputs(model, images(2))
  assert found.refused == {}
  assert len(found.names) == len(Graph(model).nodes)
  names = [each for names in found.names for each in names]
  assert sorted(names) == sorted(layer.name for layer in found.model.layers)


def test_frozen_layers_stay_frozen():
  model = MODELS['nested']()
  model.get_layer('base').trainable = False
  built = build_twin(model).model
  assert [layer.name for layer in built.layers if layer.weights and layer.trainable] == ['head']


def custom_dense(x):
  class Dense(layers.Dense):
    pass

  return Dense(2)(x)


def custom_activation(x):
  return ops.sin(x)


def always_random(x):
  class Noise(layers.Layer):
    def __init__(self):
      super().__init__()
      self.seeds = keras.random.SeedGenerator(0)

    def call(self, x):
      return x + keras.random.normal((1,), seed=self.seeds)

  return Noise()(x)


@pytest.mark.parametrize(
  'make, reasons',
  [
    (lambda x: layers.PReLU(name='odd')(x), {'odd': 'no PReLU, '}),
    (lambda x: layers.Add()(ops.split(x, 2, axis=-1)), {'split': 'no Split, '}),
    (lambda x: x[:, 1:, ::2], {'get_item': 'no GetItem, '}),
    (lambda x: 1.0 - x, {'subtract': 'no Subtract of a constant, or of one tensor twice'}),
    (lambda x: x + x, {'add': 'no Add of a constant, or of one tensor twice'}),
    (
      lambda x: ops.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0))),
      {'pad': 'no Pad but that of the channels of an image with zeros'},
    ),
    (
      lambda x: ops.pad(x, ((0, 0), (0, 0), (0, 0), (1, 0)), constant_values=2.0),
      {'pad': 'no Pad that computes the same (off by '},
    ),
    (
      lambda x: layers.Dense(2, activation='sparse_plus', name='d')(x),
      {'d': "tf_keras refuses it: Unknown activation function 'sparse_plus' cannot"},
    ),
    (
      lambda x: layers.Normalization(mean=0.5, variance=2.0, invert=True, name='n')(x),
      {'n': 'no Normalization that is inverted, or not along the last axis'},
    ),
    (
      lambda x: layers.Dense(2, activation=custom_activation, name='d')(x),
      {'d': 'no Dense with a custom activation'},
    ),
    (custom_dense, {'dense': 'no custom Dense, '}),
  ],
)
def test_what_tf_keras_cannot_hold_is_computed_by_keras(make, reasons):
  keras.backend.clear_session(free_memory=False)
  inputs = keras.Input(IMAGE)
  model = keras.Model(inputs, layers.Conv2D(2, 1)(make(inputs)))
  found = assert_equal_outputs(model, noise(IMAGE))
  assert found.refused.keys() == reasons.keys()
  for path, reason in reasons.items():
    assert reason in found.refused[path]
    (names,) = [names for node, names in nodes_and_names(model, found) if node.path == path]
    assert names == ()


def nodes_and_names(model, found):
  return zip(Graph(model).nodes, found.names, strict=True)


def test_what_reads_integers_or_a_mask_is_computed_by_keras():
  keras.backend.clear_session(free_memory=False)
  inputs = keras.Input((5,), dtype='int32')
  x = layers.Embedding(3, 4, mask_zero=True, name='words')(layers.Reshape((5,), name='row')(inputs))
  x = layers.Dense(3, name='inside')(x)
  x = layers.GlobalAveragePooling1D(name='mean')(x)
  model = keras.Model(inputs, layers.Dense(2, name='head')(x))
  found = assert_equal_outputs(model, np.array([[1, 2, 0, 0, 0], [2, 2, 1, 0, 0]]))
  assert found.refused == {
    'row': 'the tf_keras twin has no Reshape of int32, it stays float',
    'words': 'the tf_keras twin has no Embedding, it stays float',
    'not_equal': 'the tf_keras twin has no NotEqual, it stays float',
    'mean': 'the tf_keras twin has no mask for a GlobalAveragePooling1D, it stays float',
  }


def test_what_is_always_random_keeps_its_state():
  inputs = keras.Input(IMAGE)
  model = keras.Model(inputs, always_random(inputs))
  before = [np.array(variable) for variable in model.variables]
  assert list(build_twin(model).refused) == ['noise']
  np.testing.assert_array_equal([np.array(variable) for variable in model.variables], before)


def test_images_of_any_size():
  inputs = keras.Input((None, None, 3))
  x = layers.Conv2D(2, 3, strides=2)(layers.ZeroPadding2D()(inputs))
  model = randomized(keras.Model(inputs, layers.GlobalAveragePooling2D()(x)))
  assert assert_equal_outputs(model, images(2, size=9)).refused == {}


@pytest.mark.parametrize(
  ('layer', 'shape'),
  [
    (layers.DepthwiseConv2D(33), (None, None, 2)),
    (layers.SeparableConv2D(3, 3, dilation_rate=16), (None, None, 2)),
    (layers.AveragePooling1D(40, 1), (None, 2)),
  ],
)
def test_windows_that_are_larger_than_an_image_of_32_places(layer, shape):
  inputs = keras.Input(shape)
  model = randomized(keras.Model(inputs, layer(inputs)))
  assert assert_equal_outputs(model, noise((44,) * (len(shape) - 1) + (2,))).refused == {}


def test_a_window_that_no_image_is_large_enough_for():
  inputs = keras.Input((None, 1))
  model = keras.Model(inputs, layers.MaxPooling1D(600, name='wide')(inputs))
  assert build_twin(model).refused == {
    'wide': 'the tf_keras twin has no MaxPooling1D of more than 512 places, it stays float'
  }


def test_a_layer_of_tf_keras_that_computes_something_else_is_not_used(monkeypatch):
  monkeypatch.setitem(twin._RENAMED, ('ReLU', 'max_value'), 'threshold')
  monkeypatch.setitem(twin._ARGUMENTS, 'ReLU', ('max_value',))
  inputs = keras.Input(IMAGE)
  model = keras.Model(inputs, layers.ReLU(0.5, name='relu')(inputs))
  refused = assert_equal_outputs(model, noise(IMAGE)).refused
  assert 'no ReLU that computes the same (off by ' in refused['relu']
