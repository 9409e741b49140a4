"""Fixtures of all tests."""

import gc
import os
import pathlib
import sys

import hypothesis
import pytest

# Before anything imports TensorFlow: its log lines would stand among the messages that tests read.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
# As in the library, for test modules that import OpenVINO or ONNX Runtime before it does.
sys.modules.setdefault('openvino_telemetry', None)
os.environ.setdefault('ORT_DISABLE_TELEMETRY', '1')
# TensorFlow's tracing makes so many objects that looking for cycles takes a seventh of the suite.
gc.set_threshold(200_000, 20, 50)
# The same examples in each run, however slow the machine is; --hypothesis-profile=default draws
# others.
hypothesis.settings.register_profile('suite', deadline=None, derandomize=True)
hypothesis.settings.load_profile('suite')


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
  """One process of xdist has all tests of a module, so that what they share is made once."""
  for item in items:
    if not item.get_closest_marker('xdist_group'):
      item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(scope='module', autouse=True)
def each_module_begins_alike():
  """Weights without a seed of their own do not depend on the modules that ran before."""
  _begin_alike()


@pytest.fixture(autouse=True)
def each_test_begins_alike(each_module_begins_alike):
  """Nor on the tests that ran before, nor does what is computed."""
  _begin_alike()


def _begin_alike():
  import keras
  from tensorflow.python.framework import config as tf_config

  keras.utils.set_random_seed(0)
  # A run of a learner switches it on for good.
  tf_config.disable_op_determinism()


@pytest.fixture(scope='module', autouse=True)
def only_what_is_new_is_looked_at_for_cycles():
  """TensorFlow keeps millions of objects for good: one look at all of them took half a minute."""
  yield
  gc.collect()
  gc.freeze()


@pytest.fixture(scope='session')
def shared():
  """The folder with data and weights that tests marked `shared` need."""
  folder = os.environ.get('POCKETSIZE_SHARED')
  if not folder:
    pytest.skip('POCKETSIZE_SHARED is not set')
  return pathlib.Path(folder)


@pytest.fixture(scope='session')
def float_file(tmp_path_factory):
  """A float model of the digits' net, so that runs need not train one."""
  from tests.test_learners import run

  folder = tmp_path_factory.mktemp('float')
  assert run(folder, '--learner=full-prec', '--nb_epochs_rat=0.1') == 0
  return folder / 'float.keras'


@pytest.fixture
def deterministic():
  """TensorFlow computes the same bits each time."""
  import tensorflow as tf

  tf.config.experimental.enable_op_determinism()
