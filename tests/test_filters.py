"""Scores of channels against slow loops and hand-worked numbers; choices against the real cost."""

import channels as topologies
import keras
import numpy as np
import pytest
from keras import layers
from toys import conv_net

from pocketsize import cost
from pocketsize.channel_graph import ChannelGraph
from pocketsize.errors import UserError
from pocketsize.graph import Graph
from pocketsize.pruning import filters
from pocketsize.shrink import shrink

ROWS = np.float32([[3, -4], [0, 1], [1, 0]])


def trunk():
  inputs = keras.Input((8, 8, 3))
  x = stem = layers.Conv2D(16, 3, padding='same', name='stem')(inputs)
  x = layers.ReLU()(layers.BatchNormalization()(x))
  x = layers.DepthwiseConv2D(3, padding='same', name='depth')(x)
  x = layers.Conv2D(32, 1, use_bias=False, name='wide')(x)
  x = layers.ReLU()(layers.BatchNormalization()(x))
  x = layers.SeparableConv2D(24, 3, name='separable')(x)
  x = layers.Conv2D(12, 3, groups=2, name='grouped')(layers.BatchNormalization()(x))
  x = layers.Flatten()(layers.BatchNormalization()(x))
  x = layers.Concatenate()([x, layers.GlobalAveragePooling2D()(stem)])
  return topologies.randomized(keras.Model(inputs, layers.Dense(3)(x)))


def test_criteria_by_hand():
  np.testing.assert_allclose(filters.l1(ROWS), [7, 1, 1])
  np.testing.assert_allclose(filters.l2(ROWS), [5, 1, 1])
  # Distances: 0-1 sqrt(9 + 25), 0-2 sqrt(4 + 16), 1-2 sqrt(2).
  far, near, least = np.sqrt(34), np.sqrt(20), np.sqrt(2)
  np.testing.assert_allclose(
    filters.geometric_median(ROWS), [far + near, far + least, near + least], rtol=1e-6
  )


def test_a_channel_of_several_layers_has_the_sum_of_its_scores():
  inputs = keras.Input((4, 4, 3))
  x = layers.Conv2D(8, 3, padding='same', name='a')(inputs)
  x = x + layers.Conv2D(8, 1, name='b')(x)
  model = topologies.randomized(keras.Model(inputs, layers.Conv2D(2, 1)(x)))
  expected = np.zeros(8)
  for name in ('a', 'b'):
    kernel = np.array(model.get_layer(name).kernel)
    norms = np.array([np.sqrt((kernel[..., channel] ** 2).sum()) for channel in range(8)])
    expected += norms / norms.mean()
  np.testing.assert_allclose(filters.scores(ChannelGraph(model))['a'], expected, rtol=1e-5)


def test_batch_norm_scales_and_random_scores():
  model = topologies.randomized(conv_net())
  graph = ChannelGraph(model)
  found = filters.scores(graph, 'bn_scale')
  gamma = np.abs(model.get_layer('bn0').gamma)
  np.testing.assert_allclose(found['conv0'], gamma / gamma.mean(), rtol=1e-5)
  one, same, other = (filters.scores(graph, 'random', seed)['conv0'] for seed in (0, 0, 1))
  np.testing.assert_array_equal(one, same)
  assert (one != other).any()


@pytest.mark.parametrize('scope', ['group', 'network'])
@pytest.mark.parametrize('ratio', [0.0, 0.3, 0.7])
@pytest.mark.parametrize('multiple', [1, 4])
def test_the_least_go_and_the_cost_is_that_of_the_smaller_model(scope, ratio, multiple):
  model = trunk()
  graph = ChannelGraph(model)
  values = filters.scores(graph)
  keep = filters.choose(graph, values, ratio=ratio, scope=scope, multiple=multiple)
  for name, kept in keep.items():
    assert kept.sum() % multiple == 0 or kept.all()
    assert kept.all() or values[name][kept].min() >= values[name][~kept].max()
  smaller = shrink(model, keep)
  share = cost.macs(Graph(smaller)) / cost.macs(graph.graph)
  assert filters.remaining_macs(graph, keep) == pytest.approx(share, rel=1e-6)
  assert (ratio == 0.0) == (share == 1.0)


def test_counts_by_hand():
  graph = ChannelGraph(conv_net())
  values = {group.name: np.arange(group.size) for group in graph.groups}
  sizes = {name: len(scores) for name, scores in values.items()}
  keep = filters.choose(graph, values, ratio=0.4, multiple=2)
  for name, size in sizes.items():
    # What is left of 60 %, rounded up to the next multiple of two.
    kept = min(-(-size * 0.6 // 2) * 2, size)
    np.testing.assert_array_equal(keep[name], np.arange(size) >= size - kept)


@pytest.mark.parametrize('scope', ['group', 'network'])
@pytest.mark.parametrize('macs', [0.3, 0.5, 0.8])
def test_a_target_of_macs_is_met_closely(scope, macs):
  graph = ChannelGraph(trunk())
  keep = filters.choose(graph, filters.scores(graph, 'l1'), macs=macs, scope=scope)
  left = filters.remaining_macs(graph, keep)
  assert macs - 0.12 < left <= macs


@pytest.mark.parametrize('multiple', [1, 4])
@pytest.mark.parametrize('macs', [0.3, 0.5, 0.8])
def test_a_budget_of_the_network_is_filled(macs, multiple):
  channels = ChannelGraph(trunk())
  scores = filters.scores(channels)
  left = cost.macs_share(channels)
  keep = filters.choose(channels, scores, macs=macs, scope='network', multiple=multiple)
  assert left(keep) <= macs
  for name, kept in keep.items():
    assert kept.all() or kept.sum() % multiple == 0
    dropped = np.argsort(np.where(kept, -np.inf, scores[name]))[::-1][: (~kept).sum()]
    more = kept | np.isin(np.arange(len(kept)), dropped[:multiple])
    assert kept.all() or left({**keep, name: more}) > macs
    # The best stay.
    assert not kept.any() or kept.all() or scores[name][kept].min() >= scores[name][~kept].max()


def test_skipped_groups_stay_whole():
  graph = ChannelGraph(trunk())
  keep = filters.choose(graph, filters.scores(graph), ratio=0.5, skip=['stem'])
  assert keep['stem'].all() and not keep['wide'].all()


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({}, 'Give either `ratio` or `macs`'),
    ({'ratio': 1.0}, r'must be in \[0, 1\)\. Received: 1\.0'),
    ({'macs': 0.0}, r'must be in \(0, 1\]\. Received: 0\.0'),
    ({'ratio': 0.5, 'scope': 'layer'}, "'group' or 'network'. Received: 'layer'"),
    ({'ratio': 0.5, 'multiple': 0}, 'at least 1. Received: 0'),
    ({'ratio': 0.5, 'skip': ['no']}, "groups out of stem, .* Received: 'no'"),
    ({'macs': 0.01, 'multiple': 8}, 'cannot be met: with 8 channels'),
  ],
)
def test_choices_that_make_no_sense(arguments, message):
  graph = ChannelGraph(trunk())
  with pytest.raises(UserError, match=message):
    filters.choose(graph, filters.scores(graph), **arguments)


def test_criteria_that_make_no_sense():
  with pytest.raises(UserError, match="must be one of l1, .* Received: 'l3'"):
    filters.scores(ChannelGraph(trunk()), 'l3')
  model = keras.Sequential([keras.Input((4,)), layers.Dense(3, name='a'), layers.Dense(2)])
  with pytest.raises(UserError, match='needs a batch norm .* none behind a'):
    filters.scores(ChannelGraph(model), 'bn_scale')
