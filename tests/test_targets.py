"""Rules: who wins, who is left alone and why, and what the messages say."""

import keras
import pytest
from keras import layers
from toys import conv_net, nested_net

from pocketsize.errors import UserError
from pocketsize.graph import Graph
from pocketsize.targets import Rule, channel_axes, resolve, weight_points, weighted_layers


def test_the_last_rule_that_matches_wins():
  rules = [Rule('all'), Rule('convs', op_types=('Conv2D',)), Rule('one', op_names=('conv1',))]
  assert resolve(Graph(conv_net()), rules) == (
    {'conv0': 'convs', 'conv1': 'one', 'head': 'all'},
    {},
  )


def test_an_earlier_narrow_rule_loses_to_a_later_wide_one():
  configs, _ = resolve(Graph(conv_net()), [Rule('one', op_names=('conv1',)), Rule('all')])
  assert configs['conv1'] == 'all'


def test_exclude_takes_a_layer_out_and_a_later_rule_takes_it_in_again():
  out = [Rule('all'), Rule(None, op_types=('Conv2D',), exclude=True)]
  configs, skipped = resolve(Graph(conv_net()), out)
  assert configs == {'head': 'all'}
  assert skipped == {'conv0': 'excluded', 'conv1': 'excluded'}
  configs, skipped = resolve(Graph(conv_net()), [*out, Rule('back', op_names=('conv0',))])
  assert configs == {'conv0': 'back', 'head': 'all'}
  assert skipped == {'conv1': 'excluded'}


def test_a_layer_that_no_rule_names_says_so():
  configs, skipped = resolve(Graph(conv_net()), [Rule('x', op_names=('head',))])
  assert configs == {'head': 'x'}
  assert skipped == {'conv0': 'no rule names it', 'conv1': 'no rule names it'}


def test_a_layer_type_without_rules_says_so_and_batch_norm_is_not_mentioned():
  inputs = keras.Input((5,), dtype='int32')
  x = layers.LSTM(2, name='lstm')(layers.Embedding(4, 3, name='words')(inputs))
  x = layers.BatchNormalization()(x)
  _, skipped = resolve(Graph(keras.Model(inputs, layers.Dense(1)(x))), [Rule('all')])
  assert skipped == {
    'lstm': 'no rule for layers of type LSTM',
    'words': 'no rule for layers of type Embedding',
  }


def test_regular_expressions_match_the_whole_path():
  graph = Graph(nested_net())
  assert set(resolve(graph, [Rule('x', op_names=('{re}base/.*',))])[0]) == {
    'base/stem/conv',
    'base/conv',
  }
  assert set(resolve(graph, [Rule('x', op_names=('{re}.*/stem/.*', 'head'))])[0]) == {
    'base/stem/conv',
    'head',
  }
  with pytest.raises(UserError):
    resolve(graph, [Rule('x', op_names=('{re}conv',))])


def test_a_plain_name_is_not_a_regular_expression():
  with pytest.raises(UserError):
    resolve(Graph(conv_net()), [Rule('x', op_names=('conv.',))])


def test_both_type_and_name_must_match():
  configs, _ = resolve(Graph(conv_net()), [Rule('x', op_types=('Dense',), op_names=('{re}.*',))])
  assert configs == {'head': 'x'}


def test_an_unknown_name_is_refused_with_the_nearest_one():
  with pytest.raises(
    UserError, match=r"'conv_1', which matches no layer with weights.*Did you mean 'conv1'\?"
  ):
    resolve(Graph(conv_net()), [Rule('x', op_names=('conv_1',))])


def test_an_unknown_type_is_refused_with_the_legal_ones():
  with pytest.raises(
    UserError, match=r"`op_types` must be among Conv1D.*EinsumDense\. Received: 'LSTM'"
  ):
    resolve(Graph(conv_net()), [Rule('x', op_types=('LSTM',))])


def test_a_legal_type_that_the_model_lacks_is_no_mistake():
  configs, _ = resolve(Graph(conv_net()), [Rule('x', op_types=('Conv1D', 'Dense'))])
  assert configs == {'head': 'x'}


def test_weighted_layers_come_in_order_of_execution():
  assert list(weighted_layers(Graph(nested_net()))) == ['base/stem/conv', 'base/conv', 'head']


@pytest.mark.parametrize(
  ('layer', 'shape', 'sizes'),
  [
    (layers.Conv1D(5, 3), (None, 9, 2), [('kernel', 5)]),
    (layers.Conv2D(6, 3, groups=2), (None, 9, 9, 4), [('kernel', 6)]),
    (layers.Conv3D(5, 3), (None, 9, 9, 9, 2), [('kernel', 5)]),
    (layers.Conv1DTranspose(5, 3), (None, 9, 2), [('kernel', 5)]),
    (layers.Conv2DTranspose(5, 3), (None, 9, 9, 2), [('kernel', 5)]),
    (layers.Conv3DTranspose(5, 3), (None, 9, 9, 9, 2), [('kernel', 5)]),
    (layers.DepthwiseConv1D(3, depth_multiplier=4), (None, 9, 2), [('kernel', 8)]),
    (layers.DepthwiseConv2D(3, depth_multiplier=4), (None, 9, 9, 2), [('kernel', 8)]),
    (
      layers.SeparableConv1D(5, 3),
      (None, 9, 2),
      [('depthwise_kernel', 2), ('pointwise_kernel', 5)],
    ),
    (
      layers.SeparableConv2D(5, 3),
      (None, 9, 9, 2),
      [('depthwise_kernel', 2), ('pointwise_kernel', 5)],
    ),
    (layers.Dense(5), (None, 2), [('kernel', 5)]),
    (layers.EinsumDense('abc,cde->abde', (None, 4, 5)), (None, 3, 2), [('kernel', 20)]),
    (layers.EinsumDense('abcd,cde->abe', (None, 5)), (None, 3, 2, 4), [('kernel', 5)]),
  ],
  ids=lambda value: type(value).__name__,
)
def test_the_channel_axes_of_each_layer_type_count_its_outputs(layer, shape, sizes):
  layer.build(shape)
  assert list(weight_points(layer)) == [point for point, _ in sizes]
  for point, size in sizes:
    kernel = getattr(layer, point)
    found = 1
    for axis in channel_axes(layer, point):
      found *= kernel.shape[axis]
    assert found == size
