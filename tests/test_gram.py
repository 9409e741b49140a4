"""Patches against Keras' own layers; Gram matrices and block sums against explicit X and Y."""

import math

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

from pocketsize.pruning import gram
from pocketsize.pruning.gram import Problem, at_places, output_places, patches

CONVOLUTIONS = {1: layers.Conv1D, 2: layers.Conv2D, 3: layers.Conv3D}


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype('float32')


def built(layer, x, seed=0):
  """Builds a layer for x with a random kernel and, if it has one, a bias that must not matter."""
  layer.build(x.shape)
  layer.kernel.assign(normal(*layer.kernel.shape, seed=seed + 1))
  return layer


def flat_outputs(layer, x):
  """Returns [rows, outputs] of a layer without bias and activation, positions in C order.

  TensorFlow convolves channels that come first on some processors only, so they come last.
  """
  if getattr(layer, 'data_format', None) == 'channels_first':
    x = np.moveaxis(x, 1, -1)
    last = type(layer).from_config(layer.get_config() | {'data_format': 'channels_last'})
    last.build(x.shape)
    last.kernel.assign(layer.kernel)
    layer = last
  y = np.array(layer(x))
  return y.reshape(-1, y.shape[-1])


def flat_kernel(layer):
  kernel = np.array(layer.kernel)
  return kernel.reshape(-1, kernel.shape[-1])


@st.composite
def convolutions(draw):
  """A convolution that Keras can compute, and an input of it."""
  rank = draw(st.integers(1, 3))
  kernel = [draw(st.integers(1, 3)) for _ in range(rank)]
  strides, dilations = [1] * rank, [1] * rank
  # Keras has no layer with both.
  if draw(st.booleans()):
    strides = [draw(st.integers(1, 3))] * rank
  else:
    dilations = [draw(st.integers(1, 2)) for _ in range(rank)]
  padding = draw(st.sampled_from(['valid', 'same', 'causal'] if rank == 1 else ['valid', 'same']))
  reaches = [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]
  sizes = [draw(st.integers(reach, 8 - rank)) for reach in reaches]
  first = draw(st.booleans()) and padding != 'causal'
  channels = draw(st.integers(1, 3))
  layer = CONVOLUTIONS[rank](
    draw(st.integers(1, 3)),
    kernel,
    strides,
    padding,
    data_format='channels_first' if first else 'channels_last',
    dilation_rate=dilations,
    use_bias=False,
  )
  x = normal(2, channels, *sizes) if first else normal(2, *sizes, channels)
  return built(layer, x), x


@settings(max_examples=60)
@given(convolutions())
def test_patches_times_kernel_is_the_convolution(drawn):
  layer, x = drawn
  expected = flat_outputs(layer, x)
  assert output_places(layer, x.shape) * len(x) == len(expected)
  np.testing.assert_allclose(patches(layer, x) @ flat_kernel(layer), expected, atol=1e-4)


@settings(max_examples=40)
@given(convolutions(), st.integers(1, 5), st.integers(0, 99))
def test_sampled_places_are_rows_of_all_places(drawn, points, seed):
  layer, x = drawn
  count = output_places(layer, x.shape)
  places = np.random.default_rng(seed).integers(0, count, (len(x), points))
  everywhere = patches(layer, x).reshape(len(x), count, -1)
  expected = np.concatenate([everywhere[sample][places[sample]] for sample in range(len(x))])
  np.testing.assert_array_equal(patches(layer, x, places), expected)


@pytest.mark.parametrize('shape', [(5, 3), (5, 4, 3), (2, 4, 2, 3)])
def test_dense_layers_read_their_last_axis(shape):
  x = normal(*shape)
  layer = built(layers.Dense(4, use_bias=False), x)
  np.testing.assert_allclose(patches(layer, x) @ flat_kernel(layer), flat_outputs(layer, x), 1e-5)
  assert output_places(layer, shape) == math.prod(shape[1:-1])
  places = np.zeros((shape[0], 2), int)
  first = x.reshape(shape[0], -1, 3)[:, :1]
  np.testing.assert_array_equal(patches(layer, x, places), np.repeat(first, 2, 0).reshape(-1, 3))


def test_patches_by_hand():
  """Rows are ordered by kernel position first, then channel; 'same' pads more behind."""
  x = np.float32([[[1, 10], [2, 20], [3, 30], [4, 40]]])
  layer = built(layers.Conv1D(1, 2, padding='same'), x)
  expected = [[1, 10, 2, 20], [2, 20, 3, 30], [3, 30, 4, 40], [4, 40, 0, 0]]
  np.testing.assert_array_equal(patches(layer, x), expected)
  layer = built(layers.Conv1D(1, 2, padding='causal'), x)
  expected = [[0, 0, 1, 10], [1, 10, 2, 20], [2, 20, 3, 30], [3, 30, 4, 40]]
  np.testing.assert_array_equal(patches(layer, x), expected)


def test_values_at_places():
  values = np.arange(24).reshape(2, 2, 3, 2)
  np.testing.assert_array_equal(at_places(values, None), np.arange(24).reshape(12, 2))
  found = at_places(values, np.array([[5, 0], [1, 1]]))
  np.testing.assert_array_equal(found, [[10, 11], [0, 1], [14, 15], [14, 15]])


def case(first=False, seed=0):
  """Returns (layer, read, original, offset) for a 3x3 convolution of 3 to 5 channels."""
  shape = (6, 3, 5, 4) if first else (6, 5, 4, 3)
  read, original = normal(*shape, seed=seed), normal(*shape, seed=seed + 1)
  layer = layers.Conv2D(
    5,
    3,
    padding='same',
    data_format='channels_first' if first else 'channels_last',
    use_bias=False,
  )
  layer = built(layer, read)
  return layer, read, original, normal(*layer.compute_output_shape(read.shape), seed=seed + 2)


def explicit(layer, read, original, offset):
  """Returns X and Y in float64, from Keras."""
  x = patches(layer, read).astype(np.float64)
  y = flat_outputs(layer, original)
  if getattr(layer, 'data_format', '') == 'channels_first':
    offset = np.moveaxis(offset, 1, -1)
  return x, (y + offset.reshape(y.shape)).astype(np.float64)


@pytest.mark.parametrize('first', [False, True], ids=['channels_last', 'channels_first'])
@pytest.mark.parametrize('chunk', [2**24, 2 * 20 * 27, 1], ids=['whole', 'two samples', 'single'])
def test_a_problem_is_that_of_the_matrices(monkeypatch, chunk, first):
  monkeypatch.setattr(gram, 'CHUNK', chunk)
  layer, read, original, offset = case(first)
  problem = Problem(layer)
  for part in (slice(0, 4), slice(4, 6)):
    problem.add(read[part], original[part], None, offset[part])
  x, y = explicit(layer, read, original, offset)
  np.testing.assert_allclose(problem.gram, x.T @ x, rtol=1e-4, atol=1e-3)
  np.testing.assert_allclose(problem.moments, x.T @ y, rtol=1e-4, atol=1e-3)
  assert problem.energy == pytest.approx(np.square(y).sum(), rel=1e-5)
  assert problem.rows == len(x) == 6 * 20
  kernel = normal(27, 5, seed=9).astype(np.float64)
  assert problem.error(kernel) == pytest.approx(np.square(y - x @ kernel).sum(), rel=1e-4)


@pytest.mark.parametrize('chunk', [2**24, 1])
def test_sampled_rows_are_those_of_the_matrices(monkeypatch, chunk):
  monkeypatch.setattr(gram, 'CHUNK', chunk)
  layer, read, original, offset = case()
  places = np.random.default_rng(3).integers(0, 20, (6, 4))
  problem = Problem(layer)
  problem.add(read, original, places, offset)
  x, y = explicit(layer, read, original, offset)
  chosen = (np.arange(6)[:, None] * 20 + places).ravel()
  np.testing.assert_allclose(problem.gram, x[chosen].T @ x[chosen], rtol=1e-4, atol=1e-3)
  np.testing.assert_allclose(problem.moments, x[chosen].T @ y[chosen], rtol=1e-4, atol=1e-3)
  assert problem.energy == pytest.approx(np.square(y[chosen]).sum(), rel=1e-5)
  assert problem.rows == 24


@pytest.mark.parametrize('given_kernel', [False, True])
def test_contributions_are_those_of_each_channel(given_kernel):
  layer, read, original, offset = case()
  problem = Problem(layer)
  problem.add(read, original, None, offset)
  x, y = explicit(layer, read, original, offset)
  kernel = normal(27, 5, seed=7).astype(np.float64) if given_kernel else problem.kernel
  columns = []
  for channel in range(3):
    mine = [row for row in range(27) if row % 3 == channel]
    columns.append((x[:, mine] @ kernel[mine]).ravel())
  p = np.stack(columns, axis=1)
  products, moments = problem.contributions(kernel if given_kernel else None)
  np.testing.assert_allclose(products, p.T @ p, rtol=1e-4)
  np.testing.assert_allclose(moments, p.T @ y.ravel(), rtol=1e-4, atol=1e-2)


def test_the_layers_bias_plays_no_part():
  layer = layers.Conv1D(2, 1)
  x = normal(3, 4, 2)
  built(layer, x).bias.assign([5.0, -5.0])
  problem = Problem(layer)
  problem.add(x, x, None)
  assert problem.error(problem.kernel) == pytest.approx(0.0, abs=1e-4)


def test_the_rows_of_channels():
  problem = Problem(built(layers.Conv1D(1, 2), normal(1, 4, 3)))
  expected = [True, False, True, True, False, True]
  np.testing.assert_array_equal(problem.rows_of(np.array([True, False, True])), expected)


def test_two_workers_sums_are_those_of_one():
  layer, read, original, offset = case()
  whole, *parts = (Problem(layer) for _ in range(3))
  whole.add(read, original, None, offset)
  for part, mine in zip(parts, (slice(0, 2), slice(2, 6)), strict=True):
    part.add(read[mine], original[mine], None, offset[mine])
  others = iter([parts[1].gram, parts[1].moments, parts[1].energy, parts[1].rows])
  parts[0].reduce(lambda array: array + next(others))
  np.testing.assert_allclose(parts[0].gram, whole.gram, rtol=1e-5, atol=1e-3)
  np.testing.assert_allclose(parts[0].moments, whole.moments, rtol=1e-5, atol=1e-3)
  assert parts[0].energy == pytest.approx(whole.energy, rel=1e-6)
  assert (parts[0].rows, type(parts[0].rows)) == (whole.rows, int)


def test_precision_is_kept_over_many_batches():
  """Sums are in float64: a thousand batches of ones are a thousand exactly."""
  layer = keras.layers.Dense(1, use_bias=False)
  x = np.full((1, 1), 4097.0, 'float32')
  built(layer, x).kernel.assign([[1.0]])
  problem = Problem(layer)
  for _ in range(1000):
    problem.add(x, x, None)
  assert problem.gram[0, 0] == 1000 * float(np.float32(4097.0**2))
