"""ONNX files: tf2onnx, then integer kernels with their DequantizeLinear.

tf2onnx turns fake quantizers of activations into QuantizeLinear/DequantizeLinear pairs but folds
those of weights into float constants; so kernels reach it as stand-ins (see `kernels.stand_in`) and
get their int8 values, scales and int32 biases here.
"""

import logging
import types

from pocketsize.conversion.errors import Folded, conversion_error, require
from pocketsize.conversion.onnx_graph import OnnxGraph
from pocketsize.conversion.onnx_int4 import with_int4

# 17 is the newest that tf2onnx, ONNX Runtime and OpenVINO all know by heart.
_OPSET = 17


def convert(lowered, path, int4=True, pairs_joins=True):
  """Writes an ONNX file with float32 inputs and outputs and a dynamic batch.

  Args:
    lowered: a `Lowered` model.
    path: of the file.
    int4: whether codes from -8 to 7 are stored in 4 bits.
    pairs_joins: whether what joins quantized values has QuantizeLinear and DequantizeLinear behind
      it, without which ONNX Runtime joins floats. OpenVINO looks through a concatenation by itself,
      and joins floats and rounds them if there is one.

  Returns:
    The list of kernels whose codes are stored in 4 bits.

  Raises:
    Folded: kernels that the file has not as they were.
    UserError: a package is missing, or tf2onnx refuses an operation.
  """
  onnx = require('onnx', 'to write ONNX files')
  model = _convert(lowered)
  graph = OnnxGraph(onnx, model)
  graph.rename(lowered.input_names, lowered.output_names)
  graph.merge_dense()
  folded = [
    kernel.path
    for kernel, stand_in in zip(lowered.kernels, lowered.stand_ins, strict=True)
    if not graph.place(kernel, stand_in)
  ]
  if folded:
    raise Folded(folded)
  if lowered.has_activations:
    graph.pair_moves(pairs_joins)
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
    function = _without_captures(lowered.function)
    return tf2onnx.convert.from_function(function, lowered.signature, opset=_OPSET)[0]
  except Exception as error:
    raise conversion_error('ONNX', error) from error
  finally:
    logger.setLevel(level)


def _without_captures(function):
  """Returns what `tf2onnx` takes for `function`, with constants for the tensors that it captured.

  tf2onnx would make inputs of them; Keras' Normalization has such tensors.
  """
  import tensorflow as tf
  from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

  concrete = function.get_concrete_function()
  if all(tensor.dtype == tf.resource for tensor in concrete.captured_inputs):
    return function
  frozen = convert_variables_to_constants_v2(
    concrete, lower_control_flow=False, aggressive_inlining=True
  )
  return types.SimpleNamespace(get_concrete_function=lambda *signature: frozen)
