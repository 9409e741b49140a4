"""Depthwise, separable and grouped convolutions."""

import channels
import keras
import pytest
from keras import layers


def model_of(body, filters=8):
  inputs = keras.Input((8, 8, 3))
  x = layers.Conv2D(filters, 3, padding='same', activation='relu', name='stem')(inputs)
  return keras.Model(inputs, layers.Conv2D(2, 1, name='head')(body(x)))


@pytest.mark.parametrize('multiplier', [1, 2])
@pytest.mark.parametrize('use_bias', [True, False])
def test_a_depthwise_convolution_hands_on_its_input_channels(multiplier, use_bias):
  def body(x):
    x = layers.DepthwiseConv2D(3, depth_multiplier=multiplier, use_bias=use_bias, padding='same')(x)
    return layers.ReLU(6.0)(layers.BatchNormalization()(x))

  assert channels.groups(model_of(body)) == {'stem': (8, ['stem'])}
  smaller = channels.assert_shrinks(model_of(body))
  assert smaller.get_layer('head').kernel.shape == (1, 1, 4 * multiplier, 2)


@pytest.mark.parametrize('multiplier', [1, 2])
def test_a_separable_convolution(multiplier):
  def body(x):
    return layers.SeparableConv2D(6, 3, depth_multiplier=multiplier, padding='same', name='sep')(x)

  assert channels.groups(model_of(body)) == {'stem': (8, ['stem']), 'sep': (6, ['sep'])}
  channels.assert_shrinks(model_of(body))


def test_a_grouped_convolution_loses_the_same_channels_of_each_of_its_groups():
  def body(x):
    return layers.Conv2D(12, 3, groups=2, padding='same', name='grouped')(x)

  assert channels.groups(model_of(body)) == {'stem': (4, ['stem']), 'grouped': (6, ['grouped'])}
  smaller = channels.assert_shrinks(model_of(body))
  assert smaller.get_layer('grouped').kernel.shape == (3, 3, 2, 6)


def test_one_dimension():
  inputs = keras.Input((9, 3))
  x = layers.Conv1D(4, 3, name='stem')(inputs)
  x = layers.SeparableConv1D(6, 3)(layers.DepthwiseConv1D(3)(x))
  channels.assert_shrinks(keras.Model(inputs, layers.Dense(2)(x)))
