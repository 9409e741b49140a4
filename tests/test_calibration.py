"""Batch norm's statistics from data."""

import keras
import numpy as np
import pytest
from keras import layers
from toys import conv_net, images

import pocketsize
from pocketsize import configure
from pocketsize.calibration import re_estimate_batch_norm
from pocketsize.compressor import Stack
from pocketsize.errors import UserError
from pocketsize.freezing import FreezeBatchNorm


def one_norm(size, **options):
  inputs = keras.Input(size)
  layer = layers.BatchNormalization(name='bn', **options)
  return pocketsize.instrument(keras.Model(inputs, layer(inputs))), layer


def batch(size, *values):
  return np.reshape(np.float32(values), (len(values), *size))


@pytest.mark.parametrize('size', [(1, 1, 1), (1,)], ids=['fused', 'stock'])
def test_the_mean_of_the_batches_by_hand(size):
  """Means 2 and 6, variances 1 and 4; of all four values together the variance would be 6.5."""
  model, layer = one_norm(size, momentum=0.7)
  re_estimate_batch_norm(model, [batch(size, 1, 3), batch(size, 4, 8)])
  np.testing.assert_allclose(layer.moving_mean, [4.0], rtol=1e-6)
  np.testing.assert_allclose(layer.moving_variance, [2.5], rtol=1e-6)
  assert layer.momentum == 0.7


def test_each_batch_norm_sees_what_it_would_in_training():
  """Against a model whose layers are called one by one, in NumPy."""
  model = conv_net()
  batches = [3.0 * images(seed=1) + 1.0, images(16, seed=2)]
  expected = {'bn0': [], 'bn1': []}
  for x in batches:
    for index in range(2):
      x = np.array(model.get_layer(f'conv{index}')(x), np.float64)
      mean, variance = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
      expected[f'bn{index}'].append((mean, variance))
      x = np.maximum((x - mean) / np.sqrt(variance + 1e-3), 0.0).astype(np.float32)
  re_estimate_batch_norm(pocketsize.instrument(model), batches)
  for name, found in expected.items():
    layer = model.get_layer(name)
    got = [layer.moving_mean, layer.moving_variance]
    np.testing.assert_allclose(got, np.mean(found, axis=0), rtol=1e-4, atol=1e-5)


def test_nothing_else_changes_and_ranges_are_used_as_they_are():
  """Statistics are those of quantized activations: 2 bits are not float."""
  entry = {'algorithm': 'uniform', 'weight_bits': 3, 'activation_bits': 2, 'end_bits': 0}
  found = []
  for bits in (2, 32):
    model, _ = pocketsize.compress(
      conv_net(), [{**entry, 'activation_bits': bits}], calibration=[images()]
    )
    before = {weight.path: np.array(weight) for weight in model.weights}
    re_estimate_batch_norm(model, [10.0 * images(seed=3)])
    changed = {
      weight.path for weight in model.weights if (np.array(weight) != before[weight.path]).any()
    }
    assert changed == {
      f'bn{index}/{name}' for index in range(2) for name in ('moving_mean', 'moving_variance')
    }
    found.append(np.array(model.graph.layers['bn1'].moving_variance))
  assert np.abs(found[0] / found[1] - 1.0).max() > 0.1


def test_dropout_is_off():
  inputs = keras.Input((1,))
  x = layers.Dropout(0.5)(inputs)
  model = keras.Model(inputs, layers.BatchNormalization(name='bn')(x))
  re_estimate_batch_norm(pocketsize.instrument(model), [batch((1,), 1, 3)])
  np.testing.assert_allclose(model.get_layer('bn').moving_mean, [2.0], rtol=1e-6)


def test_a_layer_that_is_called_twice_has_the_mean_of_its_calls():
  """Two inputs: means 2 and 5, variances 1 and 9."""
  inputs = [keras.Input((1,)) for _ in range(2)]
  layer = layers.BatchNormalization(name='bn')
  model = keras.Model(inputs, layers.Add()([layer(x) for x in inputs]))
  re_estimate_batch_norm(pocketsize.instrument(model), [[batch((1,), 1, 3), batch((1,), 2, 8)]])
  np.testing.assert_allclose(layer.moving_mean, [3.5], rtol=1e-6)
  np.testing.assert_allclose(layer.moving_variance, [5.0], rtol=1e-6)


def frozen_layer():
  model, layer = one_norm((1,))
  layer.trainable = False
  return model, layer


def inference_only():
  inputs = keras.Input((1,))
  layer = layers.BatchNormalization(name='bn')
  return pocketsize.instrument(keras.Model(inputs, layer(inputs, training=False))), layer


def frozen_by_step():
  stack = Stack([FreezeBatchNorm(3)])
  model, layer = one_norm((1,))
  model = configure.attach(model.source, stack)
  stack.update(3)
  return model, layer


@pytest.mark.parametrize('make', [frozen_layer, inference_only, frozen_by_step])
def test_what_training_leaves_alone_is_left_alone(make):
  model, layer = make()
  re_estimate_batch_norm(model, [batch((1,), 1, 3)])
  np.testing.assert_array_equal([layer.moving_mean[0], layer.moving_variance[0]], [0.0, 1.0])


def test_workers_add_their_sums():
  """A worker with means 2 and 6, variances 1 and 4, and another with one batch: 10 and 0."""
  parts = ([batch((1,), 1, 3), batch((1,), 4, 8)], [batch((1,), 10, 10)])
  seen = []
  for part in parts:
    model, _ = one_norm((1,))
    re_estimate_batch_norm(model, part, total=lambda array: seen.append(array) or array)
  np.testing.assert_allclose(seen, [[8.0, 5.0, 2.0], [10.0, 0.0, 1.0]])
  model, layer = one_norm((1,))
  re_estimate_batch_norm(model, parts[0], total=lambda array: array + seen[1])
  np.testing.assert_allclose([layer.moving_mean[0], layer.moving_variance[0]], [6.0, 5.0 / 3.0])


def test_no_batch_is_refused():
  with pytest.raises(UserError, match=r'at least one batch\. Received none'):
    re_estimate_batch_norm(pocketsize.instrument(conv_net()), [])
