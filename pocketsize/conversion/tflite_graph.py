"""A TFLite flatbuffer as objects, with the few edits that exporting needs."""

import copy

import numpy as np

from pocketsize.conversion.kernels import channel_axis, nibbles

_FLOAT32, _INT32, _INT8, _INT4 = 0, 2, 9, 17
_DEQUANTIZE, _QUANTIZE = 6, 114
# CONV_2D, DEPTHWISE_CONV_2D, DEQUANTIZE and FULLY_CONNECTED read int4 constants.
_READ_INT4 = {3, 4, _DEQUANTIZE, 9}


class TfliteGraph:
  """One model with one subgraph. Tensors are their numbers in it.

  Args:
    content: bytes of a TFLite file.
  """

  def __init__(self, content):
    from tensorflow.lite.tools import flatbuffer_utils

    self._utils = flatbuffer_utils
    self._schema = flatbuffer_utils.schema_fb
    self._model = flatbuffer_utils.convert_bytearray_to_object(content)
    self._graph = self._model.subgraphs[0]

  def constants(self):
    """Yields (tensor, values) of the float32 constants, and of the int8 ones dequantized."""
    for number, tensor in enumerate(self._graph.tensors):
      data = self._model.buffers[tensor.buffer].data
      if data is None or not len(data) or tensor.type not in (_FLOAT32, _INT8):
        continue
      array = (
        np.asarray(data)
        .view(np.float32 if tensor.type == _FLOAT32 else np.int8)
        .reshape(tensor.shape)
      )
      if tensor.type == _INT8:
        scale, shape = tensor.quantization.scale, [1] * array.ndim
        if len(scale) > 1:
          shape[tensor.quantization.quantizedDimension] = -1
        array = array * np.reshape(scale, shape if array.ndim else ())
      yield number, array

  def _store(self, tensor, array):
    """Sets a constant's data; where equal constants of the file share them, it gets its own."""
    stored = self._graph.tensors[tensor]
    if sum(other.buffer == stored.buffer for other in self._graph.tensors) > 1:
      self._model.buffers.append(self._schema.BufferT())
      stored.buffer = len(self._model.buffers) - 1
    self._model.buffers[stored.buffer].data = np.frombuffer(
      np.ascontiguousarray(array).tobytes(), np.uint8
    )

  def is_int8(self, tensor):
    """Returns whether a tensor is int8."""
    return self._graph.tensors[tensor].type == _INT8

  def set_float(self, tensor, values):
    """Makes a constant float32, with `values` in its layout."""
    self._graph.tensors[tensor].type = _FLOAT32
    self._graph.tensors[tensor].quantization = None
    self._store(tensor, values.astype(np.float32))

  def set_int8(self, tensor, codes, scale):
    """Makes a constant int8 with `codes` and `scale`, arrays in its layout up to its shape."""
    stored = self._graph.tensors[tensor]
    scale = scale.reshape(stored.shape)
    axis = channel_axis(scale)
    if self.is_int8(tensor) and len(stored.quantization.scale) > 1:
      axis = stored.quantization.quantizedDimension
    vector = (
      scale.ravel()[:1]
      if axis is None
      else np.moveaxis(scale, axis, 0).reshape(scale.shape[axis], -1)[:, 0]
    )
    stored.type = _INT8
    stored.quantization = self._quantization(vector, axis or 0)
    self._store(tensor, codes)

  def store_int4(self, tensor):
    """Stores an int8 constant with values from -8 to 7 in 4 bits, if all that read it can.

    Returns:
      Whether they can.
    """
    if not all(self._code(op) in _READ_INT4 for op in self._readers(tensor)):
      return False
    stored = self._graph.tensors[tensor]
    self._store(tensor, nibbles(np.asarray(self._model.buffers[stored.buffer].data).view(np.int8)))
    stored.type = _INT4
    return True

  def _code(self, op):
    known = self._model.operatorCodes[op.opcodeIndex]
    return max(known.builtinCode, known.deprecatedBuiltinCode)

  def _quantization(self, scale, axis):
    quantization = self._schema.QuantizationParametersT()
    quantization.scale = scale.astype(np.float32)
    quantization.zeroPoint = np.zeros(len(scale), np.int64)
    quantization.quantizedDimension = axis
    return quantization

  def set_bias(self, tensor, bias):
    """Gives the operators that read kernel `tensor` their int32 bias.

    Its step is the input's times the weights'.

    Args:
      tensor: an int8 kernel.
      bias: [channels] float array; None for zeros.
    """
    weight_step = self._graph.tensors[tensor].quantization.scale
    for op in self._readers(tensor):
      for number in self._biases(op, tensor):
        source = next(
          self._graph.tensors[other]
          for other in op.inputs
          if other != tensor and self.is_int8(other)
        )
        step = np.asarray(source.quantization.scale[0] * weight_step, np.float64)
        values = np.zeros(self._graph.tensors[number].shape) if bias is None else bias
        self._graph.tensors[number].quantization = self._quantization(step, 0)
        self._store(number, np.round(values / step).astype(np.int32))

  def _readers(self, tensor):
    return [op for op in self._graph.operators if tensor in op.inputs]

  def _biases(self, op, kernel):
    """Returns the int32 constants that `op` reads behind its kernel: its bias, if it has one."""
    place = list(op.inputs).index(kernel)
    return [
      number
      for number in op.inputs[place + 1 :]
      if number >= 0 and self._graph.tensors[number].type == _INT32
    ]

  def biases(self, tensor):
    """Yields (values, step or None) of the biases that operators read beside kernel `tensor`."""
    for op in self._readers(tensor):
      for number in op.inputs[list(op.inputs).index(tensor) + 1 :]:
        stored = self._graph.tensors[number]
        data = self._model.buffers[stored.buffer].data
        if number < 0 or data is None or not len(data):
          continue
        if stored.type == _FLOAT32:
          yield np.asarray(data).view(np.float32), None
        elif stored.type == _INT32:
          step = np.asarray(stored.quantization.scale, np.float64)
          yield np.asarray(data).view(np.int32) * step, step

  def dequantize(self, tensor):
    """Puts a DEQUANTIZE between an int8 constant and the operators that read it."""
    output = self._add_tensor(tensor, '_float')
    readers = self._readers(tensor)
    first = self._graph.operators.index(readers[0])
    for op in readers:
      self._replace(op, 'inputs', tensor, output)
    self._insert(first, _DEQUANTIZE, tensor, output)
    for op in readers:
      # The converter leaves a dense layer on more than [batch, features] such inputs.
      self._dequantize_inputs(op)

  def make_float(self, tensor, values, bias):
    """Lets the operators that read kernel `tensor`, made int8 by the converter, compute in float.

    Args:
      tensor: the kernel.
      values: float array in its layout up to its shape.
      bias: [channels] float32, or None.
    """
    self.set_float(tensor, values)
    for op in self._readers(tensor):
      for number in self._biases(op, tensor):
        self.set_float(
          number, np.zeros(self._graph.tensors[number].shape) if bias is None else bias
        )
      self._dequantize_inputs(op)
      number = op.outputs[0]
      source = self._add_tensor(number, '_float')
      self._replace(op, 'outputs', number, source)
      self._insert(self._graph.operators.index(op) + 1, _QUANTIZE, source, number)

  def _dequantize_inputs(self, op):
    for number in [number for number in op.inputs if number >= 0 and self.is_int8(number)]:
      output = self._add_tensor(number, '_float')
      self._replace(op, 'inputs', number, output)
      self._insert(self._graph.operators.index(op), _DEQUANTIZE, number, output)

  def _add_tensor(self, like, suffix):
    tensor = copy.copy(self._graph.tensors[like])
    tensor.name = tensor.name + (suffix if isinstance(tensor.name, str) else suffix.encode())
    tensor.type, tensor.quantization, tensor.buffer = _FLOAT32, None, 0
    self._graph.tensors.append(tensor)
    return len(self._graph.tensors) - 1

  def _replace(self, op, side, old, new):
    setattr(
      op,
      side,
      np.array([new if number == old else number for number in getattr(op, side)], np.int32),
    )

  def _insert(self, index, code, source, target):
    op = self._schema.OperatorT()
    op.opcodeIndex = self._opcode(code)
    op.inputs, op.outputs = np.array([source], np.int32), np.array([target], np.int32)
    self._graph.operators.insert(index, op)

  def _opcode(self, code):
    for index, known in enumerate(self._model.operatorCodes):
      if max(known.builtinCode, known.deprecatedBuiltinCode) == code:
        known.version = max(known.version, 2)
        return index
    added = self._schema.OperatorCodeT()
    added.builtinCode = added.deprecatedBuiltinCode = code
    # Version 2 of both reads and writes int8.
    added.version = 2
    self._model.operatorCodes.append(added)
    return len(self._model.operatorCodes) - 1

  def rename(self, inputs, outputs):
    """Names the model's inputs and outputs, in the order of the TensorFlow function."""
    for names, numbers in ((inputs, self._graph.inputs), (outputs, self._graph.outputs)):
      for name, number in zip(names, numbers, strict=True):
        self._graph.tensors[number].name = name

  def save(self, path):
    """Writes the file at `path`."""
    with open(path, 'wb') as file:
      file.write(self._utils.convert_object_to_bytearray(self._model))
