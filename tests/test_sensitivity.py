"""Tables of losses, by curvature and measured."""

import json
import math
import types

import keras
import numpy as np
import pytest
from keras import layers

from evaluators.classification import Classification
from pocketsize.allocation import costs, sensitivity, traces, variants
from pocketsize.allocation.exact import minimise
from pocketsize.allocation.problem import Cost, Problem, Term, Variable
from pocketsize.allocation.scoring import Scorer
from pocketsize.allocation.variants import Variants
from pocketsize.errors import UserError
from pocketsize.graph import Graph
from pocketsize.quantization.uniform import Uniform, UniformConfig
from tests import toys
from tests.test_scoring import data, randomized
from tests.test_traces import cross_entropy
from tests.workers import threads


def problem(**choices):
  """A problem of {name: choices}, each level of which costs one more."""
  terms = [
    Term((place,), np.arange(len(each), dtype=float)) for place, each in enumerate(choices.values())
  ]
  return Problem(
    [Variable(name, each) for name, each in choices.items()], Cost('steps', terms), None
  )


def hawq(traces, errors):
  fake = types.SimpleNamespace(errors=lambda name: {name: np.array(errors[name], float)})
  made = problem(**{name: tuple(range(len(each))) for name, each in errors.items()})
  return [table.tolist() for table in sensitivity.hawq_losses(made, traces, fake)]


def test_hawq_is_trace_times_squared_error():
  tables = hawq({'a': 2.0, 'b': 0.5}, {'a': [4.0, 1.0, 0.0], 'b': [8.0, 2.0]})
  assert tables == [[8.0, 2.0, 0.0], [4.0, 1.0]]


def test_layers_that_one_variable_decides_about_count_each_with_its_own_trace():
  """100 * 0 + 1 * 8 and 100 * 0 + 1 * 2; by the mean trace it would be 404 and 101."""
  errors = {'flat': np.array([8.0, 2.0]), 'curved': np.zeros(2)}
  fake = types.SimpleNamespace(errors=lambda name: errors)
  (table,) = sensitivity.hawq_losses(problem(unit=(2, 3)), {'flat': 1.0, 'curved': 100.0}, fake)
  assert table.tolist() == [8.0, 2.0]


def test_a_negative_trace_counts_as_the_least_positive_one():
  errors = {'a': [4.0, 1.0], 'b': [3.0, 1.0], 'c': [2.0, 1.0]}
  tables = hawq({'a': 5.0, 'b': -7.0, 'c': 0.5}, errors)
  assert tables == [[20.0, 5.0], [1.5, 0.5], [1.0, 0.5]]
  assert hawq({'a': -5.0, 'b': 0.0, 'c': -1.0}, errors) == list(errors.values())


def test_more_bits_are_never_worse():
  assert hawq({'a': 1.0}, {'a': [9.0, 5.0, 6.0, 5.5, 1.0]}) == [[9.0, 5.0, 5.0, 5.0, 1.0]]


class Counted:
  """A scorer whose loss is a function of the levels, which stand in for kernels.

  Args:
    loss: function of [variables] levels.
    fails_at: the call that raises.
  """

  def __init__(self, loss, fails_at=None):
    self.loss, self.fails_at, self.asked = loss, fails_at, []

  def score(self, levels):
    self.asked.append(tuple(int(level) for level in levels))
    if len(self.asked) == self.fails_at:
      raise KeyboardInterrupt
    return {'accuracy': 0.5, 'loss': self.loss(levels)}


def measured(made, scorer, **options):
  return sensitivity.measured_losses(made, lambda levels: levels, scorer, **options)


def curved(levels):
  return 1.0 + 10.0 * (3 - levels[0]) ** 2 + (1 - levels[1])


def two():
  return problem(a=(2, 3, 4, 8), b=(0.5, 0.0))


def test_measured_is_what_one_variable_alone_adds():
  scorer = Counted(curved)
  tables = measured(two(), scorer)
  assert [table.tolist() for table in tables] == [[90.0, 40.0, 10.0, 0.0], [1.0, 0.0]]
  assert scorer.asked == [(3, 1), (0, 1), (1, 1), (2, 1), (3, 0)]


def test_levels_between_those_measured_are_interpolated():
  """Of 7 levels 0, 3 and 6 are measured: 36, 9 and 0."""
  scorer = Counted(lambda levels: float((6 - levels[0]) ** 2))
  tables = measured(problem(a=tuple(range(7))), scorer, points=3)
  np.testing.assert_allclose(tables[0], [36, 27, 18, 9, 6, 3, 0])
  assert scorer.asked == [(6,), (0,), (3,)]


def test_measured_beside_other_levels_and_falling():
  """Beside level 1 of 4: losses 5, 2, 3, 1 of which 3 is chance; less that at the base, 2."""
  scorer = Counted(lambda levels: [5.0, 2.0, 3.0, 1.0][levels[0]])
  tables = measured(problem(a=(1, 2, 3, 4)), scorer, base=[1])
  assert tables[0].tolist() == [3.0, 0.0, 0.0, -1.0]


def test_what_was_measured_is_not_measured_again(tmp_path):
  path, whole = tmp_path / 'losses.json', measured(two(), Counted(curved))
  with pytest.raises(KeyboardInterrupt):
    measured(two(), Counted(curved, fails_at=4), path=path)
  again, shown = Counted(curved), []
  resumed = measured(
    two(), again, path=path, track=lambda rounds: shown.extend(rounds) or iter(rounds)
  )
  assert again.asked == [(2, 1), (3, 0)]
  assert len(shown) == 2
  for table, expected in zip(resumed, whole, strict=True):
    np.testing.assert_array_equal(table, expected)
  never = Counted(curved)
  measured(two(), never, path=path)
  assert never.asked == []


@pytest.mark.parametrize('content', ['{', '[]', '{"losses": {}}', json.dumps({'others': 1})])
def test_a_file_of_something_else_is_refused(tmp_path, content):
  path = tmp_path / 'losses.json'
  path.write_text(content)
  with pytest.raises(UserError, match='holds no measured losses'):
    measured(two(), Counted(curved), path=path)


def test_a_file_of_another_problem_is_refused(tmp_path):
  path = tmp_path / 'losses.json'
  measured(two(), Counted(curved), path=path)
  with pytest.raises(UserError, match='losses beside other choices: give another path'):
    measured(problem(a=(2, 3, 4, 8), c=(0.5, 0.0)), Counted(curved), path=path)


def test_workers_measure_a_part_each(tmp_path):
  scorers = [Counted(curved), Counted(curved)]
  path = tmp_path / 'losses.json'
  found = threads.together(
    2, lambda rank, **shared: measured(two(), scorers[rank], path=path, rank=rank, **shared)
  )
  assert [len(scorer.asked) for scorer in scorers] == [3, 2]
  for tables in found:
    for table, expected in zip(tables, measured(two(), Counted(curved)), strict=True):
      np.testing.assert_array_equal(table, expected)
  # Rank 0 knows what rank 1 measured, and rank 1 learns it from rank 0.
  later = [Counted(curved), Counted(curved)]
  threads.together(
    2, lambda rank, **shared: measured(two(), later[rank], path=path, rank=rank, **shared)
  )
  assert [scorer.asked for scorer in later] == [[], []]


def test_nonsense_is_refused():
  with pytest.raises(UserError, match='`points` must be at least 2.* Received: 1'):
    measured(two(), Counted(curved), points=1)
  with pytest.raises(UserError, match='must be finite. Received: .*nan'):
    measured(two(), Counted(lambda levels: math.nan))


def test_a_model_is_measured_by_its_kernels():
  model = randomized(toys.conv_net())
  made = problem(conv0=(1.0, 0.0), head=(0.5, 0.0))
  sparse = Variants(model, made.variables, variants.sparse)
  scorer = Scorer(model, data(), Classification())
  tables = sensitivity.measured_losses(made, sparse.kernels, scorer)
  zero = {'conv0': {'kernel': np.zeros((3, 3, 3, 4))}}
  expected = scorer.score(zero)['loss'] - scorer.score({})['loss']
  assert tables[0][0] == pytest.approx(expected, rel=1e-4)
  assert tables[0][1] == min(0.0, expected)


def deep_net():
  """Six layers of different sizes."""
  x = inputs = keras.Input((6, 6, 3))
  for number, filters in enumerate((4, 3, 6, 5)):
    x = layers.Conv2D(filters, 3, padding='same', activation='relu', name=f'conv{number}')(x)
  x = layers.Dense(7, activation='relu', name='hidden')(layers.GlobalAveragePooling2D()(x))
  return randomized(keras.Model(inputs, layers.Dense(4, name='head')(x)))


@pytest.mark.parametrize('budget', [2.6, 4.0, 5.3])
def test_hawq_chooses_what_trying_every_choice_does(budget):
  """By the second derivatives and quantization errors of a net, of 5^6 choices."""
  model = deep_net()
  graph = Graph(model)
  variables = costs.bit_variables(graph, [2, 3, 4, 6, 8])
  paths = [variable.name for variable in variables]
  batch = toys.images(16, size=6), np.arange(16) % 4
  found = traces.estimate(model, cross_entropy, [batch], paths, iterations=4)
  change = variants.quantized(model, Uniform, dict.fromkeys(paths, UniformConfig()))
  problem = Problem(variables, costs.mean_bits(graph, variables), budget)
  tables = sensitivity.hawq_losses(problem, found.means, Variants(model, variables, change))
  every = np.array(list(np.ndindex(*problem.sizes)))
  loss, cost = (
    sum(table[every[:, place]] for place, table in enumerate(each))
    for each in (tables, [term.table for term in problem.cost.terms])
  )
  best = every[np.where(cost <= budget, loss, np.inf).argmin()]
  np.testing.assert_array_equal(minimise(problem, tables), best)
