"""Distillation from the float model: its logits, and what it computes on the way to them.

Logits: Hinton et al. 2015 (arXiv:1503.02531). Features: the hints of Romero et al. 2015
(arXiv:1412.6550, equation 3), wherever the student's channels are some of the teacher's, so that no
regressor is needed between them.
"""

import dataclasses

import keras
import tensorflow as tf

from pocketsize.compressor import Compressor
from pocketsize.errors import UserError
from pocketsize.instrument import Instrumented, instrument


def distillation_loss(student, teacher, temperature):
  """Returns T^2 times the mean cross entropy of softmax(teacher / T) and softmax(student / T).

  The factor T^2 keeps the gradient's size when T changes (section 2 of Hinton et al.).

  A single logit z is that of two classes with logits (0, z): with p = sigmoid(teacher / T) and
  q = sigmoid(student / T) the cross entropy is -p ln q - (1 - p) ln (1 - q).

  Args:
    student, teacher: [batch, classes] logits; [batch, 1] for two classes.
    temperature: T, positive.
  """
  student, teacher = (tf.cast(each, tf.float32) / temperature for each in (student, teacher))
  if student.shape[-1] == 1:
    cross_entropy = tf.nn.sigmoid_cross_entropy_with_logits(tf.sigmoid(teacher), student)
  else:
    cross_entropy = tf.nn.softmax_cross_entropy_with_logits(tf.nn.softmax(teacher), student)
  return temperature**2 * tf.reduce_mean(cross_entropy)


def feature_loss(student, teacher):
  """Returns the squared error of features in units of their energy: sum (s - t)^2 / sum t^2.

  Args:
    student, teacher: tensors of one shape.
  """
  student, teacher = (tf.cast(each, tf.float32) for each in (student, teacher))
  return tf.math.divide_no_nan(
    tf.reduce_sum(tf.square(student - teacher)), tf.reduce_sum(tf.square(teacher))
  )


def only_output(outputs):
  """Returns the tensor among a model's outputs; UserError if there are several."""
  tensors = keras.tree.flatten(outputs)
  if len(tensors) > 1:
    raise UserError(
      'Distillation of a model with several outputs needs `logits=`, a function that takes them to '
      f'the [batch, classes] logits. Received: {len(tensors)} outputs.'
    )
  return tensors[0]


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
  """How much the student listens.

  Attributes:
    weight: factor of the logits' loss, not negative.
    temperature: of both softmaxes, positive.
    feature_weight: factor of the features' loss, which is the sum of `feature_loss` over the
      layers; not negative, 0 for none.
    feature_layers: types of the layers whose outputs are features.
  """

  weight: float = 4.0
  temperature: float = 4.0
  feature_weight: float = 0.0
  feature_layers: tuple = ('Add',)

  def __post_init__(self):
    if self.weight < 0 or self.temperature <= 0 or self.feature_weight < 0:
      raise UserError(
        'Distillation wants `weight` and `feature_weight` at least 0 and `temperature` above 0. '
        f'Received: {self.weight}, {self.feature_weight}, {self.temperature}.'
      )
    if not all(self.feature_layers):
      raise UserError(
        'Distillation wants the types of the layers whose outputs are features, such as Add. '
        f'Received: {", ".join(map(repr, self.feature_layers))}.'
      )


class Distillation(Compressor):
  """A loss and nothing else; sits in any stack.

  Args:
    teacher: a Keras model that gives logits; it runs in inference mode and is not trained, and
      has weights of its own.
    config: `DistillationConfig`.
    logits: takes a model's outputs to [batch, classes] logits; needed where there are several.
    channels: {path of a layer: positions of those of the teacher's channels that the student has};
      layers that are missing have all.
  """

  Config = DistillationConfig

  def __init__(self, teacher, config=None, logits=only_output, channels=None):
    super().__init__()
    self.config = config or DistillationConfig()
    if self.config.feature_weight and not isinstance(teacher, Instrumented):
      teacher = instrument(teacher)
    self.teacher = teacher
    self.logits = logits
    self._channels = channels or {}
    # Path: takes the teacher's feature to the channels of the student's.
    self._picks = {}
    self._seen = {}
    self._is_taught = False

  def plan(self, graph):
    return []

  def bind(self, model):
    """Raises a UserError for outputs or features of which it is not known what to compare."""
    for each in (model.source, getattr(self.teacher, 'source', self.teacher)):
      if self.logits is only_output and getattr(each, 'outputs', None):
        only_output(each.outputs)
    if self.config.feature_weight:
      self._picks = self._compared(model.graph)
    taught = {id(variable) for variable in model.trainable_variables}
    self._is_taught = any(id(variable) in taught for variable in self.teacher.variables)

  def update(self, step):
    """Raises a UserError for a teacher that changes with the student, before the first step."""
    # Not in `bind`: what is bound to look at a plan alone needs no copy of a large net.
    if self._is_taught:
      raise UserError(
        'A teacher must not be trained with its student: give a copy with weights of its own, '
        'such as `keras.models.clone_model` with `set_weights`. '
        f'Received: {self.teacher.name!r}, which shares weights with the model to train.'
      )

  def _compared(self, graph):
    """Returns {path: pick} of the layers whose outputs have the same channels in both models."""
    mine, wanted = (self._shapes(each) for each in (graph, self.teacher.graph))
    picks = {
      path: _pick(shape, wanted.get(path), self._channels.get(path)) for path, shape in mine.items()
    }
    picks = {path: pick for path, pick in picks.items() if pick}
    if not picks:
      raise UserError(
        'Features are distilled where student and teacher have layers of the same name and shape, '
        'or the student some of the channels of the teacher and it is known which (not so for a '
        'pruned model from a file, such as a warm start). There are none, of type '
        f'{" or ".join(self.config.feature_layers)}. '
        f'Received: a student with {mine or "no such layer"}, a teacher with '
        f'{wanted or "no such layer"}.'
      )
    return picks

  def _shapes(self, graph):
    return {
      node.path: graph.shape(node.outputs[0])
      for node in graph.nodes
      if type(node.operation).__name__ in self.config.feature_layers
    }

  def observe(self, node, outputs):
    if node.path in self._picks:
      self._seen[node.path] = outputs

  def loss(self, x, y, outputs):
    wanted = {}

    def observe(node, outputs):
      if node.path in self._picks:
        wanted[node.path] = tf.stop_gradient(self._picks[node.path](outputs))

    if self._picks:
      teacher = self.teacher.run(x, training=False, observe=observe)
    else:
      teacher = self.teacher(x, training=False)
    loss = self.config.weight * distillation_loss(
      keras.ops.convert_to_tensor(self.logits(outputs)),
      tf.stop_gradient(self.logits(teacher)),
      self.config.temperature,
    )
    seen, self._seen = self._seen, {}
    return loss + self.config.feature_weight * sum(
      feature_loss(seen[path], wanted[path]) for path in sorted(wanted)
    )


def _pick(shape, wanted, positions):
  """Returns what takes a teacher's feature to the student's channels; None if nothing does.

  Args:
    shape, wanted: of the feature in the student and in the teacher, or None.
    positions: of the teacher's channels that the student has; None for all.
  """
  if shape == wanted:
    return lambda feature: feature
  if positions is None or wanted is None or len(shape) != len(wanted):
    return None
  axes = [axis for axis, size in enumerate(shape) if size != wanted[axis]]
  if len(axes) > 1 or len(positions) != shape[axes[0]] or max(positions) >= wanted[axes[0]]:
    return None
  return lambda feature: tf.gather(feature, positions, axis=axes[0])
