"""The tf_keras twin of a Keras 3 model: the same computation in layers that tfmot knows.

tfmot compresses tf_keras models only. The twin is flat, since tfmot refuses nested models, and has
a layer for each call, since it does not follow a layer that is called twice.
"""

from typing import NamedTuple

import keras
import numpy as np

from pocketsize.conversion.errors import require
from pocketsize.errors import UserError
from pocketsize.graph import Graph

TOLERANCE = 1e-4
_CONVOLUTION = ('kernel_size', 'strides', 'padding', 'dilation_rate', 'activation', 'use_bias')
_POOLING = ('pool_size', 'strides', 'padding')
# Keras 3 type: the arguments of the tf_keras type of the same name.
_ARGUMENTS = {
  'Conv1D': ('filters', 'groups', *_CONVOLUTION),
  'Conv2D': ('filters', 'groups', *_CONVOLUTION),
  'DepthwiseConv2D': ('depth_multiplier', *_CONVOLUTION),
  'SeparableConv2D': ('filters', 'depth_multiplier', *_CONVOLUTION),
  'Conv2DTranspose': ('filters', 'output_padding', *_CONVOLUTION),
  'Dense': ('units', 'activation', 'use_bias'),
  'BatchNormalization': ('axis', 'momentum', 'epsilon', 'center', 'scale'),
  'ReLU': ('max_value', 'negative_slope', 'threshold'),
  'LeakyReLU': ('negative_slope',),
  'Softmax': ('axis',),
  'Activation': ('activation',),
  'ZeroPadding1D': ('padding',),
  'ZeroPadding2D': ('padding',),
  'Cropping1D': ('cropping',),
  'Cropping2D': ('cropping',),
  'MaxPooling1D': _POOLING,
  'MaxPooling2D': _POOLING,
  'AveragePooling1D': _POOLING,
  'AveragePooling2D': _POOLING,
  'GlobalMaxPooling1D': ('keepdims',),
  'GlobalMaxPooling2D': ('keepdims',),
  'GlobalAveragePooling1D': ('keepdims',),
  'GlobalAveragePooling2D': ('keepdims',),
  'UpSampling1D': ('size',),
  'UpSampling2D': ('size', 'interpolation'),
  'Add': (),
  'Subtract': (),
  'Multiply': (),
  'Average': (),
  'Maximum': (),
  'Minimum': (),
  'Concatenate': ('axis',),
  'Flatten': (),
  'Reshape': ('target_shape',),
  'Permute': ('dims',),
  'Dropout': ('rate',),
  'SpatialDropout1D': ('rate',),
  'SpatialDropout2D': ('rate',),
  'GaussianDropout': ('rate',),
  'GaussianNoise': ('stddev',),
  'Rescaling': ('scale', 'offset'),
}
# Arguments that have another name in tf_keras.
_RENAMED = {('LeakyReLU', 'negative_slope'): 'alpha'}
# Operators of Keras 3: the tf_keras layer, its arguments, and how many tensors it reads.
_OPERATORS = {
  **{name: (name, {}, 2) for name in ('Add', 'Subtract', 'Multiply', 'Maximum', 'Minimum')},
  'Relu': ('ReLU', {}, 1),
  'Relu6': ('ReLU', {'max_value': 6.0}, 1),
}
TYPES = (*_ARGUMENTS, 'Normalization')


class Twin(NamedTuple):
  """A tf_keras model and where it has what.

  Attributes:
    model: Functional; its weights are copies.
    names: for each node of the `Graph`, the names of the layers that compute it, in order.
  """

  model: object
  names: list


def build_twin(model):
  """Returns the `Twin` of a model: the same layers, weights and outputs.

  Args:
    model: a built Functional or Sequential Keras model of layers of `TYPES`, nested ones included.
      Of the operators there may be `+`, `-`, `*`, `keras.ops.maximum`, `minimum`, `relu`, `relu6`,
      and `keras.ops.pad` of the channels of an image with zeros.

  Raises:
    UserError: tf_keras is missing, an operation has no twin, or the outputs differ.
  """
  tf_keras = require('tf_keras', 'for a tf_keras twin')
  graph = Graph(model)
  tensors, names, taken = {}, [], set()
  for node in graph.nodes:
    name = _free(node.path.replace('/', '_'), taken)
    if node.is_input:
      number = node.outputs[0]
      outputs = tf_keras.Input(graph.shape(number)[1:], name=name, dtype=graph.dtype(number))
      names.append((name,))
    else:
      layers = _layers(node, name, graph)
      outputs = [tensors[number] for number in node.inputs]
      outputs = outputs if len(outputs) > 1 else outputs[0]
      for layer in layers:
        outputs = layer(outputs)
      names.append(tuple(layer.name for layer in layers))
      if layers[0].weights:
        layers[0].set_weights(node.operation.get_weights())
    tensors[node.outputs[0]] = outputs
  twin = tf_keras.Model(
    [tensors[number] for number in graph.inputs],
    [tensors[number] for number in graph.outputs],
    name=model.name,
  )
  _check(graph, model, twin)
  return Twin(twin, names)


def _free(name, taken):
  """Returns `name`, or with a number if it is taken, and takes it."""
  free, number = name, 0
  while free in taken:
    number += 1
    free = f'{name}_{number}'
  taken.add(free)
  return free


def _layers(node, name, graph):
  """Returns the tf_keras layers, to be called one on the other's output, that compute a node."""
  if isinstance(node.operation, keras.Layer):
    return [_twin_layer(node, name)]
  kind = type(node.operation).__name__
  if kind == 'Pad':
    return _pad_channels(node, name, graph.shape(node.inputs[0]))
  layer_type, arguments, count = _OPERATORS.get(kind, (None, {}, 0))
  if len(node.inputs) != count or len(set(node.inputs)) != count:
    raise _refusal(node)
  return [getattr(require('tf_keras', 'for a twin').layers, layer_type)(name=name, **arguments)]


def _refusal(node, why=''):
  return UserError(
    f'A tf_keras twin has layers of the types {", ".join(TYPES)}, and of the operators '
    f'{", ".join(_OPERATORS)} of two tensors and Pad of channels with zeros. '
    f'Received: {node.path!r}, a {type(node.operation).__name__}{why}.'
  )


def _twin_layer(node, name):
  layer, tf_keras = node.operation, require('tf_keras', 'for a twin')
  kind = type(layer).__name__
  if type(layer) is not getattr(keras.layers, kind, None) or kind not in TYPES:
    raise _refusal(node)
  if kind == 'Normalization':
    return _normalization(node, name)
  config = layer.get_config()
  arguments = {
    _RENAMED.get((kind, argument), argument): config[argument] for argument in _ARGUMENTS[kind]
  }
  if config.get('data_format') == 'channels_first':
    arguments['data_format'] = 'channels_first'
  if arguments.get('activation') == 'silu':
    # The name under which tfmot knows it.
    arguments['activation'] = 'swish'
  try:
    return getattr(tf_keras.layers, kind)(name=name, trainable=layer.trainable, **arguments)
  except (TypeError, ValueError) as error:
    raise _refusal(node, f' that tf_keras cannot make ({str(error).splitlines()[0]})') from error


def _normalization(node, name):
  """Returns the layer for (x - mean) / standard deviation along the last axis."""
  layer = node.operation
  mean, variance = (
    np.ravel(keras.ops.convert_to_numpy(values)) for values in (layer.mean, layer.variance)
  )
  if layer.invert or layer.axis not in ((-1,), (), (len(node.symbols[0].shape) - 1,)):
    raise _refusal(node, ' that is inverted, or not along the last axis')
  scale = 1.0 / np.maximum(np.sqrt(variance), keras.config.epsilon())
  scale, offset = (values.astype(float).tolist() for values in (scale, -mean * scale))
  return require('tf_keras', 'for a twin').layers.Rescaling(scale, offset, name=name)


def _pad_channels(node, name, shape):
  """Zero channels by layers that tfmot quantizes, which a Lambda is not.

  ZeroPadding2D takes the pixels for rows and the channels for columns of a one-channel image.
  """
  padding = np.array(getattr(node.operation, 'pad_width', ()))
  if padding.shape != (4, 2) or padding[:3].any() or node.operation.mode != 'constant':
    raise _refusal(node)
  _, height, width, channels = shape
  before, after = map(int, padding[3])
  layers = require('tf_keras', 'for a twin').layers
  return [
    layers.Reshape((height * width, channels, 1), name=f'{name}_flat'),
    layers.ZeroPadding2D(((0, 0), (before, after)), name=name),
    layers.Reshape((height, width, channels + before + after), name=f'{name}_image'),
  ]


def _check(graph, model, twin):
  """Raises a UserError unless both compute the same on normal noise."""
  rng = np.random.default_rng(0)
  inputs = [
    rng.normal(size=(2, *graph.shape(number)[1:])).astype(graph.dtype(number))
    for number in graph.inputs
  ]
  expected = graph.run([keras.ops.convert_to_tensor(x) for x in inputs], training=False)
  got = keras.tree.flatten(twin(inputs if len(inputs) > 1 else inputs[0], training=False))
  for left, right in zip(map(np.array, expected), map(np.array, got), strict=True):
    difference = np.abs(left - right).max() / max(np.abs(left).max(), 1.0)
    if not difference <= TOLERANCE:
      raise UserError(
        f'The twin of {model.name!r} must agree within {TOLERANCE} of the largest output, or '
        f'of 1. Received: a difference of {difference:.2g}.'
      )
