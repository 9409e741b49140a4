"""Fixtures of all tests."""

import os
import pathlib

import pytest

# Before anything imports TensorFlow: its log lines would stand among the messages that tests read.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')


@pytest.fixture(scope='session')
def shared():
  """The folder with data and weights that tests marked `shared` need."""
  folder = os.environ.get('POCKETSIZE_SHARED')
  if not folder:
    pytest.skip('POCKETSIZE_SHARED is not set')
  return pathlib.Path(folder)


@pytest.fixture
def deterministic():
  """TensorFlow computes the same bits each time."""
  import tensorflow as tf
  from tensorflow.python.framework import config as tf_config

  tf.config.experimental.enable_op_determinism()
  yield
  tf_config.disable_op_determinism()
