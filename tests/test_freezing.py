"""Batch norm that is frozen from a step on."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from toys import assert_resumes, compile_for_logits, conv_net, fit, images

import pocketsize
from pocketsize import configure
from pocketsize.compressor import Stack
from pocketsize.configure import stack_from
from pocketsize.errors import UserError
from pocketsize.freezing import FreezeBatchNorm
from pocketsize.fused_bn import StatisticsSwitch


def both_nets():
  """Batch norms of both kinds: after a convolution, by the fused kernel; after a dense layer."""
  keras.utils.set_random_seed(7)
  x = inputs = keras.Input((8, 8, 3), name='images')
  x = layers.Conv2D(4, 3, strides=2, name='conv')(x)
  x = layers.ReLU(name='relu')(layers.BatchNormalization(momentum=0.9, name='fused')(x))
  x = layers.Dense(6, name='dense')(layers.Flatten(name='flatten')(x))
  x = layers.BatchNormalization(momentum=0.9, name='stock')(x)
  return keras.Model(inputs, layers.Dense(4, name='head')(x), name='both')


NORMS = ('fused', 'stock')


def frozen_from(step, *others):
  stack = Stack([*others, FreezeBatchNorm(step)])
  model = compile_for_logits(configure.attach(both_nets(), stack))
  return model, stack


def statistics(model):
  found = {}
  for name in NORMS:
    layer = model.graph.layers[name]
    found[name] = [np.array(layer.moving_mean), np.array(layer.moving_variance)]
  return found


@pytest.mark.parametrize('size', [(1, 1, 1), (1,)], ids=['fused', 'stock'])
def test_by_hand_in_one_compiled_step(size):
  """Inputs 1 and 3: mean 2, variance 1. Moving: mean 0 -> 1, variance 1 -> 1 by momentum 0.5.

  Moving, the output is -1 and 1 (times gamma 2, plus beta 1); frozen it is x - 1 so scaled.
  """
  inputs = keras.Input(size)
  layer = layers.BatchNormalization(momentum=0.5, epsilon=1e-9, name='bn')
  model = keras.Model(inputs, layer(inputs))
  layer.gamma.assign([2.0])
  layer.beta.assign([1.0])
  stack = Stack([FreezeBatchNorm(1)])
  model = configure.attach(model, stack)
  x, traces = np.reshape(np.float32([1.0, 3.0]), (2, *size)), []

  @tf.function
  def step(x):
    traces.append(x)
    with tf.GradientTape() as tape:
      y = model(x, training=True)
      loss = tf.reduce_sum(y * y)
    return y, tape.gradient(loss, [layer.gamma.value, layer.beta.value])

  stack.update(0)
  y, (gamma, beta) = step(x)
  np.testing.assert_allclose(np.ravel(y), [-1.0, 3.0], atol=1e-5)
  # dL/dgamma = sum 2 y (y - beta) / gamma, dL/dbeta = sum 2 y.
  np.testing.assert_allclose([gamma[0], beta[0]], [2.0 + 6.0, 4.0], atol=1e-4)
  np.testing.assert_allclose([layer.moving_mean[0], layer.moving_variance[0]], [1.0, 1.0])
  stack.update(1)
  y, (gamma, beta) = step(x)
  np.testing.assert_allclose(np.ravel(y), [1.0, 5.0], atol=1e-5)
  np.testing.assert_allclose([gamma[0], beta[0]], [20.0, 12.0], atol=1e-4)
  np.testing.assert_allclose([layer.moving_mean[0], layer.moving_variance[0]], [1.0, 1.0])
  assert len(traces) == 1 and stack.statistics() == {'frozen_batch_norms': 1.0}


def test_statistics_stand_still_from_the_step_on_and_the_rest_trains():
  model, stack = frozen_from(5)
  fit(model, stack, 0, 4)
  early = statistics(model)
  fit(model, stack, 4, 5)
  before, gamma = statistics(model), np.array(model.graph.layers['stock'].gamma)
  fit(model, stack, 5, 12)
  after = statistics(model)
  for name in NORMS:
    assert np.abs(before[name][0] - early[name][0]).max() > 0.0
    np.testing.assert_array_equal(after[name], before[name])
  assert np.abs(np.array(model.graph.layers['stock'].gamma) - gamma).max() > 1e-4


def test_it_trains_as_a_model_whose_statistics_are_used_from_the_start():
  """Frozen from step 0: a model whose author wrote training=False at each batch norm."""
  keras.utils.set_random_seed(7)
  model, stack = frozen_from(0)
  fit(model, stack, 0, 4)
  plain = both_nets()
  x = inputs = plain.input
  for layer in plain.layers[1:]:
    x = layer(x, training=False) if isinstance(layer, layers.BatchNormalization) else layer(x)
  plain = compile_for_logits(pocketsize.instrument(keras.Model(inputs, x)))
  fit(plain, Stack(), 0, 4)
  for one, other in zip(model.source.weights, plain.source.weights, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def quantized_and_frozen():
  entry = {'algorithm': 'uniform', 'weight_bits': 4, 'granularity': 'tensor', 'scale_every': 7}
  return frozen_from(17, stack_from([{**entry, 'fold_batch_norm': True}]))


def test_twenty_and_twenty_steps_are_forty_across_the_freeze(deterministic):
  """Frozen before the break; and resumed at 10, which is before the freeze."""
  assert_resumes(quantized_and_frozen, 40, [10, 20])


def test_saved_and_stripped_it_computes_the_same(tmp_path):
  model, stack = frozen_from(2)
  fit(model, stack, 0, 4)
  expected = np.array(model(images()))
  np.testing.assert_allclose(pocketsize.strip(model)(images()), expected, rtol=1e-5, atol=1e-5)
  model.save(tmp_path / 'model.keras')
  loaded = keras.models.load_model(tmp_path / 'model.keras')
  np.testing.assert_array_equal(loaded(images()), expected)
  assert [each.is_frozen for each in loaded.transforms] == [True, True]
  before = statistics(loaded)
  loaded.run(images(), training=True)
  for name in NORMS:
    np.testing.assert_array_equal(statistics(loaded)[name], before[name])


def test_a_batch_norm_that_does_not_train_has_no_switch():
  model = conv_net()
  model.get_layer('bn0').trainable = False
  placements = FreezeBatchNorm(3).plan(pocketsize.Graph(model))
  assert [place.path for place in placements] == ['bn1']
  assert isinstance(placements[0].transform, StatisticsSwitch)


def test_a_negative_step_is_refused():
  with pytest.raises(UserError, match=r'`begin_step` must be at least 0\. Received: -1'):
    FreezeBatchNorm(-1)
