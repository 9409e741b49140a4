"""What an evaluator is to the rest: it takes batches and gives figures."""

import abc


class Evaluator(abc.ABC):
  """Gathers figures over batches of any size; every sample counts the same."""

  def __init__(self):
    self.reset()

  @abc.abstractmethod
  def update(self, y, outputs):
    """Takes one batch: labels and the model's outputs, both NumPy arrays with samples first."""

  @abc.abstractmethod
  def result(self):
    """Returns a flat dict {name: float} over all samples since `reset`."""

  @abc.abstractmethod
  def reset(self):
    """Forgets all samples."""
