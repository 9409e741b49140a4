"""What all quantizers of kernels have in common: bits, and which weights belong together."""

import abc

import keras
import numpy as np

from pocketsize.quantization.groups import Groups
from pocketsize.transform import Transform


class KernelQuantizer(Transform, abc.ABC):
  """Maps a kernel to few values.

  What it knows of each row of `groups` is a weight of its own, made in `build_rows` and set from
  the kernel by `fit`.

  Args:
    bits: 1 to 16.
    granularity: 'tensor', 'channel' or 'bucket'.
    channel_axes: axes of the kernel that count the output channels, for 'channel'.
    bucket_size: weights in a bucket, for 'bucket'.

  Attributes:
    groups: the `Groups` of the kernel, once built.
    without_grid: what files say of a kernel for which `grid` is None.
    refits: whether `fit` is for now and then while training; else it is for the start, and what it
      sets is trained from then on.
  """

  order = 20
  without_grid = 'in groups that no format has'
  refits = True

  def __init__(self, bits=8, granularity='channel', channel_axes=(-1,), bucket_size=256, **kwargs):
    super().__init__(**kwargs)
    self.bits = bits
    self.granularity = granularity
    self.channel_axes = tuple(channel_axes)
    self.bucket_size = bucket_size

  def build(self, shape):
    self.groups = Groups(shape, self.granularity, self.channel_axes, self.bucket_size)
    self.build_rows()
    self.built = True

  @abc.abstractmethod
  def build_rows(self):
    """Makes the weights that `fit` sets."""

  @abc.abstractmethod
  def fit(self, kernel):
    """Sets what it knows from `kernel`, an array of the kernel's shape."""

  @property
  def is_fitted(self):
    """Whether `fit` was called; it matters only where it is not called again."""
    return True

  def by_rows(self, kernel, function):
    """Returns `function` of a kernel that broadcasts against one number per row.

    Args:
      kernel: tensor of the kernel's shape.
      function: sees it as it is, or as [buckets, weights], and keeps the shape.
    """
    if self.groups.broadcast is not None:
      return function(kernel)
    return self.groups.join(function(self.groups.split(kernel)))

  def per_row(self, variable):
    """Returns a variable or tensor of one number per row as a [rows] float32 array."""
    return np.ravel(keras.ops.convert_to_numpy(variable)).astype(np.float32)

  def get_config(self):
    return {
      **super().get_config(),
      'bits': self.bits,
      'granularity': self.granularity,
      'channel_axes': self.channel_axes,
      'bucket_size': self.bucket_size,
    }
