"""Codebooks: where centres begin, k-means on rows, nearest centres and their gradients."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.cluster import KMeans

from pocketsize.quantization import centres
from pocketsize.quantization.codebook import Codebook, nearest
from pocketsize.sparsity.magnitude import magnitude_mask

WEIGHTS = st.floats(-3, 3, width=32)
GRANULARITIES = ('tensor', 'channel', 'bucket')


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def fitted(kernel, *args, **kwargs):
  quantizer = Codebook(*args, **kwargs)
  quantizer.build(kernel.shape)
  quantizer.fit(kernel)
  return quantizer


def by_loop(rows, table):
  """Returns, for each weight, the nearest centre of its row, the lower of two as near."""
  return np.array(
    [
      [min(sorted(row), key=lambda centre: abs(np.float64(centre) - weight)) for weight in weights]
      for weights, row in zip(rows.astype(np.float64), table, strict=True)
    ],
    np.float32,
  )


# Where centres begin.


def test_quantiles_by_hand():
  """Of 0, 1, 2, 3, 4: quarters lie at 1, 2, 3; of 0, 10 with a gap: a third at 10 / 3."""
  assert centres.quantile(np.array([[4.0, 0, 3, 1, 2]]), 3).tolist() == [[1, 2, 3]]
  found = centres.quantile(np.array([[10.0, np.nan, 0.0]]), 2)
  np.testing.assert_allclose(found, [[10 / 3, 20 / 3]], rtol=1e-6)


def test_equal_steps_by_hand():
  rows = np.array([[-1.0, 0.2, 2.0], [np.nan, 5.0, np.nan]])
  assert centres.uniform(rows, 4).tolist() == [[-1, 0, 1, 2], [5, 5, 5, 5]]
  assert centres.uniform(rows, 1).tolist() == [[0.5], [5]]


@given(arrays.arrays(np.float32, (3, 9), elements=WEIGHTS | st.just(np.nan)), st.integers(1, 6))
def test_quantiles_against_numpy(rows, levels):
  rows[:, 0] = 1.0
  shares = np.arange(1, levels + 1) / (levels + 1)
  wanted = np.nanquantile(rows.astype(np.float64), shares, axis=1).T
  np.testing.assert_allclose(centres.quantile(rows, levels), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('start', centres.STARTS.values())
def test_a_row_without_weights_has_centres_at_zero(start):
  rows = np.array([[np.nan, np.nan], [1.0, 2.0]])
  found = start(rows, 2)
  assert found[0].tolist() == [0, 0] and found.dtype == np.float32
  np.testing.assert_array_equal(found[1], start(rows[1:], 2)[0])


# k-means.


def test_lloyd_by_hand():
  """0, 1, 2 go to the centre 0 and 9 to 5; the means are 1 and 9, and nothing moves any more."""
  found, sizes = centres.lloyd(np.array([[9.0, 0, 2, 1]]), np.array([[5.0, 0]]))
  assert found.tolist() == [[1, 9]] and sizes.tolist() == [[3, 1]]


def test_lloyd_gives_a_weight_half_way_to_the_lower_centre_as_training_does():
  found, sizes = centres.lloyd(np.array([[0.0, 1, 2]]), np.array([[0.0, 2]]))
  assert found.tolist() == [[0.5, 2]] and sizes.tolist() == [[2, 1]]


def test_a_centre_without_weights_stays():
  found, sizes = centres.lloyd(np.array([[0.0, 1.0]]), np.array([[0.0, 1.0, 50.0]]))
  assert found.tolist() == [[0, 1, 50]] and sizes.tolist() == [[1, 1, 0]]


def test_lloyd_against_scikit_learn():
  """The same start, the same fixed point; scikit-learn stops a little before it, hence 1e-3."""
  rows = normal(3, 300)
  begin = centres.quantile(rows, 5)
  found, _ = centres.lloyd(rows, begin)
  for row, start, got in zip(rows, begin, found, strict=True):
    slow = KMeans(5, init=start[:, None], n_init=1, tol=0, max_iter=1000).fit(row[:, None])
    np.testing.assert_allclose(got, np.sort(slow.cluster_centers_.ravel()), atol=1e-3)


def test_weights_that_are_small_beside_others_are_not_lost():
  rows = np.r_[0.0, -1, 1, [3.058315e-15] * 9][None].astype(np.float32)
  found, _ = centres.lloyd(rows, np.array([[-1.0, 0.0, 1e-15, 4e-15, 1.0]]))
  np.testing.assert_array_equal(found[0, [0, 3, 4]], np.float32([-1, 3.058315e-15, 1]))


def test_subnormal_weights_are_zeros_as_in_training():
  least = np.float32(2.0**-149)
  rows = np.array([[-3, -least, -least, 0, 0, 1]], np.float32)
  found, sizes = centres.lloyd(rows, np.array([[-least, 0, least]], np.float32))
  assert (np.diff(found) >= 0).all()
  np.testing.assert_array_equal(centres.lloyd(rows, found)[0], found)
  assert sizes.sum() == 6


@given(arrays.arrays(np.float32, (2, 12), elements=WEIGHTS), st.integers(1, 8))
def test_kmeans_is_where_following_stays_and_no_worse_than_its_starts(rows, levels):
  found = centres.kmeans(rows, levels)
  np.testing.assert_array_equal(centres.follow(rows, found), found)

  def errors(table):
    return ((by_loop(rows, table) - rows.astype(np.float64)) ** 2).sum(axis=1)

  for start in (centres.quantile, centres.uniform):
    assert (errors(found) <= errors(start(rows, levels)) + 1e-5).all()


def test_following_begins_anew_where_most_centres_lost_their_weights():
  """A mask took the middle: centres of the first row serve nothing any more, of the second all."""
  rows = np.stack([np.r_[normal(50) - 20, normal(50) + 20], normal(100)])
  table = np.stack([[-20.0, -0.3, 0.1, 0.2], [-1.0, -0.3, 0.3, 1.0]])
  moved = centres.follow(rows, table)
  np.testing.assert_array_equal(moved[:1], centres.kmeans(rows[:1], 4))
  np.testing.assert_array_equal(moved[1:], centres.lloyd(rows[1:], table[1:])[0])
  assert (centres.lloyd(rows, moved)[1] > 0).all()


# Nearest centres.


def assigned(rows, table, present=None):
  rows, table = tf.constant(rows, tf.float32), tf.constant(table, tf.float32)
  return nearest(rows, tf.ones_like(rows) if present is None else present, table).numpy()


def test_nearest_centres_by_hand():
  """Half way between two centres the lower one; beyond the last one the last one."""
  rows = [[-9, 0.49, 0.5, 0.51, 9], [2, 2, 2, 2, 2]]
  assert assigned(rows, [[0, 1], [5, 3]]).tolist() == [[0, 0, 0, 1, 1], [3, 3, 3, 3, 3]]


@given(
  arrays.arrays(np.int32, (2, 20), elements=st.integers(-8, 8)),
  arrays.arrays(np.int32, (2, 5), elements=st.integers(-8, 8)),
)
def test_nearest_centres_in_any_order_against_a_loop(rows, table):
  np.testing.assert_array_equal(assigned(rows, table), by_loop(rows, table))


def gradients(rows, table, upstream, present=None):
  rows, table = tf.constant(rows, tf.float32), tf.constant(table, tf.float32)
  present = tf.ones_like(rows) if present is None else tf.constant(present, tf.float32)
  with tf.GradientTape() as tape:
    tape.watch([rows, table])
    loss = tf.reduce_sum(nearest(rows, present, table) * upstream)
  return [each.numpy().tolist() for each in tape.gradient(loss, [rows, table])]


def test_the_gradient_of_a_centre_is_the_mean_of_those_of_its_weights():
  """Centre 1 has the weights 0.8 and 1.1 (gradients 2 and 4: mean 3), 0 has one, -5 none."""
  to_rows, to_table = gradients([[0.8, -0.1, 1.1]], [[1, -5, 0]], [[2.0, 7.0, 4.0]])
  assert to_rows == [[2, 7, 4]]
  assert to_table == [[3, 0, 7]]


def test_what_fills_up_a_row_counts_for_no_centre():
  _, to_table = gradients([[1, 0, 0]], [[1, 0]], [[2.0, 6.0, 0.0]], [[1, 1, 0]])
  assert to_table == [[2, 6]]


def test_rows_do_not_share_centres():
  _, to_table = gradients([[1, 1], [1, 1]], [[1, 0], [0, 1]], [[1.0, 3.0], [5.0, 7.0]])
  assert to_table == [[2, 0], [0, 6]]


def test_sgd_moves_a_centre_as_it_moves_the_mean_of_its_weights():
  """One rate for weights and centres: k-means' centres stay means while nothing is reassigned."""
  rows, upstream = normal(1, 40), normal(1, 40, seed=1)
  table = centres.kmeans(rows, 3)
  to_rows, to_table = gradients(rows, table, upstream)
  moved = rows - 1e-4 * np.float32(to_rows)
  np.testing.assert_array_equal(assigned(moved, table), assigned(rows, table))
  wanted, _ = centres.lloyd(moved, table)
  np.testing.assert_allclose(table - 1e-4 * np.float32(to_table), wanted, atol=1e-6)


# The transform.


@pytest.mark.parametrize('start', centres.STARTS)
@pytest.mark.parametrize('granularity', GRANULARITIES)
def test_a_kernel_is_mapped_to_the_nearest_centres_of_its_rows(granularity, start):
  kernel = normal(3, 3, 2, 5)
  quantizer = fitted(kernel, 2, granularity, (-1,), 7, start)
  deployed = quantizer(kernel).numpy()
  rows = quantizer.groups.split(kernel)
  assert quantizer.centres.shape == (len(rows), 4)
  wanted = quantizer.groups.join(by_loop(rows, np.array(quantizer.centres)))
  np.testing.assert_array_equal(deployed, wanted)
  assert quantizer.grid(deployed) is None
  with tf.GradientTape() as tape:
    variable = tf.Variable(kernel)
    loss = tf.reduce_sum(quantizer(variable) * 3.0)
  np.testing.assert_array_equal(tape.gradient(loss, variable), np.full(kernel.shape, 3.0))


def test_a_short_last_bucket_has_its_own_centres_and_no_zeros_of_others():
  kernel = np.float32([1, 2, 3, 4, 10, 20])
  quantizer = fitted(kernel, 1, 'bucket', (), 4)
  assert np.array(quantizer.centres).tolist() == [[1.5, 3.5], [10, 20]]
  with tf.GradientTape() as tape:
    loss = tf.reduce_sum(quantizer(kernel) * [1.0, 3, 5, 7, 9, 11])
  assert tape.gradient(loss, quantizer.centres.value).numpy().tolist() == [[2, 6], [9, 11]]


def test_a_row_has_no_more_centres_than_weights():
  kernel = normal(3, 4)
  quantizer = fitted(kernel, 8, 'channel')
  assert quantizer.centres.shape == (4, 3)
  np.testing.assert_allclose(quantizer(kernel), kernel, rtol=1e-6)
  assert fitted(normal(1, 4), 4, 'channel').centres.shape == (4, 2)


def test_centres_that_cross_are_told_apart():
  kernel = np.float32([-1, -0.8, 0.8, 1])
  quantizer = fitted(kernel, 1)
  quantizer.centres.assign([[0.5, -0.5]])
  assert quantizer(kernel).numpy().tolist() == [-0.5, -0.5, 0.5, 0.5]
  assert quantizer.codes(quantizer(kernel)).codes.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize('start', centres.STARTS)
@pytest.mark.parametrize('granularity', GRANULARITIES)
def test_a_masked_kernel_keeps_its_zeros(granularity, start):
  kernel = normal(3, 3, 2, 5)
  masked = kernel * magnitude_mask(kernel, 0.6)
  masked[..., 4] = kernel[..., 4]
  quantizer = fitted(masked, 2, granularity, (-1,), 7, start)
  for _ in range(2):
    deployed = quantizer(masked).numpy()
    assert (deployed[masked == 0.0] == 0.0).all() and deployed.any()
    quantizer.follow(masked)


def test_zeros_are_kept_on_request():
  kernel = np.float32([0, 0.2, 1, 1.2])
  np.testing.assert_allclose(fitted(kernel, 1)(kernel), [0, 0, 0.8, 0.8], rtol=1e-6)
  quantizer = fitted(kernel, 1, keep_zeros=False)
  np.testing.assert_allclose(quantizer(kernel), [0.1, 0.1, 1.1, 1.1], rtol=1e-6)


def test_the_other_centres_of_a_sparse_row_do_not_see_its_zeros():
  kernel = np.float32([0, 0, 0, 0, 0, -4, -4, 1, 3])
  quantizer = fitted(kernel, 2)
  assert sorted(np.array(quantizer.centres)[0].tolist()) == [-4, 0, 1, 3]


def test_zeros_that_come_later_take_the_centre_nearest_to_them_and_it_has_no_gradient():
  kernel = np.float32([-2, -2, -0.5, 1, 1, 3])
  quantizer = fitted(kernel, 2)
  assert quantizer(kernel).numpy()[2] == -0.5
  kernel[2] = 0.0
  with tf.GradientTape() as tape:
    deployed = quantizer(kernel)
    loss = tf.reduce_sum(deployed)
  assert deployed.numpy().tolist() == [-2, -2, 0, 1, 1, 3]
  assert np.array(quantizer.centres)[0].tolist() == [-2, -0.5, 1, 3]
  assert tape.gradient(loss, quantizer.centres.value).numpy().tolist() == [[1, 0, 1, 1]]


@settings(max_examples=40)
@given(
  st.sampled_from(GRANULARITIES),
  st.integers(1, 8),
  st.sampled_from(sorted(centres.STARTS)),
  st.booleans(),
  st.sampled_from([8, 32]),
  st.integers(0, 99),
)
def test_codes_stand_for_the_deployed_kernel_to_the_last_bit(
  granularity, bits, start, sparse, centre_bits, seed
):
  kernel = normal(3, 3, 2, 6, seed=seed)
  kernel *= magnitude_mask(kernel, 0.5 if sparse else 0.0)
  quantizer = fitted(kernel, bits, granularity, (-1,), 25, start, centre_bits=centre_bits)
  quantizer.centres.assign_add(normal(*quantizer.centres.shape, seed=seed + 1) * 0.1)
  deployed = quantizer(kernel).numpy()
  codes = quantizer.codes(deployed)
  assert codes.bits == bits and codes.codes.shape == kernel.shape
  assert codes.codes.min() >= 0 and codes.codes.max() < 2**bits
  assert codes.scale is None and codes.zero_point is None
  assert codes.centres.dtype == np.float32
  rows = codes.groups.split(codes.codes)
  read = codes.groups.join(np.take_along_axis(codes.centres, rows, axis=1))
  np.testing.assert_array_equal(read, deployed)
  grid = quantizer.grid(deployed)
  assert (grid is None) == (centre_bits == 32 or granularity == 'bucket')
  if grid:
    integers = grid.codes(deployed)
    assert grid.bits == 8 and np.abs(integers).max() <= 127
    np.testing.assert_array_equal(integers.astype(np.float32) * grid.scale, deployed)


def test_centres_on_a_grid_by_hand():
  """120 is the largest multiple of 8, so that all are whole; 0.1875 is half way from 15 to 30."""
  kernel = np.float32([1.0, 0.25, 0.125, -0.75, 0.187, 0.188])
  quantizer = fitted(kernel, 2, centre_bits=8)
  quantizer.centres.assign([[1.0, 0.25, -0.75, 0.125]])
  deployed = quantizer(kernel).numpy()
  grid = quantizer.grid(deployed)
  assert grid.codes(deployed).tolist() == [120, 30, 15, -90, 15, 30]
  assert grid.scale.shape == (1,) and grid.scale[0] == np.float32(1 / 120)


def test_the_gradient_of_a_centre_on_a_grid_is_the_mean_too():
  kernel = np.float32([[0.9, -3], [1.2, 2], [-0.6, 2.2], [-0.4, 1.8]])
  quantizer = fitted(kernel, 1, 'channel', centre_bits=8)
  quantizer.centres.assign([[1.04, -0.5713], [-3.01, 2.02]])
  variable = tf.Variable(kernel)
  with tf.GradientTape() as tape:
    deployed = quantizer(tf.convert_to_tensor(variable))
    loss = tf.reduce_sum(deployed * [[1.0, 9], [3.0, 2], [5.0, 3], [11.0, 7]])
  assert not np.isin(deployed, np.float32([-0.5713, 2.02])).any()
  to_kernel, to_centres = tape.gradient(loss, [variable, quantizer.centres.value])
  assert to_kernel.numpy().tolist() == [[1, 9], [3, 2], [5, 3], [11, 7]]
  assert to_centres.numpy().tolist() == [[2, 8], [9, 4]]


def test_a_centre_that_rounds_to_zero_changes_no_scale():
  """No weight is 0 before it is deployed, and its grid is that of the weights as deployed."""
  kernel = np.float32([1.0, 0.31, 0.003, -0.47])
  quantizer = fitted(kernel, 2, centre_bits=8)
  deployed = quantizer(kernel).numpy()
  assert deployed[2] == 0.0 and (deployed[[0, 1, 3]] != 0.0).all()
  np.testing.assert_array_equal(quantizer(deployed), deployed)
  np.testing.assert_array_equal(
    quantizer.grid(kernel).codes(deployed).astype(np.float32) * quantizer.grid(deployed).scale,
    deployed,
  )


def test_a_row_of_zeros_on_a_grid():
  kernel = normal(3, 4)
  kernel[:, 1] = 0.0
  quantizer = fitted(kernel, 2, 'channel', centre_bits=8)
  deployed = quantizer(kernel).numpy()
  assert (deployed[:, 1] == 0.0).all() and (deployed[:, [0, 2, 3]] != 0.0).all()
  assert quantizer.grid(deployed).scale[0, 1] == 0.0


def test_centres_of_buckets_are_float():
  kernel = normal(4, 5)
  tables = [fitted(kernel, 2, 'bucket', (), 6, centre_bits=bits)(kernel) for bits in (8, 32)]
  np.testing.assert_array_equal(*tables)


def test_codes_of_centres_that_are_neighbouring_numbers():
  """Their middle is none of them, though in float32 it rounds to one."""
  kernel = np.float32([1.0, np.nextafter(np.float32(1), np.float32(2))])
  for shift in (0, 1):
    quantizer = fitted(kernel, 1)
    pair = np.nextafter(kernel, np.float32(2)) if shift else kernel
    quantizer.centres.assign(pair[None])
    assert quantizer.codes(pair).codes.tolist() == [0, 1]


def test_no_tensor_is_centres_times_as_large_as_the_kernel():
  """256 centres for 10,000 weights: everything in the traced step has at most 20,000 elements."""
  kernel = normal(100, 100)
  quantizer = fitted(kernel, 8, start='uniform')

  @tf.function
  def step(x):
    with tf.GradientTape() as tape:
      loss = tf.reduce_sum(quantizer(x))
    return tape.gradient(loss, quantizer.centres.value)

  graph = step.get_concrete_function(tf.TensorSpec(kernel.shape)).graph
  sizes = [
    output.shape.num_elements() or 0
    for operation in graph.get_operations()
    for output in operation.outputs
    if output.shape.rank is not None
  ]
  assert len(sizes) > 10 and 10_000 <= max(sizes) <= 20_000


def test_a_config_makes_an_equal_codebook():
  arguments = {
    'bits': 3,
    'granularity': 'bucket',
    'channel_axes': (0, 1),
    'bucket_size': 7,
    'start': 'uniform',
    'trains': False,
    'keep_zeros': False,
    'centre_bits': 8,
  }
  made = Codebook(**arguments)
  copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(made))
  assert {name: getattr(copy, name) for name in arguments} == arguments


def test_centres_are_trained_or_not():
  kernel = normal(4, 4)
  assert len(fitted(kernel).trainable_variables) == 1
  assert fitted(kernel, trains=False).trainable_variables == []
