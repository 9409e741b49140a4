"""Channels in a plain chain: convolutions of every rank, transposed ones, dense layers, pooling."""

import channels
import keras
import numpy as np
import pytest
from keras import layers

from pocketsize.channel_graph import ChannelGraph
from pocketsize.errors import UserError
from pocketsize.shrink import mask, shrink


def chain(**arguments):
  x = inputs = keras.Input((8, 8, 3))
  for name in ('a', 'b'):
    x = layers.Conv2D(6, 3, padding='same', name=name, **arguments)(x)
    x = layers.ReLU()(layers.BatchNormalization()(x))
  x = layers.GlobalAveragePooling2D()(layers.MaxPooling2D()(x))
  return keras.Model(inputs, layers.Dense(4, name='head')(x))


def test_every_layer_but_the_last_has_a_group_of_its_own():
  graph = ChannelGraph(chain())
  assert channels.groups(chain()) == {'a': (6, ['a']), 'b': (6, ['b'])}
  assert graph.frozen == {'head': 'they are an output of the model'}


@pytest.mark.parametrize('use_bias', [True, False])
@pytest.mark.parametrize('keep_shift', [True, False])
def test_a_chain(use_bias, keep_shift):
  smaller = channels.assert_shrinks(chain(use_bias=use_bias), keep_shift)
  assert smaller.get_layer('a').filters == 3
  assert smaller.get_layer('b').kernel.shape == (3, 3, 3, 3)
  assert smaller.get_layer('head').kernel.shape == (3, 4)


@pytest.mark.parametrize('rank', [1, 2, 3])
def test_all_ranks(rank):
  spatial = (6,) * rank
  inputs = keras.Input((*spatial, 2))
  conv, transposed, pool, up, pad, crop, end = (
    getattr(layers, f'{name}{rank}D')
    for name in (
      'Conv',
      'Conv',
      'AveragePooling',
      'UpSampling',
      'ZeroPadding',
      'Cropping',
      'GlobalMaxPooling',
    )
  )
  transposed = getattr(layers, f'Conv{rank}DTranspose')
  x = conv(4, 3, padding='same', activation='relu')(inputs)
  x = up(2)(pool(2)(x))
  x = transposed(6, 3, strides=2, padding='same')(crop(1)(pad(1)(x)))
  channels.assert_shrinks(keras.Model(inputs, layers.Dense(3)(end()(x))))


def test_sequential_models():
  model = keras.Sequential(
    [keras.Input((5,)), layers.Dense(8, activation='relu'), layers.Dropout(0.5), layers.Dense(3)]
  )
  channels.assert_shrinks(model)


def test_the_mask_by_hand():
  """Two channels, the second dropped: y = 2 * relu(x + 1) of 2 relu(x + 1) + 3 relu(4 x + 5)."""
  inputs = keras.Input((1,))
  model = keras.Model(
    inputs,
    layers.Dense(1, use_bias=False)(layers.Dense(2, activation='relu', name='hidden')(inputs)),
  )
  model.set_weights([np.float32(w) for w in ([[1, 4]], [1, 5], [[2], [3]])])
  keep = {'hidden': [True, False]}
  for made in (mask(model, keep), shrink(model, keep)):
    np.testing.assert_array_equal(made(np.float32([[1], [-3]])), [[4], [0]])
  assert [w.shape for w in shrink(model, keep).weights] == [(1, 1), (1,), (1, 1)]


def test_the_model_is_left_as_it_was():
  model = channels.randomized(chain())
  before = model.get_weights()
  channels.assert_shrinks(model)
  for one, other in zip(before, channels.randomized(model).get_weights(), strict=True):
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
  ('keep', 'message'),
  [
    ({'c': [True]}, "must name groups out of a, b. Received: 'c'"),
    ({'a': [True] * 5}, r"6 values for group 'a'. Received: shape \(5,\)"),
    ({'a': [False] * 6}, "leave layer 'a' at least one channel"),
  ],
)
def test_a_keep_that_makes_no_sense(keep, message):
  with pytest.raises(UserError, match=message):
    shrink(chain(), keep)
