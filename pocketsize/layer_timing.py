"""The time of one layer in a runtime: that of a small model with it, less that of one without."""

import tempfile

import keras
import numpy as np
from keras import layers

from pocketsize import conversion
from pocketsize.configure import compress
from pocketsize.conversion.formats import QUANTIZED_FORMATS
from pocketsize.errors import UserError

# What a layer's time depends on, beside the sizes of its input and its counts of channels.
_ARGUMENTS = (
  'kernel_size',
  'strides',
  'padding',
  'output_padding',
  'dilation_rate',
  'groups',
  'depth_multiplier',
  'data_format',
  'equation',
  'output_shape',
)
COUNTS = ('filters', 'units')
_PLAIN = {'activation': 'linear', 'use_bias': True, 'dtype': 'float32'}
# About how long two models are run, between bounds on the rounds of ten calls.
_SECONDS = 0.3
_ROUNDS = 5, 100
# Among so many some make every layer write what is not zero.
_SAMPLES = 8
# What lies below the clock's noise still costs something.
_LEAST_MS = 1e-6
_CONVOLUTIONS = (None, layers.Conv1D, layers.Conv2D, layers.Conv3D)
_POOLS = (
  None,
  layers.GlobalAveragePooling1D,
  layers.GlobalAveragePooling2D,
  layers.GlobalAveragePooling3D,
)


class Call:
  """What a layer's time depends on: its arguments and the sizes of its input.

  Args:
    layer: a Keras layer of `targets.WEIGHTS_BY_TYPE`.
    shape: of its input without the batch, all channels there.

  Attributes:
    name: of the layer.
    inputs, outputs: its counts of channels; no `outputs` where they follow from the inputs.
    groups: of a convolution.
    signature: text that layers have in common which differ in counts and weights only.

  Raises:
    UserError: a size in `shape` is unknown.
  """

  def __init__(self, layer, shape):
    config = layer.get_config()
    if None in shape:
      raise UserError(
        f"Layer {layer.name!r} cannot be timed: give the model's inputs fixed sizes. "
        f'Received: {tuple(shape)}.'
      )
    self.name = layer.name
    self._layer, self._shape = layer, tuple(shape)
    self._axis = 0 if config.get('data_format') == 'channels_first' else len(shape) - 1
    self._count = next((name for name in COUNTS if name in config), None)
    self.inputs, self.outputs = shape[self._axis], config.get(self._count)
    self.groups = config.get('groups', 1)
    sizes = 'x'.join(map(str, self._shape[: self._axis] + self._shape[self._axis + 1 :]))
    arguments = [f'{name}={config[name]}' for name in _ARGUMENTS if name in config]
    self.signature = ' '.join([type(layer).__name__, *arguments, f'positions={sizes or 1}'])

  def resized(self, inputs, outputs):
    """Returns (new layer, shape of its input) with other counts of channels."""
    config = {key: value for key, value in self._layer.get_config().items() if key != 'name'}
    # EinsumDense says which axes its bias has.
    plain = {key: value for key, value in _PLAIN.items() if key in config}
    counts = {} if outputs is None else {self._count: outputs}
    shape = list(self._shape)
    shape[self._axis] = inputs
    return type(self._layer).from_config({**config, **plain, **counts}), tuple(shape)


class LayerTimer:
  """Times layers in one runtime, batch 1, one thread.

  A layer stands between one that makes its input from one channel and a mean over positions, so
  that inputs and outputs are small and lie in memory as the runtime likes them, as they do in the
  midst of a model.

  Args:
    format: one of `conversion.FORMATS`. In those of integers weights and activations have 8 bits,
      and ranges of random data, on which no time depends.
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
    if self._format in QUANTIZED_FORMATS:
      batch = np.random.default_rng(0).normal(size=(_SAMPLES, *model.inputs[0].shape[1:]))
      model, _ = compress(model, [{'algorithm': 'uniform'}], calibration=[batch.astype('float32')])
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
