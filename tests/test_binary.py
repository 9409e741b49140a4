"""The compressor `binary`: where, when, and what the files hold."""

import keras
import numpy as np
import pytest
from keras import layers
from toys import compile_for_logits, conv_net, images, labels

import pocketsize
from pocketsize import conversion, report
from pocketsize.compressor import CompressionCallback, Stage
from pocketsize.conversion.formats import QUANTIZED_FORMATS
from pocketsize.conversion.lowering import Lowered
from pocketsize.errors import UserError
from pocketsize.graph import Graph
from pocketsize.quantization.binary import Binary, BinaryConfig, is_shortcut
from pocketsize.quantization.binary_quantizers import BinaryActivation, BinaryKernel
from pocketsize.targets import Rule


def chain():
  """Four dense layers d0 to d3 of two units."""
  x = inputs = keras.Input((2,), name='in')
  for index in range(4):
    x = layers.Dense(2, name=f'd{index}')(x)
  return keras.Model(inputs, x)


def residual(seed=5):
  """A stem, a block with a 1x1 convolution on its short way, a depthwise layer and a head.

  Half of the batch norms' factors are negative.
  """
  keras.utils.set_random_seed(seed)

  def convolve(x, channels, size, name, **options):
    x = layers.Conv2D(channels, size, padding='same', use_bias=False, name=name, **options)(x)
    return layers.BatchNormalization(name=f'{name}_bn')(x)

  inputs = keras.Input((8, 8, 3), name='images')
  x = layers.ReLU(name='stem_relu')(convolve(inputs, 4, 3, 'stem'))
  y = layers.ReLU(name='one_relu')(convolve(x, 6, 1, 'one', strides=2))
  y = convolve(y, 6, 1, 'two')
  x = layers.Add(name='add')([y, convolve(x, 6, 1, 'short', strides=2)])
  x = layers.DepthwiseConv2D(3, padding='same', name='depthwise')(layers.ReLU(name='relu')(x))
  x = layers.GlobalAveragePooling2D(name='pool')(x)
  x = layers.Dense(5, activation='relu', name='hidden')(x)
  model = keras.Model(inputs, layers.Dense(4, name='head')(x), name='residual')
  rng = np.random.default_rng(seed)
  for layer in model.layers:
    if isinstance(layer, layers.BatchNormalization):
      layer.gamma.assign(rng.choice([-1.5, 0.5], layer.gamma.shape))
      layer.beta.assign(rng.normal(size=layer.beta.shape))
      layer.moving_mean.assign(0.1 * rng.normal(size=layer.beta.shape))
  return model


def binary(model, **config):
  return pocketsize.compress(model, [{'algorithm': 'binary', **config}], calibration=[images(32)])


def places(model, *rules):
  """Returns ([(path, point)] of the plan, {path: reason} of what stays float)."""
  compressor = Binary(rules)
  return [place[:2] for place in compressor.plan(Graph(model))], compressor.skipped


def test_kernels_and_inputs_of_all_but_the_ends():
  found, skipped = places(chain(), Rule(BinaryConfig()))
  assert found == [(path, point) for path in ('d1', 'd2') for point in ('input', 'kernel')]
  assert skipped == {'d0': 'first layer', 'd3': 'last layer'}


def test_ends_only_if_asked_for():
  found, skipped = places(chain(), Rule(BinaryConfig(activations_begin_step=None, keep_ends=False)))
  assert found == [(f'd{index}', 'kernel') for index in range(4)] and skipped == {}


def test_what_a_rule_excludes_stays_float_and_the_ends_are_those_of_the_model():
  found, skipped = places(
    chain(),
    Rule(BinaryConfig(weights_begin_step=None)),
    Rule(None, op_names=('d2',), exclude=True),
  )
  assert found == [('d1', 'input')]
  assert skipped == {'d0': 'first layer', 'd2': 'excluded', 'd3': 'last layer'}


def test_shortcuts_stay_float_on_request_and_depthwise_layers_always():
  _, skipped = places(residual(), Rule(BinaryConfig()))
  depthwise = {'depthwise': 'layers of type DepthwiseConv2D are not binarized'}
  ends = {'stem': 'first layer', 'head': 'last layer'}
  assert skipped == depthwise | ends
  _, skipped = places(residual(), Rule(BinaryConfig(keep_shortcuts=True)))
  assert skipped == depthwise | ends | {'short': 'shortcut convolution'}


def test_a_shortcut_is_the_1x1_convolution_beside_the_others():
  """`one` reads what `short` reads, and `two` goes into the addition."""
  graph = Graph(residual())
  assert [path for path in graph.layers if is_shortcut(graph, path)] == ['short']


def test_thresholds_are_those_of_the_channels_whose_axis_the_layer_names():
  inputs = keras.Input((3, 8, 8))
  conv = layers.Conv2D(4, 1, data_format='channels_first', name='conv')
  model = keras.Model(inputs, conv(inputs))
  placements = Binary([Rule(BinaryConfig(keep_ends=False))]).plan(Graph(model))
  model = pocketsize.instrument(model, placements)
  assert tuple(model.transforms_at('conv', 'input')[0].threshold_logits.shape) == (1, 3, 1, 1)


@pytest.mark.parametrize(
  ('begins', 'stages'),
  [
    ((2, 4), 'UUPPFF'),
    ((4, 2), 'UUPPFF'),
    ((3, 3), 'UUUFFF'),
    ((None, 2), 'UUFFFF'),
    ((0, None), 'FFFFFF'),
    ((None, None), 'FFFFFF'),
    ((0, 9), 'PPPPPP'),
  ],
)
def test_stages_by_steps(begins, stages):
  compressor = Binary([Rule(BinaryConfig('xnor', *begins))])
  compressor.plan(Graph(chain()))
  assert ''.join(compressor.stage(step).name[0] for step in range(6)) == stages


def test_the_scale_begins_as_configured():
  starts = []
  for scale_init in ('quantile', 'mse'):
    model, _ = binary(conv_net(), activations_begin_step=0, scale_init=scale_init)
    starts.append(float(model.transforms_at('conv1', 'input')[0].start))
  assert 0 < starts[1] < starts[0]


def test_each_stage_switches_on_its_part():
  model, stack = binary(conv_net(), activations_begin_step=2, weights_begin_step=4)
  (activation,), (kernel,) = (model.transforms_at('conv1', point) for point in ('input', 'kernel'))
  assert isinstance(activation, BinaryActivation) and isinstance(kernel, BinaryKernel)
  for step, on in ((0, (0, 0)), (3, (1, 0)), (4, (1, 1)), (1, (0, 0)), (9, (1, 1))):
    stack.update(step)
    assert (activation.is_on, kernel.is_on) == on
    assert tuple(stack.statistics().values()) == on
    assert (report.activation_bits(model, 'conv1'), report.weight_bits(model, 'conv1')) == (
      1 if on[0] else 32,
      1 if on[1] else 32,
    )
  assert len(np.unique(np.abs(model.baked('conv1')[..., 0]))) == 1


def test_training_starts_the_scale_where_activations_begin_and_trains_it():
  """Before, and where it begins at once, calibration counts; later, the batch of that step."""
  at_once, _ = binary(conv_net(), activations_begin_step=0)
  assert float(at_once.transforms[0].start) > 0
  model, stack = binary(conv_net(), activations_begin_step=2)
  (activation,) = model.transforms_at('conv1', 'input')
  assert float(activation.start) == 0
  compile_for_logits(model)
  starts = []
  for step in range(5):
    stack.update(step)
    model.train_on_batch(images(seed=step), labels(seed=step))
    starts.append(float(activation.start))
  assert starts[:2] == [0, 0] and starts[2] > 0 and len(set(starts[2:])) == 1
  assert float(activation.scale_logarithm) != 0
  assert np.all(np.array(activation.threshold_logits) != 0)


def test_a_fit_goes_through_the_stages_and_says_if_it_ends_too_early():
  model, stack = binary(conv_net(), activations_begin_step=1, weights_begin_step=5)
  compile_for_logits(model)
  with pytest.warns(UserWarning, match='After 2 steps the compression is on its way'):
    model.fit(
      images(16), labels(16), batch_size=8, verbose=0, callbacks=[CompressionCallback(stack)]
    )
  assert stack.stage(2) is Stage.PARTIAL


def test_a_uniform_quantizer_elsewhere_has_nothing_to_do_with_binary_kernels():
  model, stack = pocketsize.compress(
    residual(),
    [
      {'algorithm': 'uniform', 'activation_bits': 32},
      {'algorithm': 'uniform', 'op_names': ['one', 'two'], 'exclude': True},
      {'algorithm': 'binary', 'op_names': ['one', 'two']},
    ],
  )
  stack.update(50)
  bits = {path: report.weight_bits(model, path) for path in ('stem', 'one', 'two', 'short')}
  assert bits == {'stem': 8, 'one': 1, 'two': 1, 'short': 8}


@pytest.mark.parametrize('mode', ['xnor', 'dorefa'])
def test_kernels_of_a_file_are_plus_and_minus_one_behind_batch_norms_of_either_sign(mode):
  model, _ = binary(residual(), mode=mode)
  kernels = {kernel.path: kernel for kernel in Lowered(model, quantized=True).kernels}
  for path in ('one', 'two', 'short', 'hidden'):
    kernel, latent = kernels[path], np.array(model.graph.layers[path].kernel)
    signs, factor = np.where(latent > 0, 1, -1), 1.0
    if path != 'hidden':
      norm = model.graph.layers[f'{path}_bn']
      factor = np.array(norm.gamma) / np.sqrt(np.array(norm.moving_variance) + norm.epsilon)
      assert (factor < 0).any() and (factor > 0).any()
    np.testing.assert_array_equal(kernel.codes, signs * np.sign(factor))
    axes = None if mode == 'dorefa' else tuple(range(latent.ndim - 1))
    scale = np.abs(latent).mean(axis=axes) * np.abs(factor)
    np.testing.assert_allclose(kernel.scale, np.broadcast_to(scale, latent.shape), rtol=1e-6)
    assert kernel.bits == 1 and kernel.note == ''


def trained():
  """Returns the residual net after a few steps, everything that can be binary being so."""
  model, stack = binary(residual(), weights_begin_step=1)
  compile_for_logits(model, 0.01).fit(
    images(64), labels(64), batch_size=16, verbose=0, callbacks=[CompressionCallback(stack)]
  )
  return model


def test_every_format_computes_what_training_computed(tmp_path):
  """1e-4: no activation lies so near its threshold that rounding moves it over (see the seeds)."""
  model, x = trained(), images(16, seed=9)
  expected = np.array(model(x))
  without = np.array(model.run(x, activate=lambda transform, value: value))
  assert np.abs(without - expected).max() > 0.01 * np.ptp(expected)
  assert expected.std(axis=0).max() > 0.1 * np.ptp(expected)
  np.testing.assert_array_equal(conversion.float_version(model)(x), expected)
  files = conversion.export(model, tmp_path)
  assert {file.format for file in files} == set(conversion.FORMATS)
  for file in files:
    (got,) = conversion.open_file(file.path)(x)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4, err_msg=file.format)
    if file.format not in QUANTIZED_FORMATS:
      assert file.note == ''
    else:
      assert '1-bit activations as float32 operations (one and 3 more)' in file.note
      stored = 'int8' if file.format == 'tflite_int8' else 'int4'
      assert f'1-bit weights as {stored} codes of the same scale' in file.note


def test_sums_of_eight_bits_around_binary_layers(tmp_path):
  """Ranges at the sums and the model's ends: int8 files are a few of their 256 levels away."""
  model, _ = pocketsize.compress(
    residual(),
    [
      {'algorithm': 'uniform'},
      {'algorithm': 'uniform', 'weight_bits': 32, 'op_names': ['one', 'two', 'short', 'hidden']},
      {'algorithm': 'binary'},
    ],
    calibration=[images(32)],
  )
  x = images(16, seed=9)
  expected = np.array(model(x))
  for file in conversion.export(model, tmp_path, sorted(QUANTIZED_FORMATS)):
    (got,) = conversion.open_file(file.path)(x)
    assert np.median(np.abs(got - expected)) < 4 / 255 * np.ptp(expected), file.format


def test_what_is_still_off_is_exported_as_float(tmp_path):
  model, _ = binary(conv_net(), activations_begin_step=5, weights_begin_step=5)
  x = images()
  for file in conversion.export(model, tmp_path, ['tflite', 'tflite_int8']):
    assert file.note == ''
    (got,) = conversion.open_file(file.path)(x)
    np.testing.assert_allclose(got, model.source(x), rtol=1e-4, atol=1e-5)


def test_activations_without_data_are_refused_by_name(tmp_path):
  model, _ = pocketsize.compress(conv_net(), [{'algorithm': 'binary'}])
  with pytest.raises(UserError, match="quantizers at 'conv1' never saw data"):
    conversion.export(model, tmp_path, ['tflite'])
  with pytest.raises(UserError, match="quantizers at 'conv1' never saw data"):
    model(images())


def test_stripped_kernels_are_binary_and_activations_are_not_in_it():
  model = trained()
  stripped = pocketsize.strip(model)
  assert len(np.unique(np.abs(np.array(stripped.get_layer('hidden').kernel)[:, 0]))) == 1
  x = images()
  assert np.abs(np.array(stripped(x)) - np.array(model(x))).max() > 1e-3


@pytest.mark.parametrize(
  'bad',
  [
    {'mode': 'tern'},
    {'scale_init': 'max'},
    {'activations_begin_step': -1},
    {'weights_begin_step': -3},
  ],
)
def test_nonsense_is_refused(bad):
  with pytest.raises(UserError, match=f'`{next(iter(bad))}` must be .*Received: '):
    BinaryConfig(**bad)
