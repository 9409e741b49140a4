"""Small models and helpers that several tests share."""

import importlib.util

import keras
import numpy as np
import pytest
from keras import layers

from pocketsize.compressor import CompressionCallback
from pocketsize.graph import Graph


def need_tfmot():
  """Skips the calling module where tfmot is missing.

  `pytest.importorskip` would import it, and then every process that tests start has Keras 2 as
  `tf.keras`.
  """
  if not importlib.util.find_spec('tensorflow_model_optimization'):
    pytest.skip('tensorflow_model_optimization is not installed', allow_module_level=True)


def images(count=8, size=8, channels=3, seed=0):
  """Returns [count, size, size, channels] float32 normal noise."""
  return np.random.default_rng(seed).normal(size=(count, size, size, channels)).astype('float32')


def conv_net(name='conv_net'):
  """Twice conv, batch norm, ReLU, then pool and dense: 4 logits of 8x8x3 images."""
  keras.utils.set_random_seed(1)
  x = inputs = keras.Input((8, 8, 3), name='images')
  for index, strides in enumerate((1, 2)):
    x = layers.Conv2D(4, 3, strides, 'same', use_bias=False, name=f'conv{index}')(x)
    x = layers.BatchNormalization(momentum=0.9, name=f'bn{index}')(x)
    x = layers.ReLU(name=f'relu{index}')(x)
  x = layers.GlobalAveragePooling2D(name='pool')(x)
  return keras.Model(inputs, layers.Dense(4, name='head')(x), name=name)


def sequential_net():
  """A Sequential conv net: 4 logits of 8x8x3 images."""
  keras.utils.set_random_seed(2)
  return keras.Sequential(
    [
      keras.Input((8, 8, 3), name='images'),
      layers.Conv2D(4, 3, activation='relu', name='conv'),
      layers.MaxPooling2D(name='maxpool'),
      layers.Flatten(name='flatten'),
      layers.Dense(4, name='head'),
    ],
    name='sequential_net',
  )


def nested_net():
  """Two levels of nesting; 'base' holds the Sequential 'stem': 4 logits of 8x8x3 images."""
  keras.utils.set_random_seed(3)
  stem = keras.Sequential(
    [
      keras.Input((8, 8, 3)),
      layers.Conv2D(4, 3, name='conv'),
      layers.BatchNormalization(name='bn'),
    ],
    name='stem',
  )
  x = inputs = keras.Input((8, 8, 3))
  x = layers.ReLU(name='relu')(stem(x))
  base = keras.Model(inputs, layers.Conv2D(4, 3, name='conv')(x), name='base')
  x = inputs = keras.Input((8, 8, 3), name='images')
  x = layers.GlobalAveragePooling2D(name='pool')(base(x))
  return keras.Model(inputs, layers.Dense(4, name='head')(x), name='nested_net')


def shared_net():
  """One conv called twice, and one nested model called twice: 4 logits of 8x8x3 images."""
  keras.utils.set_random_seed(4)
  conv = layers.Conv2D(3, 3, padding='same', activation='relu', name='conv')
  tower = keras.Sequential(
    [
      keras.Input((8, 8, 3)),
      layers.Conv2D(2, 3, name='conv'),
      layers.GlobalAveragePooling2D(name='pool'),
    ],
    name='tower',
  )
  inputs = keras.Input((8, 8, 3), name='images')
  x = conv(inputs)
  x = layers.Concatenate(name='join')([tower(x), tower(conv(x))])
  return keras.Model(inputs, layers.Dense(4, name='head')(x), name='shared_net')


MODELS = {
  'functional': conv_net,
  'sequential': sequential_net,
  'nested': nested_net,
  'shared': shared_net,
}


def paths(model):
  """Returns the paths of a model's nodes, in order."""
  return [node.path for node in Graph(model).nodes]


def compile_for_logits(model, rate=0.05):
  """Compiles `model` for integer labels with SGD and momentum, and returns it."""
  optimizer = keras.optimizers.SGD(rate, momentum=0.9)
  # Where a step makes variables, TensorFlow traces it twice.
  optimizer.build(model.trainable_variables)
  model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
  return model


def labels(count=8, seed=0):
  """Returns [count] integers below 4."""
  return np.random.default_rng(seed + 100).integers(0, 4, count)


def fit(model, stack, begin, end, callback_step=None):
  """Trains steps `begin` to `end`; a batch is a function of its step.

  Args:
    callback_step: the step that the callback is told; None for `begin`.
  """
  steps = range(begin, end)
  model.fit(
    np.concatenate([images(seed=step) for step in steps]),
    np.concatenate([labels(seed=step) for step in steps]),
    batch_size=8,
    shuffle=False,
    verbose=0,
    callbacks=[CompressionCallback(stack, begin if callback_step is None else callback_step)],
  )


def state(model):
  """Returns copies of all variables of a compiled model and of its optimizer."""
  return [np.array(variable) for variable in model.variables + model.optimizer.variables]


def set_state(model, values):
  for variable, value in zip(model.variables + model.optimizer.variables, values, strict=True):
    variable.assign(value)


def assert_resumes(make, steps, middles):
  """Asserts that a run broken off at one of `middles` ends with the bits of a whole one.

  What runs up to the middle is the model of the whole run, set back: its step is traced already.

  Args:
    make: function without arguments to a new (compiled model, stack).
  """
  whole, stack = make()
  beginning = state(whole)
  fit(whole, stack, 0, steps)
  wanted = state(whole)
  for middle in middles:
    set_state(whole, beginning)
    fit(whole, stack, 0, middle)
    rest, rest_stack = make()
    set_state(rest, state(whole))
    fit(rest, rest_stack, middle, steps)
    names = [variable.path for variable in rest.variables + rest.optimizer.variables]
    for name, expected, got in zip(names, wanted, state(rest), strict=True):
      np.testing.assert_array_equal(got, expected, err_msg=name)
