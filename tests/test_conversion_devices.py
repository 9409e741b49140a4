"""Files of models whose activations are quantized for one device, in all three runtimes."""

import conversion_models as models
import keras
import numpy as np
import pytest
from keras import layers

from pocketsize import conversion
from pocketsize.conversion.processor import overflows
from pocketsize.quantization.devices import DEVICES
from pocketsize.quantization.learned import LearnedRange

X = models.samples()
FORMAT_BY_DEVICE = {
  'litert': 'tflite_int8',
  'onnxruntime': 'onnx_qdq',
  'openvino': 'openvino_int8',
}


def _classifier(x):
  return layers.Dense(5, name='head')(layers.GlobalAveragePooling2D()(x))


def residual():
  """3 convolutions, an addition, a max pooling, an average, a dense layer."""
  inputs = keras.Input((12, 12, 3), name='image')
  x = models.block(inputs, 8)
  y = layers.Conv2D(8, 3, padding='same')(models.block(x, 8))
  x = layers.ReLU()(layers.Add()([x, layers.BatchNormalization()(y)]))
  return keras.Model(inputs, _classifier(layers.MaxPooling2D()(x)))


def concatenation():
  """4 convolutions, a max pooling, 2 concatenations, an average, a dense layer."""
  inputs = keras.Input((12, 12, 3), name='image')
  past = layers.MaxPooling2D(3, 1, padding='same')(models.block(inputs, 4, 1))
  x = layers.Concatenate()([models.block(inputs, 6), past])
  x = layers.Concatenate()([x, models.block(x, 6)])
  return keras.Model(inputs, _classifier(models.block(x, 8)))


def squeeze_and_excitation():
  """4 convolutions, one with a sigmoid, a product, 2 averages, a dense layer."""
  inputs = keras.Input((12, 12, 3), name='image')
  x = models.block(inputs, 8)
  y = layers.GlobalAveragePooling2D(keepdims=True)(x)
  y = layers.Conv2D(8, 1, activation='sigmoid')(layers.Conv2D(4, 1, activation='relu')(y))
  return keras.Model(inputs, _classifier(models.block(layers.Multiply()([x, y]), 8)))


def convolution_last():
  """3 convolutions, a max pooling, a maximum, an average pooling."""
  inputs = keras.Input((12, 12, 3), name='image')
  past = layers.MaxPooling2D(3, 1, padding='same')(models.block(inputs, 8, 1))
  x = layers.Maximum()([models.block(inputs, 8), past])
  return keras.Model(inputs, layers.Conv2D(3, 1)(layers.AveragePooling2D(2)(x)))


# (int8, float) operations on a device of its own, counted by hand. OpenVINO adds inside the
# convolution, and computes a sigmoid there; joining is no operation. Only LiteRT has a maximum of
# integers.
OPERATIONS = {
  residual: {'litert': (7, 0), 'onnxruntime': (7, 0), 'openvino': (6, 0)},
  concatenation: {'litert': (9, 0), 'onnxruntime': (9, 0), 'openvino': (7, 0)},
  squeeze_and_excitation: {'litert': (9, 0), 'onnxruntime': (9, 0), 'openvino': (8, 0)},
  convolution_last: {'litert': (6, 0), 'onnxruntime': (5, 1), 'openvino': (5, 1)},
}


def quantized(build, device, **kinds):
  keras.utils.set_random_seed(0)
  return models.quantized(models.randomized(build()), device=device, **kinds)


# 'litert' and 'all' differ in a Maximum only, which has a test of its own.
@pytest.mark.parametrize('device', [device for device in DEVICES if device != 'litert'])
@pytest.mark.parametrize('build', OPERATIONS, ids=lambda build: build.__name__)
def test_files_for_a_device_compute_what_keras_computes_in_every_runtime(build, device, tmp_path):
  """Within two steps of 255 over the outputs; on its own device, and for all, in integers.

  Three of them where a convolution writes the outputs: no average over places is behind it.
  """
  model = quantized(build, device)
  expected = np.asarray(model(X, training=False))
  step = np.ptp(expected) / 255.0
  farthest = 3.01 if build is convolution_last else 2.01
  for file in conversion.export(model, tmp_path, FORMAT_BY_DEVICE.values()):
    steps = np.abs(conversion.open_file(file.path)(X)[0] - expected) / step
    if not overflows(file.format):
      assert steps.max() < farthest and steps.mean() < farthest / 4, file.format
    for own, format_ in FORMAT_BY_DEVICE.items():
      if format_ == file.format and device in ('all', own):
        int8_ops, float_ops = conversion.count_ops(file.path)
        least, expected_float = OPERATIONS[build][own]
        # OpenVINO counts the rounding of the outputs, which is there in a file for all.
        assert int8_ops - (device == 'all') <= least <= int8_ops, file.format
        assert float_ops == expected_float, file.format


@pytest.mark.parametrize('device', ['all', 'openvino'])
def test_a_trained_range_that_is_shared_is_in_every_file(device, tmp_path):
  model = quantized(concatenation, device, activations=LearnedRange)
  expected = np.asarray(model(X, training=False))
  for file in conversion.export(model, tmp_path, FORMAT_BY_DEVICE.values()):
    steps = np.abs(conversion.open_file(file.path)(X)[0] - expected) / np.ptp(expected) * 255.0
    assert steps.max() < 2.01 or overflows(file.format), file.format


def test_litert_rescales_nothing_before_a_maximum_or_a_concatenation_of_one_range(tmp_path):
  """A file for all devices rescales what a Maximum reads, where no convolution can do it."""

  def maximum():
    inputs = keras.Input((12, 12, 3), name='image')
    sides = [layers.MaxPooling2D()(models.block(inputs, 8, size)) for size in (1, 3)]
    return keras.Model(inputs, _classifier(layers.Maximum()(sides)))

  def quantize_operations(build, device):
    model = quantized(build, device)
    (file,) = conversion.export(model, tmp_path, ['tflite_int8'], name=device)
    return models.tflite_operations(file.path).count('QUANTIZE')

  # One operation quantizes the image.
  assert quantize_operations(maximum, 'litert') == 1
  assert quantize_operations(maximum, 'all') > 1
  assert quantize_operations(concatenation, 'all') == 1
