"""A walk's tensors against whole forward passes, what it computes, and what it keeps."""

import keras
import numpy as np
import prunable
import pytest
from channels import inputs_of, randomized

from pocketsize.copies import copied
from pocketsize.graph import Graph
from pocketsize.pruning import walk as walk_module
from pocketsize.pruning.walk import Walk

# Bytes for kept tensors: none, some, all.
MEMORIES = [0, 20000, 2**30]


def batches(model, count=2, size=3):
  return [
    np.random.default_rng(seed).normal(size=(size, *model.input_shape[1:])).astype('float32')
    for seed in range(count)
  ]


def pair(net):
  """Returns Graphs of a model and of a copy with other weights."""
  model = net()
  return Graph(model), Graph(randomized(copied(model), seed=9))


def tensors(graph, batch):
  """Returns {number: value} of a whole forward pass, by the layers themselves."""
  values = {}

  def call(node, args, kwargs):
    out = args[0] if node.is_input else node.operation(*args, **kwargs)
    values.update(zip(node.outputs, keras.tree.flatten(out), strict=True))
    return out

  graph.run(batch if isinstance(batch, list) else [batch], call, training=False)
  return values


def weighted(graph):
  return [
    index
    for index, node in enumerate(graph.nodes)
    if type(node.operation).__name__ in ('Conv2D', 'Dense')
  ]


@pytest.mark.parametrize('memory', MEMORIES)
@pytest.mark.parametrize('net', prunable.NETS)
def test_a_walk_yields_the_models_tensors(net, memory):
  graphs = pair(prunable.NETS[net])
  data = batches(graphs[0].model)
  expected = [[tensors(graph, batch) for graph in graphs] for batch in data]
  walk = Walk(*graphs, data, memory)
  assert walk.samples == 6
  for index in weighted(graphs[0]):
    yielded = list(walk.at(index))
    assert len(yielded) == len(data)
    for parts, whole in zip(yielded, expected, strict=True):
      for part, values in zip(parts, whole, strict=True):
        assert walk.live(index) <= set(part)
        assert set(graphs[0].nodes[index].inputs) <= set(part)
        for number in walk.live(index):
          np.testing.assert_allclose(part[number], values[number], rtol=1e-4, atol=1e-4)


def test_several_inputs():
  one, other = keras.Input((4,), name='one'), keras.Input((3,), name='other')
  x = keras.layers.Dense(3, name='first')(one)
  x = keras.layers.Add(name='add')([x, other])
  model = randomized(keras.Model([one, other], keras.layers.Dense(2, name='head')(x)))
  graph, data = Graph(model), [inputs_of(model, seed) for seed in range(2)]
  head = [node.path for node in graph.nodes].index('head')
  walk = Walk(graph, Graph(copied(model)), data, 2**30)
  for batch, parts in zip(data, walk.at(head), strict=True):
    for part in parts:
      number = graph.nodes[head].inputs[0]
      np.testing.assert_allclose(part[number], tensors(graph, batch)[number], rtol=1e-5)


def counted(monkeypatch, net, memory):
  """Returns {path: calls a batch and model} of a walk to all convolutions and dense layers."""
  calls = {}
  original = walk_module._compute

  def compute(node, args, kwargs):
    calls[node.path] = calls.get(node.path, 0) + 1
    return original(node, args, kwargs)

  monkeypatch.setattr(walk_module, '_compute', compute)
  graphs = pair(net)
  walk = Walk(*graphs, batches(graphs[0].model), memory)
  for index in weighted(graphs[0]):
    for _ in walk.at(index):
      pass
  return {path: count / 4 for path, count in calls.items()}, graphs[0]


@pytest.mark.parametrize('net', ['projection', 'dense_net', 'nested'])
def test_each_layer_is_computed_once_where_memory_suffices(monkeypatch, net):
  calls, graph = counted(monkeypatch, prunable.NETS[net], 2**30)
  assert set(calls.values()) == {1}
  # What is behind the last reader, and that itself, is not computed at all.
  assert set(calls) == {node.path for node in graph.nodes[: weighted(graph)[-1]]}


def test_without_memory_everything_before_is_computed_again(monkeypatch):
  calls, graph = counted(monkeypatch, prunable.chain, 0)
  places = weighted(graph)
  for index, node in enumerate(graph.nodes[: places[-1]]):
    expected = 1 if node.is_input else sum(place > index for place in places)
    assert calls[node.path] == expected


def kept_bytes(walk):
  inputs = set(walk.graphs[0].inputs)
  return sum(
    np.asarray(value).nbytes
    for batch in walk._kept
    for part in batch
    for number, value in part.items()
    if number not in inputs
  )


def two_outputs():
  """The second output is read by nobody, and is there early."""
  inputs = prunable.images()
  x = keras.layers.Conv2D(8, 3, padding='same', name='a')(inputs)
  early = keras.layers.Conv2D(32, 3, padding='same', name='early')(x)
  x = keras.layers.Conv2D(2, 3, 4, padding='same', name='b')(x)
  outputs = [keras.layers.Conv2D(2, 1, name='c')(x), early]
  return randomized(keras.Model(inputs, outputs, name='two_outputs'))


@pytest.mark.parametrize('memory', [0, 5000, 12000, 40000, 2**30])
@pytest.mark.parametrize('net', [*prunable.NETS.values(), two_outputs])
def test_kept_tensors_stay_within_the_memory(net, memory):
  graphs = pair(net)
  walk = Walk(*graphs, batches(graphs[0].model), memory)
  largest = 0
  for index in weighted(graphs[0]):
    for _ in walk.at(index):
      largest = max(largest, kept_bytes(walk))
  assert largest <= memory
  assert largest or memory < 2**30


def test_with_enough_memory_only_live_tensors_are_kept():
  graphs = pair(prunable.residual)
  walk = Walk(*graphs, batches(graphs[0].model), 2**30)
  for index in weighted(graphs[0]):
    list(walk.at(index))
    for batch in walk._kept:
      for part in batch:
        assert set(part) == walk.live(index)


def test_live_tensors_by_hand():
  graph = Graph(prunable.residual())
  paths = [node.path for node in graph.nodes]
  walk = Walk(graph, graph, [], 0)

  def writers(path):
    return {graph.producer(number).path for number in walk.live(paths.index(path))}

  assert writers('stem') == {'images'}
  assert writers('one1') == {'stem_relu'}
  assert writers('one2') == {'stem_relu', 'one1_relu'}
  assert writers('two1') == {'relu1'}
  assert writers('head') == {'pool'}


def test_a_walk_goes_forward_only():
  graphs = pair(prunable.chain)
  walk = Walk(*graphs, batches(graphs[0].model), 2**30)
  first, second = weighted(graphs[0])[:2]
  list(walk.at(second))
  list(walk.at(second))
  with pytest.raises(ValueError, match='goes forward'):
    list(walk.at(first))
