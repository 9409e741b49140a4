"""ONNX files: tf2onnx, then integer kernels with their DequantizeLinear.

tf2onnx turns fake quantizers of activations into QuantizeLinear/DequantizeLinear pairs but folds
those of weights into float constants; so kernels reach it as stand-ins (see `kernels.stand_in`) and
get their int8 values, scales and int32 biases here.
"""

import logging

from pocketsize.conversion.errors import conversion_error, require
from pocketsize.conversion.onnx_graph import OnnxGraph
from pocketsize.conversion.onnx_int4 import with_int4

# 17 is the newest that tf2onnx, ONNX Runtime and OpenVINO all know by heart.
_OPSET = 17


def convert(lowered, path, int4=True):
  """Writes an ONNX file with float32 inputs and outputs and a dynamic batch.

  Args:
    lowered: a `Lowered` model.
    path: of the file.
    int4: whether codes from -8 to 7 are stored in 4 bits.

  Returns:
    The list of kernels that are.

  Raises:
    UserError: a package is missing, or tf2onnx refuses an operation.
  """
  onnx = require('onnx', 'to write ONNX files')
  model = _convert(lowered)
  graph = OnnxGraph(onnx, model)
  graph.rename(lowered.input_names, lowered.output_names)
  graph.merge_dense()
  for kernel, stand_in in zip(lowered.kernels, lowered.stand_ins, strict=True):
    graph.place(kernel, stand_in)
  if lowered.has_activations:
    graph.pair_moves()
    graph.quantize_biases()
  packed = with_int4(onnx, model) if int4 else None
  model = packed or model
  OnnxGraph(onnx, model).tidy()
  try:
    onnx.checker.check_model(model)
  except onnx.checker.ValidationError as error:
    raise conversion_error('ONNX', error) from error
  onnx.save(model, str(path))
  return [kernel for kernel in lowered.kernels if packed and kernel.fits_int4]


def _convert(lowered):
  tf2onnx = require('tf2onnx', 'to write ONNX files')
  logger = logging.getLogger('tf2onnx')
  level = logger.level
  try:
    logger.setLevel(logging.CRITICAL)
    return tf2onnx.convert.from_function(lowered.function, lowered.signature, opset=_OPSET)[0]
  except Exception as error:
    raise conversion_error('ONNX', error) from error
  finally:
    logger.setLevel(level)
