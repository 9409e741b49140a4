"""Where the centres of a codebook begin, and k-means in one dimension for many rows at once.

All functions take rows of weights, [rows, weights], in which NaN stands for no weight, and return
centres, [rows, levels] float32. They are written here because scikit-learn's `KMeans` fits one row
at a time, sums in an order that depends on its threads, and does not use that a row can be sorted:
then the weights of a centre are a run, and its mean a difference of two running sums.
"""

import numpy as np
import tensorflow as tf

# Far more than k-means needs on one axis; it guards against rounding that goes in circles.
_ITERATIONS = 1000
# A row with a larger share of centres without weights is fitted anew.
_IDLE_SHARE = 0.25


def quantile(rows, levels):
  """Returns the quantiles (i + 1) / (levels + 1), i = 0 ... levels - 1, of each row.

  Args:
    rows: [rows, weights] float array.
    levels: at least 1.

  >>> quantile(np.array([[8.0, 0.0, 4.0]]), 1).tolist()
  [[4.0]]
  """
  ordered, counts = _ordered(rows)
  places = np.arange(1, levels + 1) / (levels + 1) * (counts - 1)[:, None]
  before = np.floor(places).astype(int)
  after = np.minimum(before + 1, (counts - 1)[:, None])
  low, high = (np.take_along_axis(ordered, place, axis=1) for place in (before, after))
  return (low + (places - before) * (high - low)).astype(np.float32)


def uniform(rows, levels):
  """Returns equal steps from the least to the largest weight of each row; its middle for one level.

  Han et al. 2016 (section 3.2) call it linear, and find it the best: large weights are few.

  Args:
    rows: [rows, weights] float array.
    levels: at least 1.
  """
  ordered, counts = _ordered(rows)
  low, high = ordered[:, :1], np.take_along_axis(ordered, counts[:, None] - 1, axis=1)
  shares = np.linspace(0.0, 1.0, levels) if levels > 1 else np.array([0.5])
  return (low + shares * (high - low)).astype(np.float32)


def kmeans(rows, levels):
  """Returns centres with a small squared error (Han et al. 2016, equation 2).

  `lloyd` from `quantile`, which follows the mass, and from `uniform`, which reaches the tails; of
  the two each row takes the one with the smaller error.

  Args:
    rows: [rows, weights] float array.
    levels: at least 1.
  """
  results = [lloyd(rows, start(rows, levels)) for start in (quantile, uniform)]
  # sum (w - c)^2 = sum w^2 - sum n c^2 where each centre is the mean of its n weights.
  first, second = (
    (sizes * centres.astype(np.float64) ** 2).sum(axis=1) for centres, sizes in results
  )
  return np.where((first >= second)[:, None], results[0][0], results[1][0])


STARTS = {'quantile': quantile, 'uniform': uniform, 'kmeans': kmeans}


def lloyd(rows, centres):
  """Moves each centre to the mean of the weights that it is nearest to, until none moves.

  Lloyd's algorithm, 1982. A centre without weights stays where it is.

  Args:
    rows: [rows, weights] float array.
    centres: [rows, levels] to begin with, in any order.

  Returns:
    (centres, sizes): [rows, levels] float32, ascending, and how many weights each is nearest to.
  """
  ordered, counts = _ordered(rows)
  sums = np.cumsum(np.where(np.isfinite(ordered), ordered, 0.0), axis=1, dtype=np.float64)
  sums = np.concatenate([np.zeros((len(sums), 1)), sums], axis=1)
  searched = tf.constant(ordered)
  ends = np.stack([np.zeros_like(counts), counts], axis=1)
  centres = np.sort(_flushed(np.asarray(centres, np.float32)), axis=1)
  for _ in range(_ITERATIONS):
    middles = _flushed((centres[:, 1:] + centres[:, :-1]) * np.float32(0.5))
    borders = tf.searchsorted(searched, middles, side='right').numpy()
    borders = np.concatenate([ends[:, :1], borders, ends[:, 1:]], axis=1)
    sizes = np.diff(borders, axis=1)
    totals = np.diff(np.take_along_axis(sums, borders, axis=1), axis=1)
    # A small weight behind large ones is lost in the sums; a mean is never beyond its weights.
    last = ordered.shape[1] - 1
    low, high = (
      np.take_along_axis(ordered, np.clip(places, 0, last), axis=1)
      for places in (borders[:, :-1], borders[:, 1:] - 1)
    )
    means = np.clip(totals / np.maximum(sizes, 1), low, np.maximum(low, high))
    moved = _flushed(np.where(sizes > 0, means, centres).astype(np.float32))
    if np.array_equal(moved, centres):
      break
    centres = moved
  return centres, sizes


def follow(rows, centres):
  """Returns the centres moved to the means of their weights by `lloyd`.

  A row in which more than a quarter of the centres have lost all their weights, for instance to a
  mask, begins anew with `kmeans`. What it returns it leaves as it is.

  Args:
    rows: [rows, weights] float array.
    centres: [rows, levels].
  """
  moved, sizes = lloyd(rows, centres)
  idle = (sizes == 0).mean(axis=1) > _IDLE_SHARE
  if idle.any():
    moved[idle] = kmeans(rows[idle], centres.shape[1])
  return moved


def beside_zero(rows, centres, find):
  """Returns `find(rows, centres)`; in rows that have zeros one of the centres is exactly 0.

  There it takes the place of the centre nearest to 0, and `find` sees neither it nor the zeros.

  Args:
    rows: [rows, weights] float array.
    centres: [rows, levels], at least two levels.
    find: function of such rows and centres, to centres.
  """
  sparse = (rows == 0.0).any(axis=1)
  found = np.zeros(centres.shape, np.float32)
  if not sparse.all():
    found[~sparse] = find(rows[~sparse], centres[~sparse])
  if sparse.any():
    others = np.ones((int(sparse.sum()), centres.shape[1]), bool)
    others[np.arange(len(others)), np.abs(centres[sparse]).argmin(axis=1)] = False
    weights = np.where(rows[sparse] == 0.0, np.nan, rows[sparse])
    found[sparse, 1:] = find(weights, centres[sparse][others].reshape(len(others), -1))
  return found


def _ordered(rows):
  """Returns (rows in ascending order, how many weights each has); infinity follows the weights.

  A row without a weight is one of zeros.
  """
  rows = _flushed(np.asarray(rows, np.float32))
  missing = np.isnan(rows)
  empty = missing.all(axis=1)
  ordered = np.sort(np.where(empty[:, None], 0.0, np.where(missing, np.inf, rows)), axis=1)
  return ordered.astype(np.float32), np.where(empty, rows.shape[1], (~missing).sum(axis=1))


def _flushed(values):
  """Returns float32 values with zero for subnormal ones, which TensorFlow takes for zero."""
  return np.where(np.abs(values) < np.finfo(np.float32).tiny, np.float32(0.0), values)
