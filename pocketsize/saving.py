"""Keras models as files: whole or absent when written, one sentence for a damaged one."""

import pathlib
import zipfile

import keras

from pocketsize.errors import UserError
from pocketsize.files import atomic_path


def save_model(model, path):
  """Writes a Keras model, whole or not at all."""
  with atomic_path(path) as temporary:
    model.save(temporary)


def load_model(path):
  """Returns the Keras model saved at `path`, with or without quantizers.

  Raises:
    UserError: there is none, or it is damaged.
  """
  # Keras says of what is no archive that it is not found.
  if pathlib.Path(path).is_file() and not zipfile.is_zipfile(path):
    raise UserError(f'Model {str(path)!r} cannot be loaded: it is not a whole .keras archive.')
  try:
    return keras.models.load_model(path, compile=False)
  # A damaged archive fails in any way that its parts can: BadZipFile, KeyError, HDF5's errors ...
  except Exception as error:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    raise UserError(f'Model {str(path)!r} cannot be loaded: {lines[0][:300]}') from error
