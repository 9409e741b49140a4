"""Scores of kernels, and inference with batch norms folded in."""

import keras
import numpy as np
import pytest
from keras import layers

from evaluators.classification import Classification
from pocketsize import calibration, targets
from pocketsize.allocation.scoring import Scorer
from pocketsize.copies import copied
from pocketsize.graph import Graph
from pocketsize.inference import Inference
from pocketsize.instrument import instrument
from tests import toys


def randomized(model, seed=0):
  """Gives all weights of a model random values, variances positive ones."""
  rng = np.random.default_rng(seed)
  for weight in model.weights:
    if weight.path.endswith(('gamma', 'variance')):
      weight.assign(rng.uniform(0.5, 1.5, weight.shape))
    else:
      weight.assign(rng.normal(scale=0.5, size=weight.shape))
  return model


def data():
  """Batches of 5, 5 and 3 images with labels."""
  x, y = toys.images(13), np.random.default_rng(1).integers(0, 4, 13)
  return [(x[start : start + 5], y[start : start + 5]) for start in (0, 5, 10)]


def slow_score(model, kernels):
  """The figures of a model with kernels {path: {point: array}} assigned to it."""
  for path, points in kernels.items():
    for point, kernel in points.items():
      getattr(Graph(model).layers[path], point).assign(kernel)
  evaluator = Classification()
  for x, y in data():
    evaluator.update(y, np.asarray(model(x, training=False)))
  return evaluator.result()


def kernels_of(model, *paths, seed=2):
  rng = np.random.default_rng(seed)
  shapes = {path: Graph(model).layers[path].kernel.shape for path in paths}
  return {path: {'kernel': rng.normal(size=shape)} for path, shape in shapes.items()}


@pytest.mark.parametrize('make', [toys.conv_net, toys.nested_net, toys.sequential_net])
def test_a_score_is_that_of_the_model_with_the_kernels_assigned(make):
  model = randomized(make())
  first, *_, last = targets.weighted_layers(Graph(model))
  before = [np.array(weight) for weight in model.weights]
  scorer = Scorer(model, data(), Classification())
  # The third has nothing of the second, and the fourth nothing of any.
  for chosen in ({}, kernels_of(model, first, last), kernels_of(model, last, seed=3), {}):
    expected = slow_score(copied(model), chosen)
    assert scorer.score(chosen) == pytest.approx(expected, rel=1e-4)
  for weight, value in zip(model.weights, before, strict=True):
    np.testing.assert_array_equal(weight, value)


def test_all_batches_and_kernels_share_one_compiled_function():
  model = toys.conv_net()
  scorer = Scorer(model, data(), Classification())
  for seed in range(3):
    scorer.score(kernels_of(model, 'conv0', seed=seed))
  assert scorer._inference._compiled.experimental_get_tracing_count() == 1


def test_statistics_of_batch_norm_are_estimated_for_a_score_and_put_back():
  model = randomized(toys.conv_net())
  batches = [toys.images(6, seed=7), toys.images(6, seed=8)]
  chosen = kernels_of(model, 'conv0')
  slow = copied(model)
  slow.get_layer('conv0').kernel.assign(chosen['conv0']['kernel'])
  calibration.re_estimate_batch_norm(instrument(slow), batches)
  expected = slow_score(slow, {})
  scorer = Scorer(model, data(), Classification(), bn_batches=batches)
  assert scorer.score(chosen) == pytest.approx(expected, rel=1e-4)
  norm = scorer._model.get_layer('bn1')
  np.testing.assert_array_equal(norm.moving_mean, model.get_layer('bn1').moving_mean)
  np.testing.assert_array_equal(norm.moving_variance, model.get_layer('bn1').moving_variance)
  scorer.score({})
  assert scorer.score(chosen) == pytest.approx(expected, rel=1e-4)
  plain = Scorer(model, data(), Classification()).score(chosen)
  assert abs(plain['loss'] - expected['loss']) > 1e-2


def test_a_model_without_batch_norm_never_sees_the_images_for_its_statistics(monkeypatch):
  model = keras.Sequential([keras.Input((8, 8, 3)), layers.Flatten(), layers.Dense(4)])
  monkeypatch.setattr(
    calibration, 'batch_statistics', lambda model, batch: pytest.fail('a forward pass for nothing')
  )
  scorer = Scorer(model, data(), Classification(), bn_batches=[toys.images(6)])
  assert scorer.score({}) == pytest.approx(slow_score(model, {}), rel=1e-4)


def many_layers():
  """Every linear layer type with a batch norm behind it, with and without bias, scale and centre;
  one that does not fold; one layer called twice, one of another dtype.
  """
  x = inputs = keras.Input((8, 8, 3), name='images')
  x = layers.Conv2D(4, 3, use_bias=False)(x)
  x = layers.BatchNormalization(scale=False)(x)
  x = layers.DepthwiseConv2D(3, depth_multiplier=2)(layers.ReLU()(x))
  x = layers.BatchNormalization(center=False)(x)
  x = layers.SeparableConv2D(4, 3, use_bias=False)(x)
  x = layers.BatchNormalization()(x)
  x = layers.Conv2DTranspose(4, 3)(x)
  x = layers.BatchNormalization()(x)
  twice, norm = layers.Conv2D(4, 1), layers.BatchNormalization()
  x = norm(twice(norm(twice(x))))
  x = layers.Conv2D(4, 1, activation='relu')(x)
  x = layers.BatchNormalization()(x)
  x = layers.Conv2D(4, 3, dtype='mixed_bfloat16')(x)
  x = layers.BatchNormalization(dtype='mixed_bfloat16')(x)
  x = layers.Dense(4)(layers.GlobalAveragePooling2D(dtype='float32')(x))
  return keras.Model(inputs, {'logits': layers.BatchNormalization()(x), 'more': x})


def test_inference_is_that_of_the_model():
  model, x = randomized(many_layers()), toys.images(3)
  inference = Inference(model)
  assert len(inference._gone) == 6
  expected = model(x, training=False)
  for found in (inference(x), inference.compiled(x)):
    for name in ('logits', 'more'):
      np.testing.assert_allclose(found[name], expected[name], rtol=2e-2, atol=2e-2)
  randomized(model, seed=3)
  expected, found = model(x, training=False), inference.compiled(x)
  np.testing.assert_allclose(found['logits'], expected['logits'], rtol=2e-2, atol=2e-2)
