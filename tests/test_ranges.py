"""Range initialisers against hand-worked numbers and loops."""

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from toys import conv_net, images

import pocketsize
from pocketsize.errors import UserError
from pocketsize.quantization import ranges
from pocketsize.quantization.quantizers import highest_code, weight_scale
from pocketsize.quantization.row_ranges import affine_grid, least_squares_range, three_sigma_range

# Two batches of two samples: extremes of the samples (-1, 3), (0, 1), (-4, 2), (1, 9).
BATCHES = (
  np.float32([[[-1.0, 3.0], [0.0, 2.0]], [[0.0, 1.0], [1.0, 0.5]]]),
  np.float32([[[-4.0, 2.0], [1.0, 0.0]], [[1.0, 9.0], [2.0, 3.0]]]),
)
ROWS = arrays.arrays(
  np.float32, arrays.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(-9, 9)
)


def found(name, batches=BATCHES, **arguments):
  initialiser = ranges.initialiser(name, **arguments)
  for batch in batches:
    initialiser.update(batch)
  return initialiser.result()


@pytest.mark.parametrize(
  ('name', 'symmetric', 'expected'),
  [
    ('min_max', False, (-4.0, 9.0)),
    ('auto', False, (-2.5, 6.0)),
    ('mean_min_max', False, (-2.5, 6.0)),
    # Samples: minima -1, 0, -4, 1; maxima 3, 1, 2, 9.
    ('mixed_min_max', False, (-1.0, 3.75)),
    ('mixed_min_max', True, (-4.0, 3.75)),
    # Without zeros: -4 -1 .5 1 1 1 1 2 2 2 3 3 9; median 1, distances 5 2 .5 0 0 0 0 1 1 1 2 2 8
    # have the median 1.
    ('threesigma', False, (1.0 - 3 * 1.4826230, 1.0 + 3 * 1.4826230)),
  ],
)
def test_ranges_by_hand(name, symmetric, expected):
  assert found(name, symmetric=symmetric) == pytest.approx(expected, rel=1e-6)


def test_percentiles_of_the_pool_and_of_the_batches():
  """0 to 1000: 0.1 % is 1, 99.9 % is 999; and -1000 to 0 mirrored; all of them: -998 and 998."""
  up = np.arange(1001, dtype=np.float32)
  batches = (up.reshape(1, -1), -up.reshape(1, -1))
  assert found('percentile', batches[:1]) == pytest.approx((0.0, 999.0))
  assert found('percentile', batches) == pytest.approx((-998.0, 998.0), abs=0.01)
  assert found('mean_percentile', batches) == pytest.approx((-499.0, 499.0))


@pytest.mark.parametrize('name', ranges.NAMES)
@pytest.mark.parametrize('sign', [1.0, -1.0, 0.0])
def test_every_range_includes_zero_and_is_finite(name, sign):
  """One-sided data away from 0, and data that are all zero."""
  batch = sign * np.random.default_rng(0).uniform(3, 4, (4, 50)).astype(np.float32)
  low, high = found(name, [batch, batch], bits=6)
  assert low <= 0.0 <= high and np.isfinite([low, high]).all()
  assert (low == high) == (sign == 0.0)
  if name != 'threesigma':
    assert (low == 0.0) == (sign >= 0.0) and (high == 0.0) == (sign <= 0.0)


def slow_squared_error(values, low, high, bits):
  """Value by value; the zero point is floor(z + 1/2), codes round half to even."""
  if bits == 1:
    low, high = (0.0, high) if high >= -low else (low, 0.0)
  levels = 2**bits - 1
  step = (high - low) / levels
  if step == 0.0:
    return float(sum(value**2 for value in values))
  zero = np.floor(-low / step + 0.5)
  return float(
    sum(
      ((min(max(np.round(value / step) + zero, 0), levels) - zero) * step - value) ** 2
      for value in values
    )
  )


@pytest.mark.parametrize('bits', [2, 4, 8])
def test_the_searched_range_is_near_the_best_of_a_grid_of_both_ends(bits):
  """300 normal values and two far away; 16 x 16 ends against three searches of 29: within 10 %.

  Never worse than the extremes, and far better where levels are few.
  """
  values = np.random.default_rng(bits).normal(size=300)
  values[:2] = -6.0, 9.0
  low, high = (float(end[0]) for end in least_squares_range(values[None], bits))
  error = slow_squared_error(values, low, high, bits)
  parts = np.linspace(0.1, 1.0, 16)
  best = min(slow_squared_error(values, -6.0 * a, 9.0 * b, bits) for a in parts for b in parts)
  assert error <= 1.1 * best
  assert error <= slow_squared_error(values, -6.0, 9.0, bits)
  assert bits > 2 or error < 0.7 * slow_squared_error(values, -6.0, 9.0, bits)


def test_a_symmetric_search_gives_symmetric_ends():
  low, high = least_squares_range(np.float32([[-1.0, 0.3, 5.0], [0.0, 0.0, 0.0]]), 3, True)
  np.testing.assert_allclose(low, -high)
  assert high[0] > 1.0 and high[1] == 0.0


@given(ROWS, st.sampled_from(ranges.NAMES), st.integers(1, 8))
def test_rows_are_searched_one_by_one(rows, name, bits):
  """All rows at once are what each alone is."""
  initialiser = ranges.initialiser(name, bits)
  together = initialiser.of_rows(rows)
  for index, row in enumerate(rows):
    alone = initialiser.of_rows(row[None])
    for both, one in zip(together, alone, strict=True):
      assert both[index] == pytest.approx(one[0], rel=1e-6, abs=1e-9)


@given(ROWS)
def test_three_sigma_against_a_loop(rows):
  for row, low, high in zip(rows, *three_sigma_range(rows), strict=True):
    values = sorted(float(value) for value in row if value != 0)
    if not values:
      assert (low, high) == (0.0, 0.0)
      continue

    def median(ordered):
      half = len(ordered) // 2
      return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2

    centre = median(values)
    spread = 3 * 1.4826230 * median(sorted(abs(value - centre) for value in values))
    assert low == pytest.approx(min(centre - spread, 0.0), abs=1e-5)
    assert high == pytest.approx(max(centre + spread, 0.0), abs=1e-5)


def test_the_affine_grid_by_hand():
  """-1.4 to 1.6 on 3 steps of 1: zero point round(1.4) = 1. One bit has the farther end."""
  assert [float(part) for part in affine_grid(-1.4, 1.6, 2)] == [1.0, 1.0]
  scale, zero_point = affine_grid(np.float32([-3, 0, 0]), np.float32([1, 2, 0]), 1)
  assert scale.tolist() == [3, 2, 0] and zero_point.tolist() == [1, 0, 0]


def test_pooled_values_are_bounded_uniform_and_the_same_each_time(monkeypatch):
  """A reservoir of 400 from 40,000 ramp values; the mean of uniform draws is off by 2 %."""
  monkeypatch.setattr(ranges, 'POOLED', 400)
  monkeypatch.setattr(ranges, '_CHUNK', 3000)
  pools = []
  for _ in range(2):
    initialiser = ranges.initialiser('percentile')
    for start in range(0, 40_000, 10_000):
      initialiser.update(np.arange(start, start + 10_000, dtype=np.float32))
      assert len(initialiser._values) == 400
    pools.append(np.sort(initialiser._values))
  np.testing.assert_array_equal(*pools)
  assert len(np.unique(pools[0])) == 400
  # Quartiles of a uniform sample: standard error sqrt(3/16 / 400) = 2.2 % of the ranks.
  for part in (0.25, 0.5, 0.75):
    assert np.quantile(pools[0], part) / 40_000 == pytest.approx(part, abs=0.09)


def test_an_unknown_name_is_refused_with_the_legal_ones():
  with pytest.raises(UserError, match="one of auto, min_max, .*mse. Received: 'minmax'"):
    ranges.initialiser('minmax')


@pytest.mark.parametrize('name', ranges.NAMES)
@pytest.mark.parametrize('bits', [1, 3, 8])
def test_scales_of_kernels_by_name(name, bits):
  rows = np.random.default_rng(1).normal(size=(5, 80)).astype(np.float32)
  rows[2] = 0.0
  scale = weight_scale(rows, bits, name)
  if bits == 1:
    expected = np.abs(rows).mean(axis=1)
  elif name == 'mse' or (name == 'auto' and bits == 3):
    expected = weight_scale(rows, bits, 'mse')
    assert (expected <= np.abs(rows).max(axis=1) / highest_code(bits) + 1e-7).all()
  else:
    low, high = ranges.initialiser(name).of_rows(rows)
    expected = np.maximum(-low, high) / highest_code(bits)
  np.testing.assert_allclose(scale, expected, rtol=1e-6)
  assert scale.dtype == np.float32 and scale[2] == 0.0


@pytest.mark.parametrize('name', ranges.NAMES)
def test_calibration_finds_ranges_as_it_is_told(name):
  batches = [images(seed=1), 3 * images(seed=2)]
  model, _ = pocketsize.compress(
    conv_net(), [{'algorithm': 'uniform', 'range_start': name}], calibration=batches
  )
  quantizer = model.transforms_at('images', 'output')[0]
  expected = found(name, batches)
  assert (float(quantizer.low), float(quantizer.high)) == pytest.approx(expected, rel=1e-6)
  relu = model.transforms_at('relu0', 'output')[0]
  assert float(relu.low) == 0.0 < float(relu.high)
  assert quantizer.start == name
  copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(quantizer))
  assert copy.start == name
