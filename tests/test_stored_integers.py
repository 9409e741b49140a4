"""The integers in a file are those of training, for every kind of quantizer."""

import keras
import numpy as np
import pytest
import stored_integers
from conversion_models import randomized
from keras import layers
from onnx import load as load_onnx
from onnx import version_converter
from toys import images
from trained_integers import (
  INT8,
  assert_activations_are_those_of,
  assert_in,
  assert_nearest_in,
  export,
  factors,
  trained_integers,
)

import pocketsize
from pocketsize import conversion
from pocketsize.conversion import onnx, openvino, tflite
from pocketsize.conversion.lowering import Lowered

CHANNELS_OF_TENSOR = 5


def net():
  """Convolutions with batch norm, a sum of two branches and a dense layer; 4 outputs."""
  keras.utils.set_random_seed(0)

  def convolve(x, channels, size, name):
    x = layers.Conv2D(channels, size, padding='same', use_bias=False, name=name)(x)
    return layers.BatchNormalization(name=f'{name}_bn')(x)

  inputs = keras.Input((8, 8, 3), name='images')
  x = layers.ReLU(name='relu0')(convolve(inputs, 6, 3, 'channel'))
  y = layers.ReLU(name='relu1')(convolve(x, CHANNELS_OF_TENSOR, 3, 'tensor'))
  x = layers.ReLU(name='relu2')(layers.Add(name='add')([convolve(y, 6, 1, 'bucket'), x]))
  x = layers.GlobalAveragePooling2D(name='pool')(x)
  return randomized(keras.Model(inputs, layers.Dense(4, name='dense')(x), name='net'))


def quantized(**config):
  """Returns the net with three granularities, as after some training: off where ranges began."""
  common = {'end_bits': 0, **config}
  model, _ = pocketsize.compress(
    net(),
    [
      {**common, 'granularity': 'channel'},
      {**common, 'granularity': 'tensor', 'op_names': ['tensor']},
      {**common, 'granularity': 'bucket', 'bucket_size': 7, 'op_names': ['bucket']},
    ],
    calibration=[images(16)],
  )
  rng = np.random.default_rng(1)
  batch_norms = {
    variable.path
    for layer in model.source.layers
    if isinstance(layer, layers.BatchNormalization)
    for variable in layer.variables
  }
  for variable in model.trainable_variables:
    if variable.path not in batch_norms:
      variable.assign(variable * rng.uniform(0.9, 1.1, variable.shape))
  return model


CASES = [
  ('fitted', 'running', 8),
  ('fitted', 'learned', 4),
  ('fitted', 'running', 1),
  ('learned', 'learned', 8),
  ('learned', 'learned_symmetric', 3),
  ('learned_log2', 'pact', 4),
  ('learned_log2', 'learned_log2', 4),
  ('dorefa', 'dorefa', 3),
  ('dorefa', 'running', 8),
  ('asymmetric', 'running', 3),
  ('asymmetric', 'learned', 8),
]


@pytest.mark.parametrize(('weights', 'activations', 'bits'), CASES)
def test_codes_scales_and_zero_points_are_those_of_training(weights, activations, bits, tmp_path):
  model = quantized(
    algorithm='uniform', weight_range=weights, activation_range=activations, weight_bits=bits
  )
  has_grid = weights not in ('dorefa', 'asymmetric') or bits < 8
  for format_, (file, stored) in export(model, tmp_path, tflite_int4=True).items():
    for path in ('channel', 'tensor', 'dense') if has_grid else ():
      codes, scale = trained_integers(model, path)
      held = assert_in(stored, codes, scale, path)
      assert held == (4 if np.abs(codes + 0.5).max() < 8 else 8), (format_, path)
    for path in ('bucket',) if has_grid else ('channel', 'tensor', 'bucket', 'dense'):
      assert_nearest_in(stored, model.baked(path, 'kernel'), factors(model, path), path)
    assert f'{bits}-bit weights' in file.note and 'as int8 by output channel' in file.note
    assert_activations_are_those_of(model, stored, format_)
    stores = 'int4' if {held for *_, held in stored.kernels} == {4, 8} else 'int8'
    if has_grid and bits < 8:
      assert f'{bits}-bit weights as {stores} codes of the same scale' in file.note


@pytest.mark.parametrize(
  ('mode', 'bits'), [('weights', 3), ('clusters', 2), ('both', 3), ('both', 8)]
)
def test_codes_of_trained_centres_are_those_of_training(mode, bits, tmp_path):
  model = quantized(algorithm='non-uniform', weight_bits=bits, mode=mode)
  for format_, (file, stored) in export(model, tmp_path, tflite_int4=True).items():
    for path in ('channel', 'tensor', 'dense'):
      codes, scale = trained_integers(model, path)
      assert all(len(np.unique(row)) <= 2**bits for row in np.moveaxis(codes, -1, 0))
      assert assert_in(stored, codes, scale, path) == 8
    assert_nearest_in(stored, model.baked('bucket', 'kernel'), factors(model, 'bucket'), 'bucket')
    assert f'{bits}-bit weights of float centres, which no format has, as int8' in file.note
    assert (f'{bits}-bit weights as int8 codes of the same scale' in file.note) == (bits < 8)
    assert_activations_are_those_of(model, stored, format_)


def test_float_centres_are_rounded_to_int8_and_the_note_says_so(tmp_path):
  model = quantized(algorithm='non-uniform', weight_bits=3, mode='both', centre_bits=32)
  for file, stored in export(model, tmp_path).values():
    for path in ('channel', 'tensor', 'bucket', 'dense'):
      assert_nearest_in(stored, model.baked(path, 'kernel'), factors(model, path), path)
    assert '3-bit weights of float centres, which no format has, as int8' in file.note
    assert 'of the same scale' not in file.note


def test_binary_weights_are_plus_and_minus_one(tmp_path):
  model, stack = pocketsize.compress(
    net(), [{'algorithm': 'binary', 'keep_ends': False}], calibration=[images(16)]
  )
  for file, stored in export(model, tmp_path).values():
    for path in ('channel', 'tensor', 'bucket', 'dense'):
      if model.transforms_at(path, 'kernel'):
        codes, scale = trained_integers(model, path)
        assert set(np.unique(codes)) <= {-1, 0, 1}
        assert_in(stored, codes, scale, path)
    assert '1-bit activations as float32 operations' in file.note


@pytest.mark.parametrize('activation_bits', [8, 32])
@pytest.mark.parametrize('format_', INT8)
def test_files_of_four_bits_compute_what_those_of_int8_do(format_, activation_bits, tmp_path):
  """LiteRT computes them by other kernels, which round halves otherwise: a step of 256 or two."""
  model = quantized(algorithm='uniform', weight_bits=4, activation_bits=activation_bits)
  x = images(16, seed=3)
  step = np.ptp(model(x)) / 128
  writer = {'tflite_int8': tflite, 'onnx_qdq': onnx, 'openvino_int8': openvino}[format_]
  suffix = {'tflite_int8': 'tflite', 'onnx_qdq': 'onnx', 'openvino_int8': 'xml'}[format_]
  narrow, wide = (tmp_path / f'{name}.{suffix}' for name in ('narrow', 'wide'))
  assert len(writer.convert(Lowered(model, True), narrow, int4=True)) == 3
  assert writer.convert(Lowered(model, True), wide, int4=False) == []
  for path, widths in ((narrow, {4, 8}), (wide, {8})):
    assert {held for *_, held in stored_integers.read(path).kernels} == widths
  got, expected = (conversion.open_file(path)(x)[0] for path in (narrow, wide))
  far = {8: 2.01 * step, 32: 1e-5}[activation_bits] if format_ == 'tflite_int8' else 0.0
  np.testing.assert_allclose(got, expected, rtol=0, atol=far)
  assert conversion.count_ops(narrow) == conversion.count_ops(wide)


def test_four_bits_of_tflite_are_on_request(tmp_path):
  model, sizes = quantized(algorithm='uniform', weight_bits=4), []
  for int4, stored in ((False, 'int8'), (True, 'int4')):
    (file,) = conversion.export(model, tmp_path, ['tflite_int8'], tflite_int4=int4)
    assert f'4-bit weights as {stored} codes of the same scale' in file.note
    sizes.append(conversion.size(file.path))
  assert sizes[1] < sizes[0]


def test_what_runtimes_cannot_read_as_int4_stays_int8(tmp_path):
  """LiteRT has no transposed convolution of int4; a depthwise one it has."""
  inputs = keras.Input((8, 8, 3), name='images')
  x = layers.Conv2DTranspose(4, 3, 2, name='transposed')(inputs)
  x = layers.DepthwiseConv2D(3, name='depthwise')(x)
  source = keras.Model(inputs, layers.Conv2D(5, 3, name='conv')(x))
  model, _ = pocketsize.compress(
    source,
    [{'algorithm': 'uniform', 'weight_bits': 4, 'end_bits': 0}],
    calibration=[images(8)],
  )
  for format_, (file, stored) in export(model, tmp_path, tflite_int4=True).items():
    bits = sorted(held for *_, held in stored.kernels)
    assert bits == ([4, 4, 8] if format_ == 'tflite_int8' else [4, 4, 4])
    assert ('as int8 codes' in file.note) == (format_ == 'tflite_int8')
    assert 'as int4 codes' in file.note
    x = images(4, seed=3)
    step = np.ptp(model(x)) / 128
    np.testing.assert_allclose(conversion.open_file(file.path)(x)[0], model(x), atol=3 * step)


def test_an_onnx_model_that_cannot_have_a_newer_opset_keeps_int8(tmp_path, monkeypatch):

  def refuse(*_):
    raise version_converter.ConvertError('no adapter')

  monkeypatch.setattr(version_converter, 'convert_version', refuse)
  model = quantized(algorithm='uniform', weight_bits=4)
  (file,) = conversion.export(model, tmp_path, ['onnx_qdq'])
  assert '4-bit weights as int8 codes of the same scale' in file.note
  assert {held for *_, held in stored_integers.read(file.path).kernels} == {8}
  assert load_onnx(file.path).opset_import[0].version == 17
