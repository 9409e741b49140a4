"""A layer that tfmot quantized, computing with variables that are not its own.

Those of a Keras 3 layer and of our quantizers take their place: nothing is copied, there or back.
"""

import copy
import inspect

import keras
import tensorflow as tf

from pocketsize import ste, targets

_STATE = ('bias', 'gamma', 'beta', 'moving_mean', 'moving_variance')
# Point of a placement: attribute of tfmot's activations that has the variables.
_RANGES = {'preactivation': '_pre_activation_vars', 'output': '_post_activation_vars'}


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
    # Without the masks of Keras, which tf_keras would pass on to layers that take none.
    inputs = tf.nest.map_structure(tf.identity, inputs)
    if self._takes_training:
      return self.layer(inputs, training=training)
    return self.layer(inputs)


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
