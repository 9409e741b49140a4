"""Costs as tables, by hand and against what the rest of the library counts."""

import functools
import math

import keras
import numpy as np
import prunable
import pytest
import toys
from keras import layers

from pocketsize import cost
from pocketsize.allocation import channel_costs, channel_latency, costs
from pocketsize.allocation.problem import Problem, Variable
from pocketsize.channel_graph import ChannelGraph
from pocketsize.errors import UserError
from pocketsize.graph import Graph
from pocketsize.latency import LatencyTable, predicted
from pocketsize.pruning.units import units
from pocketsize.shrink import shrink
from pocketsize.sparsity.magnitude import magnitude_mask


@pytest.fixture(scope='module')
def graph():
  """Weights 108, 144, 16; MACs 64 * 108, 16 * 144, 16; 312 parameters."""
  return Graph(toys.conv_net())


def test_the_toy_is_what_the_numbers_below_say(graph):
  assert costs.weights(graph, ['conv0', 'conv1', 'head']).tolist() == [108, 144, 16]
  assert [layer.macs for layer in cost.layer_costs(graph) if layer.macs] == [6912, 2304, 16]
  assert graph.model.count_params() == 108 + 16 + 144 + 16 + 16 + 4


def test_variables_of_all_layers_or_of_some(graph):
  found = costs.bit_variables(graph, [8, 2, 4, 4])
  assert [variable.name for variable in found] == ['conv0', 'conv1', 'head']
  assert found[0].choices == (2, 4, 8)
  # Weights, MACs, outputs, weights of an output: 108, 6912, 4, 27; 144, 2304, 4, 36; 16, 16, 4, 4.
  np.testing.assert_allclose(
    [variable.features for variable in found],
    [[108 / 144, 1, 1, 27 / 36], [1, 1 / 3, 1, 1], [16 / 144, 16 / 6912, 1, 4 / 36]],
  )
  found = costs.ratio_variables(graph, {'head': [0.0], 'conv0': (0, 0.5, 0.9)})
  assert [variable[:2] for variable in found] == [('conv0', (0.9, 0.5, 0)), ('head', (0.0,))]


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda graph: costs.bit_variables(graph, [0, 8]), 'from 1 to 32. Received: 0'),
    (lambda graph: costs.bit_variables(graph, [2.5]), 'from 1 to 32. Received: 2.5'),
    (lambda graph: costs.bit_variables(graph, {'bn0': [8]}), "conv0, conv1, head. Received: 'bn0'"),
    (lambda graph: costs.ratio_variables(graph, [1.0]), r'in \[0, 1\). Received: 1.0'),
    (lambda graph: costs.ratio_variables(graph, ['0.5']), r"in \[0, 1\). Received: '0.5'"),
    (lambda graph: costs.mean_bits(graph, [Variable('x', (8,))]), "Received: 'x'"),
    (lambda graph: costs.bit_operations(graph, [], {'x': 8}), "Received: 'x'"),
  ],
)
def test_what_makes_no_sense(graph, call, message):
  with pytest.raises(UserError, match=message):
    call(graph)


def test_mean_bits_by_hand(graph):
  variables = costs.bit_variables(graph, {'conv0': (2, 8), 'conv1': (2, 4, 8)})
  mean = costs.mean_bits(graph, variables)
  assert mean.name == 'mean weight bits'
  assert mean.of([1, 0]) == pytest.approx((108 * 8 + 144 * 2) / 252)
  assert mean.of([0, 1]) == pytest.approx((108 * 2 + 144 * 4) / 252)


def test_bytes_by_hand(graph):
  """Of 304 parameters 252 have bits to choose, the other 52 have 4 bytes."""
  variables = costs.bit_variables(graph, {'conv0': (2, 8), 'conv1': (2, 4, 8)})
  assert costs.model_bytes(graph, variables).of([1, 1]) == 108 + 144 / 2 + 52 * 4


def test_bit_operations_by_hand(graph):
  variables = costs.bit_variables(graph, {'conv1': (2, 4, 8), 'conv0': (2, 8)})
  operations = costs.bit_operations(graph, variables, {'conv0': 8, 'head': 16})
  # conv1's inputs and head's weights are float.
  assert operations.of([1, 2]) == 6912 * 8 * 8 + 2304 * 8 * 32 + 16 * 32 * 16


def test_a_layer_that_is_called_twice_has_its_weights_once_and_its_macs_twice():
  graph = Graph(toys.shared_net())
  variables = costs.bit_variables(graph, [4, 8])
  assert costs.weights(graph, [each.name for each in variables]).tolist() == [81, 54, 16]
  operations = costs.bit_operations(graph, variables, dict.fromkeys(['conv', 'head'], 2))
  assert operations.of([0, 1, 1]) == 128 * 81 * 8 + 72 * 54 * 8 * 32 + 16 * 16


def test_the_share_of_weights_kept_by_hand(graph):
  variables = costs.ratio_variables(graph, {'conv0': (0.75, 0.0), 'conv1': (0.5, 0.25)})
  kept = costs.density(graph, variables)
  assert kept.name == 'share of weights kept'
  assert kept.of([0, 1]) == pytest.approx((27 + 108) / 252)
  assert kept.of([1, 0]) == pytest.approx((108 + 72) / 252)


@pytest.mark.parametrize('ratio', [0.1, 0.26, 0.5, 0.74])
def test_the_share_that_is_kept_is_that_of_the_masks(graph, ratio):
  variables = costs.ratio_variables(graph, {'conv0': (ratio,), 'conv1': (ratio,)})
  masks = [magnitude_mask(graph.layers[path].kernel, ratio) for path in ('conv0', 'conv1')]
  kept = sum(mask.sum() for mask in masks) / sum(mask.size for mask in masks)
  assert costs.density(graph, variables).of([0, 0]) == pytest.approx(kept, abs=1e-9)


def test_a_net_without_layers_to_allot_to():
  inputs = keras.Input((8, 8, 3))
  graph = Graph(keras.Model(inputs, layers.Flatten()(inputs)))
  for make, choices, cost_of in (
    (costs.bit_variables, [4, 8], costs.mean_bits),
    (costs.ratio_variables, [0.5], costs.density),
  ):
    variables = make(graph, choices)
    with pytest.raises(UserError, match='must be a layer to allot to. Received: no layers'):
      Problem(variables, cost_of(graph, variables), 1.0)


def timed(format_, milliseconds, **arguments):
  """A table whose layers take what `milliseconds(inputs, outputs)` says."""

  def timer(layer, shape):
    return float(milliseconds(shape[-1], getattr(layer, 'filters', getattr(layer, 'units', 0))))

  return LatencyTable(format_, timer=timer, **arguments)


def test_layers_of_up_to_8_bits_take_the_time_of_integers(graph):
  floats = timed('openvino', lambda inputs, outputs: {(3, 4): 5, (4, 4): 3}[inputs, outputs])
  integers = timed('openvino_int8', lambda inputs, outputs: inputs - 2)
  variables = costs.bit_variables(graph, {'conv0': (2, 8, 9, 32)})
  table = costs.bit_latency(graph, variables, integers, floats)
  # conv1 and head compute in float, 3 ms each.
  assert [table.of([level]) for level in range(4)] == [7, 7, 11, 11]
  slow = timed('openvino_int8', lambda inputs, outputs: 6)
  table = costs.bit_latency(graph, variables, slow, floats)
  assert [table.of([level]) for level in range(4)] == [12, 12, 12, 12]


def test_times_of_all_calls_count():
  graph = Graph(toys.shared_net())
  variables = costs.bit_variables(graph, [8, 16])
  tables = [timed(format_, lambda *counts: 1) for format_ in ('tflite_int8', 'tflite')]
  assert costs.bit_latency(graph, variables, *tables).of([0, 1, 1]) == 2 + 2 + 1


def count_choices(channels, rng, trunk):
  """Returns (units, up to four rising counts for each but the last, in another order)."""
  found, _ = units(channels, trunk)
  names = rng.permutation([unit.name for unit in found][: max(len(found) - 1, 1)]).tolist()
  sizes = {unit.name: unit.size for unit in found}
  counts = {
    name: sorted({*rng.integers(1, sizes[name] + 1, 3).tolist(), sizes[name]}) for name in names
  }
  return found, counts


def random_levels(counts, rng):
  return [int(rng.integers(len(values))) for values in counts.values()]


def keep_of(channels, counts, levels, rng):
  """Returns `keep` with such counts, of channels that are drawn."""
  sizes = {group.name: group.size for group in channels.groups}
  return {
    name: rng.permutation(sizes[name]) < values[level]
    for (name, values), level in zip(counts.items(), levels, strict=True)
  }


NETS = {
  **prunable.NETS,
  'tied': prunable.tied,
}


@functools.cache
def channels_of(net, keep_shift=False):
  return ChannelGraph(NETS[net](), keep_shift)


@pytest.mark.parametrize('trunk', ['shared', 'whole'])
@pytest.mark.parametrize('net', NETS)
def test_the_share_of_macs_is_that_of_the_kept_channels(net, trunk):
  channels, rng = channels_of(net), np.random.default_rng(0)
  left = cost.macs_share(channels)
  for _ in range(2):
    _, counts = count_choices(channels, rng, trunk)
    table = channel_costs.macs(channels, counts)
    assert all(len(term.places) <= 2 for term in table.terms)
    for levels in [random_levels(counts, rng) for _ in range(10)]:
      keep = keep_of(channels, counts, levels, rng)
      assert table.of(levels) == pytest.approx(left(keep), abs=1e-9)
    highest = [len(values) - 1 for values in counts.values()]
    assert table.of(highest) == pytest.approx(1.0, abs=1e-12)
    falls_along_none(table)


def falls_along_none(table):
  for term in table.terms:
    for axis in range(term.table.ndim):
      assert (np.diff(term.table, axis=axis) >= 0).all()


@pytest.mark.parametrize('net', NETS)
def test_the_share_of_parameters_is_that_of_the_smaller_model(net):
  channels, rng = channels_of(net), np.random.default_rng(1)
  _, counts = count_choices(channels, rng, 'shared')
  table = channel_costs.params(channels, counts)
  whole = channels.graph.model.count_params()
  for levels in [random_levels(counts, rng) for _ in range(2)]:
    keep = keep_of(channels, counts, levels, rng)
    smaller = shrink(channels.graph.model, keep).count_params()
    # Gates, which write a half for a channel that is gone, may need a bias.
    exact = not any(layer.bias is None for layer in channels.folds)
    assert table.of(levels) >= smaller / whole - 1e-12
    if exact:
      assert table.of(levels) == pytest.approx(smaller / whole, abs=1e-12)
  falls_along_none(table)


def test_new_biases_are_counted():
  inputs = keras.Input((8, 8, 3))
  x = layers.Conv2D(4, 1, use_bias=False, name='a')(inputs)
  x = layers.ReLU()(layers.BatchNormalization(name='bn')(x))
  x = layers.Conv2D(5, 1, use_bias=False, name='b')(x)
  model = prunable.randomized(keras.Model(inputs, layers.Flatten()(x)))
  model.get_layer('bn').beta.assign(np.ones(4))
  channels = ChannelGraph(model, keep_shift=True)
  smaller = shrink(model, {'a': [True, False, True, False]}, keep_shift=True)
  assert smaller.count_params() == 6 + 8 + 10 + 5
  table = channel_costs.params(channels, {'a': [2, 4]})
  assert table.of([0]) == pytest.approx(29 / 48) and table.of([1]) == pytest.approx(53 / 48)
  # Nothing that 'b' reads can go.
  assert channel_costs.params(channels, {}).constant == pytest.approx(1.0)


def test_channels_that_lie_more_often_in_a_weight_are_taken_to_stay():
  """The second convolution reads the first's four channels, and two of them once more."""
  x = inputs = keras.Input((4, 4, 3))
  x = layers.Conv2D(4, 1, use_bias=False, name='a')(x)
  x = layers.Concatenate()([x, x[..., :2]])
  model = keras.Model(inputs, layers.Conv2D(2, 1, use_bias=False, name='b')(x))
  channels = ChannelGraph(model)
  table, left = channel_costs.macs(channels, {'a': [2, 3, 4]}), cost.macs_share(channels)
  # 'a' has 12 of 24 weights; of six inputs of 'b' four stay if the first two do.
  assert table.of([0]) == pytest.approx(6 / 24 + 12 / 24 * 4 / 6)
  for keep in ([1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 1, 1], [1, 1, 1, 0]):
    assert left({'a': np.array(keep, bool)}) <= table.of([sum(keep) - 2]) + 1e-12


def test_variables_of_units():
  channels = channels_of('chain')
  found, _ = units(channels)
  variables, counts = channel_costs.unit_variables(channels, found, [0.0, 0.5, 0.75, 0.5])
  assert [variable.name for variable in variables] == ['a', 'b', 'c', 'hidden']
  assert variables[0].choices == (0.75, 0.5, 0.0)
  assert counts == {'a': [2, 4, 8], 'b': [2, 5, 10], 'c': [1, 3, 6], 'hidden': [1, 2, 5]}
  assert list(counts) == [variable.name for variable in variables]
  features = np.array([variable.features for variable in variables])
  assert features.shape == (4, 3) and features.max(axis=0).tolist() == [1, 1, 1]
  assert features[:, 0].tolist() == [0.8, 1.0, 0.6, 0.5]
  variables, counts = channel_costs.unit_variables(
    channels, found, {'b': [0.0, 0.7], 'a': [0.4]}, multiple=4
  )
  assert counts == {'a': [8], 'b': [4, 10]}
  # Floors of 8 (1 - ratio): the least ratio of each count; a model has one choice.
  variables, counts = channel_costs.unit_variables(
    channels, found, {'a': [0.0, 0.05, 0.12, 0.13, 0.3, 0.37, 0.5]}
  )
  assert counts == {'a': [4, 5, 6, 7, 8]}
  assert variables[0].choices == (0.5, 0.3, 0.13, 0.05, 0.0)
  with pytest.raises(UserError, match="one of a, b, c, hidden. Received: 'x'"):
    channel_costs.unit_variables(channels, found, {'x': [0.5]})
  with pytest.raises(UserError, match=r'in \[0, 1\). Received: 1.0'):
    channel_costs.unit_variables(channels, found, [1.0])


@pytest.mark.parametrize('net', NETS)
def test_latency_is_what_is_predicted(net):
  """With times that are bilinear, as the bound of what depends on many units is."""
  channels, rng = channels_of(net), np.random.default_rng(2)
  _, counts = count_choices(channels, rng, 'shared')
  table = timed('tflite', lambda inputs, outputs: 7 + inputs * (2 + 3 * outputs), multiple=1)
  found = channel_latency.milliseconds(channels, counts, table)
  assert all(len(term.places) <= 2 for term in found.terms)
  falls_along_none(found)
  for levels in [random_levels(counts, rng) for _ in range(5)]:
    keep = keep_of(channels, counts, levels, rng)
    assert found.of(levels) == pytest.approx(predicted(channels, keep, table))


@pytest.mark.parametrize('net', NETS)
@pytest.mark.parametrize('multiple', [1, 3])
def test_no_choice_takes_longer_than_it_costs(net, multiple):
  """With times that rise in leaps, and less and less, where a plane through the ends is too low."""
  channels, rng = channels_of(net), np.random.default_rng(5)
  _, counts = count_choices(channels, rng, 'shared')
  table = timed(
    'tflite',
    lambda inputs, outputs: math.sqrt(inputs) * (1 + outputs // 4) + math.log1p(outputs),
    multiple=multiple,
  )
  found = channel_latency.milliseconds(channels, counts, table)
  falls_along_none(found)
  for levels in [random_levels(counts, rng) for _ in range(8)]:
    keep = keep_of(channels, counts, levels, rng)
    assert predicted(channels, keep, table) <= found.of(levels) * (1 + 1e-9)


def sliced():
  """What 'made' makes is read in halves, of which a few of its channels leave one empty."""
  inputs = keras.Input((8, 8, 3))
  x = layers.Conv2D(8, 3, padding='same', name='made')(inputs)
  halves = [
    layers.Conv2D(8, 3, name=name)(half)
    for name, half in (('left', x[..., :4]), ('right', x[..., 4:]))
  ]
  x = layers.GlobalAveragePooling2D()(layers.Concatenate()(halves))
  return keras.Model(inputs, layers.Dense(3, name='head')(x))


@pytest.mark.parametrize('make', [*NETS.values(), sliced])
def test_counts_that_are_no_faster_than_larger_ones_are_no_choice(make):
  """In times of whole steps of four channels the most of each step is left."""
  channels = ChannelGraph(make())
  found, _ = units(channels)
  variables, counts = channel_costs.unit_variables(
    channels, found, [n / 8 for n in range(8)], rounding=np.round
  )
  table = timed('tflite', lambda inputs, outputs: -(-inputs // 4) * -(-outputs // 4), multiple=1)
  faster, left = channel_latency.without_slower(channels, variables, counts, table)
  assert [each.name for each in faster] == [each.name for each in variables]
  for before, after in zip(variables, faster, strict=True):
    kept = counts[before.name]
    assert left[before.name][-1] == kept[-1] and set(left[before.name]) <= set(kept)
    assert [before.choices[kept.index(count)] for count in left[before.name]] == list(after.choices)
  assert any(len(left[name]) < len(counts[name]) for name in counts)
  cost = channel_latency.milliseconds(channels, left, table)
  assert cost.of([len(values) - 1 for values in left.values()]) >= predicted(channels, {}, table)


def test_a_depthwise_layer_that_reads_three_units_is_bounded():
  inputs = keras.Input((4, 4, 3))
  x = layers.Concatenate()([layers.Conv2D(4, 1, name=name)(inputs) for name in 'abc'])
  x = layers.DepthwiseConv2D(3, name='depth')(x)
  channels = ChannelGraph(keras.Model(inputs, layers.Conv2D(2, 1, name='head')(x)))
  counts = dict.fromkeys('abc', [1, 2, 4])
  table = timed('onnx', lambda inputs, outputs: math.sqrt(inputs) + outputs / 9, multiple=1)
  found = channel_latency.milliseconds(channels, counts, table)
  for levels in np.ndindex(3, 3, 3):
    keep = {
      name: np.arange(4) < counts[name][level] for name, level in zip('abc', levels, strict=True)
    }
    assert predicted(channels, keep, table) <= found.of(levels) * (1 + 1e-9)
  assert found.of([0, 0, 0]) < found.of([2, 2, 2]) * 0.8


@pytest.mark.parametrize('net', ['chain', 'projection', 'mobile'])
def test_pairs_of_units_take_any_time(net):
  channels, rng = channels_of(net), np.random.default_rng(3)
  _, counts = count_choices(channels, rng, 'shared')
  table = timed('onnx', lambda inputs, outputs: math.sqrt(inputs) * (1 + outputs**1.5), multiple=1)
  found = channel_latency.milliseconds(channels, counts, table)
  for levels in [random_levels(counts, rng) for _ in range(5)]:
    keep = keep_of(channels, counts, levels, rng)
    assert found.of(levels) == pytest.approx(predicted(channels, keep, table))


def test_counts_that_are_slower_than_larger_ones_are_no_choice():
  """'a' makes 8 channels, of which 3 take as long as 5; 'b' is faster the smaller it is."""
  x = inputs = keras.Input((4, 4, 1))
  for name, filters in (('a', 8), ('b', 10), ('head', 2)):
    x = layers.Conv2D(filters, 1, name=name)(x)
  channels = ChannelGraph(keras.Model(inputs, x))
  found, _ = units(channels)
  variables, counts = channel_costs.unit_variables(
    channels, found, {'a': [0.0, 0.25, 0.375, 0.625, 0.75], 'b': [0.0, 0.5]}
  )
  assert counts == {'a': [2, 3, 5, 6, 8], 'b': [5, 10]}
  times = {2: 4.0, 3: 5.0, 5: 5.0, 6: 7.0, 8: 6.0}
  table = timed(
    'onnx', lambda inputs, outputs: times[outputs] if inputs == 1 else outputs / 9, multiple=1
  )
  faster, left = channel_latency.without_slower(channels, variables, counts, table)
  assert left == {'a': [2, 5, 8], 'b': [5, 10]}
  assert [variable.choices for variable in faster] == [(0.75, 0.375, 0.0), (0.5, 0.0)]
  assert faster[0].features == variables[0].features


@pytest.mark.parametrize('net', ['chain', 'dense_net', 'pad'])
def test_measured_times_that_fall_with_the_counts_are_held(net):
  channels, rng = channels_of(net), np.random.default_rng(4)
  _, counts = count_choices(channels, rng, 'shared')
  table = timed('onnx', lambda *each: rng.uniform(1, 2), multiple=1)
  found = channel_latency.milliseconds(channels, counts, table)
  falls_along_none(found)
  highest = [len(values) - 1 for values in counts.values()]
  assert found.of(highest) >= predicted(channels, {}, table) * (1 - 1e-9)
