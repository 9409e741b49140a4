"""A Keras model as one TensorFlow function that the converters understand.

Batch norm is folded into the layer before it, activation quantizers become TensorFlow's fake
quantizers, or operations where those do not fit (binary activations), and everything else that
training put in is baked into the kernels.
"""

import functools

import keras
import tensorflow as tf

from pocketsize import targets
from pocketsize.conversion import folding, integer, kernels
from pocketsize.errors import UserError
from pocketsize.graph import Graph, functional
from pocketsize.instrument import (
  ACTIVATION_POINTS,
  Instrumented,
  call_with_weights,
  with_preactivation,
)
from pocketsize.quantization.placement import JOINING, MOVING
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
    placements = model.placements if isinstance(model, Instrumented) else []
    # Whether a transform is on, and what it computes with, cannot be read inside `function`.
    self._placements = [placement for placement in placements if placement.transform.is_on]
    self._deployed = _deployed(model) if isinstance(model, Instrumented) else {}
    self._operations = self._read_operations()
    self._ranges = self._read_ranges()
    self.has_activations = any(low_high for low_high in self._ranges.values())
    self._batch_norms = folding.foldable(self._graph, self._separates)
    self._folded = set(self._batch_norms.values())
    self._weights = {
      node: self._fixed_weights(node)
      for node in self._graph.nodes
      if targets.weight_points(node.operation)
    }
    self._depthwise = self._depthwise_nodes() if self.has_activations else {}
    symbols = functional(source).inputs
    self.input_names = _distinct(
      [self._graph.producer(tensor).path for tensor in self._graph.inputs]
    )
    self.output_names = _distinct(
      [self._graph.producer(tensor).path for tensor in self._graph.outputs]
    )
    self.signature = [
      tf.TensorSpec((None, *symbol.shape[1:]), symbol.dtype, name=name)
      for symbol, name in zip(symbols, self.input_names, strict=True)
    ]
    self.function = tf.function(self._compute, input_signature=self.signature, autograph=False)

  @property
  def notes(self):
    """Sentences about what differs from training, with the layers that they are about."""
    return [
      f'{note} ({paths[0]})'
      if len(paths) == 1
      else f'{note} ({paths[0]} and {len(paths) - 1} more)'
      for note, paths in self._paths_by_note.items()
    ]

  def _note(self, note, path):
    paths = self._paths_by_note.setdefault(note, [])
    if path not in paths:
      paths.append(path)

  def _compute(self, *inputs):
    return [tf.identity(y) for y in self._graph.run(list(inputs), self._call, training=False)]

  def _transforms(self, path, point):
    return [each.transform for each in self._placements if each[:2] == (path, point)]

  def _weight(self, node, point):
    """Returns a weight as deployed, an array."""
    own = keras.ops.convert_to_numpy(getattr(node.operation, point))
    return self._deployed.get(node.path, {}).get(point, own)

  def _batch_norm_factors(self, node):
    return folding.batch_norm_factors(node.operation, self._deployed.get(node.path))

  def _read_operations(self):
    """Returns {transform: function of x} of activations that no file's quantizer can express."""
    operations = {}
    for path, _, transform in self._placements:
      if hasattr(transform, 'operations'):
        _check_range(path, transform)
        operations[transform] = transform.operations()
        if self._quantized:
          self._note(f'{transform.bits}-bit activations as float32 operations', path)
    return operations

  def _read_ranges(self):
    """Returns {activation quantizer: (low, high), or None where it stays float}."""
    ranges = {}
    for place in self._placements if self._quantized else ():
      if not isinstance(place.transform, RangeQuantizer):
        continue
      bits = place.transform.bits
      if bits != 8:
        self._note(
          f'{bits}-bit activations as ' + ('float32' if bits > 8 else '8 bits over the same range'),
          place.path,
        )
      if bits > 8:
        ranges[place.transform] = None
        continue
      _check_range(place.path, place.transform)
      ranges[place.transform] = place.transform.range()
    return ranges

  def _separates(self, before, after):
    """Returns whether an activation quantizer lies between two nodes."""
    return self._quantized and bool(
      self._transforms(before.path, 'output') or self._transforms(after.path, 'input')
    )

  def _fixed_weights(self, node):
    """Returns ([(variable, array)], bias to add or None) of a layer, batch norm folded in."""
    layer = node.operation
    factor = None
    bias = None if layer.bias is None else self._weight(node, 'bias')
    if node in self._batch_norms:
      factor, offset = self._batch_norm_factors(self._batch_norms[node])
      bias = ((0.0 if bias is None else bias) * factor + offset).astype('float32')
    mapping = [] if layer.bias is None else [(layer.bias, bias)]
    points = targets.weight_points(layer)
    for point in points:
      last = point == points[-1]
      transforms = self._transforms(node.path, point)
      kernel = kernels.make_kernel(
        node.path,
        layer,
        point,
        self._weight(node, point),
        transforms if self._quantized else (),
        factor if last else None,
        bias.ravel() if last and bias is not None else None,
        self._input_step(node),
      )
      axes = targets.channel_axes(layer, point)
      mapping.append((getattr(layer, point), self._constant(kernel, axes)))
    return mapping, bias if layer.bias is None else None

  def _constant(self, kernel, axes):
    """Returns what to compute with: the kernel, or a stand-in. `axes` count output channels."""
    if not self._quantized:
      return kernel.values
    if kernel.note:
      self._note(kernel.note, kernel.path)
    self.kernels.append(kernel)
    self.stand_ins.append(
      kernels.stand_in(kernel, [axis % kernel.values.ndim for axis in axes], seed=len(self.kernels))
    )
    return self.stand_ins[-1]

  def _depthwise_nodes(self):
    """Returns {node: (kernel, offset or None)} of what becomes a depthwise convolution.

    That is: a batch norm that does not fold, for which no format has an integer operation; an
    average pooling, which TFLite rounds to its input's step, coarser than the learned one; and,
    where windows reach beyond the image, the change to the learned step after it.
    """
    found = {}
    for node in self._graph.nodes:
      layer, shape = node.operation, self._graph.shape(node.inputs[0]) if node.inputs else ()
      if integer.is_image_batch_norm(layer, len(shape)) and node not in self._folded:
        factor, offset = self._batch_norm_factors(node)
        kernel = kernels.scaling_kernel(node.path, factor, offset, self._input_step(node))
      elif integer.is_average(layer) and self._range_at(node):
        size = layer.pool_size if integer.averages_whole_windows(layer) else (1, 1)
        kernel = kernels.averaging_kernel(node.path, size, shape[-1])
      else:
        continue
      found[node] = self._constant(kernel, axes=(-2, -1)), kernel.bias
    return found

  def _input_step(self, node):
    """Returns the step of the 8-bit activation that `node` reads, or None where it is float."""
    low_high = self._input_range(node)
    return (low_high[1] - low_high[0]) / 255.0 if low_high else None

  def _reads_operations(self, node):
    transforms = self._transforms(node.path, 'input')
    return any(transform in self._operations for transform in transforms)

  def _input_range(self, node):
    """Returns (low, high) of the 8-bit activation that `node` reads, or None where it is float."""
    if self._reads_operations(node):
      return None
    low_high = self._range_at(node, 'input')
    return low_high or (self._range_of(node.inputs[0]) if node.inputs else None)

  def _range_of(self, tensor):
    """Returns the (low, high) of an 8-bit activation, perhaps moved or joined, or None."""
    node = self._graph.producer(tensor)
    low_high, name = self._range_at(node), type(node.operation).__name__
    if low_high or name not in MOVING | JOINING:
      return low_high
    found = {self._range_of(each) for each in node.inputs[: None if name in JOINING else 1]}
    return found.pop() if len(found) == 1 else None

  def _range_at(self, node, point='output'):
    ranges = [
      self._ranges[transform]
      for transform in self._transforms(node.path, point)
      if self._ranges.get(transform)
    ]
    return ranges[-1] if ranges else None

  def _call(self, node, args, kwargs):
    with tf.name_scope(SCOPE + node.path.replace('/', '.')):
      for transform in self._transforms(node.path, 'input'):
        args = (self._transformed(transform, args[0]), *args[1:])
      if node.is_input or node in self._folded:
        outputs = args[0]
      elif node in self._weights:
        outputs = with_preactivation(
          node.operation,
          self._transforms(node.path, 'preactivation'),
          self._transformed,
          functools.partial(self._call_weighted, node, args, kwargs),
        )
      elif node in self._depthwise:
        outputs = self._call_depthwise(node, args, kwargs)
      elif node.path in self._deployed:
        weights = self._deployed[node.path]
        outputs = call_with_weights(node.operation, weights, args, kwargs)
      else:
        outputs = node.operation(*args, **kwargs)
      for transform in self._transforms(node.path, 'output'):
        outputs = self._transformed(transform, outputs)
    return outputs

  def _call_weighted(self, node, args, kwargs):
    mapping, bias = self._weights[node]
    mapping = [(variable, tf.constant(value)) for variable, value in mapping]

    def call(x):
      return integer.call_weighted(node.operation, (x, *args[1:]), kwargs, bias)

    with keras.StatelessScope(state_mapping=mapping):
      if self._quantized and self._reads_operations(node):
        return integer.call_subsampled(node.operation, args[0], call)
      return call(args[0])

  def _call_depthwise(self, node, args, kwargs):
    layer, low_high = node.operation, self._input_range(node)
    if not integer.is_average(layer):
      return integer.depthwise(args[0], *self._depthwise[node])
    if integer.averages_whole_windows(layer):
      return integer.depthwise(args[0], *self._depthwise[node], layer.strides)
    outputs = layer(*args, **kwargs)
    outputs = integer.fake_quantize(outputs, low_high) if low_high else outputs
    return integer.depthwise(outputs, *self._depthwise[node])

  def _transformed(self, transform, x):
    """Applies an activation's transform: quantizers by the converters' own operation."""
    if transform in self._operations:
      return self._operations[transform](x)
    if not isinstance(transform, RangeQuantizer):
      return transform(x, training=False)
    if not self._ranges.get(transform):
      return x
    return integer.fake_quantize(x, self._ranges[transform])


def _check_range(path, quantizer):
  if not quantizer.has_range:
    raise UserError(
      f'The activation quantizer at {path!r} has seen no data: calibrate or train the model before '
      'it is exported.'
    )


def _deployed(model):
  """Returns {path: {attribute: array}} of the weights of an `Instrumented` with transforms."""
  weights = {}
  for path, point, _ in model.placements:
    if point not in ACTIVATION_POINTS and point not in weights.get(path, {}):
      weights.setdefault(path, {})[point] = model.baked(path, point)
  return weights


def _distinct(paths):
  """Returns names for `paths` that differ and that every format allows."""
  names = [path.replace('/', '_') for path in paths]
  return [name if names.count(name) == 1 else f'{name}_{index}' for index, name in enumerate(names)]
