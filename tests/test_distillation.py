"""Distillation: the losses by hand, what T^2 is for, and where features are compared."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from toys import compile_for_logits, conv_net, images, labels

from pocketsize.compressor import CompressionCallback, Stack, Stage
from pocketsize.configure import attach, stack_from
from pocketsize.distillation import (
  Distillation,
  DistillationConfig,
  distillation_loss,
  feature_loss,
)
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


def test_a_single_logit_is_that_of_two_classes():
  """Teacher 2 ln 3 at T = 2 is 3/4; and (0, z) is z."""
  zeros, logit = tf.zeros((1, 1)), tf.constant([[2 * math.log(3)]])
  assert float(distillation_loss(zeros, logit, 2.0)) == pytest.approx(4 * math.log(2), rel=1e-6)
  student, teacher = tf.random.normal((5, 1), seed=1), tf.random.normal((5, 1), seed=2)
  pairs = [tf.concat([tf.zeros((5, 1)), each], axis=1) for each in (student, teacher)]
  assert float(distillation_loss(student, teacher, 3.0)) == pytest.approx(
    float(distillation_loss(*pairs, 3.0)), rel=1e-5
  )


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


def two_outputs():
  inputs = keras.Input((4,))
  outputs = {name: layers.Dense(3, name=name)(inputs) for name in ('left', 'right')}
  return keras.Model(inputs, outputs)


def test_of_several_outputs_the_logits_must_be_told():
  for student, teacher in ((two_outputs(), two_outputs()), (conv_net(), two_outputs())):
    with pytest.raises(UserError, match=r'needs `logits=`.*Received: 2 outputs'):
      attach(student, Stack([Distillation(teacher)]))
  told = Distillation(two_outputs(), logits=lambda outputs: outputs['left'])
  model = attach(two_outputs(), Stack([told]))
  assert float(told.loss(tf.ones((2, 4)), None, model(tf.ones((2, 4))))) > 0.0


@pytest.mark.parametrize('feature_weight', [0.0, 1.0])
def test_a_teacher_that_is_the_student_is_refused_before_the_first_step(feature_weight):
  model = residual_net(5, seed=1)
  config = DistillationConfig(feature_weight=feature_weight)
  stack = Stack([Distillation(model, config)])
  student = compile_for_logits(attach(model, stack))
  with pytest.raises(UserError, match="give a copy .*Received: 'residual_net', which shares"):
    student.fit(images(), labels(), verbose=0, callbacks=[CompressionCallback(stack)])
  copy = keras.models.clone_model(model)
  copy.set_weights(model.get_weights())
  stack = Stack([Distillation(copy, config)])
  attach(model, stack)
  stack.update(0)


def test_the_model_itself_may_teach_where_only_centres_train():
  model = conv_net()
  centres = [{'algorithm': 'non-uniform', 'weight_bits': 2, 'mode': 'clusters'}]
  stack = Stack([*stack_from(centres).compressors, Distillation(model)])
  student = compile_for_logits(attach(model, stack))
  kernel = np.array(model.get_layer('conv0').kernel)
  student.fit(images(), labels(), verbose=0, callbacks=[CompressionCallback(stack)])
  assert stack.step == 1
  np.testing.assert_array_equal(model.get_layer('conv0').kernel, kernel)


def test_a_teacher_may_share_what_does_not_train():
  teacher = conv_net()
  teacher.trainable = False
  frozen = keras.Model(teacher.inputs, teacher.get_layer('pool').output)
  student = keras.Model(frozen.inputs, layers.Dense(4, name='new')(frozen.outputs[0]))
  stack = Stack([Distillation(teacher)])
  model = compile_for_logits(attach(student, stack))
  kernel = np.array(teacher.get_layer('conv0').kernel)
  model.fit(images(), labels(), verbose=0, callbacks=[CompressionCallback(stack)])
  assert stack.step == 1
  np.testing.assert_array_equal(teacher.get_layer('conv0').kernel, kernel)


def residual_net(inner, seed, trunk=4):
  """Two additions, 'one' of `trunk` channels and 'two' of 4; `inner` channels inside the first."""
  keras.utils.set_random_seed(seed)
  x = inputs = keras.Input((8, 8, 3), name='images')
  x = layers.Conv2D(trunk, 3, padding='same', name='stem')(x)
  y = layers.ReLU(name='relu')(layers.Conv2D(inner, 3, padding='same', name='inside')(x))
  x = layers.Add(name='one')([x, layers.Conv2D(trunk, 3, padding='same', name='back')(y)])
  x = layers.BatchNormalization(name='bn')(layers.Conv2D(4, 1, name='reduce')(x))
  x = layers.Add(name='two')([x, layers.Conv2D(4, 3, padding='same', name='last')(x)])
  x = layers.GlobalAveragePooling2D(name='pool')(x)
  return keras.Model(inputs, layers.Dense(4, name='head')(x), name='residual_net')


def test_the_feature_loss_by_hand():
  """Errors 1 and 2 against energies 4 and 16: (1 + 4) / (4 + 16)."""
  student, teacher = tf.constant([[3.0, 2.0]]), tf.constant([[2.0, 4.0]])
  assert float(feature_loss(student, teacher)) == pytest.approx(5 / 20, rel=1e-6)


def test_a_teacher_whose_feature_is_zero_teaches_nothing():
  assert float(feature_loss(tf.ones((2, 3)), tf.zeros((2, 3)))) == 0.0


@pytest.mark.parametrize(
  'trunk, channels, compared',
  [
    (4, {}, ('one', 'two')),
    (3, {}, ('two',)),  # which channel of 'one' is lost is not known
    (3, {'one': [0, 2, 3]}, ('one', 'two')),
    (3, {'one': [0, 2]}, ('two',)),
    (3, {'one': [0, 2, 4]}, ('two',)),
  ],
)
def test_a_training_step_adds_the_relative_errors_of_the_features(trunk, channels, compared):
  """The oracle reads the layers through models of Keras' own."""
  student, teacher, x = residual_net(2, seed=2, trunk=trunk), residual_net(5, seed=1), images()
  config = DistillationConfig(0.0, 4.0, 3.0)
  model = attach(student, Stack([Distillation(teacher, config, channels=channels)]))
  expected = 0.0
  for name in compared:
    got, wanted = (
      np.array(keras.Model(each.inputs, each.get_layer(name).output)(x, training=training))
      for each, training in ((student, True), (teacher, False))
    )
    wanted = wanted[..., channels.get(name, slice(None))]
    expected += 3.0 * np.sum((got - wanted) ** 2) / np.sum(wanted**2)
  model.compile(keras.optimizers.SGD(0.0), lambda y, outputs: 0.0 * tf.reduce_sum(outputs, axis=-1))
  loss = np.ravel(model.train_on_batch(x, labels()))[0]
  assert loss == pytest.approx(expected, rel=1e-4)


def test_features_pull_the_student_alone():
  """The logits have no weight, so what moves the student is what its layers give."""
  teacher, student = residual_net(5, seed=1), residual_net(2, seed=2)
  before = [np.array(weight) for weight in teacher.weights]
  model = attach(student, Stack([Distillation(teacher, DistillationConfig(0.0, 4.0, 1.0))]))
  model.compile(
    keras.optimizers.SGD(0.02), lambda y, outputs: 0.0 * tf.reduce_sum(outputs, axis=-1)
  )
  losses = [float(np.ravel(model.train_on_batch(images(), labels()))[0]) for _ in range(20)]
  assert losses[-1] < 0.7 * losses[0]
  for weight, old in zip(teacher.weights, before, strict=True):
    np.testing.assert_array_equal(weight, old)


def test_evaluation_sees_no_features():
  distillation = Distillation(residual_net(5, seed=1), DistillationConfig(1.0, 4.0, 1.0))
  model = attach(residual_net(2, seed=2), Stack([distillation]))
  seen = []
  distillation.observe = lambda node, outputs: seen.append(node.path)
  model(images(), training=False)
  assert seen == []
  model(images(), training=True)
  assert {'one', 'two'} <= set(seen)


@pytest.mark.parametrize(
  'types, found', [(('Add',), "'sum'"), (('Add', 'Conv1D'), 'no such layer')]
)
def test_features_that_nothing_matches_are_refused(types, found):
  inputs = keras.Input((8, 8, 3))
  narrow = layers.Conv2D(2, 3, padding='same', name='conv')(inputs)
  student = keras.Model(inputs, layers.Add(name='sum')([narrow, narrow]))
  if 'Conv1D' in types:
    student = conv_net('student')
  stack = Stack([Distillation(residual_net(5, seed=1), DistillationConfig(1.0, 4.0, 1.0, types))])
  with pytest.raises(UserError, match=rf'There are none, of type {" or ".join(types)}.*{found}'):
    attach(student, stack)


@pytest.mark.parametrize('bad', [(-1.0, 4.0), (1.0, 0.0), (1.0, -2.0), (1.0, 4.0, -1.0)], ids=str)
def test_nonsense_is_refused(bad):
  with pytest.raises(
    UserError, match=r'`feature_weight` at least 0 and `temperature` above 0\. Received: '
  ):
    DistillationConfig(*bad)


def test_features_of_no_layer_type_are_refused():
  with pytest.raises(UserError, match=r"such as Add\. Received: 'Add', ''"):
    DistillationConfig(feature_layers=('Add', ''))
