"""The time of one layer in a runtime: that of a small model with it, less that of one without."""

import tempfile

import keras
import numpy as np
from keras import layers

from pocketsize import conversion

# About how long two models are run, between bounds on the rounds of ten calls.
_SECONDS = 0.3
_ROUNDS = 5, 100
# What lies below the clock's noise still costs something.
_LEAST_MS = 1e-6
_CONVOLUTIONS = (None, layers.Conv1D, layers.Conv2D, layers.Conv3D)
_POOLS = (
  None,
  layers.GlobalAveragePooling1D,
  layers.GlobalAveragePooling2D,
  layers.GlobalAveragePooling3D,
)


class LayerTimer:
  """Times layers in one runtime, batch 1, one thread.

  A layer stands between one that makes its input from one channel and a mean over positions, so
  that inputs and outputs are small and lie in memory as the runtime likes them, as they do in the
  midst of a model.

  Args:
    format: 'tflite', 'onnx' or 'openvino'.
  """

  def __init__(self, format):
    self._format = format
    self._without = {}

  def __call__(self, layer, shape):
    """Returns the time of one call in ms, above 0.

    Args:
      layer: a new Keras layer, which is built here.
      shape: of its input, without the batch.

    Raises:
      UserError: a package is missing, or a converter refuses the layer.
    """
    data_format = getattr(layer, 'data_format', 'channels_last')
    key = shape, data_format
    with tempfile.TemporaryDirectory() as folder:
      runners = [self._opened(sandwich(layer, *key), folder, 'with')]
      if key not in self._without:
        self._without[key] = self._opened(sandwich(None, *key), folder, 'without')
      runners.append(self._without[key])
      # From this first call on, no runtime needs its file.
      rounds = int(np.clip(_SECONDS / (1e-2 * sum(conversion.quickest(runners, 1))), *_ROUNDS))
    whole, rest = conversion.quickest(runners, rounds)
    return max(whole - rest, _LEAST_MS)

  def _opened(self, model, folder, name):
    return conversion.open_file(conversion.export(model, folder, [self._format], name)[0].path)


def sandwich(layer, shape, data_format='channels_last'):
  """Returns a model that makes an input of `shape` from one channel, calls `layer`, and averages.

  Args:
    layer: a new Keras layer, or None to leave it out.
    shape: of its input, without the batch.
    data_format: 'channels_last' or 'channels_first'.
  """
  axis, rank = (-1 if data_format == 'channels_last' else 0), len(shape) - 1
  narrow = list(shape)
  narrow[axis] = 1
  inputs = keras.Input(narrow)
  # The activation keeps converters from merging two layers.
  if 0 < rank < len(_CONVOLUTIONS):
    make = _CONVOLUTIONS[rank](shape[axis], 1, data_format=data_format, activation='relu')
    average = _POOLS[rank](data_format=data_format)
  else:
    make, average = layers.Dense(shape[axis], activation='relu'), layers.Identity()
  x = make(inputs)
  return keras.Model(inputs, average(x if layer is None else layer(x)))
