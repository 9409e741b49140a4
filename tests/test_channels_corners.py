"""What is rare: constants, shared layers, odd slices, unknown sizes; masked and shrunk agree."""

import channels
import keras
import numpy as np
import pytest
from keras import layers, ops

from pocketsize.channel_graph import ChannelGraph
from pocketsize.errors import UserError
from pocketsize.instrument import instrument, strip
from pocketsize.pruning import filters
from pocketsize.shrink import mask, shrink


def conv(count, **arguments):
  return layers.Conv2D(count, 3, padding='same', **arguments)


def head(x):
  return layers.Dense(2, name='head')(layers.GlobalAveragePooling2D()(x))


def scalar(value):
  return lambda x: conv(8)(conv(8)(x) + value)


def norm_without_factor(x):
  return conv(8)(layers.BatchNormalization(scale=False)(conv(8, activation='sigmoid')(x)))


def root_mean_square(x):
  norm = layers.LayerNormalization(axis=[1, 2], center=False, rms_scaling=True)
  return conv(8)(norm(conv(8, activation='sigmoid')(x)))


def one_of_the_channels(x):
  return layers.Reshape((8, 8, 1))(conv(8)(x)[..., 3])


def squeezed_channel(x):
  return ops.expand_dims(ops.squeeze(conv(8)(x)[..., 2:3], -1), -1)


def prelu_elsewhere(x):
  x = layers.PReLU(shared_axes=[1, 2])(layers.Permute((3, 1, 2))(conv(8)(x)))
  return layers.Permute((2, 3, 1))(x)


def reader_of_two_constants(x):
  shared = layers.Conv2D(5, 1)
  first = shared(layers.Activation('sigmoid')(conv(8)(x)))
  return first + shared(layers.Activation('softplus')(conv(8)(x)))


def reader_of_two_shifts(x):
  shared = layers.Conv2D(5, 1)
  return shared(layers.BatchNormalization()(conv(8)(x))) * shared(
    layers.BatchNormalization()(conv(8)(x))
  )


def shared_block(x):
  inner = keras.Input((8, 8, 6))
  block = keras.Model(inner, conv(6)(inner) + inner, name='block')
  return block(block(conv(6)(x)))


def shared_inside_and_outside(x):
  shared = conv(6)
  inner = keras.Input((8, 8, 6))
  block = keras.Model(inner, layers.ReLU()(shared(inner)), name='block')
  return shared(block(conv(6)(x)))


def names_that_meet(x):
  inner = keras.Input((8, 8, 6))
  base = keras.Model(inner, conv(4, name='conv')(inner), name='base')
  return base(conv(6, name='base_conv')(x))


def one_frozen_call(x):
  shared = conv(8)
  first = shared(layers.ReLU()(conv(6)(x)))
  return first + shared(layers.Activation('sigmoid')(conv(6)(x)))


def shared_reshape(x):
  shared = layers.Reshape((64, 8))
  x = layers.Dense(5)(shared(conv(8)(x))) + layers.Dense(5)(shared(conv(8)(x)))
  return layers.Reshape((8, 8, 5))(x)


def new_axes(x):
  return ops.squeeze(conv(8)(x)[..., None, 0:4], 3) + ops.squeeze(conv(8)(x)[:, None, ..., 2:6], 1)


def reversed_operands(x):
  return conv(4)((1 - conv(8)(x)) * 2)


def square(x):
  y = conv(8)(x)
  return conv(4)(y * y + y**2)


MODELS = {
  'numpy_scalar': scalar(np.float32(1)),
  'array_scalar': scalar(np.array([1.0], 'float32')),
  **{
    build.__name__: build
    for build in (
      norm_without_factor,
      root_mean_square,
      one_of_the_channels,
      squeezed_channel,
      prelu_elsewhere,
      reader_of_two_constants,
      reader_of_two_shifts,
      shared_block,
      shared_inside_and_outside,
      names_that_meet,
      one_frozen_call,
      shared_reshape,
      new_axes,
      reversed_operands,
      square,
    )
  },
}


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('keep_shift', [False, True])
def test_corners(name, keep_shift):
  inputs = keras.Input((8, 8, 3))
  x = MODELS[name](conv(6, activation='relu', name='first')(inputs))
  channels.assert_shrinks(keras.Model(inputs, head(x)), keep_shift)


def test_unknown_sizes():
  x = inputs = keras.Input((None, None, 3))
  for _ in range(5):
    x = layers.Conv2D(6, 3, strides=2, activation='relu')(x)
  model = channels.randomized(keras.Model(inputs, head(x)))
  keep = channels.half(ChannelGraph(model))
  x = np.random.default_rng(0).normal(size=(1, 96, 96, 3)).astype('float32')
  np.testing.assert_allclose(mask(model, keep)(x), shrink(model, keep)(x), rtol=1e-5, atol=1e-5)


@keras.saving.register_keras_serializable('tests')
class Seeing(layers.Layer):
  """Notes the shapes of the tensors, not symbols, that it is called with."""

  shapes = []

  def call(self, x):
    if hasattr(x, 'numpy'):
      self.shapes.append(tuple(x.shape))
    return x


def deep(depth):
  """A net without padding that halves its input `depth` times and drops constants on the way."""
  inputs = keras.Input((None, None, 3))
  x = Seeing()(inputs)
  for number in range(depth):
    x = layers.Conv2D(4, 3, activation='sigmoid', name=f'conv{number}')(x)
    x = layers.MaxPooling2D()(x)
  return channels.randomized(keras.Model(inputs, head(x)))


def test_constants_of_unknown_sizes_are_seen_in_an_input_that_is_large_enough():
  model = deep(5)
  keep = channels.half(ChannelGraph(model))
  x = np.random.default_rng(0).normal(size=(1, 128, 128, 3)).astype('float32')
  Seeing.shapes.clear()
  smaller = shrink(model, keep)
  assert Seeing.shapes == [(1, 128, 128, 3)]  # Where it is too small, TensorFlow may not say so.
  np.testing.assert_allclose(mask(model, keep)(x), smaller(x), rtol=1e-5, atol=1e-5)


def test_sizes_must_be_fixed_where_no_input_is_large_enough():
  model = deep(9)
  with pytest.raises(UserError, match="give the model's inputs fixed sizes. Received: .*None, 3"):
    shrink(model, channels.half(ChannelGraph(model)))


def test_a_constant_that_is_no_number_is_told_whatever_the_size():
  inputs = keras.Input((None, None, 3))
  x = layers.BatchNormalization(name='shifted')(layers.Conv2D(4, 3)(inputs))
  model = keras.Model(inputs, head(layers.Conv2D(4, 3, name='reader')(x)))
  model.get_layer('shifted').beta.assign(np.full(4, np.nan))
  keep = channels.half(ChannelGraph(model, keep_shift=True))
  with pytest.raises(UserError, match="'reader' reads of dropped channels must be finite numbers"):
    shrink(model, keep, keep_shift=True)


def test_a_sum_over_an_unknown_length_freezes_a_constant():
  inputs = keras.Input((None, 3))
  x = ops.sum(layers.Conv1D(8, 1, activation='sigmoid', name='made')(inputs), axis=1)
  graph = ChannelGraph(keras.Model(inputs, layers.Dense(2)(x)))
  assert 'unknown number of summands' in graph.frozen['made']


@pytest.mark.parametrize(
  'call',
  [
    lambda x: 1.0 / x,
    lambda x: ops.clip(x, np.zeros(8, 'float32'), np.ones(8, 'float32')),
    lambda x: layers.Conv2D(4, 1, activation=layers.PReLU(shared_axes=[1, 2]))(x),
    lambda x: ops.stack([x, x], axis=1)[:, 0],
    lambda x: ops.where(x > 0, x, 0.5),
    lambda x: ops.einsum('bhwc->bhw', x)[..., None],
  ],
)
def test_what_has_no_exact_rule_freezes(call):
  inputs = keras.Input((8, 8, 3))
  x = conv(8, name='made')(inputs)
  graph = ChannelGraph(keras.Model(inputs, head(call(x))))
  assert 'made' in graph.frozen or graph.groups[0].name == 'made'
  if 'made' not in graph.frozen:
    channels.assert_shrinks(keras.Model(inputs, head(call(x))))


def test_adapted_normalization_is_copied():
  inputs = keras.Input((8, 8, 3))
  normalization = layers.Normalization()
  normalization.adapt(np.random.default_rng(0).normal(3.0, 2.0, (4, 8, 8, 3)))
  model = keras.Model(inputs, head(conv(4)(normalization(inputs))))
  x = channels.inputs_of(model)[0]
  for same in (mask(model, {}), shrink(model, {}), strip(instrument(model))):
    np.testing.assert_allclose(same(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_choice_never_empties_a_slice():
  inputs = keras.Input((8, 8, 3))
  x = conv(8, name='made')(inputs)
  model = channels.randomized(keras.Model(inputs, head(conv(8, name='read')(x[..., -4:]))))
  graph = ChannelGraph(model)
  values = {group.name: np.arange(group.size)[::-1] for group in graph.groups}
  for arguments in ({'ratio': 0.5}, {'macs': 0.5}, {'ratio': 0.8, 'scope': 'network'}):
    keep = filters.choose(graph, values, **arguments)
    # Only the weakest four are read; the best of them stays.
    assert keep['made'][4] and not keep['made'].all()
    channels.assert_same(model, keep)
