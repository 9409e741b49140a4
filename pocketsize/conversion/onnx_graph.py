"""An ONNX graph with the few edits that exporting needs."""

import re

import numpy as np

from pocketsize.conversion.kernels import channel_axis, layout

# What tf2onnx appends to a name to make it the only one.
_COUNT = re.compile(r'__\d+')
# They move values: with a pair behind them, a runtime moves 8-bit codes.
_MOVING = frozenset(
  {
    'MaxPool',
    'GlobalMaxPool',
    'Pad',
    'Transpose',
    'Reshape',
    'Squeeze',
    'Unsqueeze',
    'Slice',
    'Flatten',
    'Gather',
  }
)
# They move values where all that they read has one step.
_JOINING = frozenset({'Concat', 'Max', 'Min'})


def _are_equal(step, other, constants):
  """Returns whether two lists of names stand for the same values."""
  return step == other or (
    len(step) == len(other)
    and all(np.array_equal(constants[a], constants[b]) for a, b in zip(step, other, strict=True))
  )


class OnnxGraph:
  """Edits a model in place.

  Args:
    onnx: the package.
    model: an `onnx.ModelProto`, nodes in order of execution.
  """

  def __init__(self, onnx, model):
    self._onnx = onnx
    self._graph = model.graph

  def _constants(self):
    return {
      constant.name: self._onnx.numpy_helper.to_array(constant)
      for constant in self._graph.initializer
    }

  def _producers(self):
    return {name: node for node in self._graph.node for name in node.output}

  def _readers(self, name):
    return [node for node in self._graph.node if name in node.input]

  def _add_constant(self, name, array):
    self._graph.initializer.append(self._onnx.numpy_helper.from_array(array, name))

  def _insert(self, index, operation, inputs, output, **attributes):
    self._graph.node.insert(
      index,
      self._onnx.helper.make_node(
        operation, inputs, [output], name=f'{output}_{operation}', **attributes
      ),
    )

  def rename(self, inputs, outputs):
    """Names the model's inputs and outputs, in order, and the batch."""
    renamed = {}
    for names, values in ((inputs, self._graph.input), (outputs, self._graph.output)):
      for name, value in zip(names, values, strict=True):
        renamed[value.name] = value.name = name
        value.type.tensor_type.shape.dim[0].dim_param = 'batch'
    for node in self._graph.node:
      for side in (node.input, node.output):
        for index, name in enumerate(side):
          side[index] = renamed.get(name, name)

  def merge_dense(self):
    """Makes one Gemm, which runtimes run in int8, of a matrix product and the bias behind it."""
    constants = self._constants()
    ranks = self._ranks()
    for product in [node for node in self._graph.node if node.op_type == 'MatMul']:
      readers = self._readers(product.output[0])
      if (
        len(readers) != 1
        or readers[0].op_type != 'Add'
        or product.input[1] not in constants
        or ranks.get(product.input[0]) != 2
      ):
        continue
      bias = next((name for name in readers[0].input if name != product.output[0]), None)
      if bias in constants and constants[bias].ndim == 1:
        product.op_type = 'Gemm'
        product.input.append(bias)
        product.output[0] = readers[0].output[0]
        self._graph.node.remove(readers[0])

  def _ranks(self):
    model = self._onnx.helper.make_model(
      self._graph, opset_imports=[self._onnx.helper.make_opsetid('', 17)]
    )
    graph = self._onnx.shape_inference.infer_shapes(model).graph
    return {
      value.name: len(value.type.tensor_type.shape.dim)
      for values in (graph.input, graph.value_info, graph.output)
      for value in values
      if value.type.tensor_type.HasField('shape')
    }

  def place(self, kernel, stand_in):
    """Puts a `Kernel` in the place of its stand-in, a float32 array in Keras' layout.

    Returns:
      Whether the graph has the stand-in.
    """
    for constant in self._graph.initializer:
      if (
        constant.data_type != self._onnx.TensorProto.FLOAT
        or np.prod(constant.dims) != stand_in.size
      ):
        continue
      order = layout(stand_in, self._onnx.numpy_helper.to_array(constant))
      if order is not None:
        self._set(constant, kernel, order)
        return True
    return False

  def _set(self, constant, kernel, order):
    name, shape = constant.name, tuple(constant.dims)
    self._graph.initializer.remove(constant)
    if kernel.codes is None:
      self._add_constant(name, kernel.values.transpose(order).reshape(shape))
      return
    scale = kernel.scale.transpose(order).reshape(shape)
    axis = channel_axis(scale)
    scale = (
      scale.ravel()[0]
      if axis is None
      else np.moveaxis(scale, axis, 0).reshape(shape[axis], -1)[:, 0]
    )
    self._add_constant(f'{name}_codes', kernel.codes.transpose(order).reshape(shape))
    self._add_dequantize(name, f'{name}_codes', np.asarray(scale, np.float32), axis or 0, np.int8)

  def _add_dequantize(self, name, codes, scale, axis, dtype):
    """Computes float tensor `name` from constant `codes`."""
    self._add_constant(f'{name}_scale', scale)
    self._add_constant(f'{name}_zero', np.zeros(scale.shape, dtype))
    self._insert(0, 'DequantizeLinear', [codes, f'{name}_scale', f'{name}_zero'], name, axis=axis)

  def pair_moves(self, joins):
    """Puts a QuantizeLinear/DequantizeLinear pair behind what only moves quantized values.

    Args:
      joins: whether also behind what joins values of one step.
    """
    for node in list(self._graph.node):
      step = self._moved_step(node, self._producers())
      readers = self._readers(node.output[0])
      if (
        node.op_type not in (_MOVING | _JOINING if joins else _MOVING)
        or not step
        or all(reader.op_type == 'QuantizeLinear' for reader in readers)
      ):
        continue
      name = node.output[0]
      node.output[0] = f'{name}_moved'
      index = [other.output[0] for other in self._graph.node].index(node.output[0]) + 1
      self._insert(index, 'QuantizeLinear', [f'{name}_moved', *step], f'{name}_codes')
      self._insert(index + 1, 'DequantizeLinear', [f'{name}_codes', *step], name)

  def _moved_step(self, node, producers):
    """Returns the names of scale and zero point of what `node` writes; [] unless it moves it."""
    if node is not None and node.op_type == 'DequantizeLinear':
      return list(node.input[1:])
    if node is None or not node.input or node.op_type not in _MOVING | _JOINING:
      return []
    names = node.input if node.op_type in _JOINING else node.input[:1]
    first, *others = [self._moved_step(producers.get(name), producers) for name in names]
    constants = self._constants() if any(step != first for step in others) else {}
    return first if all(_are_equal(step, first, constants) for step in others) else []

  def quantize_biases(self):
    """Makes biases int32 multiples of (input step * weight step), as integer kernels want them.

    A layer with quantized input but float weights gets an int32 bias of a very fine step instead: a
    float bias would let ONNX Runtime quantize the weights by itself, to one int8 scale for the
    whole kernel (its pass WeightBiasQuantization).
    """
    constants, producers = self._constants(), self._producers()
    for node in list(self._graph.node):
      if node.op_type not in ('Conv', 'ConvTranspose', 'Gemm'):
        continue
      input_step, weight_step = (
        self._step(producers.get(name), constants) for name in node.input[:2]
      )
      if input_step is None or (weight_step is not None and len(node.input) < 3):
        continue
      bias = (
        constants[node.input[2]]
        if len(node.input) > 2
        else np.zeros(
          constants[node.input[1]].shape[0 if node.op_type == 'Conv' else 1], np.float32
        )
      )
      fine = max(np.abs(bias).max(), 1e-6) / 2.0**30
      scale = np.broadcast_to(fine if weight_step is None else input_step * weight_step, bias.shape)
      scale = scale.astype(np.float32)
      name = f'{node.name}_bias'
      self._add_constant(
        f'{name}_codes', np.round(bias / scale.astype(np.float64)).astype(np.int32)
      )
      self._add_dequantize(name, f'{name}_codes', scale, 0, np.int32)
      node.input[2:] = [name]

  @staticmethod
  def _step(source, constants):
    """Returns the scale of what DequantizeLinear node `source` computes, None for another node."""
    return (
      constants[source.input[1]]
      if source is not None and source.op_type == 'DequantizeLinear'
      else None
    )

  def tidy(self):
    """Removes constants that nobody reads, and names the rest so that the same model gives the same
    file.

    tf2onnx numbers what it makes through the whole life of the process, and calls equal constants
    by the name of any of them.
    """
    self._remove_unread()
    self._graph.ClearField('doc_string')  # It has the number of a TensorFlow function.
    if any(attribute.HasField('g') for node in self._graph.node for attribute in node.attribute):
      return  # The inner graphs of loops read these names.
    ends = {end.name for end in (*self._graph.input, *self._graph.output)}
    constants = {constant.name: constant for constant in self._graph.initializer}
    names = {}
    for node in self._graph.node:
      for name in (*node.input, *node.output):
        if name in ends:
          names[name] = name
        elif name not in names:
          plain, counted = _COUNT.subn('', name)
          plain = 'constant' if counted and name in constants else plain
          names[name] = f'{plain}__{len(names)}' if counted else name
    for index, node in enumerate(self._graph.node):
      node.input[:] = [names[name] for name in node.input]
      node.output[:] = [names[name] for name in node.output]
      plain, counted = _COUNT.subn('', node.name)
      node.name = f'{plain}__{index}' if counted else node.name
    ordered = [constants[name] for name in names if name in constants]
    for constant in ordered:
      constant.name = names[constant.name]
    ordered = [constant.SerializeToString() for constant in ordered]
    del self._graph.initializer[:]
    for content in ordered:
      self._graph.initializer.add().ParseFromString(content)

  def _remove_unread(self):
    read = {name for node in self._graph.node for name in node.input}
    for constant in [constant for constant in self._graph.initializer if constant.name not in read]:
      self._graph.initializer.remove(constant)
