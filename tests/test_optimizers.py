"""Muon's step on kernels against NumPy's singular values, and what it leaves to Adam."""

import keras
import numpy as np
import pytest

from learners.optimizers import Muon, optimizer


def step(shape, rate=0.01, kind='muon', steps=1):
  """Returns (value before, value after) of a variable and its gradient, the same at each step."""
  rng = np.random.default_rng(0)
  variable = keras.Variable(rng.normal(size=shape).astype('float32'))
  gradient = rng.normal(size=shape).astype('float32')
  before = np.array(variable)
  chosen = optimizer(kind, rate, 0.9)
  chosen.build([variable])
  for _ in range(steps):
    chosen.apply([gradient], [variable])
  return before, np.array(variable), gradient


@pytest.mark.parametrize('shape', [(3, 3, 4, 8), (3, 5, 7), (1, 1, 16, 6), (3, 3, 3, 2, 40)])
def test_all_directions_of_a_kernel_learn_alike(shape):
  """U S V' becomes U V', times 0.2 sqrt(larger side): five steps leave S in [0.6, 1.3]."""
  before, after, gradient = step(shape)
  update = (before - after).reshape(-1, shape[-1]) / 0.01
  matrix = gradient.reshape(update.shape)
  left, _, right = np.linalg.svd(matrix, full_matrices=False)
  inside = left.T @ update @ right.T / (0.2 * np.sqrt(max(matrix.shape)))
  assert (np.diag(inside) > 0.6).all() and (np.diag(inside) < 1.3).all()
  np.testing.assert_allclose(inside, np.diag(np.diag(inside)), atol=0.02)


@pytest.mark.parametrize('shape', [(7,), (5, 3), (1, 1, 1, 6), (3, 3, 4, 1), ()])
def test_the_rest_learns_by_adam(shape):
  for ours, theirs in zip(step(shape, steps=3), step(shape, kind='adam', steps=3), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_a_rate_of_zero_changes_nothing():
  """So the weight decay of Keras' own, which is not in the loss, is off."""
  before, after, _ = step((3, 3, 4, 8), rate=0.0)
  np.testing.assert_array_equal(before, after)
  assert Muon(0.1).weight_decay is None


def test_sgd_has_the_momentum_that_is_asked_for():
  before, after, gradient = step((4,), rate=0.5, kind='sgd', steps=2)
  np.testing.assert_allclose(before - after, 0.5 * gradient * (1 + 1.9), rtol=1e-5)
