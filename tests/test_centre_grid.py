"""Centres on an int8 grid against a loop over codes, and what stays exact."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pocketsize.quantization.centre_grid import codes_and_scales, on_grid

CENTRES = st.floats(-3, 3, width=32).map(lambda value: value if abs(value) > 1e-6 else 0.0)


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def found(centres):
  return [each.numpy() for each in codes_and_scales(tf.constant(centres, tf.float32))]


def squared_error(row, highest):
  """Returns the error of one row in float64, centre by centre."""
  scale = max(abs(float(centre)) for centre in row) / highest
  return sum((float(centre) - round(float(centre) / scale) * scale) ** 2 for centre in row)


def test_the_scale_has_the_least_error_by_hand():
  """-1/2, 0 and 1/8 of the largest are whole numbers of 1/120, and of no finer step to 1/127."""
  codes, scales = found([[-0.5, 0.0, 0.125, 1.0], [6.0, -3.0, 0.0, 0.75]])
  assert codes.tolist() == [[-60, 0, 15, 120], [120, -60, 0, 15]]
  np.testing.assert_allclose(scales, [[1 / 120], [6 / 120]], rtol=1e-6)


@settings(max_examples=60)
@given(arrays.arrays(np.float32, st.tuples(st.just(3), st.integers(2, 12)), elements=CENTRES))
def test_against_a_loop_over_the_codes_of_the_largest_centre(centres):
  codes, scales = found(centres)
  assert codes.dtype == scales.dtype == np.float32 and scales.shape == (3, 1)
  for row, integers, scale in zip(centres, codes, scales[:, 0], strict=True):
    if not row.any():
      assert not integers.any() and scale == 0.0
      continue
    highest = int(np.abs(integers).max())
    assert scale == pytest.approx(np.abs(row).max() / highest, rel=1e-6)
    assert np.abs(row / scale - integers).max() <= 0.5001
    assert (integers[row == 0.0] == 0.0).all()
    legal = range(127, 63, -1) if len(row) <= 8 else [127]
    least = min(squared_error(row, other) for other in legal)
    assert highest in legal
    assert squared_error(row, highest) <= least + 1e-9 * np.abs(row).max() ** 2


def test_a_search_leaves_four_centres_less_than_half_the_error():
  centres = normal(200, 4)
  plain = np.abs(centres).max(axis=1, keepdims=True) / 127
  errors = [
    np.sqrt(np.mean((np.round(centres / scale) * scale - centres) ** 2))
    for scale in (found(centres)[1], plain)
  ]
  assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize('levels', [2, 8, 9, 256])
def test_a_compiled_step_has_the_numbers_of_an_eager_one(levels):
  centres = tf.constant(normal(50, levels))
  compiled = tf.function(lambda values: (*codes_and_scales(values), on_grid(values)))(centres)
  codes, scales = codes_and_scales(centres)
  for got, expected in zip(compiled, (codes, scales, on_grid(centres)), strict=True):
    np.testing.assert_array_equal(got, expected)
  np.testing.assert_array_equal(codes.numpy() * scales.numpy(), on_grid(centres))
  assert np.abs(codes).max() <= 127


def test_the_gradient_goes_straight_through():
  centres, upstream = tf.Variable(normal(3, 4)), normal(3, 4, seed=1)
  with tf.GradientTape() as tape:
    loss = tf.reduce_sum(on_grid(tf.convert_to_tensor(centres)) * upstream)
  np.testing.assert_array_equal(tape.gradient(loss, centres), upstream)
