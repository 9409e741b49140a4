"""Distillation from the float model (Hinton et al. 2015, arXiv:1503.02531)."""

import dataclasses

import keras
import tensorflow as tf

from pocketsize.compressor import Compressor
from pocketsize.errors import UserError


def distillation_loss(student, teacher, temperature):
  """Returns T^2 times the mean cross entropy of softmax(teacher / T) and softmax(student / T).

  The factor T^2 keeps the gradient's size when T changes (section 2 of the paper).

  Args:
    student, teacher: [batch, classes] logits.
    temperature: T, positive.
  """
  targets = tf.nn.softmax(teacher / temperature)
  cross_entropy = tf.nn.softmax_cross_entropy_with_logits(targets, student / temperature)
  return temperature**2 * tf.reduce_mean(cross_entropy)


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
  """How much the student listens.

  Attributes:
    weight: factor of the loss, not negative.
    temperature: of both softmaxes, positive.
  """

  weight: float = 4.0
  temperature: float = 4.0

  def __post_init__(self):
    if self.weight < 0 or self.temperature <= 0:
      raise UserError(
        'Distillation wants `weight` at least 0 and `temperature` above 0. '
        f'Received: {self.weight}, {self.temperature}.'
      )


class Distillation(Compressor):
  """A loss and nothing else; sits in any stack.

  Args:
    teacher: a Keras model that gives logits; it runs in inference mode and is not trained.
    config: `DistillationConfig`.
    logits: takes a model's outputs to [batch, classes] logits.
  """

  Config = DistillationConfig

  def __init__(self, teacher, config=None, logits=lambda outputs: outputs):
    super().__init__()
    self.teacher = teacher
    self.config = config or DistillationConfig()
    self.logits = logits

  def plan(self, graph):
    return []

  def loss(self, x, y, outputs):
    teacher = tf.stop_gradient(self.logits(self.teacher(x, training=False)))
    return self.config.weight * distillation_loss(
      keras.ops.convert_to_tensor(self.logits(outputs)), teacher, self.config.temperature
    )
