"""Normalizations, activations with weights, and constants that are folded into the next bias."""

import channels
import keras
import numpy as np
import pytest
from keras import layers

from pocketsize.channel_graph import ChannelGraph
from pocketsize.shrink import shrink


def model_of(*between, size=1, padding='same', use_bias=True):
  inputs = keras.Input((6, 6, 3))
  x = layers.Conv2D(8, 3, padding='same', name='made')(inputs)
  for layer in between:
    x = layer(x)
  x = layers.Conv2D(4, size, padding=padding, use_bias=use_bias, name='reader')(x)
  return keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling2D()(x)))


@pytest.mark.parametrize('scale', [True, False])
@pytest.mark.parametrize('center', [True, False])
@pytest.mark.parametrize('keep_shift', [True, False])
@pytest.mark.parametrize('size', [1, 3])
def test_batch_normalization(scale, center, keep_shift, size):
  def built():
    return model_of(layers.BatchNormalization(scale=scale, center=center), layers.ReLU(), size=size)

  channels.assert_shrinks(built(), keep_shift)


@pytest.mark.parametrize(
  'layer', [layers.PReLU(shared_axes=(1, 2)), layers.PReLU(), layers.LeakyReLU(), layers.ELU()]
)
def test_activations(layer):
  channels.assert_shrinks(model_of(type(layer).from_config(layer.get_config())))


@pytest.mark.parametrize('groups', [2, 4, 8])
def test_group_normalization_loses_whole_groups(groups):
  model = model_of(layers.GroupNormalization(groups))
  assert channels.groups(model)['made'][0] == groups
  smaller = channels.assert_shrinks(model)
  assert smaller.layers[2].groups == groups // 2


def test_layer_normalization_over_channels_freezes_them():
  graph = ChannelGraph(model_of(layers.LayerNormalization(name='norm')))
  reason = "layer 'norm' (LayerNormalization) takes mean and variance over the channels"
  assert graph.frozen['made'] == reason
  assert [group.name for group in graph.groups] == ['reader']


@pytest.mark.parametrize('use_bias', [True, False])
@pytest.mark.parametrize('padding, size', [('valid', 3), ('same', 1)])
@pytest.mark.parametrize('activation', ['sigmoid', 'softplus', 'relu'])
def test_constants_go_into_the_next_bias(use_bias, padding, size, activation):
  model = model_of(
    layers.BatchNormalization(),
    layers.Activation(activation),
    size=size,
    padding=padding,
    use_bias=use_bias,
  )
  smaller = channels.assert_shrinks(model, keep_shift=True)
  # All that passes ReLU may be zero.
  assert smaller.get_layer('reader').use_bias or activation == 'relu'


def test_a_folded_constant_by_hand():
  """The dropped channel is relu(0 * x + 3) = 3 behind its batch norm, times 5: 15 to the bias."""
  inputs = keras.Input((1,))
  x = layers.Dense(2, name='made', use_bias=False)(inputs)
  x = layers.ReLU()(layers.BatchNormalization(epsilon=0.0)(x))
  model = keras.Model(inputs, layers.Dense(1, name='reader')(x))
  zeros, ones = np.zeros(2), np.ones(2)
  model.set_weights([np.float32(w) for w in ([[1, 7]], ones, [0, 3], zeros, ones, [[2], [5]], [1])])
  smaller = shrink(model, {'made': [True, False]}, keep_shift=True)
  np.testing.assert_allclose(smaller.get_layer('reader').bias, [16.0])
  np.testing.assert_allclose(smaller(np.float32([[4]])), [[24.0]])


def test_padding_puts_zeros_beside_constants():
  model = model_of(layers.BatchNormalization(), layers.ZeroPadding2D(), size=3, padding='valid')
  channels.assert_shrinks(model, keep_shift=True)
  graph = ChannelGraph(model_of(layers.Activation('sigmoid'), layers.ZeroPadding2D(name='pad')))
  assert "'pad' (ZeroPadding2D) puts zeros around" in graph.frozen['made']


def test_rescaling_and_input_normalization():
  inputs = keras.Input((6, 6, 3))
  x = layers.Rescaling(1 / 255)(inputs)
  x = layers.Normalization(mean=(0.4, 0.5, 0.6), variance=(1.0, 2.0, 3.0))(x)
  # Shifted inputs cannot be dropped, so they hinder no padded convolution.
  x = layers.Rescaling(2.0, offset=-1.0)(x)
  x = layers.Conv2D(8, 3, padding='same', activation='relu', name='made')(x)
  x = layers.Rescaling(2.0)(x)
  model = keras.Model(inputs, layers.Conv2D(2, 1)(x))
  assert channels.groups(model) == {'made': (8, ['made'])}
  channels.assert_shrinks(model)
