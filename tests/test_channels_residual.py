"""Residual trunks: what is added goes together, also through option A's padded shortcut."""

import channels
import keras
import numpy as np
import pytest
from keras import layers

from pocketsize.channel_graph import ChannelGraph

SUMS = {
  'layer': lambda x, y: layers.Add()([x, y]),
  'operator': lambda x, y: x + y,
  'ops': keras.ops.add,
  'average': lambda x, y: layers.Average()([x, y]),
  'maximum': lambda x, y: layers.Maximum()([x, y]),
  'subtract': lambda x, y: x - y,
  'product': lambda x, y: layers.Multiply()([x, y]),
}


def normalized(x, filters, name, strides=1):
  x = layers.Conv2D(filters, 3, strides, padding='same', use_bias=False, name=name)(x)
  return layers.BatchNormalization()(x)


@pytest.mark.parametrize('name', SUMS)
@pytest.mark.parametrize('keep_shift', [True, False])
def test_an_identity_block(name, keep_shift):
  inputs = keras.Input((6, 6, 3))
  x = layers.ReLU()(normalized(inputs, 8, 'stem'))
  y = layers.ReLU()(normalized(x, 4, 'inner'))
  x = layers.ReLU()(SUMS[name](x, normalized(y, 8, 'outer')))
  model = keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(x)))
  assert channels.groups(model) == {'stem': (8, ['outer', 'stem']), 'inner': (4, ['inner'])}
  channels.assert_shrinks(model, keep_shift)


def _permuted(x, new):
  x = layers.ZeroPadding2D(((0, 0), (new, new)))(layers.Permute((1, 3, 2))(x))
  return layers.Permute((1, 3, 2))(x)


PADDINGS = {
  'ops': lambda x, new: keras.ops.pad(x, ((0, 0), (0, 0), (0, 0), (new, new))),
  'permuted': _permuted,
}


@pytest.mark.parametrize('name', PADDINGS)
def test_option_a_joins_the_middle_of_the_wide_trunk_with_the_narrow_one(name):
  inputs = keras.Input((6, 6, 3))
  x = layers.ReLU()(normalized(inputs, 4, 'narrow'))
  past = PADDINGS[name](layers.MaxPooling2D(1, 2)(x), 2)
  x = layers.ReLU()(layers.Add()([normalized(x, 8, 'wide', 2), past]))
  model = keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(x)))
  assert channels.groups(model) == {'narrow': (4, ['narrow', 'wide']), 'wide': (4, ['wide'])}
  channels.assert_shrinks(model)


def test_cropping_the_channels_of_a_permuted_tensor():
  inputs = keras.Input((6, 6, 3))
  x = layers.Permute((1, 3, 2))(normalized(inputs, 8, 'wide'))
  x = layers.Permute((1, 3, 2))(layers.Cropping2D(((0, 0), (3, 1)))(x))
  channels.assert_shrinks(keras.Model(inputs, layers.Conv2D(2, 1)(x)))


def test_a_slice_of_the_channels():
  inputs = keras.Input((6, 6, 3))
  x = normalized(inputs, 8, 'wide')
  model = keras.Model(inputs, layers.Conv2D(2, 1)(x[..., :4] + x[:, :, :, 4:8]))
  (group,) = ChannelGraph(model).groups
  np.testing.assert_array_equal(group.members['wide'], [[0, 4], [1, 5], [2, 6], [3, 7]])
  channels.assert_shrinks(model)
