"""Which weights of a kernel share what a quantizer knows: a scale, a range or a codebook."""

import keras
import numpy as np
import tensorflow as tf

GRANULARITIES = ('tensor', 'channel', 'bucket')


class Groups:
  """A kernel seen as rows of weights that belong together.

  One row for the whole tensor, one for each output channel, or one for each bucket: a run of
  `bucket_size` weights of the flattened kernel, of which the last may be shorter.

  Args:
    shape: of the kernel.
    granularity: 'tensor', 'channel' or 'bucket'.
    channel_axes: axes of the kernel that count the output channels, for 'channel'.
    bucket_size: weights in a bucket, at least 1, for 'bucket'.

  Attributes:
    shape: of the kernel, a tuple.
    members: weights of a row; the last bucket may have fewer.
    broadcast: shape of one number per row that broadcasts against the kernel; None for buckets.
    count: rows.

  >>> channels = Groups((2, 3), 'channel')
  >>> channels.split(np.arange(6).reshape(2, 3)).tolist()
  [[0, 3], [1, 4], [2, 5]]
  >>> Groups((2, 3), 'bucket', bucket_size=4).split(np.arange(6).reshape(2, 3)).tolist()
  [[0, 1, 2, 3], [4, 5, 0, 0]]
  """

  def __init__(self, shape, granularity='channel', channel_axes=(-1,), bucket_size=256):
    self.shape = tuple(shape)
    self.size = int(np.prod(self.shape))
    self.broadcast = None
    if granularity == 'bucket':
      self.members = bucket_size
      self.count = -(-self.size // bucket_size)
      return
    axes = channel_axes if granularity == 'channel' else ()
    kept = sorted(axis % len(self.shape) for axis in axes)
    self._order = (*kept, *(axis for axis in range(len(self.shape)) if axis not in kept))
    self.broadcast = tuple(size if axis in kept else 1 for axis, size in enumerate(self.shape))
    self.count = int(np.prod(self.broadcast))
    self.members = self.size // self.count

  def split(self, kernel):
    """Returns the rows, [count, weights of one]; a short last bucket is filled up with zeros.

    Args:
      kernel: array or tensor of `shape`.
    """
    library = _library(kernel)
    if self.broadcast is not None:
      return library.reshape(library.transpose(kernel, self._order), (self.count, self.members))
    flat = library.pad(library.reshape(kernel, (-1,)), [[0, self._missing]])
    return library.reshape(flat, (self.count, self.members))

  def join(self, rows):
    """Returns the kernel of rows as `split` makes them."""
    library = _library(rows)
    if self.broadcast is not None:
      moved = library.reshape(rows, [self.shape[axis] for axis in self._order])
      return library.transpose(moved, np.argsort(self._order))
    return library.reshape(library.reshape(rows, (-1,))[: self.size], self.shape)

  def fit(self, kernel, function):
    """Returns what `function([rows, weights]) -> [rows, ...]` finds, for all rows.

    Weights that only fill up a short last bucket are not shown to it.

    Args:
      kernel: array of `shape`.
      function: of a NumPy array, to one of as many rows.
    """
    rows = self.split(np.asarray(kernel))
    if not self._missing:
      return function(rows)
    last = function(rows[-1:, : self.members - self._missing])
    return last if self.count == 1 else np.concatenate([function(rows[:-1]), last])

  @property
  def _missing(self):
    return self.count * self.members - self.size


def _library(values):
  return tf if keras.ops.is_tensor(values) else np
