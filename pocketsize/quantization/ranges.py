"""Ranges from data: of an activation from calibration batches, of a kernel's rows from the kernel.

An initialiser sees batches one by one (`update`) and then says a range (`result`). Memory is
bounded: extremes are sums, and what pools values keeps a uniform sample of at most 2^16 of them, by
a fixed seed. A percentile p of that sample is one of the pool within sqrt(p (1 - p) / 2^16) ranks
(one standard error): 99.9 is 99.9 +- 0.012, the median 50 +- 0.2.
"""

import abc

import numpy as np

from pocketsize.errors import UserError
from pocketsize.quantization.row_ranges import (
  PERCENTILES,
  extremes,
  least_squares_range,
  percentile_range,
  three_sigma_range,
)

POOLED = 2**16
# Values that get their random keys at once.
_CHUNK = 2**20


class RangeInitialiser(abc.ABC):
  """Finds a range that includes 0.

  Args:
    bits: 1 to 16, of the quantizer that the range is for.
    symmetric: whether that quantizer's range is symmetric around 0.
  """

  def __init__(self, bits=8, symmetric=False):
    self.bits = bits
    self.symmetric = symmetric

  @abc.abstractmethod
  def update(self, batch):
    """Sees an array, [batch, ...], not empty."""

  @abc.abstractmethod
  def result(self):
    """Returns (low, high), floats, low <= 0 <= high, after at least one batch."""

  def of_rows(self, rows):
    """Returns (low, high), two [rows] arrays, for a kernel's rows, a [rows, weights] array."""
    return extremes(rows)


class MinMax(RangeInitialiser):
  """From the least to the largest value of all batches."""

  def __init__(self, bits=8, symmetric=False):
    super().__init__(bits, symmetric)
    self._low = self._high = 0.0

  def update(self, batch):
    self._low = min(self._low, float(batch.min()))
    self._high = max(self._high, float(batch.max()))

  def result(self):
    return self._low, self._high


class _Mean(RangeInitialiser):
  """The mean of the ranges that `_ranges` gives for a batch."""

  def __init__(self, bits=8, symmetric=False):
    super().__init__(bits, symmetric)
    self._sum, self._count = np.zeros(2), 0

  def update(self, batch):
    ranges = np.asarray(self._ranges(batch), np.float64)
    self._sum += ranges.sum(axis=0)
    self._count += len(ranges)

  @abc.abstractmethod
  def _ranges(self, batch):
    """Returns [ranges, 2]."""

  def result(self):
    low, high = self._sum / self._count
    return min(float(low), 0.0), max(float(high), 0.0)


class MeanMinMax(_Mean):
  """The mean of the batches' minima and the mean of their maxima."""

  def _ranges(self, batch):
    return [(float(batch.min()), float(batch.max()))]


class MixedMinMax(_Mean):
  """The mean of the samples' minima and of their maxima; symmetric: the least value of all."""

  def __init__(self, bits=8, symmetric=False):
    super().__init__(bits, symmetric)
    self._least = 0.0

  def _ranges(self, batch):
    samples = np.reshape(batch, (len(batch), -1))
    self._least = min(self._least, float(samples.min()))
    return np.stack([samples.min(axis=1), samples.max(axis=1)], axis=1)

  def result(self):
    low, high = super().result()
    return (self._least if self.symmetric else low), high


class MeanPercentile(_Mean):
  """The mean over the batches of their 0.1 and 99.9 percentiles."""

  def _ranges(self, batch):
    return [np.percentile(batch, PERCENTILES)]

  def of_rows(self, rows):
    return percentile_range(rows)


class _Pooled(RangeInitialiser):
  """`of_rows` of a uniform sample of the values of all batches; of at most 2^16."""

  def __init__(self, bits=8, symmetric=False):
    super().__init__(bits, symmetric)
    self._rng = np.random.default_rng(0)
    self._values, self._keys = np.zeros(0, np.float32), np.zeros(0)

  def update(self, batch):
    flat = self._pooled(np.ravel(batch))
    for start in range(0, len(flat), _CHUNK):
      values = flat[start : start + _CHUNK]
      # The values with the least of independent random keys are a uniform sample.
      keys = np.concatenate([self._keys, self._rng.random(len(values))])
      values = np.concatenate([self._values, values])
      if len(keys) > POOLED:
        kept = np.argpartition(keys, POOLED)[:POOLED]
        keys, values = keys[kept], values[kept]
      self._keys, self._values = keys, values

  def _pooled(self, values):
    """Returns those of a batch's values that count."""
    return values

  def result(self):
    if not len(self._values):
      return 0.0, 0.0
    low, high = self.of_rows(self._values[None])
    return float(low[0]), float(high[0])


class ThreeSigma(_Pooled):
  """Three standard deviations around the median, see `three_sigma_range`."""

  def _pooled(self, values):
    return values[values != 0]

  def of_rows(self, rows):
    return three_sigma_range(rows)


class Percentile(_Pooled):
  """The 0.1 and 99.9 percentiles of all values."""

  def of_rows(self, rows):
    return percentile_range(rows)


class LeastSquares(_Pooled):
  """The range with the least squared error, see `least_squares_range`."""

  def of_rows(self, rows):
    return least_squares_range(rows, self.bits, self.symmetric)


AUTO = 'auto'
INITIALISERS = {
  'min_max': MinMax,
  'mean_min_max': MeanMinMax,
  'mixed_min_max': MixedMinMax,
  'threesigma': ThreeSigma,
  'percentile': Percentile,
  'mean_percentile': MeanPercentile,
  'mse': LeastSquares,
}
NAMES = (AUTO, *INITIALISERS)


def initialiser(name, bits=8, symmetric=False):
  """Returns a new `RangeInitialiser`.

  Args:
    name: of `NAMES`. 'auto' is 'mean_min_max': the mean of the batches' extremes.
    bits, symmetric: of the quantizer.

  Raises:
    UserError: an unknown name; it has the legal ones.
  """
  check_name(name)
  return INITIALISERS.get(name, MeanMinMax)(bits, symmetric)


def check_name(name):
  """Raises a UserError with the legal names if `name` is none of them."""
  if name not in NAMES:
    raise UserError(f'`range_start` must be one of {", ".join(NAMES)}. Received: {name!r}.')
