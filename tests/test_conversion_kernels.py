"""Folding batch norm into integer kernels, on arrays."""

import keras
import numpy as np
import pytest

from pocketsize import folding
from pocketsize.conversion import kernels
from pocketsize.quantization.asymmetric import AsymmetricWeightQuantizer
from pocketsize.quantization.dorefa import Dorefa
from pocketsize.quantization.quantizers import WeightQuantizer
from pocketsize.transform import Grid, Transform


class _OnGrid(Transform):
  """A transform that says which grid a kernel lies on."""

  def __init__(self, scale, bits):
    super().__init__()
    self.bits = bits
    self._grid = None if scale is None else Grid(np.asarray(scale), bits)

  def grid(self, kernel):
    return self._grid


def test_codes_keep_their_value_up_to_the_sign_of_the_factor():
  codes = np.array([[1, -7], [3, 2]])
  kernel = kernels.make_kernel(
    'd',
    keras.layers.Dense(2),
    'kernel',
    codes * np.float32([0.5, 0.25]),
    [_OnGrid([[0.5, 0.25]], 4)],
    factor=np.array([2.0, -4.0]),
  )
  np.testing.assert_array_equal(kernel.codes, [[1, 7], [3, -2]])
  np.testing.assert_array_equal(kernel.scale, [[1.0, 1.0], [1.0, 1.0]])
  np.testing.assert_array_equal(kernel.values, [[1.0, 7.0], [3.0, -2.0]])
  assert kernel.bits == 4 and not kernel.note


def test_a_channel_with_factor_zero_has_codes_zero_and_a_scale():
  kernel = kernels.make_kernel(
    'd',
    keras.layers.Dense(2),
    'kernel',
    np.float32([[1.0, 2.0]]),
    [_OnGrid(1.0, 8)],
    factor=np.array([0.0, 1.0]),
  )
  np.testing.assert_array_equal(kernel.codes, [[0, 2]])
  np.testing.assert_array_equal(kernel.scale, [[1.0, 1.0]])


def test_a_group_of_zeros_has_scale_zero_in_training_and_codes_zero_here():
  kernel = kernels.make_kernel(
    'd', keras.layers.Dense(2), 'kernel', np.float32([[0.0, 2.0]]), [_OnGrid([[0.0, 1.0]], 8)]
  )
  np.testing.assert_array_equal(kernel.codes, [[0, 2]])
  assert (kernel.scale > 0.0).all()


def test_bias_fits_int32_where_batch_norm_all_but_erases_a_channel():
  # 1 / (0.01 * 1e-9) = 1e11 would not fit; the step grows to 1 / (2^30 * 0.01), 100 * 1e-9 beside
  # it.
  kernel = kernels.make_kernel(
    'd',
    keras.layers.Dense(1),
    'kernel',
    np.float32([[100.0]]),
    [_OnGrid(1.0, 8)],
    factor=np.array([1e-9]),
    bias=np.float32([1.0]),
    input_step=0.01,
  )
  assert 1.0 / (0.01 * kernel.scale[0, 0]) <= 2.0**30 * 1.0001
  np.testing.assert_allclose(kernel.values, 1e-7, atol=kernel.scale[0, 0] / 2)


@pytest.mark.parametrize(
  'layer,shape,axes',
  [
    (keras.layers.Conv2D(4, 3), (3, 3, 2, 4), (3,)),
    (keras.layers.DepthwiseConv2D(3, depth_multiplier=2), (3, 3, 2, 2), (2, 3)),
    (keras.layers.Conv2DTranspose(4, 3), (3, 3, 4, 2), (2,)),
    (keras.layers.Dense(4), (5, 4), (1,)),
  ],
)
def test_folding_multiplies_output_channels(layer, shape, axes):
  values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  factor = np.array([1.0, -2.0, 0.0, 0.5])
  kernel = kernels.make_kernel('x', layer, 'kernel', values, (), factor=factor)
  moved = np.moveaxis(values, axes, range(-len(axes), 0)).reshape(-1, 4) * factor
  expected = np.moveaxis(kernel.values, axes, range(-len(axes), 0)).reshape(-1, 4)
  np.testing.assert_allclose(expected, moved.astype(np.float32))
  assert kernel.codes is None and kernel.bits == 32


def test_buckets_become_int8_by_channel_and_say_so():
  values = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
  quantizer = WeightQuantizer(4, 'bucket', bucket_size=5)
  quantizer.build(values.shape)
  quantizer.fit(values)
  deployed = np.asarray(quantizer(values))
  kernel = kernels.make_kernel('x', keras.layers.Dense(4), 'kernel', deployed, [quantizer])
  assert kernel.bits == 8 and 'groups' in kernel.note
  assert (np.abs(kernel.values - deployed) <= kernel.scale * 0.5001).all()


@pytest.mark.parametrize(
  ('quantizer', 'words'),
  [
    (AsymmetricWeightQuantizer(8), '8-bit weights with zero points that no format has, as int8'),
    (Dorefa(8), '8-bit weights on levels that no format has, as int8'),
  ],
)
def test_levels_that_no_format_has_become_int8_by_channel_and_say_so(quantizer, words):
  values = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
  quantizer.build(values.shape)
  quantizer.fit(values)
  deployed = np.asarray(quantizer(values))
  kernel = kernels.make_kernel('x', keras.layers.Dense(4), 'kernel', deployed, [quantizer])
  assert kernel.bits == 8 and words in kernel.note
  assert (np.abs(kernel.values - deployed) <= kernel.scale * 0.5001).all()


def test_more_than_eight_bits_stay_float():
  kernel = kernels.make_kernel(
    'x', keras.layers.Dense(2), 'kernel', np.float32([[1.0, 2.0]]), [_OnGrid(0.001, 12)]
  )
  assert kernel.codes is None and kernel.bits == 12 and '12-bit' in kernel.note


def test_four_bits_hold_codes_from_minus_eight_to_seven_two_in_a_byte():
  assert kernels.nibbles(np.int8([[1, -8], [7, -1], [3, 0]])).tolist() == [0x81, 0xF7, 0x03]
  assert kernels.nibbles(np.int8([2, 5, -2])).tolist() == [0x52, 0x0E]
  assert kernels.fit_int4(np.int8([-8, 7]))
  assert not kernels.fit_int4(np.int8([-9, 7])) and not kernels.fit_int4(np.int8([-8, 8]))


def test_layout_finds_the_order_of_axes():
  array = np.random.default_rng(0).integers(-127, 128, (3, 3, 4, 5)).astype(np.int8)
  assert kernels.layout(array, array.transpose(3, 0, 1, 2).reshape(5, -1)) == (3, 0, 1, 2)
  assert kernels.layout(array, array[::-1]) is None
  assert kernels.layout(array, array[:2]) is None


def test_channel_axis_is_where_the_scale_differs():
  scale = np.broadcast_to(np.float32([1.0, 2.0]), (3, 2))
  assert kernels.channel_axis(scale) == 1
  assert kernels.channel_axis(np.ones((3, 2))) is None
  with pytest.raises(ValueError, match='along one axis'):
    kernels.channel_axis(scale * np.arange(1, 4)[:, None])


def test_batch_norm_factors_against_the_layer():
  layer = keras.layers.BatchNormalization(epsilon=1e-3)
  layer.build((None, 3))
  layer.set_weights(
    [
      np.float32(row)
      for row in ([1.5, -0.5, 0.0], [0.1, 0.2, 0.3], [1.0, 2.0, 3.0], [0.5, 1.0, 2.0])
    ]
  )
  x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
  factor, offset = folding.batch_norm_factors(layer)
  np.testing.assert_allclose(x * factor + offset, layer(x), atol=1e-6)
