"""Int8 files of models in which converters fold kernels into other operations."""

import conversion_models as models
import keras
import numpy as np
import pytest
from keras import layers

import pocketsize
from pocketsize import conversion
from pocketsize.conversion import formats
from pocketsize.conversion.errors import Folded
from pocketsize.errors import UserError

WEIGHTS = {'algorithm': 'uniform', 'weight_bits': 8, 'activation_bits': 32}
BOTH = {'algorithm': 'uniform', 'weight_bits': 8, 'activation_bits': 8, 'target_device': 'openvino'}


def _dense(units, name='dense'):
  return layers.Dense(units, name=name, bias_initializer='random_normal')


def _conv(**kwargs):
  return layers.Conv2D(4, 3, name='conv', **kwargs)


def _batch_norm():
  return layers.BatchNormalization(
    beta_initializer='random_normal',
    moving_mean_initializer='random_normal',
    moving_variance_initializer=keras.initializers.RandomUniform(0.5, 2.0),
  )


NETS = {
  'scaled image': lambda: [layers.Rescaling(1 / 4), _conv(), layers.ReLU(), layers.Flatten()],
  'scaled output': lambda: [_conv(), layers.Rescaling(0.5)],
  'between': lambda: [_conv(), layers.Rescaling(0.5), layers.Conv2D(4, 3)],
  'normed': lambda: [layers.Flatten(), _batch_norm(), _dense(3)],
  'one output': lambda: [layers.Flatten(), _dense(1), layers.Rescaling(90.0)],
  'shifted image': lambda: [layers.Rescaling(1.0, 3.0), _conv()],
  'linear': lambda: [layers.Flatten(), _dense(8), _dense(3, 'second')],
  'shifted between': lambda: [_conv(), layers.Rescaling(1.0, 3.0), layers.Conv2D(4, 3)],
  'shifted dense': lambda: [
    layers.Flatten(),
    _dense(8),
    layers.Rescaling(1.0, 3.0),
    _dense(3, 'b'),
  ],
}


def _compressed(name, config):
  keras.utils.set_random_seed(0)
  x = np.random.default_rng(0).normal(size=(16, 6, 6, 3)).astype(np.float32)
  model = keras.Sequential([keras.Input((6, 6, 3)), *NETS[name]()])
  return pocketsize.compress(model, [config], calibration=[x])[0], x


@pytest.mark.parametrize('name', NETS)
def test_weights_alone_are_not_folded_into_constants(name, tmp_path):
  model, x = _compressed(name, WEIGHTS)
  expected = np.asarray(model(x))
  for file in conversion.export(model, tmp_path, ['tflite_int8', 'onnx_qdq']):
    (outputs,) = conversion.open_file(file.path)(x)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
    assert 'integer weights' in file.note


@pytest.mark.parametrize('name', ['scaled output', 'between', 'shifted between', 'shifted dense'])
def test_what_is_between_a_layer_and_its_rounding_is_not_folded_into_the_kernel(name, tmp_path):
  model, x = _compressed(name, BOTH)
  expected = np.asarray(model(x))
  for file in conversion.export(model, tmp_path, ['tflite_int8', 'onnx_qdq']):
    (outputs,) = conversion.open_file(file.path)(x)
    np.testing.assert_allclose(outputs, expected, atol=1e-4 * np.abs(expected).max())


def test_a_model_without_such_places_gets_no_operations_for_them(tmp_path):
  keras.utils.set_random_seed(0)
  model = models.quantized(models.randomized(models.BUILDERS['plain']()), activation_bits=None)
  (file,) = conversion.export(model, tmp_path, ['tflite_int8'])
  assert 'MINIMUM' not in models.tflite_operations(file.path)


def test_a_layer_that_nothing_separates_is_named(tmp_path, monkeypatch):
  def refuse(lowered, path, int4):
    raise Folded(['conv'])

  kind = formats._FORMATS['tflite_int8']._replace(writer=refuse)
  monkeypatch.setitem(formats._FORMATS, 'tflite_int8', kind)
  with pytest.raises(UserError, match='folds kernels into other operations.*Received: conv'):
    conversion.export(_compressed('scaled output', WEIGHTS)[0], tmp_path, ['tflite_int8'])
  assert not list(tmp_path.iterdir())
