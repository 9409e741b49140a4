"""Kernels of layers that read fewer channels, against regressions that are solved row by row."""

import collections

import keras
import numpy as np
import pytest
from keras import layers

from pocketsize.allocation.reconstructed import Reconstructed
from pocketsize.channel_graph import ChannelGraph
from pocketsize.graph import Graph
from pocketsize.pruning import lasso
from pocketsize.pruning.lasso import Lasso
from pocketsize.pruning.layerwise import Layerwise
from pocketsize.pruning.units import units
from tests import toys
from tests.channels import randomized

CHOICES = {'left': [1, 2, 4], 'right': [1, 3], 'both': [2, 3, 5]}
WHOLE = [2, 1, 2]


def net():
  """'both' reads what 'left' and 'right' make, side by side; 'head' and 'extra' read 'both'."""
  inputs = keras.Input((6, 6, 3), name='images')
  left = layers.Conv2D(4, 3, padding='same', activation='relu', name='left')(inputs)
  right = layers.Conv2D(3, 1, activation='relu', name='right')(inputs)
  x = layers.Concatenate(name='join')([left, right])
  x = layers.Conv2D(5, 3, 2, padding='same', activation='relu', name='both')(x)
  extra = layers.GlobalAveragePooling2D()(layers.Conv2D(2, 1, use_bias=False, name='extra')(x))
  head = layers.Dense(4, name='head')(layers.GlobalAveragePooling2D()(x))
  return randomized(keras.Model(inputs, [head, extra], name='net'))


class Counting:
  """A method that counts what it is asked for."""

  def __init__(self, method):
    self._method, self.calls = method, collections.Counter()

  def select(self, *arguments):
    self.calls['select'] += 1
    return self._method.select(*arguments)

  def reconstruct(self, problem, rows):
    self.calls['reconstruct'] += 1
    return self._method.reconstruct(problem, rows)


class Case:
  """The net, the regressions of its readers from all positions of some images, and candidates."""

  def __init__(self, method):
    self.model, self.images = net(), toys.images(20, 6)
    self.units, _ = units(ChannelGraph(self.model))
    assert [unit.name for unit in self.units] == list(CHOICES)
    survey = Layerwise(self.model, [], {}, None, [self.images], points=None)
    self.problems = survey.problems(['both', 'extra', 'head'])
    self.method = Counting(method)
    self.made = Reconstructed(self.units, CHOICES, self.problems, self.method)

  def kernel(self, path):
    return np.array(self.model.get_layer(path).kernel)

  def chosen(self, place, level):
    """Returns [size] bool of a unit, chosen on its own."""
    unit = self.units[place]
    count = CHOICES[unit.name][level]
    problems = [self.problems[path] for path in unit.readers]
    return self.method.select(problems, list(unit.readers.values()), unit.size, count)


@pytest.fixture(scope='module', params=[True, False], ids=['lasso', 'magnitude'])
def case(request):
  return Case(Lasso(request.param))


def rows_read(case, path):
  """Returns (X, [rows, ...] what a layer reads at each output position; Y, what it makes)."""
  layer = case.model.get_layer(path)
  x = np.asarray(keras.Model(case.model.inputs, layer.input)(case.images))
  kernel = case.kernel(path).reshape(-1, layer.kernel.shape[-1]).astype(np.float64)
  if path == 'both':
    # Stride 2 of 6 places and a kernel of 3: padding of 1 behind only.
    x = np.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)])
    rows = [
      image[row : row + 3, column : column + 3].ravel()
      for image in x
      for row in (0, 2, 4)
      for column in (0, 2, 4)
    ]
  else:
    rows = x.reshape(-1, x.shape[-1])
  rows = np.array(rows, np.float64)
  return rows, rows @ kernel


def slow_least_squares(x, y, kernel, rows):
  """The ridge towards the kernel as rows of their own, solved by a QR-like solver."""
  part = x[:, rows]
  ridge = np.sqrt(lasso.RIDGE * np.mean(np.square(part).sum(axis=0)))
  left = np.concatenate([part, ridge * np.eye(rows.sum())])
  right = np.concatenate([y, ridge * kernel[rows]])
  found = np.zeros_like(kernel)
  found[rows] = np.linalg.lstsq(left, right, rcond=None)[0]
  return found


def test_the_highest_levels_are_the_models_own_kernels_to_the_last_bit(case):
  kernels = case.made.kernels(np.array(WHOLE))
  assert sorted(kernels) == ['both', 'extra', 'head']
  for path, points in kernels.items():
    assert list(points) == ['kernel']
    assert points['kernel'].dtype == np.float32
    np.testing.assert_array_equal(points['kernel'], case.kernel(path))


@pytest.mark.parametrize('levels', [[0, 1, 2], [2, 0, 2], [1, 0, 1], [0, 0, 0]])
def test_fewer_channels_are_zeros_and_least_squares(case, levels):
  chosen = [case.chosen(place, level) for place, level in enumerate(levels)]
  assert [int(each.sum()) for each in chosen] == [
    CHOICES[name][level] for name, level in zip(CHOICES, levels, strict=True)
  ]
  # 'both' reads four channels of 'left' and then three of 'right'.
  read = {'both': np.concatenate(chosen[:2]), 'extra': chosen[2], 'head': chosen[2]}
  for path, points in case.made.kernels(np.array(levels)).items():
    kernel, whole = points['kernel'], case.kernel(path)
    assert kernel.shape == whole.shape
    assert not kernel[..., ~read[path], :].any()
    if read[path].all():
      np.testing.assert_array_equal(kernel, whole)
      continue
    assert (kernel[..., read[path], :] != whole[..., read[path], :]).any()
    flat = whole.reshape(-1, whole.shape[-1]).astype(np.float64)
    rows = np.tile(read[path], len(flat) // whole.shape[-2])
    slow = slow_least_squares(*rows_read(case, path), flat, rows)
    np.testing.assert_allclose(kernel.reshape(flat.shape), slow, rtol=1e-3, atol=1e-4)
    fast = lasso.least_squares(case.problems[path], rows, case.problems[path].kernel)
    np.testing.assert_array_equal(kernel.reshape(flat.shape), fast.astype(np.float32))


def test_magnitude_chooses_what_weighs_most_in_all_its_readers():
  case = Case(Lasso(lasso=False))
  weight = np.abs(case.kernel('extra'))[0, 0].sum(axis=1) + np.abs(case.kernel('head')).sum(axis=1)
  kernels = case.made.kernels(np.array([2, 1, 0]))
  stays = np.isin(np.arange(5), np.argsort(-weight)[:2])
  for path in ('extra', 'head'):
    kernel = kernels[path]['kernel'].reshape(5, -1)
    np.testing.assert_array_equal(np.abs(kernel).sum(axis=1) > 0, stays)


@pytest.mark.parametrize('name', list(CHOICES))
def test_errors_are_the_changes_of_each_reader_with_the_others_whole(case, name):
  place = list(CHOICES).index(name)
  expected = {path: [] for path in (['extra', 'head'] if name == 'both' else ['both'])}
  for level in range(len(CHOICES[name])):
    levels = np.array(WHOLE)
    levels[place] = level
    kernels = case.made.kernels(levels)
    for path, changes in expected.items():
      change = kernels[path]['kernel'].astype(np.float64) - case.kernel(path)
      changes.append(np.square(change).sum())
  found = case.made.errors(name)
  assert found.keys() == expected.keys()
  for path, changes in found.items():
    np.testing.assert_allclose(changes, expected[path], rtol=1e-12)
    assert changes[-1] == 0.0 and (changes[:-1] > 0.0).all()


def test_what_was_made_once_is_kept():
  case = Case(Lasso())
  for levels in ([0, 1, 2], [2, 1, 0], [0, 1, 0], [0, 1, 2]):
    case.made.kernels(np.array(levels))
  # 'left' at 0 and 'both' at 0; for each of these one kernel of 'both', and of 'extra' and 'head'.
  assert case.method.calls == {'select': 2, 'reconstruct': 3}
  case.made.kernels(np.array([0, 0, 2]))
  assert case.method.calls == {'select': 3, 'reconstruct': 4}


def test_the_model_stays_as_it_is(case):
  before = case.model.get_weights()
  case.made.kernels(np.array([0, 0, 0]))
  for weight, value in zip(Graph(case.model).layers['both'].weights, before[4:6], strict=True):
    np.testing.assert_array_equal(weight, value)


def test_kernels_beyond_the_memory_are_refitted_each_time(case):
  levels = np.array([0, 0, 0])
  wanted = case.made.kernels(levels)
  small = Reconstructed(case.units, CHOICES, case.problems, case.method, memory=0)
  with pytest.warns(UserWarning, match='exceed `memory`'):
    small.kernels(levels)
  before = case.method.calls['reconstruct']
  for path, points in small.kernels(levels).items():
    np.testing.assert_array_equal(points['kernel'], wanted[path]['kernel'])
  assert case.method.calls['reconstruct'] == before + 3
