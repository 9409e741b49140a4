"""Schedules against numbers on paper."""

import math

import pytest

from pocketsize.schedules import cosine, polynomial


@pytest.mark.parametrize(
  ('step', 'value'),
  # Half way 1 - 0.5^3 = 7/8 of 0.8; a quarter of the way 1 - 0.75^3 = 37/64 of 0.8.
  [(0, 0.0), (99, 0.0), (100, 0.0), (125, 0.8 * 37 / 64), (150, 0.7), (200, 0.8), (10**9, 0.8)],
)
def test_polynomial_by_hand(step, value):
  assert polynomial(step, 100, 200, 0.0, 0.8) == pytest.approx(value, abs=1e-12)


def test_polynomial_with_exponent_one_is_a_line_from_initial_to_final():
  assert [polynomial(step, 0, 4, 8.0, 4.0, exponent=1.0) for step in range(5)] == [8, 7, 6, 5, 4]


@pytest.mark.parametrize('end', [7, 3])
def test_polynomial_without_length_jumps_at_begin(end):
  assert [polynomial(step, 7, end, 0.25, 0.5) for step in (6, 7, 8)] == [0.25, 0.5, 0.5]


@pytest.mark.parametrize(
  ('step', 'value'),
  [(-5, 3.0), (0, 3.0), (25, 1 + 2 * (1 + math.sqrt(0.5)) / 2), (50, 2.0), (100, 1.0), (101, 1.0)],
)
def test_cosine_by_hand(step, value):
  assert cosine(step, 100, 3.0, 1.0) == pytest.approx(value, abs=1e-12)


def test_cosine_of_no_steps_begins_at_initial_and_ends_at_final():
  assert cosine(0, 0, 3.0) == 3.0
  assert cosine(1, 0, 3.0) == 0.0
