"""Checkpoints: one file holds all that a run needs to go on exactly where it stopped."""

import pathlib
import re
import zipfile

import numpy as np

from pocketsize.errors import UserError
from pocketsize.files import atomic_path

KEPT = 2


class Checkpoints:
  """The checkpoints of one phase, `<folder>/<phase>-<step>.npz`; the newest two are kept.

  A file holds the model's variables, the optimizer's and, in its name, the number of steps done.
  All else that a run depends on is a pure function of the step.

  Args:
    folder: made when the first checkpoint is written.
    phase: a word, such as 'float'.
  """

  def __init__(self, folder, phase):
    self.folder = pathlib.Path(folder)
    self.phase = phase

  def _steps(self):
    names = (path.name for path in self.folder.glob(f'{self.phase}-*.npz'))
    return sorted(
      int(match[1]) for match in map(re.compile(r'.*-(\d+)\.npz').fullmatch, names) if match
    )

  def path(self, step):
    """Returns the file for `step` finished steps."""
    return self.folder / f'{self.phase}-{step:08d}.npz'

  @property
  def latest(self):
    """The file of the newest checkpoint, or None."""
    steps = self._steps()
    return self.path(steps[-1]) if steps else None

  def save(self, step, variables):
    """Writes `variables` (a list) as the checkpoint of `step`, and removes the oldest."""
    with atomic_path(self.path(step)) as temporary:
      np.savez(
        temporary,
        **{f'{index:05d}': np.asarray(variable) for index, variable in enumerate(variables)},
      )
    for old in self._steps()[:-KEPT]:
      self.path(old).unlink(missing_ok=True)

  def restore(self, variables):
    """Assigns the newest checkpoint to `variables` and returns its step; 0 if there is none.

    Raises:
      UserError: the file is damaged or of another model.
    """
    if not self._steps():
      return 0
    step = self._steps()[-1]
    path = self.path(step)
    try:
      with np.load(path, allow_pickle=False) as archive:
        arrays = [archive[name] for name in sorted(archive.files)]
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
      raise UserError(
        f'Checkpoint {path} cannot be read ({error}). Remove it to go on from the one before.'
      ) from error
    if [array.shape for array in arrays] != [tuple(variable.shape) for variable in variables]:
      raise UserError(
        f'Checkpoint {path} belongs to another model. Use another --work_dir, or remove the folder.'
      )
    for variable, array in zip(variables, arrays, strict=True):
      variable.assign(array)
    return step
