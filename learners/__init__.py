"""Learners: the shapes of a run, one module per --learner value."""

import contextlib
import os
import sys
import tempfile


@contextlib.contextmanager
def _quiet_start():
  """Keeps what C++ writes to standard error, unless the block raises.

  TensorFlow tells of CPU features and missing GPU drivers before any log level counts.
  """
  with tempfile.TemporaryFile() as kept:
    stderr = os.dup(2)
    os.dup2(kept.fileno(), 2)
    try:
      yield
    except BaseException:
      kept.seek(0)
      os.write(stderr, kept.read())
      raise
    finally:
      os.dup2(stderr, 2)
      os.close(stderr)


@contextlib.contextmanager
def _hidden(*names):
  """Makes packages look as if they were not installed, to what is imported in the block."""
  names = [name for name in names if name not in sys.modules]
  sys.modules.update(dict.fromkeys(names))
  try:
    yield
  finally:
    for name in names:
      del sys.modules[name]


os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
# Keras imports these for its own wrappers and pictures, which takes a quarter of a start.
with _quiet_start(), _hidden('sklearn', 'matplotlib'):
  import tensorflow as tf

  tf.config.list_physical_devices()
