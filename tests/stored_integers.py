"""What exported files hold, read by nothing of the library that wrote them."""

from typing import NamedTuple

import numpy as np
import onnx
import openvino
from ai_edge_litert import schema_py_generated as schema


class Stored(NamedTuple):
  """What a file holds.

  Attributes:
    kernels: list of (codes, int8; scale that broadcasts against them; bits in the file).
    activations: set of (scale, float32; zero point among 0 to 255).
  """

  kernels: list
  activations: set


def read(path):
  """Returns the `Stored` of a .tflite, .onnx or .xml file."""
  return {'.tflite': _tflite, '.onnx': _onnx, '.xml': _openvino}[path.suffix](path)


def _along(scale, axis, rank):
  scale = np.ravel(scale)
  return scale.reshape([scale.size if place == axis else 1 for place in range(rank)])


def _unpacked(content, count):
  """Returns `count` int8 codes: two in a byte, the first of them in its lower half."""
  halves = np.ravel(content).view(np.uint8)
  codes = np.stack([halves & 15, halves >> 4], axis=1).ravel()[:count].astype(np.int8)
  return np.where(codes > 7, codes - 16, codes)


def _tflite(path):
  model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
  graph, kinds = model.subgraphs[0], schema.TensorType
  kernels, activations = [], set()
  for tensor in graph.tensors:
    data, scales = model.buffers[tensor.buffer].data, getattr(tensor.quantization, 'scale', None)
    if tensor.type not in (kinds.INT8, kinds.INT4) or scales is None:
      continue
    if data is None or not len(data):
      (scale,), (zero_point,) = scales, tensor.quantization.zeroPoint
      activations.add((np.float32(scale), int(zero_point) + 128))
      continue
    assert not np.any(tensor.quantization.zeroPoint)
    codes = np.asarray(data, np.uint8).view(np.int8)
    if tensor.type == kinds.INT4:
      codes = _unpacked(codes, np.prod(tensor.shape))
    axis = tensor.quantization.quantizedDimension if len(scales) > 1 else None
    codes = codes.reshape(tensor.shape)
    bits = 4 if tensor.type == kinds.INT4 else 8
    kernels.append((codes, _along(scales, axis, codes.ndim), bits))
  return Stored(kernels, activations)


def _onnx(path):
  graph = onnx.load(path).graph
  constants = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
  casts = {node.output[0]: node.input[0] for node in graph.node if node.op_type == 'Cast'}
  kernels, activations = [], set()
  for node in graph.node:
    if node.op_type == 'QuantizeLinear':
      scale, zero_point = (constants[name] for name in node.input[1:])
      activations.add((np.float32(scale), int(zero_point) + 128 * (zero_point.dtype == np.int8)))
    codes = constants.get(casts.get(node.input[0], node.input[0])) if node.input else None
    if node.op_type == 'DequantizeLinear' and codes is not None and codes.ndim > 1:
      assert not np.any(constants[node.input[2]])
      axis = next((attribute.i for attribute in node.attribute if attribute.name == 'axis'), None)
      scale = _along(constants[node.input[1]], axis, codes.ndim)
      bits = 4 if codes.dtype.name == 'int4' else 8
      kernels.append((codes.astype(np.int8), scale, bits))
  return Stored(kernels, activations)


def _openvino(path):
  kernels, activations = [], set()
  for node in openvino.Core().read_model(path).get_ops():
    inputs = [value.get_source_output().get_node() for value in node.inputs()]
    if node.get_type_name() == 'FakeQuantize':
      low, high = (float(np.ravel(value.data)[0]) for value in inputs[1:3])
      scale = (high - low) / 255.0
      activations.add((np.float32(scale), round(-low / scale)))
    if node.get_type_name() != 'Constant' or len(node.shape) < 2:
      continue
    kind = node.get_element_type().get_type_name()
    if kind in ('i4', 'i8'):
      codes = node.data if kind == 'i8' else _unpacked(node.data, np.prod(node.shape))
      codes = np.reshape(codes, node.shape)
      while node.get_type_name() != 'Multiply':
        (node,) = {value.get_node() for value in node.output(0).get_target_inputs()}
      scale = node.input(1).get_source_output().get_node().data
      kernels.append((np.asarray(codes, np.int8), np.asarray(scale), int(kind[1])))
  return Stored(kernels, activations)
