"""ISTA by hand and against the LASSO, Adam against Keras', regression against loops over rows."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from regressions import conv_problem, regression
from sklearn.linear_model import Lasso as CoordinateDescent

from pocketsize.errors import UserError
from pocketsize.pruning import ista
from pocketsize.pruning.lasso import joint_contributions


def test_one_iteration_by_hand():
  """From ones: b - 0.5 (G b - g) = [1 - 0.5, 1 + 1, 1 - 1.05, 1 - 2], and soft by 0.5 * 0.2."""
  gram = np.array([[2.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 3, 0], [0, 0, 0, 4]])
  moments = np.array([2.0, 4.0, 0.9, 0.0])
  found = ista.ista(gram, moments, 0.2, 0.5, 1)
  np.testing.assert_allclose(found, [0.4, 1.9, 0.0, -0.9], atol=1e-12)


def test_two_iterations_by_hand():
  """One channel: 1 -> 1 - 0.1 (2 - 5) - 0.01 = 1.29 -> 1.29 - 0.1 (2.58 - 5) - 0.01 = 1.522."""
  found = ista.ista(np.array([[2.0]]), np.array([5.0]), 0.1, 0.1, 2)
  np.testing.assert_allclose(found, [1.522], atol=1e-12)


@pytest.mark.parametrize('penalty', [1.0, 30.0, 100.0])
def test_many_iterations_solve_the_lasso(penalty):
  p, y = regression(seed=1)
  gram = p.T @ p
  found = ista.ista(gram, p.T @ y, penalty, 1.0 / np.linalg.eigvalsh(gram)[-1], 5000)
  other = CoordinateDescent(alpha=penalty / len(y), fit_intercept=False, tol=1e-12).fit(p, y)
  np.testing.assert_allclose(found, other.coef_, atol=1e-5)


def test_without_penalty_it_is_least_squares():
  p, y = regression(seed=2)
  gram = p.T @ p
  found = ista.ista(gram, p.T @ y, 0.0, 1.0 / np.linalg.eigvalsh(gram)[-1], 20000)
  np.testing.assert_allclose(found, np.linalg.lstsq(p, y, rcond=None)[0], atol=1e-5)


def slow_choice(p, y, count, step, iterations):
  """PocketFlow's bisection with the explicit P and y; None where it ends otherwise."""
  norm = np.linalg.norm(p.T @ p)

  def solve(penalty):
    b = np.ones(p.shape[1])
    for _ in range(iterations):
      moved = b - step * (p.T @ (p @ b - y)) / norm
      b = np.where(moved > 0, 1, -1) * np.maximum(abs(moved) - penalty * step, 0)
    return b

  upper = 0.1
  while np.count_nonzero(solve(upper)) > count:
    upper *= 2
  low = 0.0
  while upper - low > 1e-8:
    for penalty in (upper, (low + upper) / 2):
      b = solve(penalty)
      if np.count_nonzero(b) == count:
        return b != 0
    if np.count_nonzero(b) > count:
      low = penalty
    else:
      upper = penalty
  return None


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('count', [1, 3, 6, 8])
def test_the_choice_is_that_of_the_bisection(seed, count):
  p, y = regression(seed=seed)
  p *= np.linspace(0.1, 2.0, 8)
  chosen = ista.select_by_ista(p.T @ p, p.T @ y, count, 0.5, 60)
  assert chosen.sum() == count
  expected = slow_choice(p, y, count, 0.5, 60)
  if expected is not None:
    np.testing.assert_array_equal(chosen, expected)


@settings(max_examples=40)
@given(
  st.integers(1, 9),
  st.integers(0, 99),
  st.sampled_from(['plain', 'zero', 'twins', 'all zero', 'few rows']),
  st.floats(1e-4, 1.0),
  st.data(),
)
def test_the_count_is_exact(channels, seed, kind, step, data):
  p, y = regression(channels, 3 if kind == 'few rows' else 40, seed)
  if kind == 'zero':
    p[:, ::2] = 0.0
  elif kind == 'twins':
    p[:, -1] = p[:, 0]
  elif kind == 'all zero':
    p[:] = 0.0
  count = data.draw(st.integers(1, channels))
  chosen = ista.select_by_ista(p.T @ p, p.T @ y, count, step, 20)
  assert chosen.shape == (channels,) and chosen.sum() == count
  again = ista.select_by_ista(p.T @ p, p.T @ y, count, step, 20)
  np.testing.assert_array_equal(again, chosen)


def test_equal_channels_leave_in_one_go_and_the_first_stay():
  """Where no penalty leaves two of four equal channels, the earlier ones are taken."""
  gram, moments = np.eye(4), np.ones(4)
  np.testing.assert_array_equal(ista.select_by_ista(gram, moments, 2), [True, True, False, False])


def test_those_that_the_next_penalty_leaves_come_before_the_others():
  """Three equal channels and a stronger one, at the end: of two, that one and the first."""
  gram, moments = np.eye(4), np.array([1.0, 1.0, 1.0, 3.0])
  np.testing.assert_array_equal(ista.select_by_ista(gram, moments, 2), [True, False, False, True])


@pytest.mark.parametrize('scale', [1e-8, 1e8])
def test_the_choice_does_not_depend_on_the_scale(scale):
  p, y = regression(seed=3)
  expected = ista.select_by_ista(p.T @ p, p.T @ y, 3)
  np.testing.assert_array_equal(ista.select_by_ista(p.T @ p * scale, p.T @ y * scale, 3), expected)


def test_adam_is_keras():
  """Float32 there, so nearly; its epsilon is added to the uncorrected root in Keras."""
  target = np.random.default_rng(0).normal(size=(4, 3))
  variable = keras.Variable(np.ones((4, 3), 'float32'))
  optimizer = keras.optimizers.Adam(0.05, epsilon=1e-8)
  start = np.ones((4, 3))
  steps = list(ista.adam(lambda value: 2 * (value - target), start, 0.05, 25))
  assert len(steps) == 25
  for ours in steps:
    optimizer.apply([2 * (variable - target.astype('float32'))], [variable])
    np.testing.assert_allclose(ours, variable, atol=1e-4)
  np.testing.assert_array_equal(start, np.ones((4, 3)))


def test_adams_first_steps_by_hand():
  """A constant gradient: each step is the learning rate, against its sign."""
  steps = list(ista.adam(lambda value: np.array([4.0, -0.001]), np.zeros(2), 0.1, 3))
  np.testing.assert_allclose(steps, [[-0.1, 0.1], [-0.2, 0.2], [-0.3, 0.3]], rtol=1e-4)
  assert list(ista.adam(lambda value: value, np.zeros(2), 0.1, 0)) == []


@pytest.mark.parametrize('decay', [0.0, 0.3])
def test_the_regression_by_loops_over_rows(decay):
  problem, x, y = conv_problem()
  rows = problem.rows_of(np.array([True, False, True, True]))
  weights = problem.kernel.copy()
  first, second = np.zeros_like(weights), np.zeros_like(weights)
  for step in range(1, 8):
    slope = decay * weights
    for one, target in zip(x, y, strict=True):
      seen = np.where(rows, one, 0.0)
      slope += np.outer(seen, seen @ weights - target) / len(x)
    first = 0.9 * first + 0.1 * slope
    second = 0.999 * second + 0.001 * slope**2
    weights = weights - 0.05 * (first / (1 - 0.9**step)) / (
      np.sqrt(second / (1 - 0.999**step)) + 1e-8
    )
  weights[~rows] = 0.0
  found = ista.regress(problem, rows, problem.kernel, 0.05, 7, decay)
  np.testing.assert_allclose(found, weights, rtol=1e-3, atol=1e-4)


def test_no_regression_steps_leave_the_kernel_with_zeros():
  problem, *_ = conv_problem()
  rows = problem.rows_of(np.array([True, False, True, True]))
  found = ista.regress(problem, rows, problem.kernel, 0.05, 0)
  np.testing.assert_array_equal(found, np.where(rows[:, None], problem.kernel, 0.0))


def test_the_method_hands_on_its_settings():
  problem, *_ = conv_problem()
  method = ista.Ista(step=0.3, iterations=20, rate=0.02, regression_steps=9, weight_decay=0.1)
  chosen = method.select([problem], [np.arange(4)], 4, 2)
  gram, moments = joint_contributions([problem], [np.arange(4)], 4)
  np.testing.assert_array_equal(chosen, ista.select_by_ista(gram, moments, 2, 0.3, 20))
  rows = problem.rows_of(chosen)
  np.testing.assert_array_equal(
    method.reconstruct(problem, rows), ista.regress(problem, rows, problem.kernel, 0.02, 9, 0.1)
  )


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'step': 0.0}, '`step`'),
    ({'step': 1.5}, '`step`'),
    ({'rate': -1.0}, '`rate`'),
    ({'iterations': 0}, '`iterations` must be at least 1'),
    ({'regression_steps': -1}, '`regression_steps` at least 0'),
  ],
)
def test_settings_that_make_no_sense(options, message):
  with pytest.raises(UserError, match=message):
    ista.Ista(**options)
