"""The bridge to tfmot: which layers of a twin it quantizes, and how they train our variables.

`annotated` lets tfmot choose where it quantizes. `TwinLayer` then connects each of its layers with
the variables of a Keras 3 layer and of our quantizers: nothing is copied, there or back.
"""

import copy
import inspect
import re

import keras
import tensorflow as tf

from pocketsize import ste, targets
from pocketsize.conversion.errors import require
from pocketsize.errors import UserError

# What a batch norm may follow, with nothing in between, to be quantized together with it.
_BEFORE_BATCH_NORM = ('Conv2D', 'DepthwiseConv2D', 'Dense')
_STATE = ('bias', 'gamma', 'beta', 'moving_mean', 'moving_variance')


def tfmot():
  """Returns tfmot's `quantization.keras`; UserError if its package is missing."""
  return require('tensorflow_model_optimization', 'for --learner=uniform-tf').quantization.keras


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
        else f'tfmot refuses it: {_first_sentence(error)}'
      )
  raise UserError(
    f'tfmot quantizes no layer of {graph.model.name!r}: '
    f'{"; ".join(f"{name}: {reason}" for name, reason in refused.items())}.'
  )


def _first_sentence(error):
  named = re.sub(r'<function (\w+) at \w+>', r'\1', str(error))
  return re.split(r'\.\s|\.$|\n', named)[0]


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


class TwinLayer:
  """A layer of a twin, quantized by tfmot or not, that computes a Keras 3 layer.

  Args:
    layer: of tf_keras.
    operation: the Keras 3 layer or operator.

  Attributes:
    points: {point of a `Placement` where tfmot quantizes: 'channel' or 'tensor' for a weight, None
      for an activation}.
  """

  def __init__(self, layer, operation):
    self.layer = layer
    self.operation = operation
    self._inner = getattr(layer, 'layer', layer)
    self._takes_training = 'training' in inspect.signature(layer.call).parameters
    self.points = {}
    for point, (_, quantizer, _) in zip(self._weight_points(), self._weights(), strict=False):
      self.points[point] = 'channel' if quantizer.per_axis else 'tensor'
    for activation in getattr(layer, '_quantize_activations', ()):
      for point, name in _RANGES.items():
        if hasattr(activation, name):
          self.points[point] = None
    if getattr(layer, '_output_quantizers', ()) or getattr(layer, 'quantizer', None):
      self.points['output'] = None

  def _weights(self):
    return getattr(self.layer, '_weight_vars', ())

  def _weight_points(self):
    return targets.weight_points(self.operation)

  def connect(self, transforms, bits, is_on=None, is_frozen=None):
    """Lets the layer compute with the variables of its operation and of our quantizers.

    Args:
      transforms: {point: quantizer with `low` and `high`} for all `points`.
      bits: (of weights, of activations).
      is_on: tf.Variable that says whether values are quantized; None: always.
      is_frozen: tf.Variable that says whether a batch norm keeps its statistics; None: never.
    """
    layer = self.layer

    def changed(quantizer, bits):
      quantizer = copy.copy(quantizer)
      quantizer.num_bits = bits
      return Switched(quantizer, is_on)

    def ranges(point):
      transform = transforms[point]
      return {'min_var': transform.low.value, 'max_var': transform.high.value}

    self._share()
    if self._weights():
      layer._weight_vars = [
        (getattr(self.operation, point).value, changed(quantizer, bits[0]), ranges(point))
        for point, (_, quantizer, _) in zip(self._weight_points(), self._weights(), strict=True)
      ]
    for activation in getattr(layer, '_quantize_activations', ()):
      activation.quantizer = changed(activation.quantizer, bits[1])
      for point, name in _RANGES.items():
        if hasattr(activation, name):
          setattr(activation, name, ranges(point))
    if getattr(layer, '_output_quantizers', ()):
      layer._output_quantizers = [changed(layer._output_quantizers[0], bits[1])]
      layer._output_quantizer_vars = ranges('output')
    if getattr(layer, 'quantizer', None):
      layer.quantizer = changed(layer.quantizer, bits[1])
      layer.quantizer_vars = ranges('output')
    if is_frozen is not None and isinstance(self.operation, keras.layers.BatchNormalization):
      _freeze_while(self._inner, is_frozen)

  def _share(self):
    """Puts the operation's variables in the place of the layer's own."""
    points = () if self._weights() else self._weight_points()
    is_depthwise = type(self.operation).__name__.startswith('Depthwise')
    for point in (*_STATE, *points):
      name = 'depthwise_kernel' if is_depthwise and point == 'kernel' else point
      if isinstance(getattr(self._inner, name, None), tf.Variable):
        setattr(self._inner, name, getattr(self.operation, point).value)

  def __call__(self, inputs, training):
    """Computes the layer for a tensor, or a list of them, as a model does in training or after."""
    if self._takes_training:
      return self.layer(inputs, training=training)
    return self.layer(inputs)


# Point of a placement: attribute of tfmot's activations that has the variables.
_RANGES = {'preactivation': '_pre_activation_vars', 'output': '_post_activation_vars'}


class Switched:
  """A quantizer of tfmot that acts from some step on; its ranges follow the values before, too.

  On a GPU its gradient is computed by clipping: that of TensorFlow's fake quantizer has no
  deterministic kernel there.

  Args:
    quantizer: of tfmot.
    is_on: tf.Variable, or None for always.
  """

  def __init__(self, quantizer, is_on=None):
    self.quantizer = quantizer
    self.is_on = is_on

  def __call__(self, inputs, training, weights, **kwargs):
    quantized = self.quantizer(inputs, training, weights, **kwargs)
    if tf.config.list_physical_devices('GPU'):
      clipped = tf.clip_by_value(inputs, weights['min_var'], weights['max_var'])
      quantized = ste.replace(clipped, tf.stop_gradient(quantized))
    if self.is_on is None:
      return quantized
    return tf.cond(self.is_on, lambda: quantized, lambda: tf.identity(inputs))


def _freeze_while(batch_norm, is_frozen):
  """Makes a batch norm use and keep its moving statistics while `is_frozen` holds."""
  compute = batch_norm.call

  def call(inputs, training=None):
    if not training:
      return compute(inputs, training=False)
    return tf.cond(
      is_frozen,
      lambda: compute(inputs, training=False),
      lambda: compute(inputs, training=True),
    )

  batch_norm.call = call
