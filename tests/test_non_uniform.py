"""The non-uniform quantizer: what each mode trains, how centres follow, resume, files."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from toys import assert_resumes, compile_for_logits, conv_net, fit, images

import pocketsize
from pocketsize import conversion, report
from pocketsize.errors import UserError
from pocketsize.graph import Graph
from pocketsize.quantization import centres
from pocketsize.quantization.codebook import Codebook
from pocketsize.quantization.non_uniform import NonUniform, NonUniformConfig
from pocketsize.quantization.quantizers import ActivationQuantizer
from pocketsize.targets import Rule

MODES = ('weights', 'clusters', 'both')


def compressed(mode='weights', **changes):
  entry = {'algorithm': 'non-uniform', 'weight_bits': 2, 'mode': mode, 'refit_every': 4, **changes}
  model, stack = pocketsize.compress(conv_net(), [entry], calibration=[images(seed=77)])
  return compile_for_logits(model), stack


def codebooks(model):
  return {
    place.path: place.transform
    for place in model.placements
    if isinstance(place.transform, Codebook)
  }


def table(model, path='conv1'):
  return np.array(codebooks(model)[path].centres)


def test_bits_and_places_are_those_of_uniform():
  """First and last layer, input and output have 8 bits; activations are as `uniform` has them."""
  placements = NonUniform([Rule(NonUniformConfig(2, 4))]).plan(Graph(conv_net()))
  found = {
    kind: {
      place.path: place.transform.bits for place in placements if type(place.transform) is kind
    }
    for kind in (Codebook, ActivationQuantizer)
  }
  assert found[Codebook] == {'conv0': 8, 'conv1': 2, 'head': 8}
  assert found[ActivationQuantizer] == {'images': 8, 'relu0': 4, 'relu1': 8, 'pool': 8, 'head': 8}


def test_the_report_counts_the_bits_of_codebooks():
  """conv0 has 3*3*3*4 weights of 8 bits, conv1 3*3*4*4 of 2, head 4*4 of 8."""
  model, _ = compressed()
  assert report.weight_bits(model, 'conv1') == 2
  assert report.mean_weight_bits(model) == pytest.approx((108 * 8 + 144 * 2 + 16 * 8) / 268)


def test_the_configuration_reaches_the_codebooks():
  config = NonUniformConfig(
    3, 8, 'bucket', 9, start='uniform', mode='both', keep_zeros=False, end_bits=0, centre_bits=32
  )
  quantizer = NonUniform([Rule(config)]).plan(Graph(conv_net()))[0].transform
  assert (quantizer.bits, quantizer.granularity, quantizer.bucket_size) == (3, 'bucket', 9)
  assert (quantizer.start, quantizer.trains, quantizer.keep_zeros) == ('uniform', True, False)
  assert quantizer.centre_bits == 32
  quantizer = NonUniform([Rule(NonUniformConfig())]).plan(Graph(conv_net()))[0].transform
  assert quantizer.centre_bits == 8


def test_cluster_is_another_word_for_clusters():
  assert NonUniformConfig(mode='cluster') == NonUniformConfig(mode='clusters')


@pytest.mark.parametrize('mode', MODES)
def test_what_a_mode_trains(mode):
  """`clusters` moves centres and moving statistics only; `weights` no centre between two refits."""
  model, stack = compressed(mode)
  flags = [variable.trainable for variable in model.source.variables]
  trained = {id(variable) for variable in model.trainable_variables}
  assert {id(variable) for variable in model.trainable_weights} == trained
  before = {variable.path: np.array(variable) for variable in model.variables}
  fit(model, stack, 1, 3)
  moved = {
    id(variable)
    for variable in model.variables
    if (np.array(variable) != before[variable.path]).any()
  }
  kernels = {id(layer.kernel) for layer in model.source.layers if hasattr(layer, 'kernel')}
  scales = {id(layer.gamma) for layer in model.source.layers if hasattr(layer, 'gamma')}
  statistics = {
    id(layer.moving_mean) for layer in model.source.layers if hasattr(layer, 'moving_mean')
  }
  tables = {id(quantizer.centres) for quantizer in codebooks(model).values()}
  assert statistics <= moved
  assert (kernels <= moved, kernels & moved == set()) == (mode != 'clusters', mode == 'clusters')
  assert (scales <= moved, scales & moved == set()) == (mode != 'clusters', mode == 'clusters')
  assert (tables <= moved, tables & moved == set()) == (mode != 'weights', mode == 'weights')
  assert trained == ((kernels | scales | trained) if mode != 'clusters' else tables)
  # The user's model is frozen in no mode.
  assert [variable.trainable for variable in model.source.variables] == flags


def test_centres_follow_their_weights_every_so_many_steps():
  model, stack = compressed('weights', refit_every=3)
  kernel = model.graph.layers['conv1'].kernel
  kernel.assign(2 * kernel + 0.1)
  before = table(model)
  for step in (1, 2, 4):
    stack.update(step)
    np.testing.assert_array_equal(table(model), before)
  stack.update(3)
  wanted = centres.follow(np.reshape(kernel, (1, -1)), before)
  np.testing.assert_array_equal(table(model), wanted)
  assert np.abs(wanted - before).max() > 0.1


@pytest.mark.parametrize('mode', ['clusters', 'both'])
def test_trained_centres_are_left_alone_after_the_first_step(mode):
  model, stack = compressed(mode, refit_every=1)
  codebooks(model)['conv1'].centres.assign(np.float32([[-1, 0, 1, 2]]))
  for step in (1, 2, 3):
    stack.update(step)
  assert table(model).tolist() == [[-1, 0, 1, 2]]


@pytest.mark.parametrize('start', centres.STARTS)
def test_a_run_begins_at_its_start(start):
  model, _ = compressed('both', start=start)
  rows = np.reshape(model.graph.layers['conv1'].kernel, (1, -1))
  np.testing.assert_array_equal(table(model), centres.STARTS[start](rows, 4))


@pytest.mark.parametrize('mode', ['clusters', 'both'])
def test_six_and_six_steps_are_twelve_bit_for_bit(mode, deterministic):
  """The battery has mode `weights`."""
  assert_resumes(lambda: compressed(mode), 12, [6])


def test_pruned_weights_stay_zero_through_training():
  """Masks that grow while the centres train: conv1 ends with exactly 72 zeros of 144 or more."""
  model, stack = pocketsize.compress(
    conv_net(),
    [
      {'algorithm': 'magnitude', 'ratio': 0.5, 'end_step': 6, 'update_every': 2},
      {'algorithm': 'non-uniform', 'weight_bits': 3, 'mode': 'both'},
    ],
    calibration=[images()],
  )
  fit(compile_for_logits(model), stack, 0, 8)
  mask = np.array(model.transforms_at('conv1', 'kernel')[0].mask)
  assert np.sum(mask == 0.0) == 72
  assert (model.baked('conv1')[mask == 0.0] == 0.0).all()


@pytest.mark.parametrize(
  ('granularity', 'centre_bits'), [('tensor', 8), ('channel', 8), ('channel', 32), ('bucket', 8)]
)
def test_files_hold_the_deployed_kernel_and_int8_files_say_which_centres_are_rounded(
  granularity, centre_bits, tmp_path
):
  model, _ = compressed(
    granularity=granularity, bucket_size=20, end_bits=0, weight_bits=4, centre_bits=centre_bits
  )
  files = conversion.export(model, tmp_path, ['tflite', 'tflite_int8'])
  assert files[0].note == ''
  held = centre_bits == 8 and granularity != 'bucket'
  assert files[1].note == (
    '4-bit weights as int8 codes of the same scale'
    if held
    else '4-bit weights of float centres, which no format has, as int8 by output channel (conv0 '
    'and 2 more)'
  )
  x = images()
  deployed = model.run(x, activate=lambda transform, value: value).numpy()
  (got,) = conversion.open_file(files[0].path)(x)
  np.testing.assert_allclose(got, deployed, rtol=1e-4, atol=1e-4)
  (got,) = conversion.open_file(files[1].path)(x)
  expected = model(x).numpy()
  # Codes of training: a step of the 8-bit output. Else half a step of 127 of each kernel, and of
  # 255 of each activation: less than 5 % of the range.
  low, high = model.transforms_at('head', 'output')[0].range()
  farthest = 1.01 * (high - low) / 255 if held else 0.05 * np.ptp(expected)
  assert np.abs(got - expected).max() < farthest


@pytest.mark.parametrize(
  'bad',
  [
    {'weight_bits': 9},
    {'weight_bits': 0},
    {'activation_bits': 17},
    {'end_bits': 12},
    {'granularity': 'row'},
    {'bucket_size': 0},
    {'start': 'random'},
    {'mode': 'centres'},
    {'refit_every': 0},
    {'centre_bits': 16},
    {'momentum': 1.0},
  ],
)
def test_nonsense_is_refused(bad):
  with pytest.raises(UserError, match=f'`{next(iter(bad))}`.*Received: '):
    NonUniformConfig(**bad)


def test_one_mode_for_all_layers():
  rules = [
    Rule(NonUniformConfig(mode='both')),
    Rule(NonUniformConfig(mode='weights'), op_names=('conv1',)),
  ]
  with pytest.raises(UserError, match=r'the same for all layers.*Received: both, weights'):
    NonUniform(rules).plan(Graph(conv_net()))


def test_training_centres_only_needs_centres():
  with pytest.raises(UserError, match="'clusters' trains centres only, and no layer has any"):
    NonUniform([Rule(NonUniformConfig(32, mode='clusters', end_bits=0))]).plan(Graph(conv_net()))


def test_a_codebook_survives_a_file(tmp_path):
  model, _ = compressed('both')
  model.save(tmp_path / 'model.keras')
  loaded = keras.models.load_model(tmp_path / 'model.keras')
  np.testing.assert_array_equal(table(loaded), table(model))
  assert tf.reduce_all(loaded(images()) == model(images()))
