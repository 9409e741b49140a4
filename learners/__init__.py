"""Learners: the shapes of a run, one module per --learner value."""

import contextlib
import os
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


os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
with _quiet_start():
  import tensorflow as tf

  tf.config.list_physical_devices()
