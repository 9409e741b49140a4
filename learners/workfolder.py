"""The folder of a run: one writer, one configuration."""

import fcntl
import json
import os
import pathlib

from pocketsize.errors import UserError
from pocketsize.files import remove_temporary, write_json

# They say how a run is watched or where its inputs lie, not what it computes.
FREE = frozenset(
  'exec_mode work_dir summ_step save_step export_formats tflite_int4 debug data_dir_local '
  'enbl_multi_gpu'.split()
)

# Once one of them is there, the folder belongs to its configuration.
RESULTS = (
  'checkpoints',
  'float.keras',
  'search.json',
  'losses.json',
  'traces.json',
  'allocation.json',
  'pruned.keras',
  'final.keras',
  'report.json',
)


_SHOWN = {'workers': '-n', 'net': 'the net'}


class WorkFolder:
  """A run's folder, locked for one run: a context manager that gives up the lock at its end.

  Args:
    path: made if it is missing.
    config: {name: value} of the run: its flags, 'net' and 'workers'; compared with the folder's
      `config.json` once there are results.
    read_only: the folder must exist, and no file of it changes but the lock.

  Raises:
    UserError: another run holds the folder, it belongs to another configuration, or it cannot be
    written.
  """

  def __init__(self, path, config, read_only=False):
    self.path = pathlib.Path(path)
    if read_only and not self.path.is_dir():
      raise UserError(
        f'--work_dir must be the folder of a finished run. Received: {path}, which does not exist.'
      )
    try:
      if not read_only:
        self.path.mkdir(parents=True, exist_ok=True)
      # Held open: closing the file gives up the lock.
      self._lock = open(self.path / '.lock', 'a+')
    except OSError as error:
      raise UserError(
        f'--work_dir must be a folder that can be written. Received: {path} ({error.strerror}).'
      ) from error
    try:
      fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      with self._lock:
        self._lock.seek(0)
        owner = self._lock.read().strip() or 'unknown'
      raise UserError(
        f'Work folder {path} is in use by another run (process {owner}). '
        'Wait for it, or give another --work_dir.'
      ) from error
    self._lock.truncate(0)
    self._lock.write(str(os.getpid()))
    self._lock.flush()
    try:
      if any((self / name).exists() for name in RESULTS):
        self._compare(config, FREE | {'workers'} if read_only else FREE)
      if not read_only:
        remove_temporary(self.path)
        write_json(self / 'config.json', config)
    except BaseException:
      self._lock.close()
      raise

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self._lock.close()

  def __truediv__(self, name):
    return self.path / name

  def _compare(self, config, free):
    try:
      earlier = json.loads((self / 'config.json').read_text())
    except FileNotFoundError:
      return
    except ValueError as error:
      raise UserError(
        f'{self / "config.json"} is damaged: {error}. Give another --work_dir.'
      ) from error
    # A flag that the folder does not know is newer than it.
    differing = [
      f'{_SHOWN.get(name, f"--{name}")} is {earlier[name]!r} there and {config[name]!r} here'
      for name in sorted(set(earlier) & set(config) - free)
      if earlier[name] != config[name]
    ]
    if differing:
      raise UserError(
        f'Work folder {self.path} belongs to another configuration: {"; ".join(differing)}. '
        'Give another --work_dir, or remove the folder.'
      )
