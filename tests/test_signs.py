"""Which tensors are flagged as never negative, and that none of them ever has a negative value."""

import collections

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers, ops

from pocketsize.graph import Graph
from pocketsize.quantization.placement import quantized_tensors
from pocketsize.quantization.signs import nonnegative_tensors


@keras.saving.register_keras_serializable(package='tests')
def relu(x):
  """Of the name of a bounded function, but not bounded."""
  return -x


class Add(layers.Layer):
  """Of the name of a layer that keeps what is not negative."""

  def call(self, inputs):
    return inputs[0] - inputs[1]


def activated(name):
  return lambda x, r: layers.Activation(name)(x)


def conv(x, **arguments):
  return layers.Conv2D(4, 3, padding='same', **arguments)(x)


def padded(value):
  return lambda x, r: ops.pad(r, ((0, 0), (1, 1), (0, 0), (0, 0)), constant_values=value)


NEVER = {
  # What writes nothing negative whatever it reads: x is of both signs.
  'ReLU': lambda x, r: layers.ReLU()(x),
  'ReLU of a maximum': lambda x, r: layers.ReLU(6.0)(x),
  'ReLU above a threshold': lambda x, r: layers.ReLU(threshold=0.5)(x),
  'Softmax': lambda x, r: layers.Softmax()(x),
  **{
    name: activated(name)
    for name in ('relu', 'relu6', 'sigmoid', 'hard_sigmoid', 'softmax', 'softplus', 'exponential')
  },
  'sparsemax': activated('sparsemax'),
  'tf.nn.relu': activated(tf.nn.relu),
  'ops.relu': lambda x, r: ops.relu(x),
  'ops.relu6': lambda x, r: ops.relu6(x),
  'ops.sigmoid': lambda x, r: ops.sigmoid(x),
  'ops.hard_sigmoid': lambda x, r: ops.hard_sigmoid(x),
  'ops.softmax': lambda x, r: ops.softmax(x),
  'ops.softplus': lambda x, r: ops.softplus(x),
  'ops.exp': lambda x, r: ops.exp(x),
  'ops.abs': lambda x, r: ops.abs(x),
  'ops.square': lambda x, r: ops.square(x),
  'x * x': lambda x, r: x * x,
  'Multiply with itself': lambda x, r: layers.Multiply()([x, x]),
  'a layer that ends in a sigmoid': lambda x, r: conv(x, activation='sigmoid'),
  'a layer that ends in a ReLU layer': lambda x, r: conv(x, activation=layers.ReLU(6.0)),
  # What keeps it: r is never negative.
  'MaxPooling': lambda x, r: layers.MaxPooling2D(2, padding='same')(r),
  'AveragePooling': lambda x, r: layers.AveragePooling2D(2, padding='same')(r),
  'GlobalAveragePooling': lambda x, r: layers.GlobalAveragePooling2D()(r),
  'ops.mean': lambda x, r: ops.mean(r, axis=(1, 2)),
  'ops.average_pool': lambda x, r: ops.average_pool(r, 2),
  'Add': lambda x, r: layers.Add()([r, layers.Dropout(0.5)(r)]),
  'r + r': lambda x, r: r + ops.square(x),
  'Multiply': lambda x, r: layers.Multiply()([r, ops.sigmoid(x)]),
  'Average': lambda x, r: layers.Average()([r, ops.exp(x)]),
  'Maximum with anything': lambda x, r: layers.Maximum()([x, r]),
  'ops.maximum with a constant': lambda x, r: ops.maximum(r, -1.0),
  'Minimum': lambda x, r: layers.Minimum()([r, ops.abs(x)]),
  'Concatenate': lambda x, r: layers.Concatenate()([r, ops.abs(x)]),
  'UpSampling nearest': lambda x, r: layers.UpSampling2D(2)(r),
  'UpSampling bilinear': lambda x, r: layers.UpSampling2D(3, interpolation='bilinear')(r),
  'Resizing': lambda x, r: layers.Resizing(5, 7)(r),
  'ops.image.resize': lambda x, r: ops.image.resize(r, (5, 7), antialias=True),
  'padding': lambda x, r: layers.ZeroPadding2D(1)(r),
  'padding by a positive constant': padded(0.5),
  'reflection': lambda x, r: ops.pad(r, ((0, 0), (1, 1), (0, 0), (0, 0)), mode='reflect'),
  'Cropping': lambda x, r: layers.Cropping2D(1)(r),
  'Flatten': lambda x, r: layers.Flatten()(r),
  'slicing': lambda x, r: r[:, 1:, :, ::2],
  'Take': lambda x, r: ops.take(r, [0, 2], axis=-1),
  'Transpose': lambda x, r: ops.transpose(r, (0, 3, 1, 2)),
  'linear': lambda x, r: layers.Activation('linear')(r),
  'Dropout': lambda x, r: layers.SpatialDropout2D(0.5)(r),
}
SOMETIMES = {
  'LeakyReLU': lambda x, r: layers.LeakyReLU()(x),
  'ReLU with a slope': lambda x, r: layers.ReLU(negative_slope=0.1)(x),
  **{name: activated(name) for name in ('tanh', 'silu', 'elu', 'gelu', 'log_softmax')},
  'a function of the same name': activated(relu),
  'a layer that ends in it': lambda x, r: conv(x, activation=relu),
  'a layer of the same name': lambda x, r: Add()([r, ops.exp(x)]),
  'weights': lambda x, r: conv(r),
  'BatchNormalization': lambda x, r: layers.BatchNormalization()(r),
  'LayerNormalization': lambda x, r: layers.LayerNormalization()(r),
  'Add with x': lambda x, r: layers.Add()([x, r]),
  'r + a constant': lambda x, r: r + np.float32([-1, 0, 1, 2]),
  'r * a constant': lambda x, r: r * -1.0,
  'concatenate a constant': lambda x, r: ops.concatenate(
    [r, -np.ones((2, 8, 8, 1), 'float32')], axis=-1
  ),
  'r - r': lambda x, r: r - ops.abs(x),
  'x cubed': lambda x, r: layers.Multiply()([x, x, x]),
  'Minimum with x': lambda x, r: layers.Minimum()([x, r]),
  'MaxPooling of x': lambda x, r: layers.MaxPooling2D(1)(x),
  'UpSampling bicubic': lambda x, r: layers.UpSampling2D(3, interpolation='bicubic')(r),
  'padding by a negative constant': padded(-0.5),
  'linear of x': lambda x, r: layers.Activation('linear')(x),
  'GaussianNoise': lambda x, r: layers.GaussianNoise(1.0)(r),
  'GaussianDropout': lambda x, r: layers.GaussianDropout(0.7)(r),
  'AlphaDropout': lambda x, r: layers.AlphaDropout(0.5)(r),
}
FLAGS = {**dict.fromkeys(NEVER, True), **dict.fromkeys(SOMETIMES, False)}


def written(graph, inputs, training):
  """Returns {tensor: its values} of all tensors of a graph."""
  values = dict(zip(graph.inputs, inputs, strict=True))
  for node in graph.nodes:
    graph.step(node, values, training=training)
  return {tensor: np.array(value) for tensor, value in values.items()}


def noise(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype('float32')


@pytest.fixture(scope='module')
def net():
  """Returns (graph of a net with all of NEVER and SOMETIMES, {name: number of its tensor})."""
  keras.utils.set_random_seed(0)
  inputs = keras.Input(batch_shape=(2, 8, 8, 4))
  x = conv(inputs, bias_initializer='random_normal')
  r = layers.ReLU()(conv(inputs))
  outputs = {name: make(x, r) for name, make in {**NEVER, **SOMETIMES}.items()}
  graph = Graph(keras.Model(inputs, list(outputs.values())))
  return graph, dict(zip(outputs, graph.outputs, strict=True))


@pytest.mark.parametrize('name', FLAGS)
def test_what_is_flagged(net, name):
  graph, tensors = net
  assert (tensors[name] in nonnegative_tensors(graph)) == FLAGS[name]


def test_what_is_flagged_is_never_negative_and_the_rest_is_sometimes(net):
  graph, tensors = net
  least = collections.defaultdict(lambda: np.inf)
  for seed in range(4):
    for training in (False, True):
      values = written(graph, [3.0 * noise(2, 8, 8, 4, seed=seed)], training)
      for tensor, value in values.items():
        least[tensor] = min(least[tensor], value.min())
  flagged = nonnegative_tensors(graph)
  assert {tensor for tensor in flagged if least[tensor] < 0.0} == set()
  assert [name for name in SOMETIMES if least[tensors[name]] >= 0.0] == []


# Of shape and batch as they are, for graphs by chance.
STEPS = [
  lambda x, y: layers.ReLU()(x),
  lambda x, y: layers.Activation('sigmoid')(x),
  lambda x, y: layers.Activation('tanh')(x),
  lambda x, y: layers.Dense(3, activation='softplus')(x),
  lambda x, y: layers.Dense(3)(x),
  lambda x, y: layers.BatchNormalization()(x),
  lambda x, y: layers.Add()([x, y]),
  lambda x, y: layers.Subtract()([x, y]),
  lambda x, y: x * y,
  lambda x, y: layers.Average()([x, y]),
  lambda x, y: layers.Maximum()([x, y]),
  lambda x, y: layers.Minimum()([x, y]),
  lambda x, y: layers.Concatenate()([x, y])[:, 1:4],
  lambda x, y: layers.Dropout(0.5)(x),
  lambda x, y: layers.GaussianNoise(1.0)(x),
  lambda x, y: x - 0.5,
  lambda x, y: 0.5 * x,
]
CHOICE = st.tuples(st.integers(0, len(STEPS) - 1), st.integers(0, 99), st.integers(0, 99))


@settings(max_examples=25)
@given(st.lists(CHOICE, min_size=3, max_size=12))
def test_nothing_negative_is_flagged_in_graphs_by_chance(choices):
  keras.utils.set_random_seed(0)
  tensors = [keras.Input((3,))]
  for step, one, other in choices:
    tensors.append(STEPS[step](tensors[one % len(tensors)], tensors[other % len(tensors)]))
  graph = Graph(keras.Model(tensors[0], tensors[1:]))
  flagged = nonnegative_tensors(graph)
  for training in (False, True):
    values = written(graph, [2.0 * noise(16, 3)], training)
    assert [tensor for tensor in flagged if values[tensor].min() < 0.0] == []


def test_a_layer_that_is_called_twice_must_be_so_at_both_calls():
  """Whichever call comes first."""
  for order in (1, -1):
    inputs = keras.Input((8, 8, 4))
    pool = layers.AveragePooling2D(2, name='pool')
    sides = [pool(each) for each in (conv(inputs), conv(inputs, activation='relu'))[::order]]
    model = keras.Model(inputs, layers.Add()(sides))
    flags = {tensor.path: tensor.nonnegative for tensor in quantized_tensors(Graph(model))}
    assert not flags['pool']


def test_integers_that_overflow_and_what_is_taken_at_a_place_may_be_negative():
  inputs = keras.Input((4,))
  places = ops.cast(layers.ReLU()(inputs), 'int32')
  graph = Graph(keras.Model(inputs, ops.take(np.float32([-1, -2]), places)))
  flags = {
    type(node.operation).__name__: node.outputs[0] in nonnegative_tensors(graph)
    for node in graph.nodes
  }
  assert flags == {'InputLayer': False, 'ReLU': True, 'Cast': False, 'Take': False}
