"""Codes of kernels in an ONNX file, two in a byte where they fit."""

from pocketsize.conversion.kernels import fit_int4, nibbles

# Has int4, and Cast from it.
_OPSET = 21


def with_int4(onnx, model):
  """Returns a model of opset 21 with int8 codes of kernels from -8 to 7 in 4 bits, or None.

  A Cast makes int8 of them, which runtimes compute once, when they load the file: from int4 itself
  ONNX Runtime has no integer convolution.

  Args:
    onnx: the package.
    model: an `onnx.ModelProto`, nodes in order of execution.

  Returns:
    None where no kernel has such codes, or an operation of the model cannot be lifted to opset 21.
  """
  if not _codes(onnx, model.graph):
    return None
  try:
    model = onnx.version_converter.convert_version(model, _OPSET)
  except (RuntimeError, onnx.version_converter.ConvertError):
    return None
  graph = model.graph
  # Shapes of all tensors, which the conversion leaves: nobody needs them, and their names have
  # counts.
  graph.ClearField('value_info')
  for codes in _codes(onnx, graph):
    packed = onnx.TensorProto(
      name=f'{codes.name}_int4',
      dims=codes.dims,
      data_type=onnx.TensorProto.INT4,
      raw_data=nibbles(onnx.numpy_helper.to_array(codes)).tobytes(),
    )
    cast = onnx.helper.make_node(
      'Cast', [packed.name], [codes.name], name=f'{codes.name}_Cast', to=onnx.TensorProto.INT8
    )
    graph.initializer.remove(codes)
    graph.initializer.append(packed)
    graph.node.insert(0, cast)
  return model


def _codes(onnx, graph):
  """Returns the initializers that hold such codes."""
  read = {node.input[0] for node in graph.node if node.op_type == 'DequantizeLinear'}
  return [
    constant
    for constant in graph.initializer
    if constant.name in read
    and constant.data_type == onnx.TensorProto.INT8
    and len(constant.dims) > 1
    and fit_int4(onnx.numpy_helper.to_array(constant))
  ]
