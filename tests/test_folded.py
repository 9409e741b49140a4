"""Kernels quantized with batch norm folded in: by hand, against loops, and in the files."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from toys import compile_for_logits, conv_net, images, labels

import pocketsize
from pocketsize import folding, packed
from pocketsize.compressor import CompressionCallback
from pocketsize.conversion.lowering import Lowered
from pocketsize.errors import UserError
from pocketsize.graph import Graph
from pocketsize.packed import verification
from pocketsize.quantization.asymmetric import AsymmetricWeightQuantizer
from pocketsize.quantization.folded import FoldedQuantizer
from pocketsize.quantization.learned import LearnedScale
from pocketsize.quantization.quantizers import WeightQuantizer
from pocketsize.quantization.uniform import Uniform, UniformConfig
from pocketsize.targets import Rule


def made(quantizer, kernel, factor):
  """Returns a fitted `FoldedQuantizer` for a kernel and its factors."""
  folded = FoldedQuantizer(quantizer)
  folded.build(kernel.shape)
  folded.set_factor(factor)
  folded.fit(kernel)
  return folded


def fitted(quantizer, kernel):
  quantizer.build(kernel.shape)
  quantizer.fit(kernel)
  return quantizer


def test_two_channels_share_a_scale_once_folded():
  """Folded: [[3, 0.25], [-1, 1.6]], with the scale 1 of 3 bits: codes [[3, 0], [-1, 2]]."""
  kernel = np.float32([[0.75, 0.5], [-0.25, 3.2]])
  folded = made(WeightQuantizer(3, 'tensor', start='min_max'), kernel, [4.0, 0.5])
  np.testing.assert_array_equal(folded.quantizer.scale, [[1.0]])
  deployed = np.array(folded(kernel))
  np.testing.assert_array_equal(deployed, [[0.75, 0.0], [-0.25, 4.0]])
  grid = folded.grid(deployed)
  np.testing.assert_array_equal(grid.scale, [[0.25, 2.0]])
  np.testing.assert_array_equal(grid.codes(deployed), [[3, 0], [-1, 2]])
  codes = folded.codes(deployed)
  np.testing.assert_array_equal(codes.codes - 3, [[3, 0], [-1, 2]])
  np.testing.assert_array_equal(codes.factor, [[4.0, 0.5]])


def test_a_negative_factor_turns_the_signs_of_the_codes_and_none_of_the_weights():
  kernel = np.float32([[0.75, 0.5], [-0.25, 3.2]])
  folded = made(WeightQuantizer(3, 'tensor', start='min_max'), kernel, [-4.0, 0.5])
  deployed = np.array(folded(kernel))
  np.testing.assert_array_equal(deployed, [[0.75, 0.0], [-0.25, 4.0]])
  np.testing.assert_array_equal(folded.codes(deployed).codes - 3, [[-3, 0], [1, 2]])
  np.testing.assert_array_equal(folded.grid(deployed).codes(deployed), [[3, 0], [-1, 2]])


@pytest.mark.parametrize('factor', [0.0, 1e-40])
def test_a_channel_that_batch_norm_erases_is_quantized_as_it_is(factor):
  kernel = np.float32([[3.0, 0.5], [-1.0, 2.0]])
  folded = made(WeightQuantizer(3, 'tensor', start='min_max'), kernel, [factor, 0.5])
  np.testing.assert_array_equal(folded(kernel), [[3.0, 0.0], [-1.0, 2.0]])


@pytest.mark.parametrize(
  'kind, bits, options',
  [
    (WeightQuantizer, 2, {}),
    (WeightQuantizer, 8, {}),
    (AsymmetricWeightQuantizer, 4, {}),
    (LearnedScale, 4, {}),
    (LearnedScale, 8, {'log2': True}),
  ],
)
def test_per_channel_it_is_what_it_is_without_folding(kind, bits, options):
  """Values and gradients; powers of two, so that nothing is rounded.

  A step changes a trained scale as much, relative to its size: s_folded = f s.
  """
  rng = np.random.default_rng(0)
  kernel = rng.normal(size=(3, 3, 4, 5)).astype(np.float32)
  factor = np.float32([4.0, 0.125, 1.0, 2.0, 0.5])
  plain = fitted(kind(bits, **options), kernel)
  folded = made(kind(bits, **options), kernel, factor)
  upstream = rng.normal(size=kernel.shape).astype(np.float32)
  found = []
  for quantizer in (plain, folded):
    variable = tf.Variable(kernel)
    with tf.GradientTape() as tape:
      value = quantizer(variable)
      loss = tf.reduce_sum(value * upstream)
    trained = [weight.value for weight in quantizer.trainable_variables]
    gradients = tape.gradient(loss, [variable, *trained])
    found.append([np.array(each) for each in (value, *gradients)])
  np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-6)
  np.testing.assert_allclose(found[1][1], found[0][1], rtol=1e-6)
  if len(found[0]) > 2:
    # The gradient of log2 s is relative as it is.
    relative = 1.0 if options else factor
    np.testing.assert_allclose(found[1][2], found[0][2] * relative, rtol=1e-4, atol=1e-6)


def test_the_gradient_of_a_trained_scale_is_that_of_the_loss_times_the_mean_square():
  """Of the whole tensor: f = 2 and 4, mean of the squares 10; kernel's gradient straight through.

  Scale 1 of 3 bits, folded kernel [1.25, 2.5]: dq/ds = round(u) - u = [-0.25, -0.5], hence
  dL/ds = 10 * (-0.25 / 2 - 0.5 / 4) = -2.5, times LSQ's own min(1 / sqrt(2 * 3), 1 / 9) = 1 / 9.
  """
  kernel = tf.Variable([[0.625, 0.625]])
  folded = FoldedQuantizer(LearnedScale(3, 'tensor'))
  folded.build((1, 2))
  folded.set_factor([2.0, 4.0])
  folded.quantizer.scale.assign([[1.0]])
  with tf.GradientTape() as tape:
    loss = tf.reduce_sum(folded(kernel))
  gradients = tape.gradient(loss, [kernel, folded.quantizer.scale.value])
  np.testing.assert_allclose(gradients[0], [[1.0, 1.0]], rtol=1e-6)
  np.testing.assert_allclose(gradients[1], [[-2.5 / 9.0]], rtol=1e-6)


def test_gradients_go_straight_through_and_none_to_gamma():
  model, _ = folded_net('tensor')
  x = images()
  with tf.GradientTape() as tape:
    value = tf.reduce_sum(model.transformed('conv', 'kernel'))
  layer = model.graph.layers['conv'], model.graph.layers['conv_bn']
  kernel, gamma = tape.gradient(value, [layer[0].kernel.value, layer[1].gamma.value])
  np.testing.assert_allclose(kernel, np.ones(kernel.shape), rtol=1e-6)
  assert gamma is None
  assert np.isfinite(model(x)).all()


@pytest.mark.parametrize(
  'shape, axes',
  [((3, 3, 2, 5), (-1,)), ((3, 3, 4, 2), (-2, -1)), ((3, 3, 5, 2), (-2,)), ((7, 6), (-1,))],
  ids=['conv', 'depthwise', 'transposed', 'dense'],
)
@pytest.mark.parametrize('granularity', ['tensor', 'channel', 'bucket'])
def test_against_a_loop_over_weights(shape, axes, granularity):
  rng = np.random.default_rng(1)
  kernel = rng.normal(size=shape).astype(np.float32)
  sizes = [shape[axis] for axis in axes]
  factor = (rng.normal(size=sizes) + 0.1).astype(np.float32)
  quantizer = WeightQuantizer(4, granularity, axes, 7, start='min_max')
  folded = made(quantizer, kernel, factor.ravel())
  axes = [axis % len(shape) for axis in axes]
  times = {place: factor[tuple(place[axis] for axis in axes)] for place in np.ndindex(shape)}

  def row(place):
    if granularity == 'bucket':
      return np.ravel_multi_index(place, shape) // 7
    return tuple(place[axis] for axis in axes) if granularity == 'channel' else 0

  largest = {}
  for place in np.ndindex(shape):
    size = abs(float(kernel[place] * times[place]))
    largest[row(place)] = max(largest.get(row(place), 0.0), size)
  deployed, codes = np.zeros(shape), np.zeros(shape)
  for place in np.ndindex(shape):
    scale = largest[row(place)] / 7.0
    codes[place] = np.round(float(kernel[place]) * times[place] / scale)
    deployed[place] = codes[place] * scale / times[place]
  got = np.array(folded(kernel))
  np.testing.assert_allclose(got, deployed, rtol=1e-5, atol=1e-7)
  found = folded.codes(got)
  np.testing.assert_array_equal(found.codes - 7, codes)


# Which batch norm.


def paired(*outputs, inputs):
  return folding.followers(Graph(keras.Model(inputs, list(outputs))))


def test_which_batch_norm_follows_every_call_of_a_layer():
  inputs = x = keras.Input((8, 8, 3))
  bn = layers.BatchNormalization
  x = bn(name='bn0')(layers.DepthwiseConv2D(3, name='depthwise')(x))
  x = bn(name='bn1')(layers.Conv2DTranspose(3, 3, name='transposed')(x))
  # Its own activation lies between.
  x = bn(name='bn2')(layers.Conv2D(3, 3, activation='relu', name='relu')(x))
  shared, after = layers.Conv2D(3, 3, padding='same', name='shared'), bn(name='shared_bn')
  x = after(shared(after(shared(x))))
  twice = layers.Conv2D(3, 3, padding='same', name='two_norms')
  x = bn(name='bn4')(twice(bn(name='bn3')(twice(x))))
  once = layers.Conv2D(3, 3, padding='same', name='once_without')
  x = once(bn(name='bn5')(once(x)))
  read = layers.Conv2D(3, 3, name='two_readers')(x)
  sides = layers.Add()([bn(name='bn6')(read), read])
  assert paired(sides, inputs=inputs) == {
    'depthwise': 'bn0',
    'transposed': 'bn1',
    'shared': 'shared_bn',
  }


def test_only_the_last_kernel_of_a_separable_convolution_is_folded():
  inputs = keras.Input((8, 8, 3))
  x = layers.BatchNormalization(name='bn')(layers.SeparableConv2D(5, 3, name='sep')(inputs))
  model = keras.Model(inputs, layers.Dense(2, name='head')(layers.Flatten()(x)))
  config = UniformConfig(4, 32, fold_batch_norm=True)
  placements = Uniform([Rule(config)]).plan(Graph(model))
  assert [(*place[:2], type(place.transform)) for place in placements] == [
    ('sep', 'depthwise_kernel', WeightQuantizer),
    ('sep', 'pointwise_kernel', FoldedQuantizer),
    ('head', 'kernel', WeightQuantizer),
  ]


# In models and files.


def net():
  """Every kind of layer that a batch norm folds into; 4 logits of 8x8x3 images."""
  keras.utils.set_random_seed(5)
  x = inputs = keras.Input((8, 8, 3), name='images')
  for name, layer in (
    ('conv', layers.Conv2D(4, 3, use_bias=False, name='conv')),
    ('depthwise', layers.DepthwiseConv2D(3, depth_multiplier=2, name='depthwise')),
    ('transposed', layers.Conv2DTranspose(5, 3, name='transposed')),
  ):
    x = layers.BatchNormalization(momentum=0.8, name=f'{name}_bn')(layer(x))
    x = layers.ReLU(name=f'{name}_relu')(x)
  x = layers.Dense(6, name='dense')(layers.GlobalAveragePooling2D(name='pool')(x))
  x = layers.BatchNormalization(scale=False, name='dense_bn')(x)
  return keras.Model(inputs, layers.Dense(4, name='head')(x), name='net')


FOLDED = ('conv', 'depthwise', 'transposed', 'dense')


def folded_net(granularity, **options):
  """Returns (model, stack) with factors that are negative, 0 and of different sizes."""
  model = net()
  rng = np.random.default_rng(6)
  for layer in model.layers:
    if isinstance(layer, layers.BatchNormalization):
      size = layer.moving_variance.shape[0]
      layer.moving_variance.assign(rng.uniform(0.1, 4.0, size))
      if layer.scale:
        layer.gamma.assign([-2.0, 0.0, *rng.uniform(0.3, 3.0, size - 2)])
  entry = {
    'algorithm': 'uniform',
    'weight_bits': 4,
    'activation_bits': 8,
    'granularity': granularity,
    'bucket_size': 10,
    'end_bits': 0,
    'scale_every': 3,
    'fold_batch_norm': True,
    **options,
  }
  return pocketsize.compress(model, [entry], calibration=[images()])


def trained(granularity, steps=5, **options):
  model, stack = folded_net(granularity, **options)
  compile_for_logits(model)
  callback = CompressionCallback(stack)
  model.fit(
    images(8 * steps), labels(8 * steps), batch_size=8, shuffle=False, verbose=0, callbacks=callback
  )
  return model, stack


def training_codes(model, path):
  """Returns what the quantizer of a layer makes of its kernel times the factor, integers."""
  layer = model.graph.layers[path]
  quantizer = model.transforms_at(path, 'kernel')[0]
  folded = np.array(layer.kernel) * np.array(quantizer.factor)
  rows = quantizer.groups.split(folded)
  scale = np.ravel(quantizer.quantizer.scale)[:, None]
  codes = np.clip(np.round(rows / np.where(scale > 0, scale, 1.0)), -7, 7)
  return quantizer.groups.join(codes)


@pytest.mark.parametrize('granularity', ['tensor', 'channel', 'bucket'])
def test_the_files_have_the_codes_of_training(granularity, tmp_path):
  """Where nothing comes of a channel, int8 files have zeros. They have no buckets."""
  model, _ = trained(granularity)
  pocketsize.write_packed(model, tmp_path / 'net.packed')
  found = packed.load(tmp_path / 'net.packed')
  assert verification.verify(tmp_path / 'net.packed', model)['note'] == ''
  in_file = {kernel.path: kernel for kernel in Lowered(model, quantized=True).kernels}
  for path in FOLDED:
    codes = training_codes(model, path)
    weight = found.weights[f'{path}/kernel']
    assert weight.bits == 4
    np.testing.assert_array_equal(weight.codes.astype(int) - 7, codes)
    if granularity != 'bucket':
      factor = model.graph.layers[f'{path}_bn'].gamma
      factor = np.ones(6) if factor is None else np.array(factor)
      spread = np.reshape(factor, model.transforms_at(path, 'kernel')[0].factor.shape)
      np.testing.assert_array_equal(in_file[path].codes, codes * (spread != 0.0))
  plain = model.transforms_at('head', 'kernel')[0]
  assert isinstance(plain, WeightQuantizer) and found.weights['head/kernel'].factor is None


def test_a_scale_of_the_tensor_is_one_in_the_integer_file():
  """Without folding each channel has its own there."""
  for fold in (True, False):
    model, _ = trained('tensor', fold_batch_norm=fold)
    for kernel in Lowered(model, quantized=True).kernels:
      if kernel.path in FOLDED[:3]:
        alive = np.unique(kernel.scale[kernel.codes != 0])
        assert (np.ptp(alive) < 1e-6 * alive.max()) == fold


@pytest.mark.parametrize('granularity', ['tensor', 'channel'])
def test_per_channel_it_trains_as_without_folding(granularity):
  """Scales that are fitted at every step are those of the same kernel; rounding only differs."""
  one, other = (
    trained(granularity, 3, fold_batch_norm=fold, scale_every=1, activation_bits=32)[0]
    for fold in (True, False)
  )
  difference = max(
    np.abs(a - b).max()
    for a, b in zip(one.source.get_weights(), other.source.get_weights(), strict=True)
  )
  assert difference < 1e-3 if granularity == 'channel' else difference > 1e-2


def test_factors_follow_batch_norm_and_are_there_before_scales_are_fitted():
  model, stack = folded_net('tensor', weight_range='learned')
  quantizer = model.transforms_at('dense', 'kernel')[0]
  layer, dense = model.graph.layers['dense_bn'], model.graph.layers['dense']
  expected = 1.0 / np.sqrt(np.array(layer.moving_variance) + layer.epsilon)
  np.testing.assert_allclose(np.ravel(quantizer.factor), expected, rtol=1e-6)
  largest = np.abs(np.array(dense.kernel) * expected).max()
  # 4 bits: the range with the least error, 0.3 to 1.0 of the largest.
  assert 0.3 * largest <= float(quantizer.quantizer.scale[0, 0]) * 7 <= largest * 1.00001
  layer.moving_variance.assign(4 * layer.moving_variance)
  stack.update(1)
  np.testing.assert_allclose(np.ravel(quantizer.factor), expected / 2, rtol=1e-2)


def test_a_layer_whose_factors_are_all_zero_comes_to_life():
  model = conv_net()
  gamma = model.get_layer('bn1').gamma
  gamma.assign(np.zeros(4))
  # Behind a ReLU, whose gradient at 0 is 0.
  model.get_layer('bn1').beta.assign(np.full(4, 0.5))
  entry = {'algorithm': 'uniform', 'granularity': 'tensor', 'fold_batch_norm': True}
  folded, stack = pocketsize.compress(
    model, [{**entry, 'activation_bits': 32, 'scale_every': 1}], calibration=[images()]
  )
  compile_for_logits(folded)
  for step in range(6):
    folded.fit(images(), labels(), verbose=0, callbacks=CompressionCallback(stack, step))
  assert np.all(np.abs(gamma) > 1e-3)
  assert all(np.isfinite(weight).all() for weight in folded.get_weights())


def test_one_bit_is_refused():
  with pytest.raises(UserError, match=r'`fold_batch_norm` needs .* at least 2\. Received: 1'):
    UniformConfig(weight_bits=1, fold_batch_norm=True)
