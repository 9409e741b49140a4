"""Layerwise pruning on small topologies: zeros, counts, errors, and the same choice each time."""

import functools
import threading

import keras
import numpy as np
import prunable
import pytest
from channels import randomized

import pocketsize
from pocketsize import conversion
from pocketsize.channel_graph import ChannelGraph
from pocketsize.conversion.inspection import count_ops
from pocketsize.graph import Graph
from pocketsize.pruning import units as units_module
from pocketsize.pruning.gram import Problem
from pocketsize.pruning.ista import Ista
from pocketsize.pruning.lasso import Lasso
from pocketsize.pruning.layerwise import Layerwise
from pocketsize.pruning.proximal import Proximal

METHODS = {
  'lasso': Lasso(),
  'ista': Ista(step=0.5, iterations=30, rate=0.01, regression_steps=60),
  'proximal': Proximal(first=1e-3, iterations=60),
}


def batches(count=2, size=6, seed=0):
  return list(np.random.default_rng(seed).normal(size=(count, size, 8, 8, 3)).astype('float32'))


def course(net, trunk='shared', method='lasso', ratio=0.5, data=None, points=None, **options):
  """Returns a `Layerwise` with all units but those that read the images at `ratio`."""
  model = prunable.NETS[net]()
  found, _ = units_module.units(ChannelGraph(model), trunk)
  images = {'a', 'stem'} if trunk == 'sampler' else set()
  ratios = {unit.name: ratio for unit in found if unit.name not in images}
  counts = units_module.counts(found, ratios)
  return Layerwise(
    model,
    found,
    counts,
    METHODS.get(method, method),
    batches() if data is None else data,
    points=points,
    **options,
  )


def finished(*arguments, **options):
  made = course(*arguments, **options)
  for step in made.steps:
    made.do(step)
  return made


@functools.cache
def pruned(net, trunk, method):
  """Returns a finished course; tests only look at it."""
  return finished(net, trunk, method)


COMBINATIONS = [
  *((net, trunk, 'lasso') for net in prunable.NETS for trunk in units_module.TRUNKS),
  *(('projection', trunk, 'ista') for trunk in units_module.TRUNKS),
  *(('dense_net', trunk, 'proximal') for trunk in units_module.TRUNKS),
]
everywhere = pytest.mark.parametrize(('net', 'trunk', 'method'), COMBINATIONS)


def x_of(seed=50):
  return batches(1, 5, seed)[0]


@everywhere
def test_counts_are_exact_and_kernels_zero_where_nothing_is_selected(net, trunk, method):
  made = pruned(net, trunk, method)
  for unit in made._units:
    for path, places in unit.readers.items():
      chosen = np.zeros(unit.size, bool)
      inside = places >= 0
      chosen[places[inside]] = made.selected[path][inside]
      reached = len(set(places[inside].tolist()))
      if reached == unit.size:
        assert chosen.sum() == made._counts[unit.name]
  for path, layer in Graph(made.model).layers.items():
    if path in made.selected:
      kernel = np.array(layer.kernel)
      assert not kernel[..., ~made.selected[path], :].any()
      read = np.abs(kernel[..., made.selected[path], :]).reshape(-1, made.selected[path].sum(), 1)
      assert read.any()
    else:
      for weight, original in zip(
        layer.weights, Graph(made.original).layers[path].weights, strict=True
      ):
        if not hasattr(layer, 'kernel'):
          np.testing.assert_array_equal(weight, original)


@everywhere
def test_readers_of_a_unit_select_alike(net, trunk, method):
  made = pruned(net, trunk, method)
  for unit in made._units:
    found = {}
    for path, places in unit.readers.items():
      for place, chosen in zip(places, made.selected[path], strict=True):
        if place >= 0:
          assert found.setdefault(int(place), bool(chosen)) == chosen


@everywhere
def test_the_smaller_model_computes_the_same(net, trunk, method):
  made = pruned(net, trunk, method)
  smaller = made.shrunk()
  expected = np.array(made.model(x_of()))
  np.testing.assert_allclose(smaller(x_of()), expected, rtol=1e-4, atol=1e-5 * np.ptp(expected))
  assert smaller.count_params() < made.original.count_params()
  assert np.abs(expected - np.array(made.original(x_of()))).max() > 1e-3


def takes(model):
  return [node.path for node in Graph(model).nodes if type(node.operation).__name__ == 'Take']


@pytest.mark.parametrize(
  ('net', 'expected'), [('chain', 0), ('projection', 2), ('dense_net', 3), ('mobile', 0)]
)
def test_samplers_stand_where_others_read_more(net, expected):
  """At most one in front of a convolution, none where all that is left is read, none if shared."""
  made = pruned(net, 'sampler', 'lasso')
  smaller = made.shrunk()
  channels = units_module.remaining(ChannelGraph(made.model), made.selected)
  assert len(takes(smaller)) >= min(expected, 1)
  assert len(takes(smaller)) <= len(made.selected)
  assert bool(expected) == bool(takes(smaller))
  assert takes(pruned(net, 'shared', 'lasso').shrunk()) == []
  for path, layer in Graph(smaller).layers.items():
    if path in made.selected:
      assert layer.kernel.shape[-2] == made.selected[path].sum()
  if net == 'projection':
    union = made.selected['one1'] | made.selected['two1'] | made.selected['shortcut']
    np.testing.assert_array_equal(channels['stem'], union)
    assert smaller.get_layer('stem').filters == union.sum()


def test_a_saved_model_with_samplers_is_the_same(tmp_path):
  smaller = pruned('projection', 'sampler', 'lasso').shrunk()
  smaller.save(tmp_path / 'model.keras')
  loaded = keras.models.load_model(tmp_path / 'model.keras')
  np.testing.assert_array_equal(loaded(x_of()), smaller(x_of()))


@pytest.mark.parametrize('net', ['projection', 'pad', 'dense_net'])
def test_files_of_a_model_with_samplers_agree(net, tmp_path):
  smaller = pruned(net, 'sampler', 'lasso').shrunk()
  assert takes(smaller)
  expected = np.array(smaller(x_of()))
  for file in conversion.export(smaller, tmp_path, ['tflite', 'onnx', 'openvino']):
    (got,) = conversion.open_file(file.path)(x_of())
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4 * np.ptp(expected))


def test_int8_files_of_a_model_with_samplers_agree(tmp_path):
  """A sampler only moves values: no quantizer of its own, and integers throughout."""
  smaller = pruned('projection', 'sampler', 'lasso').shrunk()
  entries = [{'algorithm': 'uniform', 'weight_bits': 8, 'activation_bits': 8}]
  model, _ = pocketsize.compress(smaller, entries, calibration=batches(4))
  names = takes(smaller)
  assert names and not {place.path for place in model.placements} & set(names)
  expected = np.array(model(x_of()))
  for file in conversion.export(model, tmp_path, ['tflite_int8', 'onnx_qdq', 'openvino_int8']):
    (got,) = conversion.open_file(file.path)(x_of())
    assert np.abs(got - expected).max() < 0.05 * np.ptp(expected)
    assert count_ops(file.path)[1] == 0


def zeroed_only(made):
  """Returns {path: relative error} of the kernels of the original, zeroed where not selected."""

  class Zeroing:
    """Selects what was selected, and reconstructs nothing."""

    def __init__(self):
      self.errors = {}

    def reconstruct(self, problem, rows):
      return np.where(rows[:, None], problem.kernel, 0.0)

  other = Layerwise(made.original, made._units, made._counts, Zeroing(), made._batches, points=None)
  for unit in made._units:
    other._chosen[unit.name].assign(made._chosen[unit.name])
  other._choose = lambda unit, problems: None
  for step in other.steps:
    other.do(step)
  return other


def output_error(made, data):
  one = np.concatenate([np.array(made.model(x)) for x in data])
  other = np.concatenate([np.array(made.original(x)) for x in data])
  return np.square(one - other).sum() / np.square(other - other.mean(axis=0)).sum()


@pytest.mark.parametrize('net', prunable.NETS)
@pytest.mark.parametrize('method', METHODS)
def test_reconstruction_is_better_than_zeros(net, method):
  made = pruned(net, 'shared', method)
  plain = zeroed_only(made)
  assert made.errors.keys() == plain.errors.keys()
  assert sum(made.errors.values()) < sum(plain.errors.values())
  assert output_error(made, batches()) < output_error(plain, batches())


def test_the_first_pruned_layer_is_the_least_squares_of_keras_outputs():
  """Explicitly, from the layers' own outputs: no other kernel on these inputs is better."""
  made = pruned('chain', 'shared', 'lasso')
  layer, data = made.original.get_layer('b'), np.concatenate(batches())
  read = keras.Model(made.original.input, layer.input)(data)
  target = np.array(layer(read)).reshape(-1, 10)
  chosen = made.selected['b']
  pruned_layer = made.model.get_layer('b')
  got = np.array(pruned_layer(read)).reshape(-1, 10)
  x = np.stack(
    [
      np.array(keras.ops.conv(read[..., channel : channel + 1], basis, 2, 'same')).ravel()
      for channel in np.flatnonzero(chosen)
      for basis in np.eye(9, dtype='float32').reshape(9, 3, 3, 1, 1)
    ],
    axis=1,
  )
  best = x @ np.linalg.lstsq(x, target, rcond=None)[0]
  least = np.square(best - target).sum() / np.square(target).sum()
  assert np.square(got - target).sum() / np.square(target).sum() == pytest.approx(least, rel=0.02)
  assert made.errors['b'] == pytest.approx(least, rel=0.02)


def test_the_lasso_chooses_better_than_magnitude():
  """In sum over nets and layers, each layer on its own original inputs."""
  data, sums = np.concatenate(batches(4)), {}
  for net in ('chain', 'projection', 'dense_net', 'mobile'):
    model = prunable.NETS[net]()
    graph = Graph(model)
    found, _ = units_module.units(ChannelGraph(model), 'sampler')
    for unit in found[1:]:
      layer = graph.layers[unit.name]
      read = keras.Model(model.input, layer.input)(data)
      problem = Problem(layer)
      problem.add(np.array(read), np.array(read), None)
      for name, method in (('lasso', Lasso()), ('magnitude', Lasso(lasso=False))):
        place = list(unit.readers.values())
        chosen = method.select([problem], place, unit.size, unit.size // 2)
        kernel = method.reconstruct(problem, problem.rows_of(chosen))
        sums[name] = sums.get(name, 0.0) + problem.error(kernel) / problem.energy
  assert sums['lasso'] < 0.95 * sums['magnitude']


@pytest.mark.parametrize('net', ['projection', 'pad', 'nested'])
def test_compensation_makes_the_blocks_error_smaller(monkeypatch, net):
  """The error behind the last addition, with it and without; every trunk has one already."""
  data = batches(8, 16)

  def error():
    model = prunable.NETS[net]()
    found, _ = units_module.units(ChannelGraph(model), 'sampler')
    # Of the images, so that the trunk errs from the start.
    counts = {unit.name: 2 if unit.name == 'stem' else unit.size for unit in found}
    made = Layerwise(model, found, counts, Lasso(), data, points=None)
    for step in made.steps:
      made.do(step)
    graphs = [Graph(made.original), Graph(made.model)]
    add = [node for node in graphs[0].nodes if type(node.operation).__name__ == 'Add'][-1]
    one, other = (_value(graph, add.outputs[0], np.concatenate(data)) for graph in graphs)
    return np.square(one - other).sum() / np.square(one).sum()

  compensated = error()
  monkeypatch.setattr(Layerwise, '_past', lambda self, node: None)
  # Little, as the images are noise; exactly what is lost is taken up below.
  assert compensated < 0.999 * error()


def _value(graph, tensor, x):
  values = {}

  def call(node, args, kwargs):
    out = args[0] if node.is_input else node.operation(*args, **kwargs)
    values.update(zip(node.outputs, keras.tree.flatten(out), strict=True))
    return out

  graph.run([x], call, training=False)
  return np.array(values[tensor])


@pytest.mark.parametrize('norms', [(), ('branch',), ('trunk',), ('trunk', 'branch')])
def test_compensation_takes_up_an_error_that_it_can_remove(norms):
  """A branch with an invertible 1x1 convolution makes up for all that the other branch lost.

  Through the normalizations of both: Keras computes them behind both convolutions.
  """
  inputs = keras.Input((5, 4, 6))
  summands = []
  for name in ('trunk', 'branch'):
    x = keras.layers.Conv2D(6, 1, name=name)(inputs)
    summands.append(keras.layers.BatchNormalization()(x) if name in norms else x)
  model = randomized(keras.Model(inputs, keras.layers.Add(name='add')(summands)))
  found, _ = units_module.units(ChannelGraph(model), 'sampler')
  first, second = (unit.name for unit in found)
  data = list(np.random.default_rng(1).normal(size=(2, 8, 5, 4, 6)).astype('float32'))
  made = Layerwise(model, found, {first: 3, second: 6}, Lasso(ridge=1e-9), data, points=None)
  assert made.steps == ['survey', first, second]
  for step in made.steps:
    made.do(step)
  assert made.errors[first] > 0.05
  expected = np.array(model(data[0]))
  np.testing.assert_allclose(made.model(data[0]), expected, atol=1e-3 * np.abs(expected).max())


def test_what_is_still_to_be_pruned_is_not_made_up_for():
  """Of two branches with projections the one that is pruned last compensates."""
  made = course('projection')
  last = [step for step in made.steps if step in ('two2', 'shortcut')]
  past = [made._past(made._original.nodes[made._sampling.index[step]]) for step in last]
  assert past[0] is None
  graph = made._original
  assert graph.producer(past[1][0]).path == f'{last[0]}_bn'
  assert [graph.nodes[position].path for position in past[1][1]] == [f'{last[0]}_bn']


def test_channels_that_a_normalization_makes_tiny_make_up_for_nothing():
  made = course('nested')
  layer = made._original.layers['body/b_bn']
  gamma = np.array(layer.gamma)
  gamma[2] = 1e-6
  layer.gamma.assign(gamma)
  _, _, scale = made._past(made._original.nodes[made._sampling.index['body/b']])
  expected = np.sqrt(np.array(layer.moving_variance) + layer.epsilon) / gamma
  np.testing.assert_allclose(scale, np.where(np.arange(6) == 2, 0.0, expected), rtol=1e-5)


def test_nothing_is_compensated_behind_a_nonlinearity():
  inputs = keras.Input((4, 4, 6))
  trunk = keras.layers.Conv2D(6, 1, name='trunk')(inputs)
  x = keras.layers.Conv2D(6, 1, activation='relu', name='branch')(inputs)
  model = keras.Model(inputs, keras.layers.Add()([trunk, x]))
  made = Layerwise(model, [], {}, Lasso(), [])
  assert made._past(made._original.nodes[made._sampling.index['branch']]) is None


def state(made):
  return [np.array(variable) for variable in made.variables]


def assert_same_bits(one, other):
  for left, right in zip(one, other, strict=True):
    np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize('trunk', ['shared', 'sampler'])
@pytest.mark.parametrize('method', METHODS)
def test_a_course_goes_on_after_any_step_with_the_same_bits(trunk, method):
  whole, again, rest = (course('projection', trunk, method, points=3, seed=4) for _ in range(3))
  states = []
  for step in whole.steps:
    whole.do(step)
    states.append(state(whole))

  def assert_goes_on(made, done, until):
    for variable, value in zip(made.variables, states[done - 1], strict=True):
      variable.assign(value)
    for step in made.steps[done:until]:
      made.do(step)
    assert_same_bits(state(made), states[until - 1])

  assert_goes_on(rest, len(whole.steps) // 2, len(whole.steps))
  # Backwards, so that nothing but the variables is of the steps before.
  for done in reversed(range(1, len(whole.steps))):
    again.restart()
    assert_goes_on(again, done, done + 1)


@pytest.mark.parametrize('memory', [0, 30000])
def test_memory_changes_no_bit(memory):
  whole = pruned('projection', 'shared', 'lasso')
  assert_same_bits(state(finished('projection', memory=memory)), state(whole))


def test_the_seed_places_the_samples():
  one, same, other = (finished('chain', points=2, seed=seed) for seed in (0, 0, 1))
  assert_same_bits(state(one), state(same))
  assert any((a != b).any() for a, b in zip(state(one), state(other), strict=True))


def test_places_differ_by_layer_batch_and_image():
  made = course('chain', points=4)._sampling
  shape = (6, 8, 8, 8)
  found = [made.places(path, shape, number) for path in ('b', 'c') for number in (0, 1)]
  assert all(each.shape == (6, 4) for each in found)
  assert len({each.tobytes() for each in found}) == 4 and (found[0][0] != found[0][1]).any()
  # 16 positions behind the stride; where there are no more than that, all are taken.
  assert found[0].max() < 16
  assert course('chain', points=16)._sampling.places('b', shape, 0) is None


class Workers:
  """Two threads whose sums meet, in the order in which they ask."""

  def __init__(self):
    self.barrier = threading.Barrier(2, timeout=60)
    self.parts = [None, None]
    self.shapes = [[], []]

  def total(self, rank):
    def add(array):
      array = np.asarray(array)
      self.shapes[rank].append(array.shape)
      self.parts[rank] = array
      self.barrier.wait()
      found = self.parts[0] + self.parts[1]
      self.barrier.wait()
      return found

    return add


@pytest.mark.parametrize('net', ['projection', 'dense_net'])
@pytest.mark.parametrize('method', METHODS)
def test_two_workers_choose_what_one_chooses(net, method):
  data = batches(4)
  alone = finished(net, 'shared', method, data=data)
  workers, made = Workers(), [None, None]

  def work(rank):
    made[rank] = finished(net, 'shared', method, data=data[rank::2], total=workers.total(rank))

  threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert_same_bits(state(made[0]), state(made[1]))
  for path, chosen in alone.selected.items():
    np.testing.assert_array_equal(made[0].selected[path], chosen)
  for one, other in zip(state(alone), state(made[0]), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-2, atol=1e-3)


def test_workers_sum_the_survey_in_the_order_of_the_units():
  """Sums of processes meet in the order of the calls; that of a set of words is each one's own."""
  for net in ('dense_net', 'projection'):
    order = []
    made = course(net, total=lambda array, order=order: order.append(np.shape(array)) or array)
    made.do('survey')
    joint = [unit for unit in made._units if len(unit.readers) > 1]
    paths = list(dict.fromkeys(path for unit in joint for path in unit.readers))
    problems = [Problem(made._original.layers[path]) for path in paths]
    expected = [
      shape for each in problems for shape in (each.gram.shape, each.moments.shape, (), ())
    ]
    assert order == expected


def test_a_ratio_of_zero_changes_nothing():
  made = finished('projection', ratio=0.0)
  assert_same_bits(made.model.get_weights(), made.original.get_weights())
  assert made.errors == {}
  smaller = made.shrunk()
  assert smaller.count_params() == made.original.count_params()


def test_layers_before_the_first_pruned_one_stay_and_those_behind_are_refitted():
  model = prunable.chain()
  found, _ = units_module.units(ChannelGraph(model))
  made = Layerwise(model, found, {**{u.name: u.size for u in found}, 'b': 5}, Lasso(), batches())
  for step in made.steps:
    made.do(step)
  assert list(made.errors) == ['c', 'hidden', 'head']
  np.testing.assert_array_equal(made.model.get_layer('b').kernel, model.get_layer('b').kernel)
  assert (np.array(made.model.get_layer('c').kernel) != np.array(model.get_layer('c').kernel)).any()


def test_masks_keep_the_zeros_of_every_pruned_kernel():
  made = pruned('chain', 'shared', 'lasso')
  placements = made.masks()
  assert {place.path for place in placements} == {'b', 'c', 'hidden', 'head'}
  for path, point, transform in placements:
    layer = Graph(made.model).layers[path]
    assert point == 'kernel'
    noise = np.ones(layer.kernel.shape, 'float32')
    kept = np.array(transform(noise))
    for channel, chosen in enumerate(made.selected[path]):
      assert (kept[..., channel, :] == float(chosen)).all()


def test_what_was_trained_in_between_is_read_after_a_restart():
  made = course('chain')
  made.do('survey')
  made.do('b')
  bias = made.model.get_layer('b_bn').beta
  bias.assign(np.full(bias.shape, 3.0))
  made.restart()
  made.do('c')
  node = made._current.nodes[made._sampling.index['c']]
  read = _value(made._current, node.inputs[0], np.concatenate(batches()))
  original = _value(made._original, node.inputs[0], np.concatenate(batches()))
  problem = Problem(made._original.layers['c'])
  problem.add(read, original, None)
  kernel = np.array(made.model.get_layer('c').kernel, np.float64).reshape(problem.kernel.shape)
  assert made.errors['c'] == pytest.approx(problem.error(kernel) / problem.energy, rel=1e-3)


def test_after_a_training_in_between_what_is_left_follows_the_trained_model():
  """Layer c doubled by it: its reconstruction is twice that of the untrained one."""
  kernels = []
  for factor in (1.0, 2.0):
    made = course('chain')
    made.do('survey')
    made.do('b')
    kernel = made.model.get_layer('c').kernel
    kernel.assign(factor * np.array(kernel))
    made.rebase()
    made.do('c')
    kernels.append(np.array(kernel))
  np.testing.assert_allclose(kernels[1], 2.0 * kernels[0], rtol=1e-4, atol=1e-5)


def test_the_original_model_is_not_touched():
  model = prunable.chain()
  before = model.get_weights()
  found, _ = units_module.units(ChannelGraph(model))
  made = Layerwise(model, found, units_module.counts(found, 0.5), Lasso(), batches())
  for step in made.steps:
    made.do(step)
  assert_same_bits(model.get_weights(), before)
