"""Exported files of models with constants, unused parts and several inputs or outputs."""

import keras
import numpy as np
import pytest
from keras import layers

import pocketsize
from pocketsize import conversion

X = np.random.default_rng(0).normal(size=(16, 8, 8, 3)).astype(np.float32)
UNIFORM = {'algorithm': 'uniform', 'weight_bits': 8, 'activation_bits': 8}


@pytest.fixture(autouse=True)
def _seed():
  keras.utils.set_random_seed(0)


def compressed(model, x=X):
  return pocketsize.compress(model, [UNIFORM], calibration=[x])[0]


def assert_files_compute(model, folder, formats, *arrays, atol=1e-5):
  expected = model(arrays[0] if len(arrays) == 1 else list(arrays), training=False)
  expected = [np.asarray(y) for y in keras.tree.flatten(expected)]
  for file in conversion.export(model, folder, formats):
    outputs = conversion.open_file(file.path)(*arrays)
    for y, wanted in zip(outputs, expected, strict=True):
      np.testing.assert_allclose(y, wanted, atol=atol)


def test_tensors_that_a_model_holds_become_constants(tmp_path):
  left, right = keras.Input((8, 8, 3), name='zebra'), keras.Input((8, 8, 3), name='ant')
  normed = layers.Normalization(mean=[1.0, 2.0, 3.0], variance=[1.0, 4.0, 2.0])(left)
  shifted = right - keras.ops.convert_to_tensor([1.0, 2.0, 3.0])
  x = layers.Conv2D(4, 3)(layers.Concatenate()([normed, shifted]))
  model = keras.Model([left, right], x)
  assert_files_compute(model, tmp_path, ['tflite', 'onnx', 'openvino'], X, 2.0 * X)


def test_a_quantized_model_may_normalize_its_input(tmp_path):
  layer = layers.Normalization()
  layer.adapt(3.0 + 2.0 * X)
  inputs = keras.Input((8, 8, 3))
  model = keras.Model(inputs, layers.Dense(2)(layers.Flatten()(layers.Conv2D(4, 3)(layer(inputs)))))
  model = compressed(model)
  low, high = model.transforms[-1].range()
  formats = ['tflite_int8', 'onnx_qdq']
  assert_files_compute(model, tmp_path, formats, X, atol=1.01 * (high - low) / 255)


def test_an_output_that_nobody_uses_is_in_no_file(tmp_path):
  inputs = keras.Input((8, 8, 3))
  first = layers.Conv2D(4, 3, name='first')(inputs)
  aux = layers.AveragePooling2D(2)(layers.BatchNormalization()(layers.Conv2D(5, 3)(first)))
  encoder = keras.Model(inputs, [first, aux], name='encoder')
  inputs = keras.Input((8, 8, 3))
  model = compressed(keras.Model(inputs, layers.Conv2D(2, 1, name='head')(encoder(inputs)[0])))
  low, high = next(
    place.transform.range() for place in model.placements if place[:2] == ('head', 'output')
  )
  formats = ['tflite_int8', 'onnx_qdq']
  assert_files_compute(model, tmp_path, formats, X, atol=1.01 * (high - low) / 255)
  # The head and the layer that it reads.
  assert conversion.count_ops(tmp_path / 'model_int8.tflite') == (2, 0)


@pytest.mark.parametrize('bias_axes', ['e', 'd', 'de', 'bde', None])
def test_a_bias_may_cover_any_axes_of_an_einsum(bias_axes, tmp_path):
  x = np.random.default_rng(0).normal(size=(16, 5, 6)).astype(np.float32)
  inputs = keras.Input((5, 6))
  layer = layers.EinsumDense(
    'abc,cde->abde', (5, 3, 4), bias_axes=bias_axes, bias_initializer='random_normal'
  )
  model = compressed(keras.Model(inputs, layer(inputs)), x)
  low, high = model.transforms[-1].range()
  formats = ['tflite_int8', 'onnx_qdq']
  assert_files_compute(model, tmp_path, formats, x, atol=1.01 * (high - low) / 255)


def _mixed_net():
  inner = keras.Input((4, 4, 4))
  pooled = layers.GlobalAveragePooling2D()(layers.ReLU()(inner))
  head = keras.Model(inner, layers.Dense(3)(layers.Rescaling(0.5)(pooled)), name='head')
  inputs = keras.Input((8, 8, 3))
  x = layers.Normalization(mean=[1.0, 2.0, 3.0], variance=[1.0, 4.0, 16.0])(inputs)
  x = layers.Conv2D(4, 3, 2, padding='same', use_bias=False)(x)
  x = layers.BatchNormalization(moving_mean_initializer='random_normal')(x)
  return keras.Model(inputs, head(x + layers.SeparableConv2D(4, 3, padding='same')(x)))


def _mixed(policy):
  """Returns a net of mixed precision, and one of the same weights in float32."""
  keras.config.set_dtype_policy(policy)
  try:
    model = _mixed_net()
  finally:
    keras.config.set_dtype_policy('float32')
  wide = _mixed_net()
  wide.set_weights(model.get_weights())
  return model, wide


@pytest.mark.parametrize('policy', ['mixed_float16', 'mixed_bfloat16'])
def test_files_of_mixed_precision_compute_in_float32(policy, tmp_path):
  model, wide = _mixed(policy)
  expected = np.asarray(wide(X))
  for file in conversion.export(model, tmp_path, ['tflite', 'onnx', 'openvino']):
    np.testing.assert_allclose(conversion.open_file(file.path)(X)[0], expected, atol=1e-5)
  assert {layer.compute_dtype for layer in model.layers} == {policy.removeprefix('mixed_')}


@pytest.mark.parametrize('policy', ['mixed_float16', 'mixed_bfloat16'])
def test_int8_files_of_mixed_precision(policy, tmp_path):
  model, wide = _mixed(policy)
  expected = np.asarray(wide(X))
  model = compressed(model)
  low, high = model.transforms[-1].range()
  for file in conversion.export(model, tmp_path, ['tflite_int8', 'onnx_qdq']):
    (outputs,) = conversion.open_file(file.path)(X)
    # Of the weights and of four activations on the way.
    assert np.abs(outputs - expected).max() < 6 * (high - low) / 255
    assert conversion.count_ops(file.path)[0] > 3
