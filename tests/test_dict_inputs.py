"""Batches as dicts, which models with several inputs may take, in layer-wise pruning."""

import keras
import numpy as np
import pytest
from channels import randomized
from keras import layers

from pocketsize.channel_graph import ChannelGraph
from pocketsize.errors import UserError
from pocketsize.graph import Graph
from pocketsize.pruning import units
from pocketsize.pruning.batches import in_order
from pocketsize.pruning.lasso import Lasso
from pocketsize.pruning.layerwise import Layerwise
from pocketsize.pruning.tail import kernel_gradients


def net(structure):
  """Returns a model of an image and three numbers, with inputs as a `structure` of them."""
  image, numbers = keras.Input((6, 6, 3), name='image'), keras.Input((3,), name='aux')
  x = layers.Conv2D(6, 3, activation='relu', name='conv0')(image)
  x = layers.Conv2D(6, 3, activation='relu', name='conv1')(x)
  x = layers.GlobalAveragePooling2D()(x)
  x = layers.Concatenate()([x, layers.Dense(4, activation='relu', name='dense0')(numbers)])
  outputs = layers.Dense(2, name='head')(x)
  given = {
    # Keras has the inputs of a dict in the order of its keys.
    'dict': {'image': image, 'aux': numbers},
    'list': [image, numbers],
  }
  return randomized(keras.Model(given[structure], outputs))


def batches(count=2):
  rng = np.random.default_rng(0)
  return [
    {
      'image': rng.normal(size=(5, 6, 6, 3)).astype('float32'),
      'aux': rng.normal(size=(5, 3)).astype('float32'),
    }
    for _ in range(count)
  ]


def as_list(batch):
  return [batch['image'], batch['aux']]


def pruned(model, data):
  found, _ = units.units(ChannelGraph(model))
  course = Layerwise(model, found, units.counts(found, 0.5), Lasso(), data)
  for step in course.steps:
    course.do(step)
  return course.model.get_weights()


def test_layers_are_pruned_by_the_arrays_of_their_names():
  expected = pruned(net('list'), [as_list(batch) for batch in batches()])
  for structure in ('dict', 'list'):
    for one, other in zip(pruned(net(structure), batches()), expected, strict=True):
      np.testing.assert_array_equal(one, other)


def test_gradients_are_those_of_the_arrays_of_their_names():
  (batch,) = batches(1)

  def gradients(structure, inputs):
    graph = Graph(net(structure))
    squares = kernel_gradients(graph, ['conv1', 'head'], lambda y, x: keras.ops.sum((x - y) ** 2))
    return squares(inputs, np.ones((5, 2), 'float32'))

  loss, expected = gradients('list', as_list(batch))
  for structure in ('dict', 'list'):
    value, found = gradients(structure, batch)
    assert float(value) == pytest.approx(float(loss), rel=1e-5)
    for one, other in zip(found, expected, strict=True):
      np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_arrays_come_as_they_are_and_in_the_order_of_the_inputs():
  (batch,) = batches(1)
  for structure in ('dict', 'list'):
    model = net(structure)
    arrays = in_order(model, {**batch, 'another': np.zeros(5)})
    expected = [batch[tensor.name] for tensor in model.inputs]
    assert all(one is other for one, other in zip(arrays, expected, strict=True))
  assert in_order(keras.Sequential([keras.Input((3,)), layers.Dense(2)]), batch['aux']) == [
    batch['aux']
  ]


@pytest.mark.parametrize('structure', ['dict', 'list'])
def test_a_batch_of_other_arrays_is_refused(structure):
  model, (batch,) = net(structure), batches(1)
  for received in ({'image': batch['image'], 'more': batch['aux']}, [batch['image']]):
    with pytest.raises(UserError, match='must have an array for each of its inputs: image, aux'):
      in_order(model, received)
