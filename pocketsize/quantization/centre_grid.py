"""Centres on an int8 grid: integer kernels then compute with the values of training.

No integer kernel reads a codebook. What its kernels hold is integers times one scale for the tensor
or for each output channel, so centres that are such products can be in a file as they are.
"""

import numpy as np
import tensorflow as tf

from pocketsize import ste

# Bits of a centre: on the grid, or float.
BITS = (8, 32)
# What the largest centre of a row may have as its code; below 64 the grid would lose a bit.
_HIGHEST_CODES = np.arange(127, 63, -1, dtype=np.float32)
# Rows of more centres have 127: the best of all then leaves more than 0.8 of the error of 127 (for
# normal weights; 0.4 with four centres, 0.7 with eight), and a search costs 64 numbers a centre.
_SEARCHED_LEVELS = 8


def codes_and_scales(centres):
  """Returns (codes, scales): the integers nearest to centres over the scale of their row.

  scale = max |c| / h, where h, the code of the largest magnitude, is the one of 127, 126 ... 64
  with the least sum of (c - code * scale)^2 over the centres, the first of equals. Rows of more
  than eight centres have h = 127. A row of zeros has the scale 0.

  Args:
    centres: [rows, levels] float32 tensor.

  Returns:
    [rows, levels] float32 whole numbers from -127 to 127, and [rows, 1] float32, not negative.

  >>> codes, scales = codes_and_scales(tf.constant([[-0.5, 0.0, 0.125, 1.0]]))
  >>> codes.numpy().tolist(), (1.0 / scales.numpy()).round().tolist()
  ([[-60.0, 0.0, 15.0, 120.0]], [[120.0]])
  """
  most = tf.reduce_max(tf.abs(centres), axis=1, keepdims=True)
  shares = tf.math.divide_no_nan(centres, most)
  if centres.shape[1] <= _SEARCHED_LEVELS:
    scaled = shares[:, None] * _HIGHEST_CODES[:, None]
    errors = tf.reduce_sum(tf.square(tf.round(scaled) - scaled), axis=2)
    chosen = tf.argmin(errors * _HIGHEST_CODES**-2, axis=1)[:, None]
  else:
    chosen = tf.zeros(most.shape, tf.int64)
  # Compiled, a division by a constant is a multiplication, with another last bit: none is here.
  scales = most * tf.gather(1.0 / _HIGHEST_CODES, chosen)
  return tf.round(shares * tf.gather(_HIGHEST_CODES, chosen)), scales


def on_grid(centres):
  """Returns code * scale of `codes_and_scales` for each centre; straight-through gradient.

  Args:
    centres: [rows, levels] float32 tensor.
  """
  codes, scales = codes_and_scales(centres)
  return ste.replace(centres, codes * scales)
