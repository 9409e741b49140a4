"""Accuracy and cross-entropy of a classifier that gives logits."""

import numpy as np

from evaluators.evaluator import Evaluator


def cross_entropy(y, logits):
  """Returns -log softmax(logits)[y] for each sample, [batch] float64, finite for finite logits.

  Args:
    y: [batch] integers, 0 to classes - 1.   logits: [batch, classes].
  """
  logits = np.asarray(logits, np.float64)
  # softmax does not change when a row is shifted, and exp cannot overflow below zero.
  shifted = logits - logits.max(axis=1, keepdims=True)
  return np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(y)), y]


class Classification(Evaluator):
  """{'accuracy': share of right answers in [0, 1], 'loss': mean cross-entropy in nats}."""

  def reset(self):
    self._samples = 0
    self._right = 0
    self._loss = 0.0

  def update(self, y, outputs):
    """Takes y [batch] integers and outputs [batch, classes] logits."""
    y = np.asarray(y)
    self._samples += len(y)
    self._right += int(np.sum(np.argmax(outputs, axis=1) == y))
    self._loss += float(cross_entropy(y, outputs).sum())

  def result(self):
    """Returns the figures; ValueError if there was no sample."""
    if not self._samples:
      raise ValueError('`result` needs at least one sample. Received: no `update` since `reset`.')
    return {'accuracy': self._right / self._samples, 'loss': self._loss / self._samples}
