"""What every algorithm must do. An algorithm that `discover` finds is tested by existing.

It brings `Config.neutral()`, the configuration that changes nothing. An entry in BUSY makes it work
at more steps than the first; without one it runs with its defaults. An entry '<algorithm>:<words>'
is the same algorithm again in another configuration.
"""

import dataclasses
import functools
import math

import keras
import numpy as np
import pytest
from toys import MODELS, assert_resumes, compile_for_logits, fit, images, set_state, state

import pocketsize
from pocketsize import conversion
from pocketsize.compressor import discover
from pocketsize.configure import stack_from
from pocketsize.instrument import ACTIVATION_POINTS
from pocketsize.transform import Transform

ALGORITHMS = sorted(discover())
BUSY = {
  'binary': {'activations_begin_step': 3, 'weights_begin_step': 9, 'keep_ends': False},
  'filters': {
    'ratio': 0.6,
    'schedule': 'polynomial',
    'begin_step': 3,
    'end_step': 33,
    'update_every': 4,
    'prune_first_conv': True,
    'prune_downsample_convs': True,
  },
  'magnitude': {'ratio': 0.6, 'begin_step': 3, 'end_step': 33, 'update_every': 4},
  'non-uniform': {'weight_bits': 3, 'activation_bits': 6, 'refit_every': 7, 'momentum': 0.9},
  'uniform': {'weight_bits': 3, 'activation_bits': 6, 'scale_every': 7, 'momentum': 0.9},
  'uniform:learned': {
    'weight_bits': 3,
    'activation_bits': 6,
    'weight_range': 'learned',
    'activation_range': 'learned',
  },
  'uniform:onnxruntime': {
    'weight_bits': 3,
    'activation_bits': 6,
    'momentum': 0.9,
    'target_device': 'onnxruntime',
  },
  'uniform:dorefa-pact': {
    'weight_bits': 3,
    'activation_bits': 6,
    'weight_range': 'dorefa',
    'activation_range': 'pact',
    'momentum': 0.9,
  },
  'uniform:log2': {
    'weight_bits': 3,
    'activation_bits': 6,
    'weight_range': 'learned_log2',
    'activation_range': 'learned_log2',
  },
  'uniform:dorefa': {
    'weight_bits': 3,
    'activation_bits': 6,
    'weight_range': 'dorefa',
    'activation_range': 'dorefa',
    'momentum': 0.9,
  },
  'uniform:folded': {
    'weight_bits': 3,
    'activation_bits': 6,
    'granularity': 'tensor',
    'fold_batch_norm': True,
    'scale_every': 7,
    'momentum': 0.9,
  },
}
STEPS = 40

everywhere = pytest.mark.parametrize('toy', MODELS)
each_algorithm = pytest.mark.parametrize('name', ALGORITHMS)
each_configuration = pytest.mark.parametrize('name', sorted({*ALGORITHMS, *BUSY}))


def entries(name):
  return [{'algorithm': name.partition(':')[0], **BUSY.get(name, {})}]


def compressed(name, toy):
  model, stack = pocketsize.compress(MODELS[toy](), entries(name), calibration=[images(seed=77)])
  return compile_for_logits(model), stack


@functools.cache
def trained(name, toy):
  """Returns (model, stack) after `STEPS` steps; tests only look at it."""
  model, stack = compressed(name, toy)
  fit(model, stack, 0, STEPS)
  stack.update(STEPS)
  return model, stack


@functools.cache
def plain(toy):
  """Returns (outputs before, weights of the source after) three steps of an empty overlay."""
  model = compile_for_logits(pocketsize.instrument(MODELS[toy]()))
  outputs = np.array(model(images()))
  fit(model, pocketsize.Stack(), 0, 3)
  return outputs, [np.array(weight) for weight in model.source.weights]


@everywhere
@each_algorithm
def test_the_neutral_configuration_changes_nothing(name, toy):
  """Neither outputs nor three steps of training; 1e-4 as for an empty overlay."""
  neutral = dataclasses.asdict(discover()[name].Config.neutral())
  outputs, weights = plain(toy)
  model, stack = pocketsize.compress(
    MODELS[toy](), [{'algorithm': name, **neutral}], calibration=[images()]
  )
  np.testing.assert_array_equal(model(images()), outputs)
  fit(compile_for_logits(model), stack, 0, 3)
  for expected, got in zip(weights, model.source.weights, strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@each_configuration
def test_the_busy_configuration_changes_something(name):
  """Or the rest of the battery would test an empty overlay."""
  model, _ = trained(name, 'functional')
  assert np.abs(model(images()) - model.source(images())).max() > 1e-3


@everywhere
@each_configuration
def test_shapes_stay(name, toy):
  model, _ = trained(name, toy)
  assert model(images(5)).shape == model.source(images(5)).shape == (5, 4)
  for path, point, transform in model.placements:
    assert isinstance(transform, Transform)
    if point not in ACTIVATION_POINTS:
      assert model.baked(path, point).shape == tuple(getattr(model.graph.layers[path], point).shape)


@everywhere
@each_configuration
def test_save_and_load_are_equal(name, toy, tmp_path):
  model, stack = trained(name, toy)
  model.save(tmp_path / 'model.keras')
  loaded = keras.models.load_model(tmp_path / 'model.keras')
  np.testing.assert_array_equal(loaded(images()), model(images()))
  again = stack_from(entries(name))
  again.plan(loaded.graph)
  again.bind(loaded)
  again.update(STEPS + 1)
  assert again.statistics() == stack.statistics()
  assert loaded.stack is again


@pytest.mark.parametrize('toy', ['nested'])
@each_configuration
def test_twenty_and_twenty_steps_are_forty_bit_for_bit(name, toy, deterministic):
  assert_resumes(lambda: compressed(name, toy), STEPS, [STEPS // 2])


@pytest.mark.parametrize('name', sorted({*ALGORITHMS} & {*BUSY}))
def test_forgetting_the_step_is_noticed(name):
  """The test above is sharp: a resumed run that begins at step 0 again differs."""
  model, stack = compressed(name, 'functional')
  beginning = state(model)
  fit(model, stack, 0, 12)
  whole = [np.array(weight) for weight in model.weights]
  set_state(model, beginning)
  fit(model, stack, 0, 6)
  fit(model, stack, 6, 12, callback_step=0)
  assert any(
    np.abs(expected - weight).max() > 1e-6
    for expected, weight in zip(whole, model.weights, strict=True)
  )


@everywhere
@each_configuration
def test_strip_leaves_stock_layers_that_compute_the_same(name, toy):
  """Up to activation quantizers; fused and stock batch norm differ by rounding, 1e-5."""
  model, _ = trained(name, toy)
  stripped = pocketsize.strip(model)
  for layer in stripped._flatten_layers():
    assert type(layer).__module__.startswith('keras.')
  np.testing.assert_allclose(
    stripped(images()), model.run(images(), activate=lambda transform, x: x), rtol=1e-5, atol=1e-5
  )
  for path, point, _ in model.placements:
    if point not in ACTIVATION_POINTS:
      got = getattr(pocketsize.Graph(stripped).layers[path], point)
      np.testing.assert_array_equal(got, model.baked(path, point))


@everywhere
@each_configuration
def test_statistics_weights_and_outputs_are_finite(name, toy):
  model, stack = trained(name, toy)
  assert all(
    isinstance(value, float) and math.isfinite(value) for value in stack.statistics().values()
  )
  assert all(np.isfinite(weight).all() for weight in model.get_weights())
  assert np.isfinite(model(images())).all()
  assert stack.stage(STEPS) is pocketsize.Stage.FULL


@each_configuration
def test_the_exported_file_agrees(name, tmp_path):
  """Float formats hold the deployed kernels, and activations that are operations: 1e-4.

  An int8 file has finer activations than the 6 bits trained: four roundings to 64 levels move the
  output by less than a tenth of its range.
  """
  model, _ = trained(name, 'functional')
  x = images()
  deployed, expected = conversion.float_version(model)(x).numpy(), model(x).numpy()
  formats = [each for each in conversion.formats_for(model) if each.startswith('tflite')]
  files = conversion.export(model, tmp_path, formats)
  assert files[0].format == 'tflite'
  for file in files:
    (got,) = conversion.open_file(file.path)(x)
    if file.format == 'tflite':
      np.testing.assert_allclose(got, deployed, rtol=1e-4, atol=1e-4)
    else:
      assert np.abs(got - expected).max() < 0.1 * np.ptp(expected)


@each_configuration
def test_an_update_is_pure_in_the_step_and_the_weights(name):
  """Twice the same step gives what once gives."""
  model, stack = compressed(name, 'functional')
  for step in (0, 7, 21, 33):
    stack.update(step)
    once = [np.array(weight) for weight in model.weights]
    stack.update(step)
    for expected, got in zip(once, model.weights, strict=True):
      np.testing.assert_array_equal(got, expected)


@each_configuration
def test_a_plan_is_the_same_each_time(name):
  graph = pocketsize.Graph(MODELS['shared']())
  stack = stack_from(entries(name))
  plans = [
    [(place.path, place.point, type(place.transform)) for place in stack.plan(graph)]
    for _ in range(2)
  ]
  assert plans[0] == plans[1]
  assert len({place for place in plans[0]}) == len(plans[0]) > 0


@each_algorithm
def test_the_configuration_is_a_frozen_dataclass(name):
  config = discover()[name].Config
  assert dataclasses.is_dataclass(config) and config.__dataclass_params__.frozen
  assert isinstance(config.neutral(), config)
