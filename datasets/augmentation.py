"""Augmentation of whole batches as functions of arrays.

A loop over 128 images costs more than the training step of a small net can hide, so everything
here works on the batch at once.
"""

import numpy as np


def random_crop(x, padding, rng):
  """Pads with zeros on all four sides and cuts a window of the old size at a random place.

  Args:
    x: [batch, height, width, channels] array of any type, in raw pixel values.
    padding: pixels on each side, at least 1.
    rng: np.random.Generator; two draws of [batch] are taken, rows and then columns.

  Returns:
    [batch, height, width, channels] array of the type of `x`, its own memory.
  """
  batch, height, width, channels = x.shape
  padded = np.zeros((batch, height + 2 * padding, width + 2 * padding, channels), x.dtype)
  padded[:, padding:-padding, padding:-padding] = x
  top = rng.integers(0, 2 * padding, size=batch, endpoint=True)
  left = rng.integers(0, 2 * padding, size=batch, endpoint=True)
  # Pixels and channels of a row are one run of memory: windows over runs copy 96 bytes at a time
  # where an index per pixel would copy 3.
  rows = padded.reshape(batch, height + 2 * padding, -1)
  windows = np.lib.stride_tricks.sliding_window_view(rows, (height, width * channels), axis=(1, 2))
  return windows[np.arange(batch), top, left * channels].reshape(x.shape)


def random_flip(x, rng):
  """Mirrors each image left to right with probability 1/2, in place.

  Args:
    x: [batch, height, width, channels] array; changed.
    rng: np.random.Generator; one draw of [batch] is taken.

  Returns:
    `x`.
  """
  chosen = rng.random(len(x)) < 0.5
  x[chosen] = x[chosen, :, ::-1]
  return x
