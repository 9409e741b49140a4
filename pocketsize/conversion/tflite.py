"""TFLite files: TensorFlow's converter, then the learned kernels put in as integers.

The converter makes int8 from the fake quantizers on activations; no representative data is used.
Kernels reach it as stand-ins (see `kernels.stand_in`), because it refuses per-channel fake
quantizers on some of them and rounds others to a grid of its own. Where nothing separates them it
folds constants into kernels, and kernels into biases: with stand-ins such a file would be wrong.
"""

import logging
import warnings

from pocketsize.conversion import kernels
from pocketsize.conversion.errors import Folded, conversion_error
from pocketsize.conversion.tflite_graph import TfliteGraph


def convert(lowered, path, int4=False):
  """Writes a TFLite file with float32 inputs and outputs; the batch is dynamic.

  Args:
    lowered: a `Lowered` model.
    path: of the file.
    int4: whether codes from -8 to 7 are stored in 4 bits where LiteRT has an operation for them.

  Returns:
    The list of kernels that are.

  Raises:
    Folded: kernels that the file has not as they were.
    UserError: the converter refuses an operation.
  """
  import tensorflow as tf

  absl_logger = logging.getLogger('absl')
  level = absl_logger.level
  try:
    absl_logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [lowered.function.get_concrete_function()]
      )
      if lowered.has_activations:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
      content = converter.convert()
  except Exception as error:
    raise conversion_error('TFLite', error) from error
  finally:
    absl_logger.setLevel(level)
  graph = TfliteGraph(content)
  places = [
    _find(graph, kernel, stand_in)
    for kernel, stand_in in zip(lowered.kernels, lowered.stand_ins, strict=True)
  ]
  if None in places:
    raise Folded(
      kernel.path for kernel, place in zip(lowered.kernels, places, strict=True) if place is None
    )
  packed = []
  for kernel, (tensor, order) in zip(lowered.kernels, places, strict=True):
    _place(graph, kernel, tensor, order)
    if int4 and kernel.fits_int4 and graph.store_int4(tensor):
      packed.append(kernel)
  graph.rename(lowered.input_names, lowered.output_names)
  graph.save(path)
  return packed


def _place(graph, kernel, tensor, order):
  """Puts `kernel` in the place of its stand-in."""
  if kernel.codes is None:
    values = kernel.values.transpose(order)
    if graph.is_int8(tensor):
      graph.make_float(tensor, values, kernel.bias)
    else:
      graph.set_float(tensor, values)
    return
  is_integer = graph.is_int8(tensor)
  graph.set_int8(tensor, kernel.codes.transpose(order), kernel.scale.transpose(order))
  if is_integer:
    graph.set_bias(tensor, kernel.bias)
  else:
    graph.dequantize(tensor)


def _find(graph, kernel, stand_in):
  """Returns (tensor, order of axes) of a stand-in; None if it or a bias beside it was folded."""
  for tensor, stored in graph.constants():
    order = kernels.layout(stand_in, stored)
    if order is not None:
      own = all(kernels.is_own_bias(kernel, *bias) for bias in graph.biases(tensor))
      return (tensor, order) if own else None
  return None
