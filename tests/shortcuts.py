"""What tests leave out of runs where it is not what they are about."""

import contextlib

import pytest

from learners.phases import Phases
from learners.results import Results


@contextlib.contextmanager
def unreported():
  """Runs end with final.keras and quantized.keras: no exported files, no evaluation, no report."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Results, 'write_report', lambda *arguments: None)
    yield


class Enough(BaseException):
  """What follows in a run is that of every run."""


@contextlib.contextmanager
def until_training(of=None):
  """Expects that a run gets to its first training, or to that of a phase, and ends it there.

  The plan and what is decided about the compression are written by then. Without --pretrained the
  first training is that of the float model.
  """
  fit = Phases._fit

  def enough(self, phase, *arguments, **options):
    if of in (None, phase):
      raise Enough
    fit(self, phase, *arguments, **options)

  with pytest.MonkeyPatch.context() as patch, pytest.raises(Enough):
    patch.setattr(Phases, '_fit', enough)
    yield
