"""Schedules against numbers on paper."""

import math

import pytest

from pocketsize.errors import UserError
from pocketsize.schedules import (
  baseline,
  cosine,
  exponential,
  exponential_with_bias,
  polynomial,
)


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


def test_baseline_by_hand():
  assert [baseline(step, 5, 0.1, 0.5) for step in (0, 4, 5, 99)] == [0.1, 0.1, 0.5, 0.5]


@pytest.mark.parametrize(
  ('step', 'value'),
  # The density goes from 0.8 to 0.2: half way sqrt(0.8 * 0.2) = 0.4, a quarter 0.8 / sqrt(2).
  [(9, 0.2), (10, 0.2), (15, 1 - 0.8 / math.sqrt(2)), (20, 0.6), (30, 0.8), (99, 0.8)],
)
def test_exponential_by_hand(step, value):
  assert exponential(step, 10, 30, 0.2, 0.8) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
  ('step', 'value'),
  # e^(-k/8) is 1/4 but for 1e-5, so a quarter of the way 1 - 1/16 of 0.8 is done.
  [(3, 0.0), (4, 0.0), (14, 0.6), (24, 0.75), (84, 0.8), (999, 0.8)],
)
def test_exponential_with_bias_by_hand(step, value):
  assert exponential_with_bias(step, 4, 84, 0.0, 0.8) == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize('initial', [0.1, 0.4, 0.8 * 5 / 7, 0.59])
def test_exponential_with_bias_goes_through_its_three_points(initial):
  """From above, as a line (initial 5/7 of final: 3/4 at an eighth of the way), and from below."""
  values = [exponential_with_bias(step, 0, 8, initial, 0.8) for step in range(9)]
  assert [values[0], values[1], values[8]] == pytest.approx([initial, 0.6, 0.8], abs=1e-9)
  assert values == sorted(values)


def test_exponential_with_bias_needs_a_low_beginning():
  with pytest.raises(UserError, match=r'below three quarters .* Received: 0\.6 and 0\.8'):
    exponential_with_bias(1, 0, 8, 0.6, 0.8)


@pytest.mark.parametrize('schedule', [exponential, exponential_with_bias])
def test_exponentials_without_length_jump_at_begin(schedule):
  assert [schedule(step, 7, 3, 0.25, 0.5) for step in (6, 7, 8)] == [0.25, 0.5, 0.5]
