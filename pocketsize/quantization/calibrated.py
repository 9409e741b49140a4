"""What transforms of activations have in common whose start comes from data."""

import abc

from pocketsize.transform import Transform


class Calibrated(Transform, abc.ABC):
  """A transform that needs data, which calibration shows it, or else the first training batch.

  Attributes:
    bits: of what it writes.
  """

  order = 20

  @property
  @abc.abstractmethod
  def has_range(self):
    """Whether it has seen data."""

  @property
  def needs_data(self):
    return self.is_on and not self.has_range

  @abc.abstractmethod
  def initialiser(self):
    """Returns a new object that sees batches by `update(array)`.

    Its `result()` is then the tuple that `set_range` takes.
    """

  @abc.abstractmethod
  def set_range(self, *result):
    """Sets what it begins with."""
