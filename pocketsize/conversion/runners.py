"""Exported files as functions of NumPy batches, each in the runtime that its suffix names."""

import pathlib

import numpy as np

from pocketsize.conversion.errors import require
from pocketsize.errors import UserError


class Runner:
  """A loaded file: runner(x, ...) takes arrays [batch, ...] and returns the list of output arrays.

  Attributes:
    shapes: of the inputs; the batch, and sizes that may differ from call to call, are None.
    dtypes: of the inputs, NumPy's.
  """

  def __init__(self, call, shapes, dtypes):
    self._call = call
    self.shapes = [
      (None, *(size if isinstance(size, int) and size >= 0 else None for size in shape[1:]))
      for shape in shapes
    ]
    self.dtypes = [np.dtype(dtype) for dtype in dtypes]

  def __call__(self, *arrays):
    if len(arrays) != len(self.shapes) or not all(map(_fits, arrays, self.shapes)):
      raise UserError(
        f'The file takes arrays of shapes {self.shapes}. '
        f'Received: {[array.shape for array in arrays]}.'
      )
    # Any floats for floats and any integers for integers, as Keras takes them.
    for array, dtype in zip(arrays, self.dtypes, strict=True):
      if not np.can_cast(array.dtype, dtype, 'same_kind'):
        raise UserError(
          f'The file takes arrays of {", ".join(map(str, self.dtypes))}. '
          f'Received: {", ".join(str(array.dtype) for array in arrays)}.'
        )
    return self._call(*map(np.ascontiguousarray, arrays, self.dtypes))


def _fits(array, shape):
  return array.ndim == len(shape) and all(
    size in (None, given) for size, given in zip(shape, array.shape, strict=True)
  )


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

  return Runner(
    run,
    [detail['shape_signature'].tolist() for detail in inputs],
    [detail['dtype'] for detail in inputs],
  )


# Where ONNX Runtime's names are not NumPy's.
_ONNX_DTYPES = {'tensor(float)': 'float32', 'tensor(double)': 'float64'}


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
    [value.shape for value in inputs],
    [_ONNX_DTYPES.get(value.type, value.type[len('tensor(') : -1]) for value in inputs],
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
      [size.get_length() if size.is_static else None for size in value.partial_shape]
      for value in model.inputs
    ],
    [value.get_element_type().to_dtype() for value in model.inputs],
  )


def compile_openvino(path, threads, shapes):
  """Returns OpenVINO's compiled model of an .xml file, for one request at a time.

  Args:
    path, threads: as in `open_file`.
    shapes: of the inputs, batch included; a size may be None.
  """
  openvino = require('openvino', 'to run OpenVINO files')
  core = openvino.Core()
  model = core.read_model(str(path))
  shapes = [[-1 if size is None else size for size in shape] for shape in shapes]
  model.reshape(dict(zip(model.inputs, map(openvino.PartialShape, shapes), strict=True)))
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
