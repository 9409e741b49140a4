"""One process, and two real workers under horovodrun on this machine."""

import importlib.util
import os
import pathlib
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest

from learners import runtime as runtime_lib
from pocketsize.errors import UserError
from tests.workers import averaging

ROOT = pathlib.Path(__file__).resolve().parents[1]
WORKERS = ROOT / 'tests' / 'workers'

# Under xdist one process has all of these tests: each starts two workers of its own.
pytestmark = pytest.mark.xdist_group('horovod')
needs_horovod = pytest.mark.skipif(
  importlib.util.find_spec('horovod') is None,
  reason='Horovod is not installed: scripts/install_horovod.sh',
)


def start(script, *arguments):
  return subprocess.Popen(
    [ROOT / 'scripts' / 'run_local.sh', WORKERS / script, '-n=2', *map(str, arguments)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ | {'POCKETSIZE_VENV': sys.prefix},
  )


def finish(process, seconds=300):
  try:
    out, err = process.communicate(timeout=seconds)
  finally:
    process.kill()
  return process.returncode, out, err


def test_one_process_is_its_own_chief_and_changes_nothing():
  runtime = runtime_lib.create(False)
  optimizer = keras.optimizers.SGD()
  variable = keras.Variable(np.ones(2))
  runtime.broadcast_variables([variable])
  runtime.barrier()
  assert (runtime.rank, runtime.size, runtime.is_chief) == (0, 1, True)
  assert runtime.broadcast('x') == 'x'
  assert runtime.distribute(optimizer, [variable]) is optimizer
  assert 'apply' not in vars(optimizer)
  assert runtime.any(True, False) == [True, False]
  np.testing.assert_array_equal(runtime.allreduce_sum([1, 2]), [1, 2])


def test_without_horovod_the_error_names_the_script(monkeypatch):
  monkeypatch.setitem(sys.modules, 'horovod', None)
  monkeypatch.setitem(sys.modules, 'horovod.tensorflow', None)
  with pytest.raises(UserError, match=r'need Horovod .* scripts/install_horovod\.sh'):
    runtime_lib.create(True)


def test_a_worker_takes_its_own_gpu_and_refuses_to_share(monkeypatch):
  taken = []
  monkeypatch.setattr(runtime_lib.tf.config, 'list_physical_devices', lambda kind: ['g0', 'g1'])
  monkeypatch.setattr(runtime_lib.tf.config, 'set_visible_devices', lambda *a: taken.append(a))
  monkeypatch.setattr(runtime_lib.tf.config.experimental, 'set_memory_growth', lambda *a: None)
  runtime_lib._take_one_gpu(1)
  assert taken == [('g1', 'GPU')]
  with pytest.raises(UserError, match='a GPU of its own.* Received: worker 3, GPUs: 2'):
    runtime_lib._take_one_gpu(2)


@pytest.fixture(scope='module')
def two_workers(tmp_path_factory):
  folder = tmp_path_factory.mktemp('two workers')
  code, out, err = finish(start('averaging.py', folder))
  assert code == 0, err
  assert out == 'both wrote 2\n'
  return [dict(np.load(folder / f'rank{rank}.npz')) for rank in range(2)]


@needs_horovod
def test_gradients_and_state_are_the_means_over_two_workers(two_workers):
  # Gradients (1, 4) and (3, 12), moving statistics 0 and 10, learning rate 1 from weight 0.
  for rank, found in enumerate(two_workers):
    np.testing.assert_array_equal(found['linear_weight'], [-2.0, -8.0])
    assert found['linear_moving'] == 5.0
    assert found['linear_counter'] == rank  # an integer has no mean
    assert found['linear_class'] == 'SGD'


@needs_horovod
def test_objects_sums_and_variables_agree(two_workers):
  for found in two_workers:
    np.testing.assert_array_equal(found['object'], [4, 8])
    np.testing.assert_array_equal(found['sum'], [[1.0, 5.0]])
    np.testing.assert_array_equal(found['any'], [True, False])
    np.testing.assert_array_equal(found['bias'], np.ones(5))  # rank 0's


@needs_horovod
def test_weights_and_optimizer_are_equal_to_the_bit_after_five_steps(two_workers):
  first, second = two_workers
  names = [name for name in first if name.startswith(('variable_', 'optimizer_'))]
  assert len(names) == 16
  for name in names:
    np.testing.assert_array_equal(first[name], second[name], err_msg=name)


@needs_horovod
def test_two_workers_train_as_one_loop_that_averages_by_hand(two_workers):
  """Oracle: both ranks' forward passes and gradients in this process, averaged with NumPy."""
  import tensorflow as tf

  model = averaging.build()
  model.layers[0].bias.assign(np.ones(5))
  optimizer = keras.optimizers.SGD(0.1, momentum=0.9, name='sgd')
  loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
  data = [averaging.samples(rank) for rank in range(2)]
  for step in range(5):
    state = [np.array(v.value) for v in model.non_trainable_variables]
    gradients, states = [], []
    for x, y in data:
      for variable, value in zip(model.non_trainable_variables, state, strict=True):
        variable.assign(value)
      rows = slice(8 * step, 8 * step + 8)
      with tf.GradientTape() as tape:
        value = loss(y[rows], model(x[rows], training=True))
      gradients.append(tape.gradient(value, [v.value for v in model.trainable_variables]))
      states.append([np.array(v.value) for v in model.non_trainable_variables])
    for i, variable in enumerate(model.non_trainable_variables):
      variable.assign((states[0][i] + states[1][i]) / 2)
    optimizer.apply(
      [(a + b) / 2 for a, b in zip(*gradients, strict=True)], model.trainable_variables
    )
  for i, variable in enumerate(model.variables):
    np.testing.assert_allclose(
      two_workers[0][f'variable_{i:02d}'],
      np.array(variable.value),
      rtol=1e-4,
      atol=1e-6,
      err_msg=variable.path,
    )


@needs_horovod
def test_a_checkpoint_of_one_worker_fits_the_optimizer_of_two(two_workers):
  model = averaging.build()
  optimizer = keras.optimizers.SGD(0.1, momentum=0.9, name='sgd')
  optimizer.build(model.trainable_variables)
  names = [name for name in two_workers[0] if name.startswith('optimizer_')]
  assert names == [f'optimizer_{variable.path}' for variable in optimizer.variables]


@needs_horovod
def test_a_worker_that_breaks_ends_the_run(tmp_path):
  code, out, err = finish(start('leaving.py', 'fail', tmp_path))
  assert code == 1
  assert 'lost a worker: True' in out
  assert '[1] ArithmeticError: rank 1 broke' in err
  assert 'Horovod detected' not in err


@needs_horovod
def test_a_user_error_of_both_workers_is_said_once(tmp_path):
  code, _, err = finish(start('leaving.py', 'refuse', tmp_path))
  assert code == 2
  assert err.count('--bits must be from 1 to 16. Received: --bits=17') == 1
  assert 'Traceback' not in err


@needs_horovod
@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_the_workers_time_to_save(number, tmp_path):
  process = start('leaving.py', 'signal', tmp_path)
  _wait_for(lambda: len(list(tmp_path.glob('ready*'))) == 2)
  process.send_signal(number)
  code, out, err = finish(process)
  assert (code, out) == (0, 'saved\n'), err


@needs_horovod
@pytest.mark.slow
def test_workers_end_when_the_launcher_is_killed(tmp_path):
  process = start('leaving.py', 'signal', tmp_path)
  _wait_for(lambda: len(_processes(tmp_path)) == 2)
  workers = _processes(tmp_path)
  assert all(each.exists() for each in workers)
  process.kill()
  assert finish(process)[0] == -signal.SIGKILL
  _wait_for(lambda: not any(each.exists() for each in workers))


def _processes(folder):
  """Returns the folders of /proc of the workers that have said that they are ready."""
  texts = [path.read_text() for path in folder.glob('ready*')]
  return [pathlib.Path('/proc', text) for text in texts if text]


def _wait_for(condition, seconds=60):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, f'not so after {seconds} s'
    time.sleep(0.1)
