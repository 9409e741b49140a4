"""A Keras model as one TensorFlow function that the converters understand.

Batch norm is folded into the layer before it, activation quantizers become TensorFlow's fake
quantizers, or operations where those do not fit (binary activations), and everything else that
training put in is baked into the kernels.
"""

import copy
import functools

import keras
import tensorflow as tf

from pocketsize.calls import call_with_weights, with_preactivation
from pocketsize.conversion import integer, precision
from pocketsize.conversion.deployed import Deployed
from pocketsize.graph import functional
from pocketsize.instrument import Instrumented
from pocketsize.quantization.range_quantizer import RangeQuantizer

# What leads from a converter's error back to the layer: the scope of its operations.
SCOPE = 'layer_'


class Lowered:
  """A model ready for a converter.

  Args:
    model: `Instrumented`, or a Functional or Sequential model.
    quantized: whether quantizers are kept; without them the kernels as deployed are constants.

  Attributes:
    function: a `tf.function` from the model's inputs to the list of its outputs.
    signature: its inputs as a list of `tf.TensorSpec`; the batch is None.
    kernels: with `quantized`, the `Kernel` of each call of a weighted layer, which `function` does
      not have: the file's writer puts it in place of the stand-in.
    stand_ins: with `quantized`, what `function` has in its place, see `kernels.stand_in`.
    input_names, output_names: strings.
    has_activations: whether any activation is quantized.
    notes: sentences about what differs from training.

  Raises:
    UserError: a subclassed model, or a quantizer that has seen no data.
  """

  def __init__(self, model, quantized):
    self._deployed = Deployed(model, quantized)
    self._graph = self._deployed.graph
    self.kernels, self.stand_ins = self._deployed.kernels, self._deployed.stand_ins
    self.has_activations, self.notes = self._deployed.has_activations, self._deployed.notes
    self.input_names, self.output_names = (
      _distinct([self._graph.producer(tensor).path for tensor in tensors])
      for tensors in (self._graph.inputs, self._graph.outputs)
    )
    symbols = functional(model.source if isinstance(model, Instrumented) else model).inputs
    self.signature = [
      tf.TensorSpec((None, *symbol.shape[1:]), precision.widened(symbol.dtype), name=name)
      for symbol, name in zip(symbols, self.input_names, strict=True)
    ]
    self._separations = frozenset()
    self.function = self._traced()

  def _traced(self):
    return tf.function(self._compute, input_signature=self.signature, autograph=False)

  def separated(self, paths):
    """Returns the same with an operation, through which no converter folds, beside layers.

    It is before a layer, and behind it, too, if it is before it already; there is none where a fake
    quantizer separates.

    Args:
      paths: of the layers.

    Returns:
      A `Lowered`; None if all the layers are between two already.
    """
    points = {
      (path, 'output' if (path, 'input') in self._separations else 'input') for path in paths
    }
    if points <= self._separations:
      return None
    other = copy.copy(self)
    other._separations = self._separations | points
    other.function = other._traced()
    return other

  def _compute(self, *inputs):
    with precision.in_float32(self._graph.layers.values()):
      outputs = self._graph.run(list(inputs), self._call, training=False)
    return [tf.identity(y) for y in outputs]

  def _call(self, node, args, kwargs):
    deployed = self._deployed
    with tf.name_scope(SCOPE + node.path.replace('/', '.')):
      for transform in deployed.transforms(node.path, 'input'):
        args = (self._transformed(transform, args[0]), *args[1:])
      if (node.path, 'input') in self._separations and not deployed.input_range(node):
        args = (_separate(args[0]), *args[1:])
      if node.is_input or node in deployed.folded:
        outputs = args[0]
      elif node in deployed.weights:
        outputs = with_preactivation(
          node.operation,
          deployed.transforms(node.path, 'preactivation'),
          self._transformed,
          functools.partial(self._call_weighted, node, args, kwargs),
        )
      elif node in deployed.depthwise:
        outputs = self._call_depthwise(node, args, kwargs)
      elif node.path in deployed.weights_by_path:
        weights = deployed.weights_by_path[node.path]
        outputs = call_with_weights(node.operation, weights, args, kwargs)
      else:
        outputs = node.operation(*args, **kwargs)
      if (node.path, 'output') in self._separations and not deployed.is_rounded_behind(node):
        outputs = _separate(outputs)
      for transform in deployed.transforms(node.path, 'output'):
        outputs = self._transformed(transform, outputs)
    return outputs

  def _call_weighted(self, node, args, kwargs):
    mapping, bias = self._deployed.weights[node]
    mapping = [(variable, tf.constant(value)) for variable, value in mapping]

    def call(x):
      return integer.call_weighted(node.operation, (x, *args[1:]), kwargs, bias)

    with keras.StatelessScope(state_mapping=mapping):
      if self._deployed.quantized and self._deployed.reads_operations(node):
        return integer.call_subsampled(node.operation, args[0], call)
      return call(args[0])

  def _call_depthwise(self, node, args, kwargs):
    layer, low_high = node.operation, self._deployed.input_range(node)
    weights = self._deployed.depthwise[node]
    if not integer.is_average(layer):
      return integer.depthwise(args[0], *weights)
    if integer.averages_whole_windows(layer):
      return integer.depthwise(args[0], *weights, layer.strides)
    outputs = layer(*args, **kwargs)
    outputs = integer.fake_quantize(outputs, low_high) if low_high else outputs
    return integer.depthwise(outputs, *weights)

  def _transformed(self, transform, x):
    """Applies an activation's transform: quantizers by the converters' own operation."""
    operations = self._deployed.operations(transform)
    if operations:
      return operations(x)
    if not isinstance(transform, RangeQuantizer):
      return transform(x, training=False)
    low_high = self._deployed.range(transform)
    return integer.fake_quantize(x, low_high) if low_high else x


def _separate(x):
  """Returns x, by an operation that no converter removes or folds through."""
  return tf.minimum(x, tf.constant(float('inf'), x.dtype))


def _distinct(paths):
  """Returns names for `paths` that differ and that every format allows."""
  names = [path.replace('/', '_') for path in paths]
  return [name if names.count(name) == 1 else f'{name}_{index}' for index, name in enumerate(names)]
