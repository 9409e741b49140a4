"""Costs counted by hand."""

import keras
import numpy as np
import pytest
from keras import layers
from toys import shared_net

from pocketsize.cost import layer_costs, macs, nonzero
from pocketsize.graph import Graph

# layer, input shape, MACs, parameters; biases are parameters and no MACs.
CASES = [
  (layers.Conv1D(5, 3), (9, 2), 7 * 3 * 2 * 5, 3 * 2 * 5 + 5),
  (layers.Conv2D(5, 3, strides=2), (9, 9, 2), 4 * 4 * 3 * 3 * 2 * 5, 3 * 3 * 2 * 5 + 5),
  (
    layers.Conv2D(6, 3, groups=2, padding='same', use_bias=False),
    (4, 4, 4),
    16 * 9 * 2 * 6,
    9 * 2 * 6,
  ),
  (layers.Conv3D(5, 2), (4, 4, 4, 2), 27 * 8 * 2 * 5, 8 * 2 * 5 + 5),
  (layers.Conv1DTranspose(5, 3), (7, 2), 7 * 3 * 2 * 5, 3 * 2 * 5 + 5),
  (layers.Conv2DTranspose(5, 3, strides=2), (4, 4, 2), 16 * 9 * 2 * 5, 9 * 2 * 5 + 5),
  (layers.Conv3DTranspose(5, 2), (3, 3, 3, 2), 27 * 8 * 2 * 5, 8 * 2 * 5 + 5),
  (layers.DepthwiseConv1D(3, depth_multiplier=2), (9, 4), 7 * 3 * 8, 3 * 8 + 8),
  (layers.DepthwiseConv2D(3, depth_multiplier=2), (9, 9, 4), 49 * 9 * 8, 9 * 8 + 8),
  (layers.SeparableConv1D(5, 3), (9, 4), 7 * (3 * 4 + 4 * 5), 3 * 4 + 4 * 5 + 5),
  (layers.SeparableConv2D(5, 3), (9, 9, 4), 49 * (9 * 4 + 4 * 5), 9 * 4 + 4 * 5 + 5),
  (layers.Dense(5), (3,), 3 * 5, 3 * 5 + 5),
  (layers.Dense(5), (7, 3), 7 * 3 * 5, 3 * 5 + 5),
  (layers.EinsumDense('abc,cde->abde', (None, 4, 5)), (7, 3), 7 * 3 * 4 * 5, 3 * 4 * 5),
  (layers.EinsumDense('abcd,cde->abe', (None, 5)), (7, 3, 4), 7 * 3 * 4 * 5, 3 * 4 * 5),
]


@pytest.mark.parametrize(('template', 'shape', 'expected_macs', 'params'), CASES)
def test_a_layer_by_hand(template, shape, expected_macs, params):
  inputs = keras.Input(shape)
  graph = Graph(keras.Model(inputs, type(template).from_config(template.get_config())(inputs)))
  (cost,) = layer_costs(graph)
  assert (cost.macs, cost.params) == (expected_macs, params)
  assert cost.channels == graph.shape(graph.outputs[0])[-1]
  assert macs(graph) == expected_macs


def test_batch_norm_has_parameters_and_no_macs():
  inputs = keras.Input((4, 4, 3))
  (cost,) = layer_costs(Graph(keras.Model(inputs, layers.BatchNormalization(name='bn')(inputs))))
  assert cost == ('bn', 12, 0, 3)


def test_a_shared_layer_costs_its_parameters_once_and_its_macs_at_each_call():
  """conv 27 * 3 * 64 twice, tower 27 * 2 * 36 twice, head 4 * 4."""
  costs = {cost.name: cost for cost in layer_costs(Graph(shared_net()))}
  assert list(costs) == ['conv', 'tower/conv', 'head']
  assert costs['conv'].params == 27 * 3 + 3
  assert costs['conv'].macs == 2 * 64 * 27 * 3
  assert costs['tower/conv'].macs == 2 * 36 * 27 * 2
  assert macs(Graph(shared_net())) == 2 * 64 * 81 + 2 * 36 * 54 + 16


def test_nonzero_weights_by_hand():
  assert nonzero([np.float32([[1, 0], [0, -3]]), np.float32([0, 5])]) == 3


def test_resnet_20_has_40_8_million_macs():
  """By hand, with the 1x1 projections of the two stages that shrink.

  First conv 1024 * 27 * 16; stage one 6 * 1024 * 144 * 16; stage two 256 * 32 * (144 + 5 * 288) and
  projection 256 * 16 * 32; stage three 64 * 64 * (288 + 5 * 576) and projection 64 * 32 * 64; dense
  640: 40,813,184 with the two projections of 131,072 each, hence 40,551,040 without.
  """
  resnet = pytest.importorskip('nets.resnet_at_cifar10')
  first = 1024 * 27 * 16
  stages = 6 * 1024 * 144 * 16 + 256 * 32 * (144 + 5 * 288) + 64 * 64 * (288 + 5 * 576)
  plain = first + stages + 640
  by_shortcut = {'pad': plain, 'projection': plain + 256 * 16 * 32 + 64 * 32 * 64}
  for shortcut, expected in by_shortcut.items():
    model = resnet.ModelHelper(resnet.ModelHelper.Config(shortcut=shortcut)).build()
    assert macs(Graph(model)) == expected
  assert by_shortcut == {'pad': 40_551_040, 'projection': 40_813_184}


@pytest.mark.parametrize('data_format', ['channels_first', 'channels_last'])
def test_channels_are_counted_along_their_axis(data_format):
  inputs = keras.Input((3, 8, 6))
  x = layers.Conv2D(4, 3, data_format=data_format, name='conv')(inputs)
  x = layers.BatchNormalization(1 if data_format == 'channels_first' else -1, name='bn')(x)
  costs = {cost.name: cost.channels for cost in layer_costs(Graph(keras.Model(inputs, x)))}
  assert costs == {'conv': 4, 'bn': 4}
