"""Roll-outs that train: their score follows from the choice alone, whoever computes it."""

import types

import keras
import numpy as np
import pytest
import tensorflow as tf

from evaluators.classification import Classification
from learners.judge import Judge
from learners.phases import Phases
from learners.roll_outs import Tuning
from pocketsize.distillation import Distillation, DistillationConfig
from pocketsize.quantization.uniform import Uniform, UniformConfig
from pocketsize.targets import Rule


def net(rate):
  keras.utils.set_random_seed(5)
  return keras.Sequential(
    [
      keras.Input((8,)),
      keras.layers.Dense(32, activation='relu', name='first'),
      keras.layers.Dropout(rate),
      keras.layers.Dense(3, name='last'),
    ]
  )


def batch(seed):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(16, 8)).astype('float32'), rng.integers(0, 3, 16)


def learner(folder):
  """What a roll-out asks of a learner; it reads no file and has nobody to wait for."""
  return types.SimpleNamespace(
    run=types.SimpleNamespace(seed=3),
    folder=folder,
    helper=types.SimpleNamespace(
      evaluator=Classification,
      loss=lambda y, outputs: keras.ops.mean(
        keras.losses.sparse_categorical_crossentropy(y, outputs, from_logits=True)
      ),
    ),
    own_batches=lambda start: tf.data.Dataset.from_tensors(batch(start)).repeat(),
    calibrate=lambda model, batches: Phases.calibrate(None, model, batches),
  )


def tuned(folder, model, teacher=None):
  judge = Judge(learner(folder).helper, teacher)
  tuning = Tuning(
    lambda bits: [
      Uniform([Rule(UniformConfig(weight_bits=bits['first'], activation_bits=32))]),
    ],
    layerwise_steps=0,
    layerwise_rate=1e-3,
    global_steps=5,
    global_rate=1e-2,
    rate_flags='--rate',
  )
  return tuning.score(learner(folder), model, {'first': 4}, judge.marked([batch(77)]), judge)


def test_a_score_does_not_depend_on_what_was_drawn_before(tmp_path, deterministic):
  model = net(rate=0.5)
  first = tuned(tmp_path, model)
  keras.utils.set_random_seed(99)
  assert tuned(tmp_path, model) == first
  # Dropout is at work: without it the net is tuned to something else.
  plain = net(rate=0.0)
  plain.set_weights(model.get_weights())
  assert tuned(tmp_path, plain)['loss'] != pytest.approx(first['loss'], abs=1e-4)


@pytest.mark.parametrize('weights', [(2.0, 0.0), (0.0, 1.0)], ids=['logits', 'features'])
def test_one_teacher_serves_all_roll_outs(tmp_path, weights):
  """It is the judge's: a roll-out that read the teacher's file would wait for all workers."""
  weight, feature_weight = weights
  config = DistillationConfig(weight, feature_weight=feature_weight, feature_layers=('Dense',))
  teacher, model = Distillation(net(rate=0.0), config), net(rate=0.0)
  for layer in teacher.teacher.layers:
    layer.set_weights([2.0 * weight for weight in layer.get_weights()])
  alone = tuned(tmp_path, model)
  scores = [tuned(tmp_path, model, teacher) for _ in range(2)]
  assert scores[0] == pytest.approx(scores[1])
  assert scores[0]['loss'] != pytest.approx(alone['loss'], abs=1e-4)
