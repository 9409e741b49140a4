"""The tf_keras twin of a Keras 3 model: the same computation in layers that tfmot knows.

tfmot compresses tf_keras models only. The twin is flat, since tfmot refuses nested models, and has
a layer for each call, since it does not follow a layer that is called twice. Where tf_keras has no
such layer, the Keras operation stands in the twin, and stays float.
"""

from typing import NamedTuple

import keras
import numpy as np

from pocketsize.conversion.errors import require
from pocketsize.errors import first_sentence
from pocketsize.graph import Graph
from pocketsize.quantization.stand_in import stand_in
from pocketsize.sizes import LARGEST, fitting

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
    names: for each node of the `Graph`, the names of the layers that compute it, in order; none
      where the Keras operation stands in.
    refused: {path of what has a stand-in: why}.
  """

  model: object
  names: list
  refused: dict


class _NoTwin(Exception):
  """What tf_keras has no layer for; the message names it."""


def build_twin(model):
  """Returns the `Twin` of a model: the same outputs, by the same layers where tf_keras has them.

  Args:
    model: a built Functional or Sequential Keras model, nested ones included.

  Raises:
    UserError: tf_keras is missing, or a subclassed or unbuilt model.
  """
  tf_keras = require('tf_keras', 'for a tf_keras twin')
  graph = Graph(model)
  tensors, names, refused, taken = {}, [], {}, set()
  for node in graph.nodes:
    name = _free(node.path.replace('/', '_'), taken)
    if node.is_input:
      number = node.outputs[0]
      outputs = tf_keras.Input(graph.shape(number)[1:], name=name, dtype=graph.dtype(number))
      names.append((name,))
    else:
      layers, reason = _layers_or_reason(node, name, graph)
      names.append(tuple(layer.name for layer in layers))
      inputs = node.inputs
      if not layers:
        refused[node.path] = reason
        layers, inputs = [stand_in(graph, node, name)], dict.fromkeys(inputs)
      outputs = _computed(layers, [tensors[number] for number in inputs])
    tensors.update(zip(node.outputs, keras.tree.flatten(outputs), strict=True))
  ends = [[tensors[number] for number in numbers] for numbers in (graph.inputs, graph.outputs)]
  return Twin(tf_keras.Model(*ends, name=model.name), names, refused)


def _computed(layers, outputs):
  outputs = outputs if len(outputs) > 1 else outputs[0]
  for layer in layers:
    outputs = layer(outputs)
  return outputs


def _free(name, taken):
  """Returns `name`, or with a number if it is taken, and takes it."""
  free, number = name, 0
  while free in taken:
    number += 1
    free = f'{name}_{number}'
  taken.add(free)
  return free


def _layers_or_reason(node, name, graph):
  """Returns (the tf_keras layers for a node, None) or ((), why there are none)."""
  try:
    layers = _layers(node, name, graph)
    _check(node, layers, graph)
    return layers, None
  except _NoTwin as what:
    return (), f'the tf_keras twin has no {what}, it stays float'
  except Exception as error:  # tf_keras raises whatever comes
    return (), f'tf_keras refuses it: {first_sentence(error)}'


def _layers(node, name, graph):
  """Returns the tf_keras layers, to be called one on the other's output, that compute a node."""
  kind = type(node.operation).__name__
  if isinstance(node.operation, keras.Layer):
    return [_twin_layer(node, name)]
  if kind == 'Pad':
    return _pad_channels(node, name, graph.shape(node.inputs[0]))
  if kind not in _OPERATORS:
    raise _NoTwin(kind)
  layer_type, arguments, count = _OPERATORS[kind]
  if len(node.inputs) != count or len(set(node.inputs)) != count:
    raise _NoTwin(f'{kind} of a constant, or of one tensor twice')
  return [getattr(require('tf_keras', 'for a twin').layers, layer_type)(name=name, **arguments)]


def _twin_layer(node, name):
  layer, tf_keras = node.operation, require('tf_keras', 'for a twin')
  kind = type(layer).__name__
  is_custom = type(layer) is not getattr(keras.layers, kind, None)
  if is_custom or kind not in TYPES:
    raise _NoTwin(f'custom {kind}' if is_custom else kind)
  if node.arguments.kwargs.get('mask') is not None:
    raise _NoTwin(f'mask for a {kind}')
  if kind == 'Normalization':
    return _normalization(node, name)
  config = layer.get_config()
  arguments = {
    _RENAMED.get((kind, argument), argument): config[argument] for argument in _ARGUMENTS[kind]
  }
  if not isinstance(config.get('activation', ''), str):
    raise _NoTwin(f'{kind} with a custom activation')
  if config.get('data_format') == 'channels_first':
    arguments['data_format'] = 'channels_first'
  if arguments.get('activation') == 'silu':
    # The name under which tfmot knows it.
    arguments['activation'] = 'swish'
  return getattr(tf_keras.layers, kind)(name=name, trainable=layer.trainable, **arguments)


def _normalization(node, name):
  """Returns the layer for (x - mean) / standard deviation along the last axis."""
  layer = node.operation
  mean, variance = (
    np.ravel(keras.ops.convert_to_numpy(values)) for values in (layer.mean, layer.variance)
  )
  if layer.invert or layer.axis not in ((-1,), (), (len(node.symbols[0].shape) - 1,)):
    raise _NoTwin('Normalization that is inverted, or not along the last axis')
  scale = 1.0 / np.maximum(np.sqrt(variance), keras.config.epsilon())
  scale, offset = (values.astype(float).tolist() for values in (scale, -mean * scale))
  return require('tf_keras', 'for a twin').layers.Rescaling(scale, offset, name=name)


def _pad_channels(node, name, shape):
  """Zero channels by layers that tfmot quantizes, which a Lambda is not.

  ZeroPadding2D takes the pixels for rows and the channels for columns of a one-channel image.
  """
  padding = np.array(getattr(node.operation, 'pad_width', ()))
  is_of_channels = padding.shape == (4, 2) and not padding[:3].any() and None not in shape[1:]
  if not is_of_channels or node.operation.mode != 'constant':
    raise _NoTwin('Pad but that of the channels of an image with zeros')
  _, height, width, channels = shape
  before, after = map(int, padding[3])
  layers = require('tf_keras', 'for a twin').layers
  return [
    layers.Reshape((height * width, channels, 1), name=f'{name}_flat'),
    layers.ZeroPadding2D(((0, 0), (before, after)), name=name),
    layers.Reshape((height, width, channels + before + after), name=f'{name}_image'),
  ]


def _shapes(node, graph, dtypes):
  """Returns shapes of a node's inputs, of two samples, that are large enough for it."""

  def computed(inputs):
    values = dict(zip(node.inputs, inputs, strict=True))
    # A call would leave its trace in the user's layer.
    graph.step(node, values, lambda node, args, kwargs: node.operation.compute_output_spec(*args))

  shapes = [graph.shape(number) for number in node.inputs]
  found = next(fitting(shapes, dtypes, computed, batch=2), None)
  if found is None:
    raise _NoTwin(f'{type(node.operation).__name__} of more than {LARGEST} places')
  return found


def _check(node, layers, graph):
  """Gives layers the weights of a node, and refuses them unless both agree on normal noise."""
  rng, values = np.random.default_rng(0), {}
  kind = type(node.operation).__name__
  dtypes = [graph.dtype(number) for number in node.inputs]
  for dtype in dtypes:
    if not dtype.startswith('float'):
      raise _NoTwin(f'{kind} of {dtype}')
  for number, shape, dtype in zip(node.inputs, _shapes(node, graph, dtypes), dtypes, strict=True):
    noise = rng.normal(size=shape)
    values[number] = keras.ops.convert_to_tensor(noise.astype(dtype))
  inputs = [values[number] for number in node.inputs]
  got = _computed(layers, inputs)
  if layers[0].weights:
    layers[0].set_weights(node.operation.get_weights())
    got = _computed(layers, inputs)
  graph.step(node, values, training=False)
  expected, got = (np.array(x, float) for x in (values[node.outputs[0]], got))
  difference = np.abs(expected - got).max() / max(np.abs(expected).max(), 1.0)
  if expected.shape != got.shape or not difference <= TOLERANCE:
    raise _NoTwin(f'{kind} that computes the same (off by {difference:.2g})')
