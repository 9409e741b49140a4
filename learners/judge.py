"""What a search judges choices by: the loss that the run trains by, on a fixed set of images.

A net that has learned its task hardly errs on images that it was trained on: their loss, and its
second derivatives, are those of a few odd ones. Where the run distills, every image tells how far a
choice is from the teacher.
"""

from evaluators.evaluator import Evaluator
from pocketsize.distillation import distillation_loss


class Judge:
  """The net's loss and figures; with a teacher, as the training has it, the divergence from it too.

  Features that are distilled do not count: they are not among a model's outputs.

  Args:
    helper: the `ModelHelper`.
    teacher: `Distillation`, or None for none.

  Attributes:
    distillation: `teacher` as it was given, with its features.
  """

  def __init__(self, helper, teacher=None):
    self._helper, self.distillation = helper, teacher
    self._teacher = teacher if teacher and teacher.config.weight else None

  def marked(self, batches):
    """Returns (x, y) batches with what `loss` and `evaluator` want as their y."""
    if not self._teacher:
      return batches
    teacher = self._teacher.teacher
    return [(x, (y, self._teacher.logits(teacher(x, training=False)).numpy())) for x, y in batches]

  def loss(self, y, outputs):
    """Returns a tensor of which the mean is the loss.

    Args:
      y: of a marked batch.   outputs: of the model that is judged.
    """
    if not self._teacher:
      return self._helper.loss(y, outputs)
    labels, wanted = y
    return self._helper.loss(labels, outputs) + self._divergence(outputs, wanted)

  def evaluator(self):
    """Returns an `Evaluator` of marked batches: the net's figures, 'loss' that of this judge."""
    evaluator = self._helper.evaluator()
    return _Taught(evaluator, self._divergence) if self._teacher else evaluator

  def _divergence(self, outputs, wanted):
    """Returns the loss of distillation beyond its least, which equal outputs have."""
    config, outputs = self._teacher.config, self._teacher.logits(outputs)
    return config.weight * (
      distillation_loss(outputs, wanted, config.temperature)
      - distillation_loss(wanted, wanted, config.temperature)
    )


class _Taught(Evaluator):
  """The figures of an evaluator, with the mean of another loss added to its 'loss'."""

  def __init__(self, evaluator, divergence):
    self._evaluator, self._divergence = evaluator, divergence
    super().__init__()

  def reset(self):
    self._evaluator.reset()
    self._sum, self._samples = 0.0, 0

  def update(self, y, outputs):
    labels, wanted = y
    self._evaluator.update(labels, outputs)
    self._sum += len(wanted) * float(self._divergence(outputs, wanted))
    self._samples += len(wanted)

  def result(self):
    figures = self._evaluator.result()
    return figures | {'loss': figures['loss'] + self._sum / self._samples}
