"""The uniform quantizer's plan: bits of each layer and of each tensor."""

import keras
import numpy as np
import pytest
from keras import layers
from toys import conv_net, images

import pocketsize
from pocketsize.errors import UserError
from pocketsize.graph import Graph
from pocketsize.quantization.asymmetric import AsymmetricWeightQuantizer
from pocketsize.quantization.dorefa import Dorefa, DorefaActivation
from pocketsize.quantization.learned import LearnedRange, LearnedScale, Pact
from pocketsize.quantization.quantizers import ActivationQuantizer, WeightQuantizer
from pocketsize.quantization.range_quantizer import RangeQuantizer
from pocketsize.quantization.uniform import Uniform, UniformConfig
from pocketsize.targets import Rule


def chain(count=4):
  """Dense layers d0, d1, ... of two units."""
  x = inputs = keras.Input((2,), name='in')
  for index in range(count):
    x = layers.Dense(2, name=f'd{index}')(x)
  return keras.Model(inputs, x)


def bits(model, *rules):
  """Returns ({path: bits} of weights, {path: bits} of activations)."""
  placements = Uniform(rules).plan(Graph(model))
  return tuple(
    {place.path: place.transform.bits for place in placements if isinstance(place.transform, kind)}
    for kind in (WeightQuantizer, ActivationQuantizer)
  )


def test_first_and_last_layer_have_eight_bits_at_least():
  weights, activations = bits(chain(), Rule(UniformConfig(2, 4)))
  assert weights == {'d0': 8, 'd1': 2, 'd2': 2, 'd3': 8}
  assert activations == {'in': 8, 'd0': 4, 'd1': 4, 'd2': 8, 'd3': 8}


def test_more_than_eight_bits_stay_at_the_ends():
  weights, activations = bits(chain(3), Rule(UniformConfig(12, 10)))
  assert weights == {'d0': 12, 'd1': 12, 'd2': 12}
  assert activations == {'in': 10, 'd0': 10, 'd1': 10, 'd2': 10}


def test_end_bits_zero_treats_them_like_the_others_but_the_output_keeps_eight():
  weights, activations = bits(chain(3), Rule(UniformConfig(2, 4, end_bits=0)))
  assert weights == {'d0': 2, 'd1': 2, 'd2': 2}
  assert activations == {'in': 4, 'd0': 4, 'd1': 4, 'd2': 8}


def test_a_layer_in_the_middle_is_no_end_because_the_ends_are_left_alone():
  weights, activations = bits(chain(), Rule(UniformConfig(2, 3), op_names=('d1',)))
  assert weights == {'d1': 2}
  assert activations == {'d0': 3}


def test_bits_of_each_layer_by_rules():
  weights, activations = bits(
    chain(),
    Rule(UniformConfig(4, 8, end_bits=0)),
    Rule(UniformConfig(3, 5, end_bits=0), op_names=('d2',)),
  )
  assert weights == {'d0': 4, 'd1': 4, 'd2': 3, 'd3': 4}
  assert activations == {'in': 8, 'd0': 8, 'd1': 5, 'd2': 8, 'd3': 8}


def test_a_tensor_with_two_readers_has_the_larger_of_their_bits():
  inputs = keras.Input((2,), name='in')
  x = layers.Dense(2, name='first')(inputs)
  sides = [layers.Dense(2, name=name)(x) for name in ('left', 'right')]
  model = keras.Model(inputs, layers.Dense(2, name='last')(layers.Add(name='add')(sides)))
  _, activations = bits(
    model,
    Rule(UniformConfig(4, 4, end_bits=0)),
    Rule(UniformConfig(4, 6, end_bits=0), op_names=('right',)),
  )
  assert activations == {'in': 4, 'first': 6, 'left': 4, 'right': 4, 'add': 4, 'last': 8}


def test_activations_of_32_bits_are_left_float():
  weights, activations = bits(chain(), Rule(UniformConfig(4, 32)))
  assert weights == {'d0': 8, 'd1': 4, 'd2': 4, 'd3': 8}
  assert activations == {}


def test_weights_of_32_bits_are_left_float():
  weights, activations = bits(chain(2), Rule(UniformConfig(32, 8)))
  assert weights == {}
  assert activations == {'in': 8, 'd0': 8, 'd1': 8}


def test_the_input_of_an_excluded_layer_is_left_float_and_so_is_its_output_at_the_end():
  _, activations = bits(
    chain(3), Rule(UniformConfig(4, 4)), Rule(None, op_names=('d2',), exclude=True)
  )
  assert activations == {'in': 8, 'd0': 4}


def test_a_device_is_one_for_all_layers_and_decides_where():
  placed = {}
  for device in ('all', 'openvino'):
    uniform = Uniform([Rule(UniformConfig(4, 8, target_device=device))])
    placed[device] = [path for path, point, _ in uniform.plan(Graph(chain(2))) if point == 'output']
  assert placed == {'all': ['in', 'd0', 'd1'], 'openvino': ['in', 'd0']}
  mixed = Rule(UniformConfig(4, 8, target_device='litert'), op_names=('d1',))
  with pytest.raises(UserError, match='`target_device` must be the same for all layers'):
    Uniform([Rule(UniformConfig()), mixed]).plan(Graph(chain(2)))


def test_an_excluded_layer_in_the_middle():
  uniform = Uniform([Rule(UniformConfig(4, 4)), Rule(None, op_names=('d1',), exclude=True)])
  places = [place[:2] for place in uniform.plan(Graph(chain()))]
  assert places == [
    ('d0', 'kernel'),
    ('d2', 'kernel'),
    ('d3', 'kernel'),
    ('in', 'output'),
    ('d1', 'output'),
    ('d2', 'output'),
    ('d3', 'output'),
  ]
  assert uniform.skipped == {'d1': 'excluded'}


def test_nothing_to_quantize_is_no_mistake():
  inputs = keras.Input((4,))
  model = keras.Model(inputs, layers.ReLU()(inputs))
  quantized, stack = pocketsize.compress(model, [{'algorithm': 'uniform'}], calibration=[])
  assert quantized.placements == [] and stack.statistics() == {}
  np.testing.assert_array_equal(quantized(np.float32([[-1, 2, 0, 4]])), [[0, 2, 0, 4]])


def test_a_separable_conv_has_two_quantizers():
  inputs = keras.Input((8, 8, 3))
  model = keras.Model(inputs, layers.SeparableConv2D(5, 3, name='sep')(inputs))
  places = {
    place.point: place.transform
    for place in Uniform([Rule(UniformConfig(4, 32))]).plan(Graph(model))
  }
  assert list(places) == ['depthwise_kernel', 'pointwise_kernel']
  built = pocketsize.instrument(model, Uniform([Rule(UniformConfig(4, 32))]).plan(Graph(model)))
  assert [tuple(transform.scale.shape) for transform in built.transforms] == [
    (1, 1, 3, 1),
    (1, 1, 1, 5),
  ]


def test_the_configuration_reaches_the_quantizers():
  placements = Uniform([Rule(UniformConfig(5, 6, 'bucket', bucket_size=9, momentum=0.5))]).plan(
    Graph(chain(3))
  )
  weight = next(
    place.transform for place in placements if place.path == 'd1' and place.point == 'kernel'
  )
  assert (weight.bits, weight.granularity, weight.bucket_size) == (5, 'bucket', 9)
  assert {place.transform.momentum for place in placements if place.point == 'output'} == {0.5}


@pytest.mark.parametrize(
  ('weights', 'activations', 'kinds'),
  [
    ('fitted', 'running', {WeightQuantizer, ActivationQuantizer}),
    ('learned', 'learned', {LearnedScale, LearnedRange}),
    ('learned', 'learned_symmetric', {LearnedScale, LearnedRange}),
    ('learned_log2', 'learned_log2', {LearnedScale, LearnedRange}),
    ('dorefa', 'pact', {Dorefa, Pact, ActivationQuantizer}),
    ('dorefa', 'dorefa', {Dorefa, DorefaActivation, ActivationQuantizer}),
    ('asymmetric', 'running', {AsymmetricWeightQuantizer, ActivationQuantizer}),
  ],
)
def test_each_kind_of_range_has_its_quantizer(weights, activations, kinds):
  """PACT and DoReFa take what is never negative: of ReLUs, and their average."""
  config = UniformConfig(weight_range=weights, activation_range=activations)
  placements = Uniform([Rule(config)]).plan(Graph(conv_net()))
  assert {type(place.transform) for place in placements} == kinds
  for place in placements:
    transform = place.transform
    if isinstance(transform, LearnedScale):
      assert transform.log2 == (weights == 'learned_log2')
    if isinstance(transform, RangeQuantizer):
      assert transform.nonnegative == (place.path in ('relu0', 'relu1', 'pool'))
      for kind, name in ((Pact, 'pact'), (DorefaActivation, 'dorefa')):
        assert isinstance(transform, kind) == (activations == name and transform.nonnegative)
      assert transform.symmetric == (activations in ('learned_symmetric', 'learned_log2'))
    if isinstance(transform, LearnedRange):
      assert transform.log2 == (activations == 'learned_log2')


def test_scales_are_fitted_every_so_many_steps_only():
  model, stack = pocketsize.compress(
    conv_net(), [{'algorithm': 'uniform', 'activation_bits': 32, 'scale_every': 3}]
  )
  kernel, quantizer = model.graph.layers['conv1'].kernel, model.transforms_at('conv1', 'kernel')[0]
  before = np.array(quantizer.scale)
  kernel.assign(2 * kernel)
  for step in (1, 2):
    stack.update(step)
    np.testing.assert_array_equal(quantizer.scale, before)
  stack.update(3)
  np.testing.assert_allclose(quantizer.scale, 2 * before, rtol=1e-6)


def test_calibration_takes_the_mean_of_the_batches_extremes():
  batches = [images(seed=1), 3 * images(seed=2)]
  model, _ = pocketsize.compress(conv_net(), [{'algorithm': 'uniform'}], calibration=batches)
  quantizer = model.transforms_at('images', 'output')[0]
  assert float(quantizer.low) == pytest.approx(
    np.mean([batch.min() for batch in batches]), rel=1e-6
  )
  assert float(quantizer.high) == pytest.approx(
    np.mean([batch.max() for batch in batches]), rel=1e-6
  )
  assert all(
    transform.has_range
    for transform in model.transforms
    if isinstance(transform, ActivationQuantizer)
  )


def test_calibration_without_a_batch_is_refused():
  with pytest.raises(
    UserError, match=r'`calibration` must give at least one batch\. Received none'
  ):
    pocketsize.compress(conv_net(), [{'algorithm': 'uniform'}], calibration=[])


def test_sixteen_bits_compute_nearly_the_same():
  """2^-15 of the range at each kernel: 1e-3 is a hundred times that; 4 bits do not pass."""
  model, x = conv_net(), images(16)
  expected = np.array(model(x))
  for bits_, far in ((16, False), (4, True)):
    quantized, _ = pocketsize.compress(
      model,
      [{'algorithm': 'uniform', 'weight_bits': bits_, 'activation_bits': bits_}],
      calibration=[x],
    )
    assert (np.abs(quantized(x) - expected).max() > 1e-3) == far


@pytest.mark.parametrize(
  'bad',
  [
    {'weight_bits': 0},
    {'weight_bits': 17},
    {'activation_bits': 31},
    {'end_bits': 20},
    {'granularity': 'row'},
    {'target_device': 'gpu'},
    {'bucket_size': 0},
    {'scale_every': 0},
    {'momentum': 1.0},
    {'weight_range': 'trained'},
    {'activation_range': 'trained'},
    {'range_start': 'minmax'},
    {'pact_decay': -1.0},
    {'activation_range': 'learned_symmetric', 'activation_bits': 1},
    {'activation_range': 'learned_log2', 'activation_bits': 1},
  ],
)
def test_nonsense_is_refused(bad):
  with pytest.raises(UserError, match=f'`{next(iter(bad))}`.*Received: '):
    UniformConfig(**bad)


def test_a_kernel_with_zeros_is_quantized_folded():
  """What keeps the zeros is no quantizer, and stays in front of the one that is folded."""
  source = conv_net()
  kernel = source.get_layer('conv0').kernel
  before = np.where(np.abs(kernel) < 0.1, 0.0, kernel)
  kernel.assign(before)
  entry = {'algorithm': 'uniform', 'fold_batch_norm': True, 'granularity': 'tensor'}
  model, _ = pocketsize.compress(source, [entry], calibration=[images()])
  kinds = [type(transform).__name__ for transform in model.transforms_at('conv0', 'kernel')]
  assert kinds == ['FrozenZeros', 'FoldedQuantizer']
  assert np.all(model.baked('conv0')[before == 0.0] == 0.0)
