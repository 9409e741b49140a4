"""Weights under a mask, refitted: against a solver that takes one output after the other."""

from unittest import mock

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

from pocketsize.allocation.problem import Variable
from pocketsize.allocation.variants import Variants, refitted, sparse
from pocketsize.graph import Graph
from pocketsize.pruning.gram import Problem
from pocketsize.pruning.sampling import Sampling, is_regression
from pocketsize.sparsity.magnitude import magnitude_mask
from pocketsize.sparsity.refit import refit
from tests import toys


def dense_problem(rng, inputs, outputs, rows):
  """Returns the `Problem` of a dense layer that reads `rows` samples of a few factors."""
  layer = layers.Dense(outputs, use_bias=False)
  layer.build((None, inputs))
  layer.kernel.assign(rng.normal(size=(inputs, outputs)))
  read = rng.normal(size=(rows, 3)) @ rng.normal(size=(3, inputs))
  read += 0.3 * rng.normal(size=read.shape)
  problem = Problem(layer)
  problem.add(read.astype('float32'), read.astype('float32'), None)
  return problem


def slow(problem, mask, ridge):
  """The normal equations of each output's own weights."""
  penalty = ridge * np.trace(problem.gram) / len(problem.gram)
  found = np.zeros_like(problem.kernel)
  for output in range(mask.shape[1]):
    kept = mask[:, output] > 0
    gram = problem.gram[np.ix_(kept, kept)] + penalty * np.eye(kept.sum())
    right = problem.moments[kept, output] + penalty * problem.kernel[kept, output]
    found[kept, output] = np.linalg.solve(gram, right)
  return found


@settings(max_examples=30)
@given(
  seed=st.integers(0, 2**32 - 1),
  inputs=st.integers(1, 12),
  outputs=st.integers(1, 5),
  ratio=st.floats(0.0, 1.0),
  ridge=st.sampled_from([1e-4, 1e-2, 1.0]),
)
def test_it_is_the_least_squares_of_each_output(seed, inputs, outputs, ratio, ridge):
  rng = np.random.default_rng(seed)
  problem = dense_problem(rng, inputs, outputs, 40)
  mask = magnitude_mask(problem.kernel, ratio)
  # To the end; ten inputs of three factors hardly tell apart what lies within the usual residual.
  with mock.patch('pocketsize.sparsity.refit._TOLERANCE', 1e-14):
    found = refit(problem, mask, ridge)
  assert not found[mask == 0].any()
  wanted = slow(problem, mask, ridge)
  np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(problem.kernel).max())


def test_two_inputs_that_are_one_by_hand():
  """y = 3 a + b with b = a: without b the weight is 4; without a, 4; with neither, nothing."""
  layer = layers.Dense(3, use_bias=False)
  layer.build((None, 2))
  layer.kernel.assign([[3.0] * 3, [1.0] * 3])
  read = np.array([[1.0, 1.0], [2.0, 2.0]], 'float32')
  problem = Problem(layer)
  problem.add(read, read, None)
  mask = np.array([[1, 0, 0], [0, 1, 0]], float)
  np.testing.assert_allclose(refit(problem, mask, 0.0), [[4, 0, 0], [0, 4, 0]], rtol=1e-6)
  # X'X is 5 everywhere, and so is its mean diagonal: r = 5: (20 + 15) / 10 and (20 + 5) / 10.
  np.testing.assert_allclose(refit(problem, mask, 1.0), [[3.5, 0, 0], [0, 2.5, 0]], rtol=1e-6)


def test_layers_that_never_saw_anything_keep_their_weights():
  problem = dense_problem(np.random.default_rng(0), 4, 2, 1)
  for sums in (problem.gram, problem.moments):
    sums[:] = 0.0
  mask = magnitude_mask(problem.kernel, 0.5)
  np.testing.assert_allclose(refit(problem, mask), mask * problem.kernel, rtol=1e-6)


@pytest.fixture(scope='module')
def net():
  inputs = keras.Input((6, 6, 3))
  x = layers.Conv2D(8, 3, strides=2, padding='same', activation='relu', name='conv')(inputs)
  x = layers.DepthwiseConv2D(3, padding='same', name='depthwise')(x)
  x = layers.Conv2D(8, 1, groups=2, name='grouped')(x)
  return keras.Model(inputs, layers.Dense(4, name='head')(layers.Flatten()(x)))


def test_kernels_of_choices_are_refitted_where_that_can_be(net):
  graph, images = Graph(net), toys.images(40, 6)
  paths = ['conv', 'depthwise', 'grouped', 'head']
  regressions = [path for path in paths if is_regression(graph.layers[path])]
  assert regressions == ['conv', 'head']
  problems = Sampling(graph, points=None).problems(regressions, [images[:20], images[20:]])
  choices = [Variable(path, (0.75, 0.0)) for path in paths]
  plain = Variants(net, choices, sparse)
  made = Variants(net, choices, refitted(problems))
  low, high = [0] * 4, [1] * 4
  for path in paths:
    (kept,), (kernel,) = plain.kernels(low)[path].values(), made.kernels(low)[path].values()
    np.testing.assert_array_equal(kernel != 0, kept != 0)
    assert (kernel != kept).any() == (path in regressions)
    assert kernel.dtype == np.float32
    (whole,), (same,) = plain.kernels(high)[path].values(), made.kernels(high)[path].values()
    np.testing.assert_array_equal(same, whole)
    if path in regressions:
      errors = [
        problems[path].error(each.reshape(problems[path].kernel.shape).astype(float))
        for each in (kernel, kept)
      ]
      assert errors[0] < errors[1]


def test_positions_are_a_function_of_the_seed_the_layer_and_the_batch(net):
  graph, images = Graph(net), toys.images(40, 6)
  sampling = Sampling(graph, points=4, seed=1)
  places = sampling.places('conv', images.shape, 0)
  assert places.shape == (40, 4) and places.min() >= 0 and places.max() < 9
  np.testing.assert_array_equal(places, Sampling(graph, 4, 1).places('conv', images.shape, 0))
  for other in (
    sampling.places('conv', images.shape, 1),
    Sampling(graph, 4).places('conv', images.shape, 0),
  ):
    assert (other != places).any()
  assert Sampling(graph, points=9).places('conv', images.shape, 0) is None
  assert sampling.problems(['conv'], [images])['conv'].rows == 160
