"""Concatenation, squeeze-and-excitation, broadcasting."""

import functools

import channels
import keras
import pytest
from keras import layers

from pocketsize.channel_graph import ChannelGraph


def conv(x, filters, name, size=3):
  return layers.Conv2D(filters, size, padding='same', activation='relu', name=name)(x)


def model_of(body):
  inputs = keras.Input((6, 6, 3))
  return keras.Model(inputs, layers.Conv2D(2, 1, name='head')(body(inputs)))


@pytest.mark.parametrize('join', [layers.Concatenate(), layers.Concatenate(axis=3), 'ops'])
def test_concatenation_keeps_branches_apart(join):
  if join == 'ops':
    join = functools.partial(keras.ops.concatenate, axis=-1)
  else:
    join = type(join).from_config(join.get_config())
  model = model_of(lambda x: join([conv(x, 4, 'a'), conv(x, 6, 'b')]))
  assert channels.groups(model) == {'a': (4, ['a']), 'b': (6, ['b'])}
  channels.assert_shrinks(model)


def test_concatenation_along_space_ties_channels():
  model = model_of(lambda x: layers.Concatenate(axis=1)([conv(x, 4, 'a'), conv(x, 4, 'b')]))
  assert channels.groups(model) == {'a': (4, ['a', 'b'])}
  channels.assert_shrinks(model)


@pytest.mark.parametrize('dense', [True, False])
@pytest.mark.parametrize('multiply', [lambda x, y: layers.Multiply()([x, y]), lambda x, y: x * y])
def test_squeeze_and_excitation(dense, multiply):
  def body(x):
    x = conv(x, 8, 'wide')
    if dense:
      y = layers.Reshape((1, 1, 8))(layers.GlobalAveragePooling2D()(x))
      y = layers.Dense(4, activation='relu', name='squeeze')(y)
      return multiply(x, layers.Dense(8, activation='sigmoid', name='excite')(y))
    y = layers.GlobalAveragePooling2D(keepdims=True)(x)
    return multiply(x, layers.Activation('hard_sigmoid')(conv(y, 8, 'excite', 1)))

  found = channels.groups(model_of(body))
  assert found['wide'] == (8, ['excite', 'wide'])
  channels.assert_shrinks(model_of(body))


def test_one_map_for_all_channels_multiplies_exactly():
  def body(x):
    x = conv(x, 8, 'wide')
    return x * layers.Conv2D(1, 1, activation='sigmoid', name='map')(x)

  graph = ChannelGraph(model_of(body))
  assert [group.name for group in graph.groups] == ['wide']
  assert "layer 'multiply' joins it to many channels" in graph.frozen['map'] or graph.frozen['map']
  channels.assert_shrinks(model_of(body))


def test_one_map_added_to_all_channels_freezes_them():
  def body(x):
    x = conv(x, 8, 'wide')
    return conv(x + layers.Conv2D(1, 1, name='map')(x), 4, 'after')

  graph = ChannelGraph(model_of(body))
  assert [group.name for group in graph.groups] == ['after']
  assert 'adds the same to all channels' in graph.frozen['wide']


def test_a_number_added_makes_a_constant_that_is_folded_where_that_is_exact():
  def foldable(x):
    return layers.Conv2D(4, 1, name='point')(conv(x, 8, 'wide') + 1.5)

  channels.assert_shrinks(model_of(foldable))
  graph = ChannelGraph(model_of(lambda x: conv(conv(x, 8, 'wide') + 1.5, 4, 'after')))
  assert 'a dropped channel is a constant there' in graph.frozen['wide']
