"""What acts inside the network: transforms, their places, and the integers that files hold."""

from typing import NamedTuple

import keras
import numpy as np

from pocketsize.errors import UserError

_HALF = ('float16', 'bfloat16')


class Grid(NamedTuple):
  """The values that a quantized kernel can take: `code * scale`.

  Attributes:
    scale: positive float array that broadcasts against the kernel: one for the tensor, or one for
      each output channel.
    bits: 1 to 16. Codes are integers with |code| < 2 ** (bits - 1); -1 and 1, and 0 for pruned
      weights, for one bit.
  """

  scale: np.ndarray
  bits: int

  def codes(self, kernel):
    """Returns the integer codes of a kernel that lies on the grid, int32, same shape."""
    return np.round(np.asarray(kernel, np.float64) / self.scale).astype(np.int32)


class Codes(NamedTuple):
  """A quantized kernel as integers, and what they stand for, to the last bit of float32.

  Rows are those of `groups`. The value of a code in row r is `(code - zero_point[r]) * scale[r]`,
  or `centres[r, code]` where there are centres; divided by `factor` where there is one. Where no
  code is worth 0, weights that are exactly 0 have any.

  Attributes:
    codes: array of the kernel's shape, integers from 0 to 2 ** bits - 1.
    bits: 1 to 16.
    groups: a `Groups`: which weights have the same row.
    scale: [rows] float32; None with centres.
    zero_point: [rows] float32, whole or half numbers; None with centres.
    centres: [rows, at most 2 ** bits] float32, or None.
    factor: float32 array that broadcasts against the kernel, nowhere 0, or None.
  """

  codes: np.ndarray
  bits: int
  groups: object
  scale: np.ndarray | None = None
  zero_point: np.ndarray | None = None
  centres: np.ndarray | None = None
  factor: np.ndarray | None = None


class Transform(keras.layers.Layer):
  """Maps a weight or an activation to a tensor of the same shape.

  What it must remember is made by `add_weight` in `build`, hence saved, restored and broadcast
  without another word. A transform that comes back from a file is already built.

  Its weights and its `call` are float32, whatever the dtype policy of Keras or of the layer is; a
  half-precision tensor is cast on its way in and the result on its way out.

  Attributes:
    order: transforms of one placement run in ascending order: masks 10, quantizers 20.
    is_on: whether it changes anything at all; what waits for its step is off until then.
    is_shareable: whether it may stand at several places, for what it knows has no shape of theirs.
    needs_data: whether what it computes in inference means nothing yet, for want of data.
  """

  order = 0
  is_shareable = False
  is_on = True
  needs_data = False

  def __init__(self, **kwargs):
    # Levels and ranges in half precision would be others than those that files hold.
    super().__init__(**{**kwargs, 'dtype': 'float32'})
    self.supports_masking = True

  def __call__(self, x, *args, **kwargs):
    outputs = super().__call__(x, *args, **kwargs)
    if getattr(x, 'dtype', None) not in _HALF:
      return outputs
    mask = getattr(outputs, '_keras_mask', None)
    outputs = keras.ops.cast(outputs, x.dtype)
    if mask is not None:
      outputs._keras_mask = mask
    return outputs

  def compute_output_shape(self, input_shape):
    return input_shape

  def grid(self, kernel):
    """Returns the `Grid` on which `kernel` (array, as deployed) lies, or None if it has none."""
    return None

  def codes(self, kernel):
    """Returns the `Codes` of `kernel` (array, as deployed), or None if it has none."""
    return None

  def operations(self):
    """Returns a function of x that computes the same by operations and constants alone, for what
    no file's quantizer can express; else None.
    """
    return None


class Placement(NamedTuple):
  """A transform and its place.

  Attributes:
    path: path of the layer or operator, as in `Graph`.
    point: 'output', 'input' (the first argument), 'preactivation' (what the layer's own activation
      reads), or the attribute of a weight: 'kernel', 'depthwise_kernel', 'bias', 'gamma', ...
    transform: the `Transform`.
  """

  path: str
  point: str
  transform: Transform


def check_data(placements):
  """Raises a UserError that names the places of `Placement`s whose transforms need data, if any."""
  paths = list(dict.fromkeys(path for path, _, transform in placements if transform.needs_data))
  if paths:
    named = ', '.join(map(repr, paths[:3])) + (f' and {len(paths) - 3} more' * (len(paths) > 3))
    raise UserError(
      f'The activation quantizers at {named} never saw data: train the model, or give '
      '`calibration` batches, before it is evaluated or exported.'
    )
