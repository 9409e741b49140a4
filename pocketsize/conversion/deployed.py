"""What files hold of a model: weights as deployed, ranges of activations, or operations for them.

All of it is read once, as arrays and numbers, before anything is converted.
"""

import math

import keras

from pocketsize import folding, targets
from pocketsize.conversion import integer, kernels
from pocketsize.graph import Graph
from pocketsize.instrument import ACTIVATION_POINTS, Instrumented
from pocketsize.quantization.placement import JOINING, MOVING
from pocketsize.quantization.range_quantizer import RangeQuantizer
from pocketsize.transform import check_data


class Deployed:
  """A model read for a converter.

  Args:
    model: `Instrumented`, or a Functional or Sequential model.
    quantized: whether quantizers are kept; without them the kernels as deployed are constants.

  Attributes:
    graph: the `Graph` of the model without its transforms.
    quantized: as given.
    kernels, stand_ins: see `Lowered`.
    weights: {weighted node: ([(variable, array)], bias to add or None)}, batch norm folded in.
    depthwise: {node: (kernel, offset or None)} of what becomes a depthwise convolution.
    folded: the batch norms that are in the weights of the layer before them.
    weights_by_path: {path: {attribute: array}} of the weights that transforms are at.
    has_activations: whether any activation is quantized.

  Raises:
    UserError: a subclassed model, or a quantizer that has seen no data.
  """

  def __init__(self, model, quantized):
    self.quantized = quantized
    instrumented = isinstance(model, Instrumented)
    self.graph = Graph(model.source if instrumented else model)
    self.kernels, self.stand_ins = [], []
    self._paths_by_note = {}
    # Whether a transform is on, and what it computes with, cannot be read while converting.
    placements = model.placements if instrumented else []
    self._placements = [placement for placement in placements if placement.transform.is_on]
    # A float file has no quantizer but those that are operations.
    check_data(each for each in self._placements if quantized or each.transform.operations())
    self.weights_by_path = _transformed_weights(model) if instrumented else {}
    self._operations = self._read_operations()
    self._ranges = self._read_ranges()
    self.has_activations = any(self._ranges.values())
    self._batch_norms = folding.foldable(self.graph, self._separates)
    self.folded = set(self._batch_norms.values())
    self._used = _used(self.graph)
    self.weights = {
      node: self._fixed_weights(node)
      for node in self._used
      if targets.weight_points(node.operation)
    }
    self.depthwise = self._depthwise_nodes() if self.has_activations else {}

  @property
  def notes(self):
    """Sentences about what differs from training, with the layers that they are about."""
    return [
      f'{note} ({paths[0]})'
      if len(paths) == 1
      else f'{note} ({paths[0]} and {len(paths) - 1} more)'
      for note, paths in self._paths_by_note.items()
    ]

  def transforms(self, path, point):
    """Returns the transforms at a place that are on, in order."""
    return [each.transform for each in self._placements if each[:2] == (path, point)]

  def operations(self, transform):
    """Returns the function of x that stands for an activation's transform, or None."""
    return self._operations.get(transform)

  def range(self, transform):
    """Returns (low, high) of an activation's quantizer, or None where it stays float."""
    return self._ranges.get(transform)

  def reads_operations(self, node):
    """Returns whether what `node` reads is computed by operations in a quantizer's place."""
    return any(self.operations(transform) for transform in self.transforms(node.path, 'input'))

  def input_range(self, node):
    """Returns (low, high) of the 8-bit activation that `node` reads, or None where it is float."""
    if self.reads_operations(node):
      return None
    low_high = self._range_at(node, 'input')
    return low_high or (self._range_of(node.inputs[0]) if node.inputs else None)

  def is_rounded_behind(self, node):
    """Returns whether all that read what `node` computes, batch norm folded in, read 8 bits."""
    node = self._batch_norms.get(node, node)
    if self._range_at(node):
      return True
    readers = [reader for tensor in node.outputs for reader in self.graph.consumers(tensor)]
    return bool(readers) and all(self._range_at(reader, 'input') for reader in readers)

  def _range_of(self, tensor):
    """Returns the (low, high) of an 8-bit activation, perhaps moved or joined, or None."""
    node = self.graph.producer(tensor)
    low_high, name = self._range_at(node), type(node.operation).__name__
    if low_high or name not in MOVING | JOINING:
      return low_high
    found = {self._range_of(each) for each in node.inputs[: None if name in JOINING else 1]}
    return found.pop() if len(found) == 1 else None

  def _note(self, note, path):
    paths = self._paths_by_note.setdefault(note, [])
    if path not in paths:
      paths.append(path)

  def _read_operations(self):
    """Returns {transform: function of x} of activations that no file's quantizer can express."""
    operations = {}
    for path, _, transform in self._placements:
      function = transform.operations()
      if function is None:
        continue
      operations[transform] = function
      if self.quantized:
        self._note(f'{transform.bits}-bit activations as float32 operations', path)
    return operations

  def _read_ranges(self):
    """Returns {activation quantizer: (low, high), or None where it stays float}."""
    ranges = {}
    for place in self._placements if self.quantized else ():
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
      ranges[place.transform] = place.transform.range()
    return ranges

  def _separates(self, before, after):
    """Returns whether an activation quantizer lies between two nodes."""
    return self.quantized and bool(
      self.transforms(before.path, 'output') or self.transforms(after.path, 'input')
    )

  def _weight(self, node, point):
    """Returns a weight as deployed, an array."""
    own = keras.ops.convert_to_numpy(getattr(node.operation, point))
    return self.weights_by_path.get(node.path, {}).get(point, own)

  def _batch_norm_factors(self, node):
    return folding.batch_norm_factors(node.operation, self.weights_by_path.get(node.path))

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
      transforms = self.transforms(node.path, point)
      kernel = kernels.make_kernel(
        node.path,
        layer,
        point,
        self._weight(node, point),
        transforms if self.quantized else (),
        factor if last else None,
        bias if last and self._is_by_channel(node, point, bias) else None,
        self._input_step(node),
      )
      axes = targets.channel_axes(layer, point)
      mapping.append((getattr(layer, point), self._constant(node, kernel, axes)))
    return mapping, bias if layer.bias is None else None

  @staticmethod
  def _is_by_channel(node, point, bias):
    """Returns whether a bias, or None, has a value for each output channel.

    That of an EinsumDense layer may cover other axes: it is then added behind the kernel.
    """
    layer = node.operation
    axes, shape = targets.channel_axes(layer, point), getattr(layer, point).shape
    return bias is not None and bias.shape == (math.prod(shape[axis] for axis in axes),)

  def _constant(self, node, kernel, axes):
    """Returns what to compute with: the kernel, or a stand-in. `axes` count output channels."""
    if not self.quantized:
      return kernel.values
    if kernel.note:
      self._note(kernel.note, kernel.path)
    self.kernels.append(kernel)
    axes = [axis % kernel.values.ndim for axis in axes]
    self.stand_ins.append(kernels.stand_in(kernel, axes, len(self.kernels), self._input_step(node)))
    return self.stand_ins[-1]

  def _depthwise_nodes(self):
    """Returns {node: (kernel, offset or None)} of what becomes a depthwise convolution.

    That is: a batch norm that does not fold, for which no format has an integer operation; an
    average pooling, which TFLite rounds to its input's step, coarser than the learned one; and,
    where windows reach beyond the image, the change to the learned step after it.
    """
    found = {}
    for node in self._used:
      layer, shape = node.operation, self.graph.shape(node.inputs[0]) if node.inputs else ()
      if integer.is_image_batch_norm(layer, len(shape)) and node not in self.folded:
        factor, offset = self._batch_norm_factors(node)
        kernel = kernels.scaling_kernel(node.path, factor, offset, self._input_step(node))
      elif integer.is_average(layer) and self._range_at(node):
        size = layer.pool_size if integer.averages_whole_windows(layer) else (1, 1)
        kernel = kernels.averaging_kernel(node.path, size, shape[-1])
      else:
        continue
      found[node] = self._constant(node, kernel, axes=(-2, -1)), kernel.bias
    return found

  def _input_step(self, node):
    """Returns the step of the 8-bit activation that `node` reads, or None where it is float."""
    low_high = self.input_range(node)
    return (low_high[1] - low_high[0]) / 255.0 if low_high else None

  def _range_at(self, node, point='output'):
    ranges = [self.range(transform) for transform in self.transforms(node.path, point)]
    return next((low_high for low_high in reversed(ranges) if low_high), None)


def _used(graph):
  """Returns the nodes, in order, that an output depends on: converters drop the others.

  A nested model may have outputs that the model around it does not read.
  """
  numbers, used = set(graph.outputs), []
  for node in reversed(graph.nodes):
    if numbers.intersection(node.outputs):
      numbers.update(node.inputs)
      used.append(node)
  return used[::-1]


def _transformed_weights(model):
  """Returns {path: {attribute: array}} of the weights of an `Instrumented` with transforms."""
  weights = {}
  for path, point, _ in model.placements:
    if point not in ACTIVATION_POINTS and point not in weights.get(path, {}):
      weights.setdefault(path, {})[point] = model.baked(path, point)
  return weights
