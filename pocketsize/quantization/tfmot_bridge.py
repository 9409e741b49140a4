"""The bridge to tfmot: which layers of a twin it quantizes, and why it leaves others float."""

import os
import re

import keras
import tensorflow as tf

from pocketsize.conversion.errors import require
from pocketsize.errors import UserError, first_sentence

# What a batch norm may follow, with nothing in between, to be quantized together with it.
_BEFORE_BATCH_NORM = ('Conv2D', 'DepthwiseConv2D', 'Dense')
# What tfmot sets when it is imported; every process that is started afterwards would have it too,
# and Keras 2 for `tf.keras`.
_LEGACY = 'TF_USE_LEGACY_KERAS'


def tfmot():
  """Returns tfmot's `quantization.keras`; UserError if its package is missing."""
  kept = os.environ.get(_LEGACY)
  try:
    return require('tensorflow_model_optimization', 'for --learner=uniform-tf').quantization.keras
  finally:
    os.environ.pop(_LEGACY, None)
    if kept is not None:
      os.environ[_LEGACY] = kept


def annotated(twin, graph):
  """Returns ({name: quantized tf_keras layer}, {name: why tfmot leaves a layer float}).

  The layers of the first are keyed by the twin's names, with an input's quantizer at its name. A
  layer that brings tfmot down is left out, and the rest is tried again.

  Args:
    twin: a `Twin`.
    graph: the `Graph` that it was built from.

  Raises:
    UserError: tfmot quantizes no layer at all.
  """
  registry = tfmot().default_8bit.Default8BitQuantizeRegistry()
  wanted, refused = [], {}
  for node, names in zip(graph.nodes, twin.names, strict=True):
    for name in () if node.is_input else names:
      layer = twin.model.get_layer(name)
      kind = type(layer).__name__
      if registry.supports(layer) or kind == 'SeparableConv2D':
        wanted.append(name)
      elif kind == 'BatchNormalization' and _follows_kernel(node, graph):
        wanted.append(name)
      else:
        refused[name] = _no_scheme(layer)
  while wanted:
    try:
      return _apply(twin.model, wanted, registry), refused
    except Exception as error:  # tfmot and tf_keras raise whatever comes
      culprit, error = _culprit(twin.model, wanted, registry, error)
      wanted.remove(culprit)
      refused[culprit] = (
        _no_scheme(twin.model.get_layer(culprit))
        if 'is not supported' in str(error)
        else f'tfmot refuses it: {first_sentence(error)}'
      )
  reasons = {**twin.refused, **refused}
  raise UserError(
    f'tfmot quantizes no layer of {graph.model.name!r}: '
    f'{"; ".join(f"{name}: {reason}" for name, reason in reasons.items())}.'
  )


def _no_scheme(layer):
  return f'tfmot has no quantization for a {type(layer).__name__} here'


def _follows_kernel(node, graph):
  before = graph.producer(node.inputs[0])
  return (
    type(before.operation).__name__ in _BEFORE_BATCH_NORM
    and before.operation.activation is keras.activations.linear
    and len(graph.consumers(node.inputs[0])) == 1
    and node.inputs[0] not in graph.outputs
  )


def _culprit(model, names, registry, error):
  """Returns (the first layer with which tfmot fails, its error).

  Of the layers in order, the shortest beginning that fails ends with it: found by bisection.
  """
  told = re.search(r'Layer ([^\s:]+):<class', str(error))
  if told and told[1] in names:
    return told[1], error
  passing, failing = 0, len(names)
  while failing - passing > 1:
    middle = (passing + failing) // 2
    try:
      _apply(model, names[:middle], registry)
      passing = middle
    except Exception as another:
      failing, error = middle, another
  return names[failing - 1], error


def _apply(model, names, registry):
  """Returns {name: layer} of tfmot's model with the layers `names` quantized."""
  tf_keras, library = require('tf_keras', 'for a tf_keras twin'), tfmot()
  plain = type(registry.get_quantize_config(tf_keras.layers.Dense(1)))

  def annotate(layer):
    layer = type(layer).from_config(layer.get_config())
    config = None
    if layer.name not in names:
      if not registry.supports(layer):
        return layer
      # Else tfmot quantizes what it writes if a quantized layer reads it.
      config = plain([], [], False)
    elif isinstance(layer, tf_keras.layers.SeparableConv2D):
      # By itself tfmot cuts it in two layers, and there is one to give their variables to.
      config = plain(['depthwise_kernel', 'pointwise_kernel'], ['activation'], False)
    return library.quantize_annotate_layer(layer, config)

  with library.quantize_scope():
    quantized = library.quantize_apply(tf_keras.models.clone_model(model, clone_function=annotate))
  layers = {}
  for layer in quantized.layers:
    if hasattr(layer, 'quantizer'):  # of an input
      (node,) = layer._inbound_nodes
      layers[tf.nest.flatten(node.inbound_layers)[0].name] = layer
    elif hasattr(layer, 'quantize_config'):
      layers[layer.layer.name] = layer
      if layer.layer.name in names:
        _quantize_kernel(layer, registry)
    else:
      layers.setdefault(layer.name, layer)
  return layers


def _quantize_kernel(wrapper, registry):
  """Quantizes a kernel that tfmot forgets: that of a layer right before a ReLU layer."""
  layer = wrapper.layer
  if wrapper._weight_vars or type(layer).__name__ not in _BEFORE_BATCH_NORM:
    return
  full = registry.get_quantize_config(layer)
  wrapper.quantize_config = type(full)(full.weight_attrs, [], False)
  wrapper._weight_vars = [
    (weight, quantizer, quantizer.build(weight.shape, 'kernel', wrapper))
    for weight, quantizer in wrapper.quantize_config.get_weights_and_quantizers(layer)
  ]
