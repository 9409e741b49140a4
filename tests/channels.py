"""What the tests of topologies share: channels dropped at random, masked against shrunk."""

import keras
import numpy as np

from pocketsize.channel_graph import ChannelGraph
from pocketsize.graph import Graph
from pocketsize.shrink import mask, shrink


def randomized(model, seed=0):
  """Gives every weight a value as after training."""
  rng = np.random.default_rng(seed)
  for layer in Graph(model).layers.values():
    for weight in layer.weights:
      if weight.name == 'moving_variance':
        weight.assign(rng.uniform(0.5, 1.5, weight.shape))
      elif weight.name == 'gamma':
        weight.assign(rng.uniform(0.5, 1.5, weight.shape))
      elif weight.dtype == 'float32':
        weight.assign(rng.normal(size=weight.shape) * (0.4 if len(weight.shape) > 1 else 0.3))
  return model


def half(graph, seed=0):
  """Returns a `keep` that drops a random half of every group."""
  rng = np.random.default_rng(seed)
  return {
    group.name: np.isin(np.arange(group.size), rng.permutation(group.size)[group.size // 2 :])
    for group in graph.groups
  }


def groups(model, **arguments):
  """Returns {name of a group: (size, its makers)}."""
  return {
    group.name: (group.size, sorted(group.members))
    for group in ChannelGraph(model, **arguments).groups
  }


def inputs_of(model, seed=0):
  rng = np.random.default_rng(seed)
  return [
    rng.normal(size=(2, *(size or 12 for size in symbol.shape[1:]))).astype('float32')
    for symbol in model.inputs
  ]


def assert_shrinks(model, keep_shift=False, seed=0):
  """Drops half of each group: the masked model and the smaller one agree; returns the latter."""
  randomized(model, seed)
  channels = ChannelGraph(model, keep_shift)
  assert channels.groups
  keep = half(channels, seed)
  smaller = assert_same(model, keep, keep_shift, seed)
  assert smaller.count_params() < model.count_params()
  for symbol, small in zip(
    keras.tree.flatten(model.outputs), keras.tree.flatten(smaller.outputs), strict=True
  ):
    assert symbol.shape == small.shape
  return smaller


def assert_same(model, keep, keep_shift=False, seed=0):
  """The masked model and the smaller one agree; returns the latter."""
  masked, smaller = mask(model, keep, keep_shift), shrink(model, keep, keep_shift)
  inputs = inputs_of(model, seed)
  fed = inputs if len(inputs) > 1 else inputs[0]
  for one, other in zip(
    keras.tree.flatten(masked(fed)), keras.tree.flatten(smaller(fed)), strict=True
  ):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
  return smaller
