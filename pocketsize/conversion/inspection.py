"""How many operations of a file compute in 8 bits and how many in float.

TFLite is read from the file. ONNX and OpenVINO files are read as their runtime rewrites them, since
a file full of QuantizeLinear says little about what is executed. Counted is what computes:
conversions between number formats and what only moves values (reshape, pad, transpose, slice) are
not.
"""

import pathlib
import tempfile

from pocketsize.conversion.errors import require
from pocketsize.conversion.runners import compile_openvino, open_file, session_options

_TFLITE_UNCOUNTED = {
  'QUANTIZE',
  'DEQUANTIZE',
  'CAST',
  'RESHAPE',
  'PAD',
  'PADV2',
  'MIRROR_PAD',
  'TRANSPOSE',
  'SLICE',
  'STRIDED_SLICE',
  'SHAPE',
  'PACK',
  'UNPACK',
  'SQUEEZE',
  'EXPAND_DIMS',
  'GATHER',
  'SPLIT',
  'FILL',
  'BROADCAST_TO',
  'TILE',
}
_ONNX_UNCOUNTED = {
  'QuantizeLinear',
  'DequantizeLinear',
  'Cast',
  'Reshape',
  'Flatten',
  'Pad',
  'Transpose',
  'Slice',
  'Shape',
  'Gather',
  'Squeeze',
  'Unsqueeze',
  'Concat',
  'Split',
  'Expand',
  'Tile',
  'Identity',
  'ReorderInput',
  'ReorderOutput',
}
_OPENVINO_UNCOUNTED = {
  'Const',
  'Input',
  'Output',
  'Reorder',
  'Reshape',
  'Transpose',
  'Pad',
  'FakeQuantize',
  'Convert',
  'ShapeOf',
  'Gather',
  'StridedSlice',
  'Concatenation',
  'Split',
  'Broadcast',
  'Tile',
  'Unsqueeze',
  'Squeeze',
}


def count_ops(path):
  """Returns (int8, float) operations of an exported file, .tflite, .onnx or .xml.

  Raises:
    UserError: another suffix, or the runtime's package is missing.
  """
  path = pathlib.Path(path)
  precisions = {'.tflite': _tflite, '.onnx': _onnx, '.xml': _openvino}[path.suffix](path)
  return sum(precisions), len(precisions) - sum(precisions)


def _tflite(path):
  """Returns for each counted operation whether it writes 8 bits."""
  schema = require('ai_edge_litert.schema_py_generated', 'to read TFLite files')
  model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
  names = {
    value: name for name, value in vars(schema.BuiltinOperator).items() if not name.startswith('_')
  }
  found = []
  for graph in model.subgraphs:
    for op in graph.operators:
      code = model.operatorCodes[op.opcodeIndex]
      name = names[max(code.builtinCode, code.deprecatedBuiltinCode)]
      kind = graph.tensors[op.outputs[0]].type
      if name not in _TFLITE_UNCOUNTED and kind in (
        schema.TensorType.INT8,
        schema.TensorType.UINT8,
        schema.TensorType.FLOAT32,
      ):
        found.append(kind != schema.TensorType.FLOAT32)
  return found


def _onnx(path):
  onnx, ort = (require(name, 'to read ONNX files') for name in ('onnx', 'onnxruntime'))
  with tempfile.TemporaryDirectory() as folder:
    options = session_options(threads=1)
    options.optimized_model_filepath = f'{folder}/optimized.onnx'
    ort.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    graph = onnx.load(options.optimized_model_filepath).graph
  types = {value.name: value.type.tensor_type.elem_type for value in graph.input}
  types.update({constant.name: constant.data_type for constant in graph.initializer})
  eight_bits = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
  found = []
  for node in graph.node:
    source = types.get(node.input[0]) if node.input else None
    target = source
    if node.op_type == 'QuantizeLinear':
      target = (
        types.get(node.input[2], onnx.TensorProto.UINT8)
        if len(node.input) > 2
        else onnx.TensorProto.UINT8
      )
    elif node.op_type == 'Cast':
      target = node.attribute[0].i
    # These take 8 bits and write float: they are integer products without a scale for the output.
    elif (
      node.op_type == 'DequantizeLinear'
      or node.op_type.endswith('ToFloat')
      or (node.op_type == 'QGemm' and len(node.input) < 9)
    ):
      target = onnx.TensorProto.FLOAT
    types.update(dict.fromkeys(node.output, target))
    is_integer = source in eight_bits or node.op_type.startswith('QLinear')
    if is_integer and target == source == onnx.TensorProto.FLOAT:
      # QLinearConcat reads the scale of its output first.
      types.update(dict.fromkeys(node.output, onnx.TensorProto.UINT8))
    if node.op_type not in _ONNX_UNCOUNTED and (is_integer or source == onnx.TensorProto.FLOAT):
      found.append(is_integer)
  return found


def _openvino(path):
  shapes = [(1, *shape[1:]) for shape in open_file(path).shapes]
  found = []
  for node in compile_openvino(path, 1, shapes).get_runtime_model().get_ops():
    kind, primitive, layers, precision = (
      node.get_rt_info()[key].astype(str)
      for key in ('layerType', 'primitiveType', 'originalLayersNames', 'runtimePrecision')
    )
    converts = layers and all('quantiz' in layer.lower() for layer in layers.split(','))
    if (
      kind not in _OPENVINO_UNCOUNTED
      and not converts
      and precision not in ('i32', 'i64', 'boolean')
    ):
      found.append(primitive.lower().endswith('i8'))
  return found
