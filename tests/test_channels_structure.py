"""Reshaping, shared and nested models, several inputs, layers without a rule, random graphs."""

import channels
import keras
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from keras import layers

from pocketsize import cost
from pocketsize.channel_graph import ChannelGraph
from pocketsize.errors import UserError
from pocketsize.graph import Graph
from pocketsize.shrink import shrink

RESHAPES = {
  'flatten': lambda x: layers.Flatten()(x),
  'reshape': lambda x: layers.Reshape((16 * 8,))(x),
  'rows': lambda x: layers.Flatten()(layers.Reshape((16, 8))(x)),
  'any': lambda x: layers.Reshape((-1, 8))(x),
  'ops': lambda x: keras.ops.reshape(x, (-1, 16, 8)),
  'transposed': lambda x: layers.Flatten()(keras.ops.transpose(x, (0, 3, 1, 2))),
  'permuted': lambda x: layers.Flatten()(layers.Permute((3, 2, 1))(x)),
  'squeezed': lambda x: keras.ops.squeeze(layers.MaxPooling2D((4, 1))(x), 1),
  'expanded': lambda x: keras.ops.expand_dims(x, 1),
  'mean': lambda x: keras.ops.mean(x, axis=(1, 2)),
  'kept': lambda x: keras.ops.max(x, axis=1, keepdims=True),
  'rows taken': lambda x: keras.ops.take(x, [3, 0, 0], axis=1),
  'taken': lambda x: keras.ops.take(x, [7, 0, 2, 2, 5, 6, 1], axis=-1),
  'all taken': lambda x: keras.ops.take(x, list(range(8)), axis=-1),
  'repeated': lambda x: layers.RepeatVector(3)(layers.GlobalAveragePooling2D()(x)),
}


def conv(x, filters, name):
  return layers.Conv2D(filters, 3, padding='same', activation='relu', name=name)(x)


@pytest.mark.parametrize('name', RESHAPES)
def test_a_channel_is_a_run_of_a_dense_layers_inputs(name):
  inputs = keras.Input((4, 4, 3))
  x = layers.Dense(6, activation='relu', name='read')(RESHAPES[name](conv(inputs, 8, 'made')))
  model = keras.Model(inputs, layers.Dense(2)(x))
  assert channels.groups(model) == {'made': (8, ['made']), 'read': (6, ['read'])}
  channels.assert_shrinks(model)


def test_a_reshape_that_mixes_channels_with_places_freezes_them():
  inputs = keras.Input((4, 4, 3))
  x = layers.Reshape((4, 4, 2, 4), name='mix')(conv(inputs, 8, 'made'))
  graph = ChannelGraph(keras.Model(inputs, layers.Dense(2)(x)))
  assert "'mix' (Reshape) mixes channels" in graph.frozen['made']


def test_indices_count_what_is_left():
  inputs = keras.Input((4, 4, 3))
  x = keras.ops.take(conv(inputs, 8, 'made'), [7, 0, 2, 2, 5], axis=-1)
  model = channels.randomized(keras.Model(inputs, layers.Conv2D(2, 1, name='read')(x)))
  # Of 1, 2, 4, 5, 7, that is 0 to 4, places 4, 1, 1, 3 are taken.
  keep = {'made': np.isin(np.arange(8), [1, 2, 4, 5, 7])}
  smaller = channels.assert_same(model, keep)
  (taken,) = [node for node in Graph(smaller).nodes if type(node.operation).__name__ == 'Take']
  assert taken.arguments.args[1] == [4, 1, 1, 3]
  assert smaller.get_layer('read').kernel.shape == (1, 1, 4, 2)


def test_a_shared_layer_ties_what_it_reads_and_makes():
  first, second = keras.Input((4, 4, 3)), keras.Input((4, 4, 3))
  shared = layers.Conv2D(6, 3, name='shared')
  x, y = shared(conv(first, 8, 'a')), shared(conv(second, 8, 'b'))
  model = keras.Model([first, second], layers.Conv2D(2, 1)(layers.Concatenate()([x, y])))
  assert list(channels.groups(model).values()) == [(8, ['a', 'b']), (6, ['shared'])]
  channels.assert_shrinks(model)


@pytest.mark.parametrize('calls', [1, 2])
def test_nested_models_are_inlined(calls):
  inner_inputs = keras.Input((4, 4, 3))
  inner = keras.Model(inner_inputs, conv(conv(inner_inputs, 8, 'a'), 3, 'b'), name='inner')
  x = inputs = keras.Input((4, 4, 3))
  for _ in range(calls):
    x = inner(x)
  head = keras.Sequential([keras.Input((4, 4, 3)), layers.Flatten(), layers.Dense(4)], name='end')
  smaller = channels.assert_shrinks(keras.Model(inputs, head(x)))
  assert smaller.get_layer('inner_a').filters == 4


def test_several_inputs_and_outputs_with_names():
  image, facts = keras.Input((4, 4, 3), name='image'), keras.Input((5,), name='facts')
  x = layers.GlobalAveragePooling2D()(conv(image, 8, 'made'))
  x = layers.Concatenate()([x, layers.Dense(6, activation='relu', name='dense')(facts)])
  model = keras.Model(
    {'image': image, 'facts': facts}, {'one': layers.Dense(2)(x), 'other': layers.Dense(3)(x)}
  )
  channels.randomized(model)
  keep = channels.half(ChannelGraph(model))
  smaller = shrink(model, keep)
  fed = dict(zip(('image', 'facts'), (np.ones((2, 4, 4, 3)), np.ones((2, 5))), strict=True))
  assert set(smaller(fed)) == {'one', 'other'}
  assert [symbol.name for symbol in smaller.inputs] == [symbol.name for symbol in model.inputs]


def test_a_layer_without_a_rule_freezes_and_is_named():
  inputs = keras.Input((4, 3))
  x = layers.Conv1D(8, 3, padding='same', name='made')(inputs)
  x = layers.LSTM(5, name='memory')(x)
  graph = ChannelGraph(keras.Model(inputs, layers.Dense(2)(layers.Dense(6, name='after')(x))))
  assert graph.frozen['made'] == "layer 'memory' (LSTM) has no rule for channels"
  assert [group.name for group in graph.groups] == ['after']


def test_frozen_layers_and_inference_only_calls_stay_so():
  inputs = keras.Input((4, 4, 3))
  norm = layers.BatchNormalization(name='norm')
  norm.trainable = False
  x = norm(conv(inputs, 8, 'made'), training=False)
  smaller = channels.assert_shrinks(keras.Model(inputs, layers.Conv2D(2, 1)(x)))
  assert not smaller.get_layer('norm').trainable
  before = smaller.get_layer('norm').get_weights()
  smaller(np.ones((2, 4, 4, 3)), training=True)
  np.testing.assert_array_equal(before[2], smaller.get_layer('norm').get_weights()[2])


@st.composite
def random_models(draw):
  """Models of layers drawn one after the other, each reading tensors that are there."""
  inputs = keras.Input((6, 6, 2))
  tensors = [layers.Conv2D(4, 3, padding='same')(inputs)]
  for _ in range(draw(st.integers(2, 8))):
    x = tensors[draw(st.integers(0, len(tensors) - 1))]
    kind = draw(
      st.sampled_from(
        'conv valid bn relu sigmoid depthwise add concat scale slice pad separable'.split()
      )
    )
    fits = [y for y in tensors if y.shape == x.shape]
    y = fits[draw(st.integers(0, len(fits) - 1))]
    if kind == 'conv':
      x = layers.Conv2D(draw(st.sampled_from((2, 4, 6))), 3, padding='same')(x)
    elif kind == 'valid':
      x = layers.ZeroPadding2D()(layers.Conv2D(4, 3, use_bias=False)(x))
    elif kind == 'bn':
      x = layers.BatchNormalization()(x)
    elif kind in ('relu', 'sigmoid'):
      x = layers.Activation(kind)(x)
    elif kind == 'depthwise':
      x = layers.DepthwiseConv2D(3, padding='same', depth_multiplier=draw(st.integers(1, 2)))(x)
    elif kind == 'add':
      x = x + y
    elif kind == 'concat':
      x = layers.Concatenate()([x, y])
    elif kind == 'scale':
      x = (
        x
        * layers.Dense(x.shape[-1], activation='sigmoid')(layers.GlobalAveragePooling2D()(y))[
          :, None, None, :
        ]
      )
    elif kind == 'slice':
      x = x[..., : max(x.shape[-1] // 2, 1)]
    elif kind == 'pad':
      x = keras.ops.pad(x, ((0, 0), (0, 0), (0, 0), (1, 0)))
    elif kind == 'separable':
      x = layers.SeparableConv2D(4, 3, padding='same')(x)
    tensors.append(x)
  ends = [layers.GlobalMaxPooling2D()(x) for x in tensors]
  return keras.Model(inputs, layers.Dense(3)(layers.Concatenate()(ends)))


@given(random_models(), st.booleans(), st.integers(0, 99))
@settings(max_examples=40)
def test_random_graphs(model, keep_shift, seed):
  graph = ChannelGraph(model, keep_shift)
  keep = channels.half(graph, seed)
  try:
    assume(any((~kept).any() for kept in keep.values()) and graph.dropped(keep))
  except UserError:
    # A slice may be all that a half is: it cannot go whole.
    assume(False)
  smaller = channels.assert_shrinks(model, keep_shift, seed)
  assert cost.macs(Graph(smaller)) < cost.macs(Graph(model))
