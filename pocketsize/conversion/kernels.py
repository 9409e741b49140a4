"""Kernels on their way into a file: batch norm folded in, and integer codes for those on a grid.

Folding is exact per output channel (Jacob et al. 2018, arXiv:1712.05877, section 3.2): the scale
takes the batch norm's factor; the codes stay what training made of them, up to the factor's sign.
"""

import itertools
from typing import NamedTuple

import numpy as np

from pocketsize import targets
from pocketsize.quantization.kernel_quantizer import KernelQuantizer

# Runtimes hold a bias as int32 multiples of (input step * weight step).
_BIAS_CODES = 2.0**30
# What stand-ins are multiplied by. Where a layer reads floats, a bias that a converter computed
# with one is larger than any that was trained; where it reads 8 bits, its bias keeps its digits.
_FLOAT_SIZE, _INTEGER_SIZE = 2.0**60, 2.0**-10
_TRAINED_BIAS = 2.0**40
# The smallest step: its products with an activation's step are still normal float32 numbers.
_LEAST_STEP = 1e-30


class Kernel(NamedTuple):
  """One kernel as a file shall hold it.

  Attributes:
    path: path of its layer.
    values: float32 array in Keras' layout, the kernel as deployed with batch norm folded in.
    codes: int8 array of the same shape, or None for a kernel that stays float.
    scale: positive float32 array of the same shape, `codes * scale == values`, one value in each
      output channel; None with `codes`.
    bits: of the quantizer, 1 to 16; 8 for codes that are only the nearest; 32 without one.
    bias: [channels] float32 with batch norm folded in, or None.
    note: what differs from training, or ''.
  """

  path: str
  values: np.ndarray
  codes: np.ndarray | None
  scale: np.ndarray | None
  bits: int
  bias: np.ndarray | None
  note: str

  @property
  def fits_int4(self):
    """Whether it has codes, all of them from -8 to 7."""
    return self.codes is not None and fit_int4(self.codes)


def fit_int4(codes):
  """Returns whether all of an integer array lie from -8 to 7."""
  return bool(np.all((codes >= -8) & (codes <= 7)))


def nibbles(codes):
  """Returns [ceil(size / 2)] uint8: two codes in a byte, the first of them in its lower half.

  Args:
    codes: integer array, from -8 to 7.

  >>> nibbles(np.array([1, -1, 7])) == [0xF1, 0x07]
  array([ True,  True])
  """
  halves = np.ravel(codes).astype(np.int8).view(np.uint8) & 15
  halves = np.append(halves, np.zeros(halves.size % 2, np.uint8))
  return halves[::2] | halves[1::2] << 4


def make_kernel(path, layer, point, deployed, transforms, factor=None, bias=None, input_step=None):
  """Returns the `Kernel` of one weight.

  Args:
    path, layer, point: where it is.
    deployed: float array, after all transforms.
    transforms: those of the place, in order; the last one with a grid decides.
    factor: [channels] of the batch norm to fold in, or None.
    bias: [channels] float after folding, or None.
    input_step: the step of the 8-bit activation that the layer reads, or None where it is float.
  """
  axes = tuple(axis % deployed.ndim for axis in targets.channel_axes(layer, point))
  factors = 1.0 if factor is None else _spread(factor, axes, deployed.shape)
  grid, bits = _grid(deployed, transforms)
  if not bits or bits > 8:
    return Kernel(
      path,
      (deployed * factors).astype(np.float32),
      None,
      None,
      bits or 32,
      bias,
      f'{bits}-bit weights as float32' if bits else '',
    )
  note = ''
  scale = _channel_scale(grid, deployed.shape, axes)
  if scale is None:
    note = f'{bits}-bit weights {_without_grid(transforms)}, as int8 by output channel'
    within = tuple(axis for axis in range(deployed.ndim) if axis not in axes)
    scale = np.abs(deployed.astype(np.float64)).max(axis=within, keepdims=True) / 127.0
    scale, bits = np.broadcast_to(scale, deployed.shape), 8
  scale = np.where(scale > 0.0, scale, 1.0)
  codes = np.round(deployed / scale) * np.sign(factors)
  scale = np.where(factors == 0.0, scale, scale * np.abs(factors))
  if bias is not None and input_step:
    codes, scale = _with_room(codes, scale, _spread(bias, axes, codes.shape), input_step)
  codes, scale = codes.astype(np.int8), np.maximum(scale, _LEAST_STEP).astype(np.float32)
  return Kernel(path, codes * scale, codes, scale, bits, bias, note)


def _with_room(codes, scale, bias, input_step):
  """Returns (codes, scale) such that the bias fits int32.

  It else would not in a channel that batch norm all but erases: the step becomes coarser there.
  """
  least = np.broadcast_to(np.abs(bias) / (_BIAS_CODES * input_step), codes.shape)
  coarser = np.round(codes * scale / np.maximum(least, _LEAST_STEP))
  return np.where(scale < least, coarser, codes), np.maximum(scale, least)


def scaling_kernel(path, factor, offset, input_step):
  """Returns the depthwise `Kernel`, [1, 1, channels, 1], that is exactly x * factor + offset."""
  codes, scale = 127.0 * np.sign(factor), np.where(factor == 0.0, 1.0, np.abs(factor) / 127.0)
  if input_step:
    codes, scale = _with_room(codes, scale, offset, input_step)
  codes = codes.astype(np.int8).reshape(1, 1, -1, 1)
  scale = np.maximum(scale, _LEAST_STEP).astype(np.float32).reshape(codes.shape)
  return Kernel(path, codes * scale, codes, scale, 8, offset.astype(np.float32), '')


def averaging_kernel(path, size, channels):
  """Returns the [height, width, channels, 1] depthwise `Kernel` that averages windows of `size`."""
  codes = np.full((*size, channels, 1), 127, np.int8)
  scale = np.full(codes.shape, 1.0 / (127.0 * size[0] * size[1]), np.float32)
  return Kernel(path, codes * scale, codes, scale, 8, None, '')


def _grid(deployed, transforms):
  """Returns (the last transform's grid or None, the bits of its quantizer or 0)."""
  for transform in reversed(transforms):
    grid = transform.grid(deployed)
    if grid is not None:
      return grid, getattr(transform, 'bits', grid.bits)
  return None, max((getattr(transform, 'bits', 0) for transform in transforms), default=0)


def _without_grid(transforms):
  """Returns what the last quantizer says of a kernel that lies on no grid."""
  quantizers = [each for each in transforms if isinstance(each, KernelQuantizer)]
  return (quantizers or [KernelQuantizer])[-1].without_grid


def _channel_scale(grid, shape, axes):
  """Returns the grid's scale spread over `shape`, or None if it varies within an output channel."""
  if grid is None:
    return None
  scale = np.broadcast_to(np.asarray(grid.scale, np.float64), shape)
  within = tuple(axis for axis in range(len(shape)) if axis not in axes)
  return scale if np.array_equal(scale.min(axis=within), scale.max(axis=within)) else None


def _spread(vector, axes, shape):
  """Returns a [channels] vector that broadcasts against a kernel with output channels in `axes`."""
  return np.reshape(vector, [size if axis in axes else 1 for axis, size in enumerate(shape)])


def stand_in(kernel, axes, seed, input_step=None):
  """Returns random float32 values to put in a kernel's place.

  They lead to the constant in a converted file, whatever layout it has there. They are integers
  times a step of each output channel, and each channel has a 127: a converter that makes int8 of
  them finds the same integers.

  Args:
    kernel: a `Kernel`.
    axes: of the output channels.
    seed: different for every kernel.
    input_step: the step of the 8-bit activation that the layer reads, or None where it is float.
  """
  shape = kernel.values.shape
  rng = np.random.default_rng(seed)
  codes = rng.integers(-127, 128, shape)
  codes[tuple(slice(None) if axis in axes else 0 for axis in range(len(shape)))] = 127
  steps = rng.uniform(0.5, 1.0, [size if axis in axes else 1 for axis, size in enumerate(shape)])
  return (codes * steps * _stand_in_size(kernel.bias, input_step)).astype(np.float32)


def _stand_in_size(bias, input_step):
  if not input_step:
    return _FLOAT_SIZE
  largest = 0.0 if bias is None else np.abs(bias).max(initial=0.0)
  return max(_INTEGER_SIZE, 4.0 * largest / (_BIAS_CODES * input_step))


def is_own_bias(kernel, stored, step=None):
  """Returns whether nothing was folded into a bias of a converted file that would be lost or wrong.

  A constant that was added to float outputs is neither.

  Args:
    kernel: the `Kernel` whose stand-in is beside it.
    stored: float array, as found in the file.
    step: positive array or float: `stored` was rounded to its multiples; None if it was not.
  """
  if step is None:
    return bool(np.all(np.abs(stored) < _TRAINED_BIAS))
  expected = 0.0 if kernel.bias is None else kernel.bias
  return bool(np.all(np.abs(stored - expected) <= step + 1e-5 * np.abs(expected)))


def layout(original, stored):
  """Returns the order of `original`'s axes in which it has the values of `stored`, or None.

  Args:
    original: array in Keras' layout.
    stored: array as found in a file; its shape does not matter.
  """
  if original.size != stored.size:
    return None
  for order in itertools.permutations(range(original.ndim)):
    if np.allclose(original.transpose(order).ravel(), stored.ravel(), rtol=1e-5, atol=0.0):
      return order
  return None


def channel_axis(scale):
  """Returns the only axis along which `scale`, as laid out in a file, differs, or None."""
  axes = [axis for axis in range(scale.ndim) if np.any(scale != scale.take([0], axis))]
  if len(axes) > 1:
    raise ValueError(f'Argument `scale` must differ along one axis. Received: axes {axes}.')
  return axes[0] if axes else None
