"""Distillation: the loss by hand, and what T^2 is for."""

import math

import numpy as np
import pytest
import tensorflow as tf
from toys import conv_net, images, labels

from pocketsize.compressor import Stack, Stage
from pocketsize.configure import attach
from pocketsize.distillation import Distillation, DistillationConfig, distillation_loss
from pocketsize.errors import UserError


def test_the_loss_by_hand():
  """T = 2, teacher (0, 2 ln 3): targets 1/4, 3/4; student (0, 0): T^2 ln 2 = 4 ln 2."""
  teacher, student = tf.constant([[0.0, 2 * math.log(3)]]), tf.constant([[0.0, 0.0]])
  assert float(distillation_loss(student, teacher, 2.0)) == pytest.approx(4 * math.log(2), rel=1e-6)


def test_the_student_is_softened_too():
  """Student (0, 2 ln 3) at T = 2 is (1/4, 3/4): -(1/4 ln 1/4 + 3/4 ln 3/4) * 4."""
  logits = tf.constant([[0.0, 2 * math.log(3)]])
  entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
  assert float(distillation_loss(logits, logits, 2.0)) == pytest.approx(4 * entropy, rel=1e-6)


def test_the_loss_is_a_mean_over_the_batch():
  teacher, student = tf.random.normal((3, 4), seed=1), tf.random.normal((3, 4), seed=2)
  each = [float(distillation_loss(student[i : i + 1], teacher[i : i + 1], 3.0)) for i in range(3)]
  assert float(distillation_loss(student, teacher, 3.0)) == pytest.approx(np.mean(each), rel=1e-5)


def test_the_gradient_does_not_depend_on_a_large_temperature():
  """In the limit (student - teacher) / classes, for logits of mean zero (section 2)."""
  teacher = tf.constant([[1.0, -2.0, 0.5, 0.5]])
  student = tf.Variable([[0.5, 0.5, -2.0, 1.0]])
  for temperature in (50.0, 200.0):
    with tf.GradientTape() as tape:
      loss = distillation_loss(student, teacher, temperature)
    # The next term is of order logits / T: 2 / 50.
    np.testing.assert_allclose(tape.gradient(loss, student), (student - teacher) / 4, atol=0.04)


def test_the_weight_multiplies_and_the_teacher_gets_no_gradient():
  teacher, student = conv_net('teacher'), conv_net('student')
  student.get_layer('head').bias.assign([1.0, 0, 0, -1])
  x = images()

  def loss(weight):
    return Distillation(teacher, DistillationConfig(weight, 2.0)).loss(x, None, student(x))

  assert float(loss(3.0)) == pytest.approx(3 * float(loss(1.0)), rel=1e-6)
  with tf.GradientTape() as tape:
    value = loss(1.0)
  gradients = tape.gradient(value, [variable.value for variable in teacher.trainable_variables])
  assert all(gradient is None for gradient in gradients)


def test_the_teacher_runs_in_inference_mode():
  teacher = conv_net('teacher')
  before = np.array(teacher.get_layer('bn0').moving_mean)
  Distillation(teacher).loss(images(), None, tf.zeros((8, 4)))
  np.testing.assert_array_equal(teacher.get_layer('bn0').moving_mean, before)


def test_logits_are_taken_out_of_the_outputs_of_both():
  class Teacher:
    def __call__(self, x, training):
      return {'logits': tf.constant([[0.0, 0.0]])}

  loss = Distillation(
    Teacher(), DistillationConfig(1.0, 1.0), logits=lambda outputs: outputs['logits']
  )
  assert float(loss.loss(None, None, {'logits': tf.constant([[0.0, 0.0]])})) == pytest.approx(
    math.log(2), rel=1e-6
  )


def test_fit_adds_it_in_training_and_not_in_evaluation():
  """Loss 0 for the task: what remains is the distillation, which does not count in evaluate."""
  teacher = conv_net('teacher')
  stack = Stack([Distillation(teacher, DistillationConfig(1.0, 1.0))])
  model = attach(conv_net('student'), stack)
  model.compile('sgd', loss=lambda y, outputs: 0.0 * tf.reduce_sum(outputs, axis=-1))
  trained = model.train_on_batch(images(), labels())
  assert float(np.ravel(trained)[0]) > 0.5
  assert float(np.ravel(model.test_on_batch(images(), labels()))[0]) == 0.0
  assert stack.stage(0) is Stage.FULL


@pytest.mark.parametrize('bad', [(-1.0, 4.0), (1.0, 0.0), (1.0, -2.0)])
def test_nonsense_is_refused(bad):
  with pytest.raises(
    UserError, match=r'`weight` at least 0 and `temperature` above 0\. Received: '
  ):
    DistillationConfig(*bad)
