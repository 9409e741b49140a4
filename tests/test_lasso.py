"""The LASSO against scikit-learn on explicit matrices, least squares against NumPy's, by hand."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from regressions import conv_problem, regression
from sklearn.linear_model import Lasso as CoordinateDescent
from sklearn.linear_model import LassoLars

from pocketsize.errors import UserError
from pocketsize.pruning import lasso
from pocketsize.pruning.gram import Problem


@pytest.mark.parametrize('count', [1, 2, 5, 7, 8])
@pytest.mark.parametrize('seed', range(3))
def test_the_path_is_scikit_learns(count, seed):
  """Along LassoLars' path on P and y, the first knot with `count` channels."""
  p, y = regression(seed=seed)
  model = LassoLars(alpha=0.0, fit_intercept=False, max_iter=3000).fit(p, y)
  knots = model.coef_path_
  expected = next(knot for knot in knots.T if np.count_nonzero(knot) >= count)
  found = lasso.lasso_path(p.T @ p, p.T @ y, count)
  np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
  chosen = lasso.select_by_lasso(p.T @ p, p.T @ y, count)
  assert chosen.dtype == bool and chosen.sum() == count
  np.testing.assert_array_equal(chosen, expected != 0.0)


def test_the_coefficients_solve_the_lasso_at_their_penalty():
  """Coordinate descent, another algorithm, finds the same at the penalty that they imply."""
  p, y = regression(seed=5)
  found = lasso.lasso_path(p.T @ p, p.T @ y, 4)
  slope = p.T @ (y - p @ found)
  penalty = np.abs(slope[found != 0.0])
  np.testing.assert_allclose(penalty, penalty[0], rtol=1e-6)
  assert (np.abs(slope) <= penalty[0] * (1 + 1e-6)).all()
  other = CoordinateDescent(alpha=penalty[0] / len(y), fit_intercept=False, tol=1e-12)
  np.testing.assert_allclose(found, other.fit(p, y).coef_, atol=1e-5)


def test_the_path_by_hand():
  """Orthogonal columns: b_i = soft(g_i, a) / G_i, so channels come in the order of |g|."""
  gram, moments = np.diag([1.0, 4.0, 9.0]), np.array([3.0, -2.0, 1.0])
  np.testing.assert_allclose(lasso.lasso_path(gram, moments, 1), [1.0, 0.0, 0.0])
  np.testing.assert_allclose(lasso.lasso_path(gram, moments, 2), [2.0, -0.25, 0.0])
  np.testing.assert_allclose(lasso.lasso_path(gram, moments, 3), [3.0, -0.5, 1 / 9])
  np.testing.assert_array_equal(lasso.select_by_lasso(gram, moments, 2), [True, True, False])


@pytest.mark.parametrize('scale', [1e-8, 1.0, 1e8])
def test_the_choice_does_not_depend_on_the_scale(scale):
  p, y = regression(seed=3)
  expected = lasso.select_by_lasso(p.T @ p, p.T @ y, 3)
  found = lasso.select_by_lasso(p.T @ p * scale, p.T @ y * scale, 3)
  np.testing.assert_array_equal(found, expected)


@settings(max_examples=60)
@given(
  st.integers(1, 9),
  st.integers(0, 99),
  st.sampled_from(['plain', 'zero', 'twins', 'collinear', 'all zero', 'few rows']),
  st.data(),
)
@pytest.mark.filterwarnings('ignore')
def test_the_count_is_exact(channels, seed, kind, data):
  p, y = regression(channels, 3 if kind == 'few rows' else 40, seed)
  if kind == 'zero':
    p[:, :: 2 if channels > 1 else 1] = 0.0
  elif kind == 'twins':
    p[:, -1] = p[:, 0]
  elif kind == 'collinear':
    p[:, -1] = p[:, :-1].sum(axis=1)
  elif kind == 'all zero':
    p[:] = 0.0
  count = data.draw(st.integers(1, channels))
  chosen = lasso.select_by_lasso(p.T @ p, p.T @ y, count)
  assert chosen.shape == (channels,) and chosen.sum() == count
  alive = np.square(p).sum(axis=0) > 0.0
  # What is always zero comes last.
  assert chosen[alive].all() or not chosen[~alive].any()


@pytest.mark.filterwarnings('error')
def test_channels_that_are_always_zero_give_no_warning():
  p, y = regression(seed=2)
  p[:, [1, 4]] = 0.0
  for count in range(1, 9):
    assert lasso.select_by_lasso(p.T @ p, p.T @ y, count).sum() == count


def test_where_the_path_ends_the_channels_that_explain_most_come_next():
  """y lies in the first column alone; of the others the last explains most of it."""
  gram = np.array([[1.0, 0.0, 0.3, 0.6], [0.0, 1, 0, 0], [0.3, 0, 1, 0], [0.6, 0, 0, 1]])
  moments = gram[0].copy()
  np.testing.assert_array_equal(lasso.lasso_path(gram, moments, 3), [1, 0, 0, 0])
  chosen = lasso.select_by_lasso(gram, moments, 3)
  np.testing.assert_array_equal(chosen, [True, False, True, True])


def test_least_squares_are_numpys():
  problem, x, y = conv_problem()
  rows = problem.rows_of(np.array([True, False, True, True]))
  expected = np.linalg.lstsq(x[:, rows], y, rcond=None)[0]
  found = lasso.least_squares(problem, rows, problem.kernel, ridge=0.0)
  assert not found[~rows].any()
  np.testing.assert_allclose(found[rows], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('ridge', [1e-4, 0.5])
def test_the_ridge_is_towards_the_start(ridge):
  """As least squares with rows sqrt(r) I and right sides sqrt(r) W0 below the others."""
  problem, x, y = conv_problem()
  rows = problem.rows_of(np.array([True, False, True, True]))
  weight = ridge * np.mean(np.diag(x[:, rows].T @ x[:, rows]))
  below = np.sqrt(weight) * np.eye(rows.sum())
  expected = np.linalg.lstsq(
    np.vstack([x[:, rows], below]),
    np.vstack([y, np.sqrt(weight) * problem.kernel[rows]]),
    rcond=None,
  )[0]
  found = lasso.least_squares(problem, rows, problem.kernel, ridge)
  np.testing.assert_allclose(found[rows], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('ridge', [lasso.RIDGE, 0.0])
@pytest.mark.parametrize('dead', [[1], [0, 1, 2, 3]])
def test_inputs_that_are_always_zero_keep_their_weights(dead, ridge):
  layer = keras.layers.Dense(3, use_bias=False)
  layer.build((None, 4))
  layer.kernel.assign(np.random.default_rng(0).normal(size=(4, 3)))
  x = np.random.default_rng(1).normal(size=(50, 4)).astype('float32')
  x[:, dead] = 0.0
  problem = Problem(layer)
  problem.add(x, x, None)
  found = lasso.least_squares(problem, np.ones(4, bool), problem.kernel, ridge)
  np.testing.assert_allclose(found, problem.kernel, rtol=1e-3, atol=1e-5)


def test_magnitudes_of_groups_by_hand():
  """A channel's are summed over kernel positions, outputs, readers and its own places."""
  layer = keras.layers.Conv1D(2, 2, use_bias=False)
  layer.build((None, 5, 2))
  layer.kernel.assign([[[1, -2], [3, 4]], [[5, 6], [-7, 8]]])
  dense = keras.layers.Dense(1)
  dense.build((None, 3))
  dense.kernel.assign([[-100], [20], [3]])
  problems = [Problem(layer), Problem(dense)]
  # The dense layer reads channel 1 at two places, and one input outside the unit.
  found = lasso.group_magnitudes(problems, [np.array([0, 1]), np.array([1, -1, 1])], 3)
  np.testing.assert_array_equal(found, [14, 22 + 103, 0])
  chosen = lasso.Lasso(lasso=False).select(problems, [np.array([0, 1]), np.array([1, -1, 1])], 3, 1)
  np.testing.assert_array_equal(chosen, [False, True, False])


def test_joint_contributions_by_loops():
  """Two readers, one with an input outside the unit and two places of one channel."""
  one, x1, y1 = conv_problem(seed=1)
  other, x2, y2 = conv_problem(seed=2, channels=5)
  places = [np.array([2, 0, 1, 3]), np.array([1, -1, 0, 1, 2])]
  expected_gram, expected_moments = np.zeros((4, 4)), np.zeros(4)
  for problem, x, y, place in ((one, x1, y1, places[0]), (other, x2, y2, places[1])):
    channels = len(place)
    columns = np.zeros((y.size, 4))
    target = y.ravel().copy()
    for channel, position in enumerate(place):
      mine = np.arange(len(problem.kernel)) % channels == channel
      contribution = (x[:, mine] @ problem.kernel[mine]).ravel()
      if position < 0:
        target -= contribution
      else:
        columns[:, position] += contribution
    energy = np.square(y).sum()
    expected_gram += columns.T @ columns / energy
    expected_moments += columns.T @ target / energy
  gram, moments = lasso.joint_contributions([one, other], places, 4)
  np.testing.assert_allclose(gram, expected_gram, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(moments, expected_moments, rtol=1e-4, atol=1e-6)


def test_a_reader_counts_with_its_relative_error():
  one, *_ = conv_problem(seed=1)
  loud = conv_problem(seed=1)[0]
  loud.gram, loud.moments, loud.energy = loud.gram, loud.moments * 10, loud.energy * 100
  loud.kernel = loud.kernel * 10
  place = [np.arange(4)]
  for quiet, noisy in zip(
    lasso.joint_contributions([one], place, 4),
    lasso.joint_contributions([loud], place, 4),
    strict=True,
  ):
    np.testing.assert_allclose(quiet, noisy, rtol=1e-6)


def test_the_method_reconstructs_with_its_ridge():
  problem, *_ = conv_problem()
  rows = problem.rows_of(np.array([True, True, False, True]))
  np.testing.assert_array_equal(
    lasso.Lasso(ridge=0.3).reconstruct(problem, rows),
    lasso.least_squares(problem, rows, problem.kernel, 0.3),
  )
  with pytest.raises(UserError, match='`ridge` must be at least 0. Received: -1'):
    lasso.Lasso(ridge=-1)
