"""What channels are worth: backward elimination against a slow loop, and by hand."""

import keras
import numpy as np
from keras import layers

from pocketsize import cost
from pocketsize.channel_graph import ChannelGraph
from pocketsize.pruning import marginal, units
from pocketsize.pruning.gram import Problem


def least_error(gram, moments, alive):
  part = np.ix_(alive, alive)
  return -moments[alive] @ np.linalg.solve(gram[part], moments[alive])


def test_rises_against_the_slow_loop():
  rng = np.random.default_rng(0)
  rows = rng.normal(size=(50, 7))
  gram, moments = rows.T @ rows, rows.T @ rng.normal(size=50)
  alive, slow, highest = list(range(7)), np.full(7, np.inf), 0.0
  while len(alive) > 1:
    before = least_error(gram, moments, alive)
    errors = {
      channel: least_error(gram, moments, [each for each in alive if each != channel]) - before
      for channel in alive
    }
    cheapest = min(errors, key=errors.get)
    highest = max(highest, errors[cheapest])
    slow[cheapest] = highest
    alive.remove(cheapest)
  np.testing.assert_allclose(marginal.marginal_errors(gram, moments), slow, rtol=1e-5)


def test_of_two_equal_channels_one_goes_for_nothing():
  """Columns e1, e1, 2 e2 and y = 2 e1 + 2 e2: one copy is free, then e1 for 4, and e2 stays."""
  rows = np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
  y = np.array([2.0, 2.0])
  rises = marginal.marginal_errors(rows.T @ rows, rows.T @ y)
  np.testing.assert_allclose(np.sort(rises)[:2], [0.0, 4.0], atol=1e-4)
  assert np.isinf(rises).sum() == 1


def test_silent_channels_go_first():
  rises = marginal.marginal_errors(np.diag([0.0, 1.0, 4.0]), np.array([0.0, 1.0, 4.0]))
  np.testing.assert_allclose(rises[:2], [0.0, 1.0], atol=1e-6)


def test_a_channel_is_worth_its_error_by_the_macs_that_go_with_it():
  """Two 1x1 convolutions of 2 channels: one channel is half of either's 4 + 4 of 12 MACs."""
  inputs = keras.Input((1, 1, 2))
  x = layers.Conv2D(2, 1, use_bias=False, name='made')(inputs)
  x = layers.Conv2D(2, 1, use_bias=False, name='read')(x)
  model = keras.Model(inputs, layers.Conv2D(2, 1, use_bias=False, name='end')(x))
  channels = ChannelGraph(model)
  found, _ = units.units(channels)
  assert [unit.name for unit in found] == ['made', 'read']
  problems = {path: Problem(channels.graph.layers[path]) for path in ('read', 'end')}
  kernel = np.array([[3.0, 0.0], [0.0, 1.0]])
  for problem in problems.values():
    problem.kernel = kernel
    problem.gram, problem.moments, problem.energy = np.eye(2), kernel.copy(), 10.0
  worths = marginal.worths(channels, found, problems)
  assert cost.macs_share(channels)({'made': np.array([False, True])}) == 8 / 12
  for name in ('made', 'read'):
    np.testing.assert_allclose(worths[name][1], 0.1 / (4 / 12))
    assert worths[name][0] == np.finfo(float).max
