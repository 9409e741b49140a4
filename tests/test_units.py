"""Units of each topology and trunk, what remains, and counts, worked out by hand."""

import numpy as np
import prunable
import pytest

from pocketsize.channel_graph import ChannelGraph
from pocketsize.errors import UserError
from pocketsize.graph import Graph
from pocketsize.pruning import units as units_module
from pocketsize.pruning.units import Unit, counts, remaining, units
from pocketsize.shrink import mask as masked
from pocketsize.shrink import shrink


def found(net, trunk):
  """Returns ({unit: (size, its readers)}, reasons)."""
  chosen, skipped = units(ChannelGraph(net()), trunk)
  return {unit.name: (unit.size, list(unit.readers)) for unit in chosen}, skipped


# Of each net: units with 'shared' in order, and those that 'whole' leaves out.
SHARED = {
  'chain': (
    {'a': (8, ['b']), 'b': (10, ['c']), 'c': (6, ['hidden']), 'hidden': (5, ['head'])},
    [],
  ),
  'projection': (
    {
      'stem': (8, ['one1', 'two1', 'shortcut']),
      'one1': (10, ['one2']),
      'two1': (12, ['two2']),
      'shortcut': (12, ['head']),
    },
    ['stem', 'shortcut'],
  ),
  'dense_net': (
    {
      'a': (6, ['b', 'c', 'last']),
      'b': (4, ['c', 'last']),
      'c': (4, ['last']),
      'last': (8, ['head']),
    },
    [],
  ),
  'squeeze': (
    {'a': (8, ['reduce', 'b']), 'reduce': (4, ['expand']), 'b': (6, ['head'])},
    ['a'],
  ),
  'mobile': (
    {'stem': (6, ['point0']), 'point0': (8, ['point1']), 'point1': (10, ['head'])},
    [],
  ),
  'nested': (
    {'stem': (6, ['body/a', 'last']), 'body/a': (8, ['body/b']), 'last': (5, ['head'])},
    ['stem'],
  ),
}


@pytest.mark.parametrize('net', SHARED)
def test_all_readers_of_a_group_choose_together(net):
  expected, joined = SHARED[net]
  got, skipped = found(prunable.NETS[net], 'shared')
  assert got.keys() == expected.keys() and skipped == {}
  for name, (size, readers) in expected.items():
    assert got[name][0] == size and sorted(got[name][1]) == sorted(readers)
  got, skipped = found(prunable.NETS[net], 'whole')
  assert set(got) == set(expected) - set(joined)
  assert set(skipped) == set(joined)
  assert all(reason == 'several layers make it' for reason in skipped.values())


@pytest.mark.parametrize('net', prunable.NETS)
def test_units_are_in_the_order_of_their_first_readers(net):
  channels = ChannelGraph(prunable.NETS[net]())
  order = [node.path for node in channels.graph.nodes]
  for trunk in units_module.TRUNKS:
    firsts = [order.index(next(iter(unit.readers))) for unit in units(channels, trunk)[0]]
    assert firsts == sorted(firsts)
    for unit in units(channels, trunk)[0]:
      assert [order.index(path) for path in unit.readers] == sorted(
        order.index(path) for path in unit.readers
      )


SAMPLER = {
  'chain': {'a': 3, 'b': 8, 'c': 10},
  'projection': {'stem': 3, 'one1': 8, 'one2': 10, 'two1': 8, 'two2': 12, 'shortcut': 8},
  'pad': {'stem': 3, 'one1': 8, 'one2': 10, 'two1': 8, 'two2': 12},
  'dense_net': {'a': 3, 'b': 6, 'c': 10, 'last': 14},
  'squeeze': {'a': 3, 'b': 8},
  'mobile': {'stem': 3, 'point0': 6, 'point1': 8},
  'nested': {'stem': 3, 'body/a': 6, 'body/b': 8, 'last': 6},
}


@pytest.mark.parametrize('net', SAMPLER)
def test_with_samplers_each_convolution_chooses_for_itself(net):
  chosen, skipped = units(ChannelGraph(prunable.NETS[net]()), 'sampler')
  assert {unit.name: unit.size for unit in chosen} == SAMPLER[net] and skipped == {}
  for unit in chosen:
    assert list(unit.readers) == [unit.name]
    np.testing.assert_array_equal(unit.readers[unit.name], np.arange(unit.size))


def places(net, trunk='shared'):
  return {
    (unit.name, path): place.tolist()
    for unit in units(ChannelGraph(net()), trunk)[0]
    for path, place in unit.readers.items()
  }


def test_places_by_hand():
  got = places(prunable.dense_net)
  outside = [-1] * 10
  assert got['a', 'b'] == list(range(6))
  assert got['a', 'c'] == [*range(6), *[-1] * 4]
  assert got['b', 'c'] == [*[-1] * 6, 0, 1, 2, 3]
  assert got['c', 'last'] == [*outside, 0, 1, 2, 3]
  # The chain's third convolution writes 2x2 positions, pooled to 1x1: flattened 6.
  assert places(prunable.chain)['c', 'hidden'] == list(range(6))


def test_flattened_positions_repeat_the_channels():
  import keras

  inputs = keras.Input((4, 4, 3))
  x = keras.layers.Conv2D(2, 3, name='conv')(inputs)
  model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Flatten()(x)))
  assert places(lambda: model)['conv', model.layers[-1].name] == [0, 1] * 4


def test_the_padded_shortcut_has_channels_of_its_own_in_the_middle():
  """Of the second trunk's 12 channels the 8 in the middle are the first trunk's too."""
  got, skipped = found(prunable.padded, 'shared')
  assert skipped == {}
  assert got['stem'] == (8, ['one1', 'two1', 'head'])
  assert got['two2'] == (4, ['head'])
  place = places(prunable.padded)
  assert place['stem', 'head'] == [-1, -1, *range(8), -1, -1]
  assert place['two2', 'head'] == [0, 1, *[-1] * 8, 2, 3]


@pytest.mark.parametrize('trunk', units_module.TRUNKS)
def test_what_cannot_choose_is_named_with_the_reason(trunk):
  got, skipped = found(prunable.tied, trunk)
  reasons = '\n'.join(f'{path}: {reason}' for path, reason in skipped.items())
  assert 'convolutions in groups cannot choose their inputs' in reasons
  # A layer that reads its own outputs ties its makers.
  assert ('several layers make it' if trunk == 'whole' else 'it is called several times') in reasons
  readers = {path for _, paths in got.values() for path in paths}
  assert not {'twice', 'grouped'} & readers
  if trunk == 'sampler':
    assert set(skipped) == {'twice', 'grouped'}
    assert set(got) == {'a', 'plain', 'last'}
  else:
    assert {'head'} <= readers


def test_layers_that_cannot_choose_keep_their_group_whole():
  import keras

  inputs = keras.Input((8, 8, 3))
  x = keras.layers.Conv2D(4, 3, name='conv')(inputs)
  y = keras.layers.SeparableConv2D(4, 3, name='separable')(x)
  z = keras.layers.Conv2DTranspose(4, 3, name='transposed')(y)
  model = keras.Model(inputs, keras.layers.Conv2D(2, 1, name='end')(z))
  got, skipped = found(lambda: model, 'shared')
  assert got == {'transposed': (4, ['end'])}
  assert 'SeparableConv2D cannot choose' in skipped['conv']
  assert 'Conv2DTranspose cannot choose' in skipped['separable']


def test_a_group_that_a_dense_layer_alone_reads_is_one_with_shared_only():
  assert 'last' in found(prunable.dense_net, 'shared')[0]
  assert 'head' not in found(prunable.dense_net, 'sampler')[0]


def test_an_unknown_trunk():
  with pytest.raises(UserError, match="one of shared, sampler, whole. Received: 'split'"):
    units(ChannelGraph(prunable.chain()), 'split')


def mask(text):
  return np.array([letter == '1' for letter in text])


def test_what_at_least_one_reader_selects_remains():
  channels = ChannelGraph(prunable.residual())
  selected = {'one1': mask('11000000'), 'two1': mask('00100001'), 'shortcut': mask('10000000')}
  kept = remaining(channels, selected)
  np.testing.assert_array_equal(kept['stem'], mask('11100001'))
  # Nobody says anything of the others.
  assert all(values.all() for name, values in kept.items() if name != 'stem')
  del selected['two1']
  assert remaining(channels, selected)['stem'].all()


def test_what_a_layer_that_cannot_choose_reads_remains():
  channels = ChannelGraph(prunable.tied())
  kept = remaining(channels, {'last': mask('100000'), 'plain': mask('10000000')})
  assert kept['plain'].all()


def test_the_places_of_a_concatenation_remain():
  channels = ChannelGraph(prunable.dense_net())
  kept = remaining(
    channels,
    {
      'b': mask('100000'),
      'c': mask('010000' + '0001'),
      'last': mask('000001' + '0010' + '1000'),
    },
  )
  np.testing.assert_array_equal(kept['a'], mask('110001'))
  np.testing.assert_array_equal(kept['b'], mask('0011'))
  np.testing.assert_array_equal(kept['c'], mask('1000'))
  assert kept['last'].all()


def test_a_branch_that_nobody_chose_keeps_one_channel():
  channels = ChannelGraph(prunable.dense_net())
  kept = remaining(channels, {'last': mask('111111' + '1111' + '0000')})
  np.testing.assert_array_equal(kept['c'], mask('1000'))


def unit(name, size):
  return Unit(name, size, {name: np.arange(size)})


@pytest.mark.parametrize(
  ('size', 'ratio', 'multiple', 'rounding', 'expected'),
  [
    (10, 0.8, 1, np.floor, 2),
    (10, 0.5, 1, np.floor, 5),
    (7, 0.5, 1, np.floor, 3),
    (7, 0.5, 1, np.ceil, 4),
    (7, 0.4, 1, np.round, 4),
    (10, 0.7, 1, np.ceil, 3),
    (3, 0.9, 1, np.floor, 1),
    (3, 0.9, 1, np.round, 1),
    (64, 0.0, 1, np.floor, 64),
    (64, 0.5, 8, np.floor, 32),
    (64, 0.51, 8, np.floor, 32),
    (64, 0.49, 8, np.floor, 40),
    (64, 0.99, 8, np.floor, 8),
    (64, 0.01, 8, np.round, 64),
    (6, 0.5, 8, np.floor, 6),
    (12, 0.2, 8, np.floor, 12),
  ],
)
def test_counts_by_hand(size, ratio, multiple, rounding, expected):
  assert counts([unit('a', size)], ratio, multiple, rounding) == {'a': expected}
  assert type(counts([unit('a', size)], ratio, multiple, rounding)['a']) is int


def test_units_without_a_ratio_stay_whole():
  assert counts([unit('a', 8), unit('b', 8)], {'b': 0.5}) == {'a': 8, 'b': 4}


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (({'c': 0.5},), "one of a, b. Received: 'c'"),
    ((1.0,), r'must be in \[0, 1\)\. Received: 1\.0 for .a.'),
    ((-0.1,), r'must be in \[0, 1\)\. Received: -0\.1'),
    ((float('nan'),), r'must be in \[0, 1\)'),
    ((0.5, 0), '`multiple` must be at least 1. Received: 0'),
  ],
)
def test_counts_that_make_no_sense(arguments, message):
  with pytest.raises(UserError, match=message):
    counts([unit('a', 8), unit('b', 8)], *arguments)


@pytest.mark.parametrize('net', ['chain', 'projection', 'pad', 'dense_net'])
def test_positions_are_where_the_masked_model_has_what_the_smaller_one_computes(net):
  model = prunable.NETS[net]()
  channels = ChannelGraph(model)
  keep = {group.name: np.arange(group.size) % 3 > 0 for group in channels.groups}
  places = units_module.positions(channels, keep)
  assert places
  shape = (2, *model.inputs[0].shape[1:])
  x = np.random.default_rng(0).normal(size=shape).astype('float32')

  def features(model):
    found = {}

    def call(node, args, kwargs):
      found[node.path] = args[0] if node.is_input else node.operation(*args, **kwargs)
      return found[node.path]

    Graph(model).run([x], call, training=False)
    return found

  before, after = features(masked(model, keep)), features(shrink(model, keep))
  assert set(after) == set(before)
  for path, value in after.items():
    expected = np.array(before[path])
    expected = expected[..., places[path]] if path in places else expected
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-4, err_msg=path)
