"""Ranges of rows of values, as functions of arrays: from extremes to the least squared error."""

import numpy as np

# The median of the magnitude of a normal variable is its standard deviation divided by this.
DEVIATIONS_PER_MAD = 1.4826230
PERCENTILES = (0.1, 99.9)
# Of a range that is searched for the least squared error, the parts of its ends that are tried.
SHARES = np.linspace(0.3, 1.0, 29)


def affine_grid(low, high, bits):
  """Returns (scale, zero point) of the 2^bits levels (code - zero point) * scale from low to high.

  The zero point is a whole number, so the levels are moved a little against low and high, as
  TensorFlow's fake quantizer does it. One bit has the levels 0 and the end farther from it.

  Args:
    low, high: arrays or numbers, low <= 0 <= high. Where both are 0 the scale is 0.
    bits: 1 to 16.

  Returns:
    Two float32 arrays.
  """
  levels = np.float32(2**bits - 1)
  low, high = np.asarray(low, np.float32), np.asarray(high, np.float32)
  if bits == 1:
    above = high >= -low
    low, high = np.where(above, np.float32(0), low), np.where(above, high, np.float32(0))
  scale = (high - low) / levels
  zero_point = np.floor(np.float64(-low / np.where(scale > 0, scale, np.float32(1))) + 0.5)
  return scale, np.clip(zero_point, 0, levels).astype(np.float32)


def extremes(rows):
  """Returns (minima, maxima) of each row of a [rows, values] array, moved to include 0."""
  return np.minimum(rows.min(axis=1), 0.0), np.maximum(rows.max(axis=1), 0.0)


def three_sigma_range(rows):
  """Returns (low, high) of each row: median -+ 3 * 1.4826230 * MAD, of the values that are not 0.

  MAD is the median of the distances from the median. A row of zeros has (0, 0).

  Args:
    rows: [rows, values] array.
  """
  lows, highs = [], []
  for row in rows:
    values = row[row != 0]
    centre = np.median(values) if values.size else 0.0
    spread = np.median(np.abs(values - centre)) if values.size else 0.0
    lows.append(centre - 3 * DEVIATIONS_PER_MAD * spread)
    highs.append(centre + 3 * DEVIATIONS_PER_MAD * spread)
  return np.minimum(lows, 0.0), np.maximum(highs, 0.0)


def percentile_range(rows):
  """Returns (low, high) of each row of [rows, values]: its 0.1 and 99.9 percentiles, and 0."""
  low, high = np.percentile(rows, PERCENTILES, axis=1)
  return np.minimum(low, 0.0), np.maximum(high, 0.0)


def least_squares_range(rows, bits, symmetric=False):
  """Returns the (low, high) of each row with the least squared error on 2^bits levels.

  Searched among 29 parts, 0.3 to 1.0, of both ends together, then of the lower and of the upper
  end alone: three searches, each from where the one before ended.

  Args:
    rows: [rows, values] array.
    bits: 1 to 16.
    symmetric: both ends are equally far from 0, hence one search.
  """
  rows = np.asarray(rows, np.float64)
  best, moves = extremes(rows), [(1, 1), (1, 0), (0, 1)]
  if symmetric:
    far = np.maximum(-best[0], best[1])
    best, moves = (-far, far), moves[:1]
  for moves_low, moves_high in moves:
    begin, least = best, np.full(len(rows), np.inf)
    for share in SHARES[::-1]:
      ends = (begin[0] * share**moves_low, begin[1] * share**moves_high)
      error = _squared_error(rows, *ends, bits)
      better = error < least
      best = tuple(np.where(better, new, old) for new, old in zip(ends, best, strict=True))
      least = np.minimum(error, least)
  return best


def _squared_error(rows, low, high, bits):
  scale, zero_point = (part[:, None] for part in affine_grid(low, high, bits))
  codes = np.round(rows / np.where(scale > 0, scale, 1.0)) + zero_point
  return (((np.clip(codes, 0, 2**bits - 1) - zero_point) * scale - rows) ** 2).sum(axis=1)
