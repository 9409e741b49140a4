"""Exported files as functions of NumPy batches, each in the runtime that its suffix names."""

import pathlib

import numpy as np

from pocketsize.conversion.errors import require
from pocketsize.errors import UserError


class Runner:
  """A loaded file: runner(x, ...) takes arrays [batch, ...] and returns the list of output arrays.

  Attributes:
    shapes: of the inputs; the batch is None.
  """

  def __init__(self, call, shapes):
    self._call = call
    self.shapes = [(None, *shape[1:]) for shape in shapes]

  def __call__(self, *arrays):
    if [array.shape[1:] for array in arrays] != [shape[1:] for shape in self.shapes]:
      raise UserError(
        f'The file takes arrays of shapes {self.shapes}. '
        f'Received: {[array.shape for array in arrays]}.'
      )
    return self._call(*[np.ascontiguousarray(array) for array in arrays])


def open_file(path, threads=1):
  """Loads an exported file. All runtimes compute float operations in float32.

  Args:
    path: .tflite (LiteRT), .onnx (ONNX Runtime) or .xml (OpenVINO).
    threads: of the runtime, at least 1.

  Returns:
    A `Runner`; the batch may differ from call to call.

  Raises:
    UserError: no such file, another suffix, a broken file, or the runtime's package is missing.
  """
  path = pathlib.Path(path)
  if path.suffix not in _OPENERS:
    raise UserError(f'An exported file ends in {", ".join(_OPENERS)}. Received: {path}.')
  if not path.is_file():
    raise UserError(f'There is no file {path}.')
  try:
    return _OPENERS[path.suffix](path, threads)
  except UserError:
    raise
  except Exception as error:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    raise UserError(f'File {path} cannot be loaded: {lines[0][:300]}') from error


def _open_tflite(path, threads):
  litert = require('ai_edge_litert.interpreter', 'to run TFLite files')
  interpreter = litert.Interpreter(str(path), num_threads=threads)
  inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
  shapes = []

  def run(*arrays):
    if shapes != [array.shape for array in arrays]:
      shapes[:] = [array.shape for array in arrays]
      for detail, shape in zip(inputs, shapes, strict=True):
        interpreter.resize_tensor_input(detail['index'], shape)
      interpreter.allocate_tensors()
    for detail, array in zip(inputs, arrays, strict=True):
      interpreter.set_tensor(detail['index'], array)
    interpreter.invoke()
    return [interpreter.get_tensor(detail['index']) for detail in outputs]

  return Runner(run, [tuple(map(int, detail['shape'])) for detail in inputs])


def _open_onnx(path, threads):
  ort = require('onnxruntime', 'to run ONNX files')
  session = ort.InferenceSession(
    str(path), session_options(threads), providers=['CPUExecutionProvider']
  )
  inputs = session.get_inputs()
  return Runner(
    lambda *arrays: session.run(
      None, {value.name: array for value, array in zip(inputs, arrays, strict=True)}
    ),
    [tuple(value.shape) for value in inputs],
  )


def session_options(threads):
  """Returns ONNX Runtime's options for `threads` threads, silent but for errors."""
  options = require('onnxruntime', 'to run ONNX files').SessionOptions()
  options.intra_op_num_threads = options.inter_op_num_threads = threads
  options.log_severity_level = 3
  # Level 1 is float32; the default quantizes the inputs of dense layers whose weights alone are
  # int8.
  options.add_session_config_entry('session.qdq_matmulnbits_accuracy_level', '1')
  # On x86 processors without VNNI the default adds products of int8 in 16 bits, which overflow.
  options.add_session_config_entry('session.x64quantprecision', '1')
  return options


def _open_openvino(path, threads):
  model = require('openvino', 'to run OpenVINO files').Core().read_model(str(path))
  request_by_shapes = {}

  def run(*arrays):
    # A model compiled for its batch is faster than one for any batch.
    shapes = tuple(array.shape for array in arrays)
    if shapes not in request_by_shapes:
      request_by_shapes[shapes] = compile_openvino(path, threads, shapes).create_infer_request()
    results = request_by_shapes[shapes].infer(list(arrays))
    return [np.array(results[index]) for index in range(len(results))]

  return Runner(
    run,
    [
      tuple(
        dimension.get_length() if dimension.is_static else None for dimension in value.partial_shape
      )
      for value in model.inputs
    ],
  )


def compile_openvino(path, threads, shapes):
  """Returns OpenVINO's compiled model of an .xml file, for one request at a time.

  Args:
    path, threads: as in `open_file`.
    shapes: of the inputs, batch included.
  """
  openvino = require('openvino', 'to run OpenVINO files')
  core = openvino.Core()
  model = core.read_model(str(path))
  model.reshape({value: list(shape) for value, shape in zip(model.inputs, shapes, strict=True)})
  return core.compile_model(
    model,
    'CPU',
    {
      'INFERENCE_NUM_THREADS': threads,
      'PERFORMANCE_HINT': 'LATENCY',
      'NUM_STREAMS': 1,
      # The default is bfloat16 where the processor has it, and dense layers with quantized inputs
      # where only the weights are int8.
      'INFERENCE_PRECISION_HINT': 'f32',
      'DYNAMIC_QUANTIZATION_GROUP_SIZE': 0,
    },
  )


_OPENERS = {'.tflite': _open_tflite, '.onnx': _open_onnx, '.xml': _open_openvino}
