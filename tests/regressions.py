"""Regression problems that the tests of solvers share."""

import keras
import numpy as np

from pocketsize.pruning.gram import Problem, patches


def regression(channels=8, rows=60, seed=0):
  """Returns (P, y) with columns of different sizes that are correlated."""
  rng = np.random.default_rng(seed)
  mixing = np.eye(channels) + 0.3 * rng.normal(size=(channels, channels))
  p = rng.normal(size=(rows, channels)) @ mixing * rng.uniform(0.5, 2.0, channels)
  return p, p.sum(axis=1) + 0.1 * rng.normal(size=rows)


def conv_problem(seed=0, channels=4, outputs=3):
  """Returns (problem, X, Y) of a 3x3 convolution whose inputs are not the original ones."""
  rng = np.random.default_rng(seed)
  layer = keras.layers.Conv2D(outputs, 3, use_bias=False)
  layer.build((None, 6, 6, channels))
  layer.kernel.assign(rng.normal(size=layer.kernel.shape))
  original = rng.normal(size=(5, 6, 6, channels)).astype('float32')
  read = original + 0.3 * rng.normal(size=original.shape).astype('float32')
  problem = Problem(layer)
  problem.add(read, original, None)
  x = patches(layer, read).astype(np.float64)
  return problem, x, np.array(layer(original), np.float64).reshape(len(x), -1)
