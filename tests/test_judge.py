"""What choices are judged by: the net's figures, and the divergence from a teacher, by hand."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from evaluators.classification import Classification
from learners.judge import Judge
from pocketsize.distillation import Distillation, DistillationConfig
from pocketsize.instrument import instrument

LN3 = math.log(3.0)
# The student says 1/2, 1/2; the teacher, at temperature 2, 1/4, 3/4: T^2 sum p ln(p / q), twice.
DIVERGENCE = 2.0 * 4.0 * (0.25 * math.log(0.5) + 0.75 * math.log(1.5))


class Helper:
  """A net of two classes."""

  def loss(self, y, outputs):
    return tf.reduce_mean(
      keras.losses.sparse_categorical_crossentropy(y, outputs, from_logits=True)
    )

  def evaluator(self):
    return Classification()


def teacher(weight=2.0):
  """Says 0 and 2 ln 3 times what comes in."""
  inputs = keras.Input((1,))
  model = keras.Model(inputs, keras.layers.Dense(2, use_bias=False, name='logits')(inputs))
  model.get_layer('logits').kernel.assign([[0.0, 2 * LN3]])
  return Distillation(instrument(model), DistillationConfig(weight, 2.0))


def batches():
  """Of three images and of one, which the teacher sees at 1 and at 0."""
  return [
    (np.ones((3, 1), np.float32), np.array([1, 1, 1])),
    (np.zeros((1, 1), np.float32), np.array([0])),
  ]


def test_without_a_teacher_it_is_the_net_itself():
  for judge in (Judge(Helper()), Judge(Helper(), teacher(weight=0.0))):
    given = batches()
    assert judge.marked(given) is given
    assert isinstance(judge.evaluator(), Classification)
    even = tf.zeros((1, 2))
    assert float(judge.loss(np.array([1]), even)) == pytest.approx(math.log(2.0))


def test_the_loss_is_that_of_the_training_beyond_its_least():
  judge = Judge(Helper(), teacher())
  (x, y), _ = judge.marked(batches())
  np.testing.assert_array_equal(y[0], [1, 1, 1])
  np.testing.assert_allclose(y[1], 3 * [[0.0, 2 * LN3]], rtol=1e-6)
  assert float(judge.loss(y, tf.zeros((3, 2)))) == pytest.approx(
    math.log(2.0) + DIVERGENCE, rel=1e-5
  )
  # The teacher's own outputs have the net's loss alone: -ln(9 / 10).
  assert float(judge.loss(y, tf.constant(y[1]))) == pytest.approx(math.log(10 / 9), rel=1e-4)


def test_figures_are_the_nets_and_every_image_counts_the_same():
  """The second batch, of one, has no divergence: the first one's counts three quarters."""
  judge = Judge(Helper(), teacher())
  evaluator = judge.evaluator()
  for _ in range(2):
    evaluator.reset()
    for x, y in judge.marked(batches()):
      evaluator.update(y, np.zeros((len(x), 2), np.float32))
    figures = evaluator.result()
    assert list(figures) == ['accuracy', 'loss']
    assert figures['accuracy'] == 0.25
    assert figures['loss'] == pytest.approx(math.log(2.0) + DIVERGENCE * 3 / 4, rel=1e-5)
