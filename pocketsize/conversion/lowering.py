"""A Keras model as one TensorFlow function that the converters understand.

Batch norm is folded into the layer before it, activation quantizers become TensorFlow's fake
quantizers, and everything else that training put in is baked into the kernels.
"""

import keras
import tensorflow as tf

from pocketsize import targets
from pocketsize.conversion import kernels
from pocketsize.errors import UserError
from pocketsize.graph import Graph, functional
from pocketsize.instrument import Instrumented
from pocketsize.quantization.placement import MOVING

# What leads from a converter's error back to the layer: the scope of its operations.
SCOPE = 'layer_'


class Lowered:
  """A model ready for a converter.

  Args:
    model: `Instrumented`, or a Functional or Sequential model.
    quantized: whether quantizers are kept; without them the kernels are those deployed, as constants.

  Attributes:
    function: a `tf.function` from the model's inputs to the list of its outputs.
    signature: its inputs as a list of `tf.TensorSpec`; the batch is None.
    kernels: with `quantized`, the `Kernel` of each call of a weighted layer, which `function` does not
      have: the file's writer puts it in place of the stand-in.
    stand_ins: with `quantized`, what `function` has in its place: (codes, values), see `kernels.stand_in`.
    input_names, output_names: strings.
    has_activations: whether any activation is quantized.

  Raises:
    UserError: a subclassed model, or a quantizer that has seen no data.
  """

  def __init__(self, model, quantized):
    self._model = model
    self._quantized = quantized
    source = model.source if isinstance(model, Instrumented) else model
    self._graph = Graph(source)
    self.kernels, self.stand_ins = [], []
    self._paths_by_note = {}
    self._ranges = self._read_ranges()
    self.has_activations = any(low_high for low_high in self._ranges.values())
    self._batch_norms = self._foldable()
    self._folded = set(self._batch_norms.values())
    self._weights = {node: self._fixed_weights(node) for node in self._graph.nodes
                     if targets.weight_points(node.operation)}
    symbols = functional(source).inputs
    self.input_names = _distinct([self._graph.producer(tensor).path for tensor in self._graph.inputs])
    self.output_names = _distinct([self._graph.producer(tensor).path for tensor in self._graph.outputs])
    self.signature = [tf.TensorSpec((None, *symbol.shape[1:]), symbol.dtype, name=name)
                      for symbol, name in zip(symbols, self.input_names, strict=True)]
    self.function = tf.function(self._compute, input_signature=self.signature, autograph=False)

  @property
  def notes(self):
    """Sentences about what differs from training, with the layers that they are about."""
    return [f'{note} ({paths[0]})' if len(paths) == 1 else f'{note} ({paths[0]} and {len(paths) - 1} more)'
            for note, paths in self._paths_by_note.items()]

  def _note(self, note, path):
    paths = self._paths_by_note.setdefault(note, [])
    if path not in paths:
      paths.append(path)

  def _compute(self, *inputs):
    return [tf.identity(y) for y in self._graph.run(list(inputs), self._call, training=False)]

  def _transforms(self, path, point):
    return self._model.transforms_at(path, point) if isinstance(self._model, Instrumented) else []

  def _read_ranges(self):
    """Returns {activation quantizer: (low, high), or None where it stays float}."""
    ranges = {}
    for place in self._model.placements if self._quantized else ():
      if not hasattr(place.transform, 'range'):
        continue
      bits = place.transform.bits
      if bits != 8:
        self._note(f'{bits}-bit activations as ' + ('float32' if bits > 8 else '8 bits over the same range'), place.path)
      if bits > 8:
        ranges[place.transform] = None
        continue
      if not place.transform.has_range:
        raise UserError(f'The activation quantizer at {place.path!r} has seen no data: calibrate or train the '
                        'model before it is exported.')
      ranges[place.transform] = place.transform.range()
    return ranges

  def _foldable(self):
    """Returns {node of a linear weighted layer: node of the only batch norm that reads it}."""
    nodes = {}
    for node in self._graph.nodes:
      if type(node.operation) is not keras.layers.BatchNormalization or len(node.inputs) != 1:
        continue
      before = self._graph.producer(node.inputs[0])
      layer = before.operation
      quantized_between = self._quantized and (
        self._transforms(before.path, 'output') or self._transforms(node.path, 'input'))
      if (targets.weight_points(layer) and not isinstance(layer, keras.layers.EinsumDense)
          and layer.activation in (None, keras.activations.linear)
          and getattr(layer, 'data_format', 'channels_last') == 'channels_last'
          and node.operation.axis in (-1, len(self._graph.shape(node.inputs[0])) - 1)
          and self._graph.consumers(before.outputs[0]) == [node]
          and before.outputs[0] not in self._graph.outputs and not quantized_between):
        nodes[before] = node
    return nodes

  def _fixed_weights(self, node):
    """Returns ([(variable, array)], bias to add or None) of a weighted layer, batch norm folded in."""
    layer = node.operation
    bias = None if layer.bias is None else keras.ops.convert_to_numpy(layer.bias)
    factor = None
    if node in self._batch_norms:
      factor, offset = kernels.batch_norm_factors(self._batch_norms[node].operation)
      bias = ((0.0 if bias is None else bias) * factor + offset).astype('float32')
    mapping = [] if layer.bias is None else [(layer.bias, bias)]
    points = targets.weight_points(layer)
    for point in points:
      last = point == points[-1]
      transforms = self._transforms(node.path, point)
      deployed = (self._model.baked(node.path, point) if transforms
                  else keras.ops.convert_to_numpy(getattr(layer, point)))
      kernel = kernels.make_kernel(
        node.path, layer, point, deployed, transforms if self._quantized else (), factor if last else None,
        bias if last and not isinstance(layer, keras.layers.EinsumDense) else None, self._input_step(node))
      mapping.append((getattr(layer, point), self._constant(kernel, layer, point)))
    return mapping, bias if layer.bias is None else None

  def _constant(self, kernel, layer, point):
    """Returns the array to compute with: the kernel, or its stand-in."""
    if not self._quantized:
      return kernel.values
    if kernel.note:
      self._note(kernel.note, kernel.path)
    axes = [axis % kernel.values.ndim for axis in targets.channel_axes(layer, point)]
    self.kernels.append(kernel)
    self.stand_ins.append(kernels.stand_in(kernel, axes, seed=len(self.kernels)))
    return self.stand_ins[-1][1]

  def _input_step(self, node):
    """Returns the step of the 8-bit activation that `node` reads, or None where it is float."""
    if not self._quantized:
      return None
    transforms = self._transforms(node.path, 'input')
    while not transforms and node.inputs:
      node = self._graph.producer(node.inputs[0])
      transforms = self._transforms(node.path, 'output')
      if type(node.operation).__name__ not in MOVING:
        break
    ranges = [self._ranges[transform] for transform in transforms if self._ranges.get(transform)]
    return (ranges[-1][1] - ranges[-1][0]) / 255.0 if ranges else None

  def _call(self, node, args, kwargs):
    with tf.name_scope(SCOPE + node.path.replace('/', '.')):
      for transform in self._transforms(node.path, 'input'):
        args = (self._transformed(transform, args[0]), *args[1:])
      if node.is_input or node in self._folded:
        outputs = args[0]
      elif node in self._weights:
        mapping, bias = self._weights[node]
        mapping = [(variable, tf.constant(value)) for variable, value in mapping]
        with keras.StatelessScope(state_mapping=mapping):
          outputs = node.operation(*args, **kwargs)
        outputs = outputs if bias is None else tf.nn.bias_add(outputs, tf.constant(bias))
      else:
        outputs = node.operation(*args, **kwargs)
      for transform in self._transforms(node.path, 'output'):
        outputs = self._transformed(transform, outputs)
    return outputs

  def _transformed(self, transform, x):
    """Applies an activation's transform: quantizers by the converters' own operation."""
    if not hasattr(transform, 'range'):
      return transform(x, training=False)
    if not self._ranges.get(transform):
      return x
    low, high = self._ranges[transform]
    return tf.quantization.fake_quant_with_min_max_args(x, low, high, num_bits=8)


def _distinct(paths):
  """Returns names for `paths` that differ and that every format allows."""
  names = [path.replace('/', '_') for path in paths]
  return [name if names.count(name) == 1 else f'{name}_{index}' for index, name in enumerate(names)]
