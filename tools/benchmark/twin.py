"""The tf_keras twin of a Keras 3 model: what tfmot compresses, and the measure of our own step.

Covers the stock layers of `nets/`. Nested models are flattened, since tfmot refuses them.
"""

import keras
import numpy as np
import tf_keras

from pocketsize.graph import Graph

TOLERANCE = 1e-4
_ARGUMENTS = {
  'Conv2D': (
    'filters',
    'kernel_size',
    'strides',
    'padding',
    'dilation_rate',
    'groups',
    'activation',
    'use_bias',
  ),
  'Dense': ('units', 'activation', 'use_bias'),
  'BatchNormalization': ('axis', 'momentum', 'epsilon', 'center', 'scale'),
  'ReLU': ('max_value', 'negative_slope', 'threshold'),
  'ZeroPadding2D': ('padding',),
  'MaxPooling2D': ('pool_size', 'strides', 'padding'),
  'GlobalAveragePooling2D': ('keepdims',),
  'Add': (),
  'Flatten': (),
}


def build_twin(model):
  """Returns a tf_keras model of the same layers, weights and outputs as `model`.

  Args:
    model: a built Functional or Sequential Keras model of the layers of `nets/`, with one input and
      one output; `keras.ops.pad` may add zero channels.

  Raises:
    ValueError: an operation without a twin, or outputs that differ.
  """
  graph = Graph(model)
  tensors = {}
  layers = {}
  for node in graph.nodes:
    if node.is_input:
      outputs = tf_keras.Input(graph.shape(node.outputs[0])[1:], name=node.path)
    elif isinstance(node.operation, keras.Layer):
      if node.path not in layers:
        layers[node.path] = _twin_layer(node.operation, node.path.replace('/', '_'))
      arguments = [tensors[number] for number in node.inputs]
      outputs = layers[node.path](arguments if len(arguments) > 1 else arguments[0])
    else:
      outputs = _pad_channels(node, graph.shape(node.inputs[0]), tensors[node.inputs[0]])
    tensors[node.outputs[0]] = outputs
  twin = tf_keras.Model(tensors[graph.inputs[0]], tensors[graph.outputs[0]], name=model.name)
  for path, layer in layers.items():
    layer.set_weights(graph.layers[path].get_weights())
  _check(model, twin)
  return twin


def _twin_layer(layer, name):
  kind = type(layer).__name__
  if type(layer) is not getattr(keras.layers, kind, None) or kind not in _ARGUMENTS:
    raise ValueError(
      f'A twin has layers of the types {", ".join(_ARGUMENTS)}. Received: {layer.name!r}, a {kind}.'
    )
  config = layer.get_config()
  return getattr(tf_keras.layers, kind)(
    name=name, **{argument: config[argument] for argument in ('trainable', *_ARGUMENTS[kind])}
  )


def _pad_channels(node, shape, x):
  """Zero channels by layers that tfmot quantizes, which a Lambda is not.

  ZeroPadding2D takes the pixels for rows and the channels for columns of a one-channel image.
  """
  padding = np.array(getattr(node.operation, 'pad_width', ()))
  if padding.shape != (4, 2) or padding[:3].any() or node.operation.mode != 'constant':
    raise ValueError(
      'A twin has no operator but `keras.ops.pad` of the channels with zeros. '
      f'Received: {node.path!r}.'
    )
  _, height, width, channels = shape
  before, after = map(int, padding[3])
  x = tf_keras.layers.Reshape((height * width, channels, 1), name=f'{node.path}_flat')(x)
  x = tf_keras.layers.ZeroPadding2D(((0, 0), (before, after)), name=node.path)(x)
  return tf_keras.layers.Reshape(
    (height, width, channels + before + after), name=f'{node.path}_image'
  )(x)


def _check(model, twin):
  """Raises a ValueError unless both compute the same on normal noise."""
  x = np.random.default_rng(0).normal(size=(2, *model.inputs[0].shape[1:])).astype(np.float32)
  expected = np.array(model(x, training=False))
  difference = np.abs(expected - np.array(twin(x, training=False))).max() / max(
    np.abs(expected).max(), 1.0
  )
  if not difference <= TOLERANCE:
    raise ValueError(
      f'The twin of {model.name!r} must agree within {TOLERANCE} of the largest output, or '
      f'of 1. Received: a difference of {difference:.2g}.'
    )
