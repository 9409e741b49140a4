"""What acts inside the network: transforms, their places, and the grid that a file must hold."""

from typing import NamedTuple

import keras
import numpy as np


class Grid(NamedTuple):
  """The values that a quantized kernel can take: `code * scale`.

  Attributes:
    scale: positive float array that broadcasts against the kernel: one for the tensor, or one for
      each output channel.
    bits: 1 to 16. Codes are integers with |code| < 2 ** (bits - 1); -1 and 1 for one bit.
  """

  scale: np.ndarray
  bits: int

  def codes(self, kernel):
    """Returns the integer codes of a kernel that lies on the grid, int32, same shape."""
    return np.round(np.asarray(kernel, np.float64) / self.scale).astype(np.int32)


class Transform(keras.layers.Layer):
  """Maps a weight or an activation to a tensor of the same shape.

  What it must remember is made by `add_weight` in `build`, hence saved, restored and broadcast
  without another word. A transform that comes back from a file is already built.

  Attributes:
    order: transforms of one placement run in ascending order: masks 10, quantizers 20.
  """

  order = 0

  def __init__(self, **kwargs):
    super().__init__(**kwargs)
    self.supports_masking = True

  def compute_output_shape(self, input_shape):
    return input_shape

  def grid(self, kernel):
    """Returns the `Grid` on which `kernel` (array, as deployed) lies, or None if it has none."""
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
