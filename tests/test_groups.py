"""Rows of a kernel against loops over its weights."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pocketsize.quantization.groups import Groups

KERNELS = arrays.arrays(
  np.float32, arrays.array_shapes(min_dims=1, max_dims=4, max_side=5), elements=st.integers(-9, 9)
)


@given(KERNELS, st.data())
def test_rows_are_channels_in_order(kernel, data):
  axes = data.draw(st.lists(st.integers(0, kernel.ndim - 1), unique=True, max_size=2))
  groups = Groups(kernel.shape, 'channel', axes)
  rows = groups.split(kernel)
  assert len(rows) == groups.count == np.prod([kernel.shape[axis] for axis in axes], initial=1)
  assert np.prod(groups.broadcast, initial=1) == groups.count
  kept = sorted(axes)
  for row, place in zip(rows, np.ndindex(*(kernel.shape[axis] for axis in kept)), strict=True):
    where = [slice(None)] * kernel.ndim
    for axis, index in zip(kept, place, strict=True):
      where[axis] = index
    np.testing.assert_array_equal(row, np.ravel(kernel[tuple(where)]))


@given(KERNELS, st.integers(1, 30))
def test_buckets_are_runs_of_the_flat_kernel(kernel, size):
  groups = Groups(kernel.shape, 'bucket', bucket_size=size)
  flat = kernel.ravel()
  wanted = [flat[start : start + size] for start in range(0, flat.size, size)]
  assert groups.broadcast is None
  assert groups.count == len(wanted)
  for row, run in zip(groups.split(kernel), wanted, strict=True):
    np.testing.assert_array_equal(row[: len(run)], run)
    assert not row[len(run) :].any()
  # Zeros that fill up the last bucket are not seen: its minimum is that of its weights.
  np.testing.assert_array_equal(
    groups.fit(kernel, lambda rows: rows.min(axis=1)), [run.min() for run in wanted]
  )


@given(KERNELS, st.sampled_from(['tensor', 'channel', 'bucket']), st.integers(1, 30))
def test_joining_undoes_splitting(kernel, granularity, size):
  groups = Groups(kernel.shape, granularity, (-1,), size)
  np.testing.assert_array_equal(groups.join(groups.split(kernel)), kernel)


@pytest.mark.parametrize('granularity', ['tensor', 'channel', 'bucket'])
def test_tensors_are_seen_as_arrays_are(granularity):
  kernel = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
  groups = Groups(kernel.shape, granularity, (1,), 7)
  rows = groups.split(tf.constant(kernel))
  np.testing.assert_array_equal(rows, groups.split(kernel))
  np.testing.assert_array_equal(groups.join(rows), kernel)
