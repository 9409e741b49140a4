"""Group thresholds by hand, the descent by loops over rows, and rates that would diverge."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from regressions import conv_problem

from pocketsize.errors import UserError
from pocketsize.pruning import proximal
from pocketsize.pruning.gram import Problem


def dense_problem(kernel, x, original=None):
  layer = keras.layers.Dense(np.shape(kernel)[1], use_bias=False)
  layer.build((None, len(kernel)))
  layer.kernel.assign(kernel)
  problem = Problem(layer)
  x = np.asarray(x, 'float32')
  problem.add(x, x if original is None else np.asarray(original, 'float32'), None)
  return problem


def test_the_group_threshold_by_hand():
  norms = np.array([0.0, 1.0, 2.0, 8.0])
  np.testing.assert_allclose(proximal.group_factors(norms, 2.0), [0, 0, 0, 0.75])
  np.testing.assert_allclose(proximal.group_factors(norms, 0.0), [0, 1, 1, 1])
  np.testing.assert_allclose(proximal.group_factors(norms, 1.0), [0, 0, 0.5, 0.875])
  assert np.isfinite(proximal.group_factors(np.zeros(3), 0.0)).all()


def test_the_proximal_operator_minimises():
  """min_v |v - w|^2 / 2 + t |v| is w max(1 - t / |w|, 0): no other v on a grid is better."""
  w, threshold = np.array([3.0, 4.0]), 2.0
  found = w * proximal.group_factors(np.array([5.0]), threshold)[0]

  def value(v):
    return np.square(v - w).sum() / 2 + threshold * np.linalg.norm(v)

  grid = [np.array([a, b]) for a in np.linspace(-1, 5, 61) for b in np.linspace(-1, 5, 61)]
  assert value(found) <= min(map(value, grid)) + 1e-9


def test_two_steps_of_the_descent_by_hand():
  """X'X = I and Y = X W, so the gradient is zero until the threshold has shrunk the weights.

  |W| = 4, 3, 0. For one of two channels to be kept, tau rises to the 25 % and 50 % quantile.
  """
  problem = dense_problem([[4.0, 0.0], [0.0, 3.0]], np.eye(2))
  norms = proximal.descend([problem], [np.arange(2)], 2, 1, (0.5, 1.0, 1.0), 2)
  # Norms relative to |W| = 5: 0.8, 0.6. tau = 0.6 + 0.25 * 0.2 = 0.65: 0.8 - 0.65 = 0.15 and 0.
  # A step of 0.5 towards 0.8 and 0.6: 0.475 and 0.3. tau = 0.3875: 0.0875 and 0.
  np.testing.assert_allclose(norms, [0.0875, 0.0], atol=1e-9)


def slow_descent(x, y, kernel, channels, count, rates, iterations):
  """PocketFlow's selection of one layer over explicit rows, with the limit of the step size."""
  size, grow, fall = rates
  weights = kernel.copy()
  scale = np.sqrt(np.square(kernel).sum())
  limit = 1.0 / np.linalg.eigvalsh(x.T @ x)[-1]
  size = min(size, limit)
  for step in range(1, iterations + 1):
    before = np.square(y - x @ weights).sum()
    weights = weights - size * (x.T @ (x @ weights - y))
    after = np.square(y - x @ weights).sum()
    size = min(size * (grow if after < before else fall), limit)
    mine = [np.arange(len(weights)) % channels == channel for channel in range(channels)]
    norms = np.array([np.linalg.norm(weights[each]) for each in mine])
    tau = np.percentile(norms, 100.0 * step / iterations * (1.0 - count / channels))
    for each, norm in zip(mine, norms, strict=True):
      weights[each] *= max(1.0 - tau / norm, 0.0) if norm else 0.0
  return np.array([np.linalg.norm(weights[each]) for each in mine]) / scale


@pytest.mark.parametrize('rates', [(1e-10, 1.4, 0.7), (1e-3, 1.1, 0.5), (1.0, 1.0, 1.0)])
@pytest.mark.parametrize('count', [1, 3])
def test_the_descent_by_loops_over_rows(rates, count):
  problem, x, y = conv_problem(seed=4)
  found = proximal.descend([problem], [np.arange(4)], 4, count, rates, 40)
  expected = slow_descent(x, y, problem.kernel, 4, count, rates, 40)
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
  assert np.count_nonzero(found) == count


def test_norms_of_several_readers_are_added_as_squares():
  """Each relative to its kernel: 0.8^2 and 0.6^2 of both, whatever their size."""
  small = dense_problem([[4.0], [3.0]], np.eye(2))
  large = dense_problem([[300.0], [400.0], [1200.0]], np.eye(3))
  norms = proximal.descend(
    [small, large], [np.array([0, 1]), np.array([1, 0, -1])], 2, 2, (1e-10, 1.4, 0.7), 1
  )
  expected = [np.hypot(0.8, 400 / 1300), np.hypot(0.6, 300 / 1300)]
  np.testing.assert_allclose(norms, expected, rtol=1e-6)


def test_inputs_outside_the_unit_are_not_shrunk():
  """Their weights go down the gradient only: with Y = X W and X'X = I they stay."""
  problem = dense_problem([[1.0], [5.0], [3.0]], np.eye(3))
  norms = proximal.descend([problem], [np.array([0, -1, 1])], 2, 1, (0.5, 1.4, 0.7), 50)
  assert norms[0] == 0.0 < norms[1] and np.isfinite(norms).all()


@pytest.mark.parametrize('first', [1e-30, 1.0, 1e30, 1e300])
@pytest.mark.parametrize('rate', [1e-3, 1e30])
@pytest.mark.filterwarnings('error::RuntimeWarning')
def test_absurd_rates_never_end_in_numbers_that_are_not_finite(first, rate):
  problem, *_ = conv_problem(seed=1)
  method = proximal.Proximal(first, 1e30, 0.5, rate, 30)
  chosen = method.select([problem], [np.arange(4)], 4, 2)
  assert chosen.sum() == 2
  kernel = method.reconstruct(problem, problem.rows_of(chosen))
  assert np.isfinite(kernel).all()
  masked = np.where(problem.rows_of(chosen)[:, None], problem.kernel, 0.0)
  assert problem.error(kernel) <= problem.error(masked) * (1 + 1e-9)


@pytest.mark.filterwarnings('error::RuntimeWarning')
@pytest.mark.parametrize('kernel', [0.0, 1.0])
def test_inputs_and_kernels_of_zeros(kernel):
  problem = dense_problem(np.full((4, 2), kernel), np.zeros((6, 4)))
  method = proximal.Proximal(iterations=20)
  chosen = method.select([problem], [np.arange(4)], 4, 3)
  assert chosen.sum() == 3
  found = method.reconstruct(problem, problem.rows_of(chosen))
  np.testing.assert_array_equal(found, np.where(chosen[:, None], problem.kernel, 0.0))


@settings(max_examples=40)
@given(st.integers(1, 8), st.integers(0, 99), st.integers(1, 30), st.data())
def test_the_count_is_exact(channels, seed, iterations, data):
  rng = np.random.default_rng(seed)
  kernel = rng.normal(size=(channels, 3)) * rng.integers(0, 2, (channels, 1))
  problem = dense_problem(kernel, rng.normal(size=(12, channels)), rng.normal(size=(12, channels)))
  count = data.draw(st.integers(1, channels))
  method = proximal.Proximal(first=1e-2, iterations=iterations)
  chosen = method.select([problem], [np.arange(channels)], channels, count)
  assert chosen.dtype == bool and chosen.sum() == count
  again = method.select([problem], [np.arange(channels)], channels, count)
  np.testing.assert_array_equal(again, chosen)


@pytest.mark.parametrize('rate', [1e-4, 0.01, 10.0])
def test_the_refit_is_never_worse_than_its_start(rate):
  problem, x, y = conv_problem(seed=6)
  rows = problem.rows_of(np.array([True, False, True, False]))
  start = np.where(rows[:, None], problem.kernel, 0.0)
  found = proximal.refit(problem, rows, problem.kernel, rate, 60)
  assert not found[~rows].any()
  error = np.square(y - x @ found).sum()
  assert error <= np.square(y - x @ start).sum() * (1 + 1e-6)
  if rate == 0.01:
    assert error < 0.9 * np.square(y - x @ start).sum()


def test_the_refit_takes_the_best_of_all_steps():
  """A rate that overshoots: the error of the last step is not the least."""
  problem, x, y = conv_problem(seed=6)
  rows = np.ones(36, bool)
  errors = [
    np.square(y - x @ proximal.refit(problem, rows, problem.kernel, 0.5, steps)).sum()
    for steps in range(1, 12)
  ]
  assert all(
    later <= earlier * (1 + 1e-9) for earlier, later in zip(errors, errors[1:], strict=False)
  )


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'first': 0.0}, '`first` and `rate` must be positive'),
    ({'rate': -1.0}, '`first` and `rate` must be positive'),
    ({'grow': 0.9}, '`grow` at least 1'),
    ({'fall': 1.1}, r'`fall` in \(0, 1\]'),
    ({'iterations': 0}, '`iterations` must be at least 1'),
  ],
)
def test_settings_that_make_no_sense(options, message):
  with pytest.raises(UserError, match=message):
    proximal.Proximal(**options)
