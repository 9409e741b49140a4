"""TFLite files: TensorFlow's converter, then the learned kernels put in as integers.

The converter makes int8 from the fake quantizers on activations; no representative data is used. Kernels
reach it as stand-ins (see `kernels.stand_in`), because it refuses per-channel fake quantizers on some of
them and rounds others to a grid of its own.
"""

import logging
import warnings

import numpy as np

from pocketsize.conversion import kernels
from pocketsize.conversion.errors import conversion_error
from pocketsize.conversion.tflite_graph import TfliteGraph


def convert(lowered, path):
  """Writes a TFLite file with float32 inputs and outputs; the batch is dynamic.

  Args:
    lowered: a `Lowered` model.
    path: of the file.

  Raises:
    UserError: the converter refuses an operation.
  """
  import tensorflow as tf
  converter = tf.lite.TFLiteConverter.from_concrete_functions([lowered.function.get_concrete_function()])
  if lowered.has_activations:
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
  absl_logger = logging.getLogger('absl')
  level = absl_logger.level
  try:
    absl_logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      content = converter.convert()
  except Exception as error:
    raise conversion_error('TFLite', error) from error
  finally:
    absl_logger.setLevel(level)
  graph = TfliteGraph(content)
  for kernel, stand_in in zip(lowered.kernels, lowered.stand_ins, strict=True):
    _place(graph, kernel, stand_in)
  graph.rename(lowered.input_names, lowered.output_names)
  graph.save(path)


def _place(graph, kernel, stand_in):
  """Puts `kernel` in the place of its stand-in, a pair (codes, values)."""
  tensor, order = _find(graph, kernel.path, stand_in)
  if graph.is_int8(tensor):
    if kernel.codes is None:
      graph.make_float(tensor, kernel.values.transpose(order), kernel.bias)
    else:
      graph.set_int8(tensor, kernel.codes.transpose(order), kernel.scale.transpose(order))
  elif kernel.codes is None:
    graph.set_float(tensor, kernel.values.transpose(order))
  else:
    graph.set_int8(tensor, kernel.codes.transpose(order), kernel.scale.transpose(order))
    graph.dequantize(tensor)


def _find(graph, path, stand_in):
  codes, values = stand_in
  for tensor, stored in graph.constants():
    order = kernels.layout(codes if stored.dtype == np.int8 else values, stored)
    if order is not None:
      return tensor, order
  raise RuntimeError(f'The TFLite converter changed the kernel of {path!r} beyond recognition.')
