"""Learners end to end on the digits: resume, signals, work folders, and what users get wrong."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from learners import main, training
from learners.checkpoint import Checkpoints
from learners.learner import Learner
from learners.progress import ProgressReport
from learners.workfolder import WorkFolder
from nets.convnet_at_digits import ModelHelper
from pocketsize import calibration, packed
from pocketsize.conversion.processor import overflows
from pocketsize.errors import UserError
from tests.shortcuts import unreported

ROOT = pathlib.Path(__file__).parent.parent
SMALL = ['--nb_epochs_rat=0.03', '--export_formats=none', '--save_step=7', '--summ_step=5']
UNIFORM = [
  '--learner=uniform',
  '--uql_weight_bits=4',
  '--uql_activation_bits=8',
  '--uql_quant_epochs=2',
]
FROZEN = [*UNIFORM, '--uql_fold_bn', '--freeze_bn_delay=12']
NON_UNIFORM = ['--learner=non-uniform', '--nuql_opt_mode=both', '--nuql_quant_epochs=2']
UNIFORM_TF = ['--learner=uniform-tf', '--uqtf_quant_delay=4', '--uqtf_freeze_bn_delay=12']
SPARSE = ['--learner=weight-sparse', '--ws_prune_ratio_prtl=heurist', '--ws_mask_update_step=3']


def run(work_dir, *arguments, helper=ModelHelper):
  return main.run_with(
    helper, ['convnet_at_digits_run.py', f'--work_dir={work_dir}', *SMALL, *arguments]
  )


def weights(work_dir, name='final.keras'):
  return keras.models.load_model(pathlib.Path(work_dir) / name, compile=False).get_weights()


def assert_same_bits(one, other):
  for left, right in zip(one, other, strict=True):
    np.testing.assert_array_equal(left, right)


class WithDropout(ModelHelper):
  """The net with a layer that draws its own random numbers."""

  def build(self):
    model = super().build()
    return keras.Model(model.input, keras.layers.Dropout(0.3)(model.output))


class Killed(BaseException):
  """Stands for a process that ends between two steps."""


@pytest.fixture
def kill_at(monkeypatch):
  """Makes training end abruptly after a step of a phase."""

  def arrange(phase, step):
    original = training._Loop.on_train_batch_end

    def dying(loop, batch, logs=None):
      original(loop, batch, logs)
      if loop.step == step and loop.schedule.title.startswith(phase):
        raise Killed

    monkeypatch.setattr(training._Loop, 'on_train_batch_end', dying)
    return lambda: monkeypatch.setattr(training._Loop, 'on_train_batch_end', original)

  return arrange


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """Returns the folder of a run that nothing stopped, by its arguments; tests only look at it."""
  kept = {}

  def get(*arguments):
    if arguments not in kept:
      folder = tmp_path_factory.mktemp('finished')
      assert run(folder, *arguments) == 0
      kept[arguments] = folder
    return kept[arguments]

  return get


@pytest.fixture(scope='module')
def undisturbed(finished):
  """Returns the weights of a run that nothing stopped, by its arguments."""
  return lambda *arguments: weights(finished(*arguments))


@pytest.fixture(scope='module')
def pretrained(finished):
  """Returns the flag with which a run need not train the float model."""
  return f'--pretrained={finished(*UNIFORM) / "float.keras"}'


@pytest.fixture
def copy(tmp_path, finished):
  """Returns a copy of the folder of a finished run, by its arguments."""
  return lambda *arguments: shutil.copytree(finished(*arguments), tmp_path / 'copy')


DISTILLED = [*SPARSE, '--enbl_dst', '--loss_w_dst_features=1', '--dst_features=ReLU']


def test_a_run_killed_in_both_of_its_trainings_ends_with_the_same_bits(
  tmp_path, kill_at, undisturbed
):
  for phase, step in (('float', 3), ('compressed', 15)):
    revive = kill_at(phase, step)
    with pytest.raises(Killed):
      run(tmp_path, *UNIFORM)
    revive()
  with unreported():
    assert run(tmp_path, *UNIFORM) == 0
  assert_same_bits(weights(tmp_path), undisturbed(*UNIFORM))


# The float model is trained alike by all of them.
@pytest.mark.parametrize(
  'learner, step',
  [
    pytest.param(NON_UNIFORM, 15, id='non-uniform-15'),
    pytest.param(DISTILLED, 15, id='sparse-distilled-15'),
    pytest.param(UNIFORM_TF, 15, id='uniform-tf-15'),
    # Batch norm is frozen between the last checkpoint and the kill.
    pytest.param(FROZEN, 13, id='frozen-13'),
  ],
)
def test_a_run_killed_at_any_step_ends_with_the_same_bits(
  tmp_path, kill_at, pretrained, learner, step
):
  arguments = [*learner, pretrained]
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  revive = kill_at('compressed', step)
  with pytest.raises(Killed):
    run(parts, *arguments)
  revive()
  with unreported():
    for folder in (whole, parts):
      assert run(folder, *arguments) == 0
  assert_same_bits(weights(parts), weights(whole))


def test_a_run_with_dropout_killed_twice_ends_with_the_same_bits(tmp_path, kill_at):
  """Before a checkpoint, and after one.

  The second start takes the float model from its file, which the first had trained itself.
  """
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  for step in (5, 15):
    revive = kill_at('compressed', step)
    with pytest.raises(Killed):
      run(parts, *SPARSE, helper=WithDropout)
    revive()
  with unreported():
    for folder in (whole, parts):
      assert run(folder, *SPARSE, helper=WithDropout) == 0
  assert_same_bits(weights(parts), weights(whole))


def test_without_an_output_nothing_is_shown(monkeypatch, capfd):
  monkeypatch.setattr(sys, 'stdout', None)
  with ProgressReport('training', 3) as report:
    report.say(1, {'now': 'one'})
    report.advance(2)
  assert capfd.readouterr() == ('', '')


def test_the_float_model_is_the_same_whatever_a_learner_checks(tmp_path, monkeypatch):
  monkeypatch.setattr(Learner, '_train_float', lambda learner, model: None)
  models = []
  for name in ('full-prec', 'binary'):
    (tmp_path / name).mkdir()
    flags = [f'--learner={name}', f'--work_dir={tmp_path / name}']
    learner = main.make_learner(ModelHelper, ['convnet_at_digits_run.py', *SMALL, *flags])
    learner.check()
    models.append(learner._float_model().get_weights())
  assert_same_bits(*models)


def test_another_seed_gives_other_weights(tmp_path, undisturbed):
  with unreported():
    assert run(tmp_path, *UNIFORM, '--seed=1') == 0
  assert any(
    (one != other).any()
    for one, other in zip(weights(tmp_path), undisturbed(*UNIFORM), strict=True)
  )


@pytest.mark.parametrize('more', [[], ['--nb_batches_bn=2']], ids=['plain', 're-estimated'])
def test_a_finished_run_started_again_changes_nothing(copy, more):
  folder = copy(*UNIFORM, *more)
  before = weights(folder)
  assert run(folder, *UNIFORM, *more) == 0
  assert_same_bits(weights(folder), before)


def test_batch_norm_is_estimated_anew_once_the_model_is_trained(finished, undisturbed):
  """From augmented training batches, the first ones, through what is shipped."""
  folder = finished(*UNIFORM, '--nb_batches_bn=2')
  model = keras.models.load_model(folder / 'quantized.keras')
  final = keras.models.load_model(folder / 'final.keras', compile=False)
  learner = main.make_learner(ModelHelper, ['x', f'--work_dir={folder}', *SMALL, *UNIFORM])
  before = undisturbed(*UNIFORM)
  for variable, value in zip(final.weights, before, strict=True):
    is_statistic = variable.name.startswith('moving')
    assert (np.array(variable) != value).any() == is_statistic, variable.path
  expected = [np.array(variable) for variable in model.source.weights]
  for layer in model.source.layers:
    if isinstance(layer, keras.layers.BatchNormalization):
      layer.moving_mean.assign(np.zeros(layer.moving_mean.shape))
  batches = learner.training_batches().take(2)
  calibration.re_estimate_batch_norm(model, (x for x, _ in batches))
  for variable, value in zip(model.source.weights, expected, strict=True):
    np.testing.assert_allclose(variable, value, rtol=1e-5, atol=1e-6)
  assert 'batch_norm' in json.loads((folder / 'report.json').read_text())['seconds']


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_in_a_real_process_loses_nothing(tmp_path, undisturbed, number, capfd):
  expected = undisturbed(*UNIFORM)
  code, stderr = _signalled(tmp_path, number, 'float training: 10/', *SMALL, *UNIFORM)
  if number == signal.SIGKILL:
    assert code == -number
  else:
    assert code == 128 + number
    assert f'stopped by {signal.Signals(number).name} after step' in stderr
    assert 'Traceback' not in stderr
  capfd.readouterr()
  assert run(tmp_path, *UNIFORM) == 0
  said = re.findall(
    r'(\w+) training: (\d+)/\d+  goes on from its checkpoint', capfd.readouterr().out
  )
  if number != signal.SIGKILL:
    ((phase, step),) = said
    assert phase == 'float' and f'after step {step};' in stderr
  assert_same_bits(weights(tmp_path), expected)


def test_a_signal_while_files_are_written_leaves_whole_ones(tmp_path):
  arguments = [*SMALL, *UNIFORM, '--export_formats=tflite,onnx,openvino']
  code, stderr = _signalled(tmp_path, signal.SIGTERM, 'exporting: 1/3', *arguments)
  assert code == 128 + signal.SIGTERM
  assert 'stopped by SIGTERM; the same command goes on' in stderr and 'Traceback' not in stderr
  written = {path.name for path in (tmp_path / 'exports').iterdir()}
  assert 'convnet.tflite' in written and written <= {'convnet.tflite', 'convnet.onnx'}


def _signalled(tmp_path, number, beginning, *arguments):
  """Starts a run, signals it at the first line with `beginning`; returns (exit code, stderr)."""
  command = [
    sys.executable,
    'nets/convnet_at_digits_run.py',
    f'--work_dir={tmp_path}',
    *arguments,
  ]
  process = subprocess.Popen(
    command,
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )
  for line in process.stdout:
    if line.startswith(beginning):
      process.send_signal(number)
      break
  _, stderr = process.communicate(timeout=120)
  return process.returncode, stderr


def test_an_output_that_nobody_reads_ends_the_run_without_a_word():
  reading, writing = os.pipe()
  os.close(reading)
  result = subprocess.run(
    [sys.executable, 'nets/convnet_at_digits_run.py', '--help'],
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    stdout=writing,
    stderr=subprocess.PIPE,
    text=True,
    timeout=120,
    check=False,
  )
  os.close(writing)
  assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, '')


def test_a_diverging_loss_stops_the_run_and_keeps_the_last_good_checkpoint(
  tmp_path, capfd, monkeypatch
):
  original = ModelHelper.loss
  monkeypatch.setattr(
    ModelHelper, 'loss', lambda self, y, outputs: original(self, y, outputs) * 1e30
  )
  assert run(tmp_path, *UNIFORM, '--save_step=1') == 2
  message = capfd.readouterr().err
  assert 'at step' in message and 'learning rate' in message and 'Traceback' not in message
  checkpoints = Checkpoints(tmp_path / 'checkpoints', 'float')
  if checkpoints.latest:
    with np.load(checkpoints.latest) as archive:
      assert all(np.isfinite(archive[name]).all() for name in archive.files)


def test_full_precision_trains_and_keeps_the_float_model(tmp_path):
  assert run(tmp_path, '--learner=full-prec') == 0
  assert_same_bits(weights(tmp_path), weights(tmp_path, 'float.keras'))
  report = json.loads((tmp_path / 'report.json').read_text())
  assert report['float']['metrics'] == report['compressed']['metrics']


def test_sparse_weights_are_exact_zeros_in_the_final_model(tmp_path, pretrained):
  arguments = ['--learner=weight-sparse', '--ws_prune_ratio_prtl=uniform', '--ws_prune_ratio=0.6']
  assert run(tmp_path, *arguments, pretrained) == 0
  report = json.loads((tmp_path / 'report.json').read_text())
  for layer in report['layers']:
    if layer['macs']:
      assert layer['sparsity'] == pytest.approx(0.6, abs=0.005)


def test_the_report_has_its_stable_keys(finished):
  folder = finished(*UNIFORM)
  report = json.loads((folder / 'report.json').read_text())
  assert set(report) == {
    'model',
    'dataset',
    'learner',
    'float',
    'compressed',
    'files',
    'packed',
    'layers',
    'seconds',
    'command',
    'versions',
  }
  assert set(report['float']) == {'metrics', 'params', 'macs', 'bytes'}
  assert set(report['compressed']) == {
    'metrics',
    'params',
    'nonzero_params',
    'macs',
    'mean_weight_bits',
    'bytes',
  }
  assert set(report['layers'][0]) == {
    'name',
    'params',
    'macs',
    'weight_bits',
    'activation_bits',
    'sparsity',
    'channels_before',
    'channels_after',
    'skipped_because',
  }
  bits = {
    layer['name']: (layer['weight_bits'], layer['activation_bits'])
    for layer in report['layers']
    if layer['macs']
  }
  assert bits == {'conv0': (8, 8), 'conv1': (4, 8), 'conv2': (4, 8), 'dense': (8, 8)}
  assert report['compressed']['bytes'] == (folder / 'final.keras').stat().st_size
  path = folder / 'exports' / 'convnet.packed'
  model = keras.models.load_model(folder / 'quantized.keras')
  assert report['packed'] == packed.verify(path, model)
  assert {name: weight.bits for name, weight in packed.load(path).weights.items()} == {
    weight.path: bits[weight.path.split('/')[0]][0] if weight.name == 'kernel' else 32
    for weight in model.source.weights
  }
  final = keras.models.load_model(folder / 'final.keras', compile=False)
  for name, values in packed.read(path).items():
    np.testing.assert_array_equal(values, packed.variables(final)[name])


def test_evaluation_reproduces_the_report_and_writes_nothing(copy, capfd):
  folder = copy(*UNIFORM)
  before = {
    path: path.read_bytes() for path in folder.rglob('*') if path.is_file() and path.name != '.lock'
  }
  capfd.readouterr()
  assert run(folder, *UNIFORM, '--exec_mode=eval') == 0
  accuracy = json.loads(before[folder / 'report.json'])['compressed']['metrics']['accuracy']
  assert f'{accuracy:.4f}' in capfd.readouterr().out
  assert {
    path: path.read_bytes() for path in folder.rglob('*') if path.is_file() and path.name != '.lock'
  } == before


@pytest.mark.parametrize(
  'arguments, sentence',
  [
    (['--learner=unifrom'], "Received: 'unifrom'; did you mean 'uniform'?"),
    (['--uql_weight_bits=0', '--learner=uniform'], '--uql_weight_bits must be one of 1, 2,'),
    (['--uql_weight_bits=many', '--learner=uniform'], 'uql_weight_bits'),
    (['--uql_wieght_bits=8', '--learner=uniform'], 'uql_wieght_bits'),
    (['--ws_prune_ratio=1.0', *SPARSE], '--ws_prune_ratio must be'),
    (
      ['--learner=full-prec', '--uql_weight_bits=4'],
      '--uql_weight_bits belongs to --learner=uniform',
    ),
    ([*SPARSE, '--ws_iter_ratio_beg=0.9'], '--ws_iter_ratio_beg must not be above'),
    (['--learner=uniform', '--uql_bucket_size=64'], '--uql_bucket_size has no effect'),
    (['--learner=uniform', '--uql_weight_range=lsq'], '--uql_weight_range must be one of fitted,'),
    (['--learner=uniform', '--uql_range_start=max'], '--uql_range_start must be one of auto,'),
    (
      ['--learner=uniform', '--uql_activation_range=learned'],
      '--uql_activation_range has no effect with --uql_activation_bits=32',
    ),
    *(
      (
        ['--learner=uniform', '--uql_activation_bits=1', f'--uql_activation_range={kind}'],
        f'--uql_activation_range={kind} needs --uql_activation_bits of at least 2. Received: 1.',
      )
      for kind in ('learned_symmetric', 'learned_log2')
    ),
    (
      ['--learner=uniform', '--uql_weight_bits=32', '--uql_weight_range=learned'],
      '--uql_weight_range has no effect with --uql_weight_bits=32',
    ),
    (
      ['--learner=uniform', '--uql_weight_range=dorefa', '--uql_range_start=mse'],
      '--uql_range_start has no effect with',
    ),
    (
      ['--learner=uniform', '--uql_weight_bits=32', '--uql_fold_bn'],
      '--uql_fold_bn has no effect with --uql_weight_bits=32',
    ),
    (
      ['--learner=uniform', '--uql_weight_bits=1', '--uql_fold_bn'],
      '--uql_fold_bn needs --uql_weight_bits of at least 2. Received: 1.',
    ),
    (
      ['--learner=full-prec', '--nb_batches_bn=3'],
      '--nb_batches_bn is about the training of a compressed model, which --learner=full-prec has',
    ),
    (['--learner=full-prec', '--freeze_bn_delay=0'], '--freeze_bn_delay is about the training of'),
    (
      [*UNIFORM, '--freeze_bn_delay=22'],
      '--freeze_bn_delay must be below the 22 steps for which the compressed model is trained',
    ),
    (
      [*UNIFORM, '--freeze_bn_delay=0', '--nb_batches_bn=1'],
      'give one of them. Received: 1 and 0.',
    ),
    (['--learner=uniform', '--uql_bucket_type=split'], '--uql_bucket_type has no effect'),
    (
      ['--learner=uniform', '--uql_activation_bits=8', '--target_device=gpu'],
      "--target_device must be one of all, litert, openvino, onnxruntime. Received: 'gpu'",
    ),
    (
      ['--learner=non-uniform', '--target_device=litert'],
      '--target_device has no effect with --nuql_activation_bits=32',
    ),
    (['--learner=binary', '--target_device=litert'], '--target_device belongs to --learner='),
    (['--learner=non-uniform', '--nuql_weight_bits=9'], '--nuql_weight_bits must be one of 1, 2,'),
    (['--learner=non-uniform', '--nuql_centre_bits=4'], '--nuql_centre_bits must be one of 8, 32'),
    (['--learner=non-uniform', '--nuql_bucket_size=64'], '--nuql_bucket_size has no effect'),
    (['--learner=non-uniform', '--nuql_bucket_type=channel'], '--nuql_bucket_type has no effect'),
    (
      ['--learner=non-uniform', '--nuql_weight_bits_list=8,8'],
      '--nuql_weight_bits_list must have one number for each of the 4 layers',
    ),
    (['--learner=full-prec', '--save_path_dst=x.keras'], 'add --enbl_dst'),
    (['--tempr_dst=2'], '--tempr_dst is about distillation, which is off'),
    (['--learner=uniform', '--loss_w_dst_features=1'], 'is about distillation, which is off'),
    (['--learner=uniform', '--dst_mixup=0.5'], 'is about distillation, which is off'),
    (['--learner=uniform', '--enbl_dst', '--dst_mixup=2'], 'at least 0 and at most 1'),
    (
      ['--learner=uniform', '--enbl_dst', '--dst_features=ReLU'],
      'no effect without --loss_w_dst_features',
    ),
    # The digits' net has no addition: said before anything is trained.
    (['--learner=uniform', '--enbl_dst', '--loss_w_dst_features=1'], 'There are none, of type Add'),
    (['--learner=full-prec', '--enbl_dst'], 'needs --save_path_dst'),
    (
      ['--learner=full-prec', '--enbl_dst', '--save_path_dst=x.keras', '--pretrained=y.keras'],
      'and no --pretrained',
    ),
    (['--learner=uniform', '--enbl_dst', '--save_path_dst=missing.keras'], 'missing.keras'),
    (['--learner=uniform', '--uql_weight_bits_list=8,99,8,8'], 'Received: 99'),
    (
      ['--learner=full-prec', '--export_formats=tflite_int8'],
      "'tflite_int8' holds what quantizers",
    ),
    (['--seed=4294967296'], '--seed must be'),
    (['--batch_size=many'], "--batch_size must be an integer at least 1. Received: 'many'"),
    (['--noenbl_dst=1'], '--noenbl_dst=1 does not take an argument'),
    (['--help=much'], "--help must be true or false. Received: 'much'"),
    (['--enbl_dst=maybe'], "--enbl_dst must be true or false. Received: 'maybe'"),
    (['--learner=uniform', '--uql_weight_bits_list=8,8'], 'one number for each of the 4 layers'),
    (['--learner=uniform', '--export_formats=tflight'], "Received: 'tflight'"),
    (['--pretrained=missing.keras'], 'missing.keras'),
    (['--batch_size=5000'], '5000'),
    (['--flagfile=missing.flags'], 'missing.flags'),
    (['surplus'], "Received: 'surplus'"),
    (['--exec_mode=eval'], 'of a finished run'),
  ],
)
def test_a_mistake_of_the_user_is_one_sentence_and_exit_code_2(
  tmp_path, capfd, arguments, sentence
):
  assert run(tmp_path / 'work', *arguments) == 2
  message = capfd.readouterr().err
  assert sentence in message
  assert not list((tmp_path / 'work').glob('*.keras'))
  assert 'Traceback' not in message and len(message.strip().splitlines()) == 1


def test_a_work_folder_of_another_configuration_is_refused_and_kept(copy, capfd):
  folder = copy(*UNIFORM)
  before = (folder / 'report.json').read_bytes()
  capfd.readouterr()
  assert run(folder, *UNIFORM[:1], '--uql_weight_bits=3') == 2
  message = capfd.readouterr().err
  assert '--uql_weight_bits is 4 there and 3 here' in message
  assert (folder / 'report.json').read_bytes() == before


def test_two_runs_in_one_work_folder_are_refused(tmp_path, capfd):
  with WorkFolder(tmp_path, {}):
    assert run(tmp_path) == 2
  assert f'in use by another run (process {os.getpid()})' in capfd.readouterr().err
  assert run(tmp_path, '--learner=full-prec') == 0


@pytest.mark.parametrize(
  'module, name, error',
  [
    (np, 'savez', OSError(28, 'No space left on device')),
    (
      tf.summary,
      'create_file_writer',
      tf.errors.ResourceExhaustedError(None, None, 'events; No space left on device'),
    ),
  ],
)
def test_a_full_disk_is_one_sentence(tmp_path, capfd, monkeypatch, module, name, error):
  def full(*arguments, **options):
    raise error

  monkeypatch.setattr(module, name, full)
  assert run(tmp_path, *UNIFORM) == 2
  assert 'The disk is full' in capfd.readouterr().err
  assert not list((tmp_path / 'checkpoints').glob('*'))


def test_a_missing_package_is_found_before_training(tmp_path, capfd, monkeypatch):
  monkeypatch.setitem(sys.modules, 'openvino', None)
  assert run(tmp_path, *UNIFORM, '--export_formats=openvino') == 2
  assert "Package 'openvino' is needed for openvino files" in capfd.readouterr().err
  assert not (tmp_path / 'config.json').exists()


def test_the_number_of_workers_belongs_to_a_work_folder(tmp_path):
  with WorkFolder(tmp_path, {'workers': 2}):
    (tmp_path / 'report.json').touch()
  with pytest.raises(UserError, match='-n is 2 there and 1 here'):
    WorkFolder(tmp_path, {'workers': 1})
  with WorkFolder(tmp_path, {'workers': 1}, read_only=True):
    assert json.loads((tmp_path / 'config.json').read_text()) == {'workers': 2}


def test_what_a_killed_writer_left_is_removed(tmp_path):
  left = tmp_path / 'checkpoints' / '.float-00000007.0123abcd.npz'
  left.parent.mkdir()
  for path in (left, tmp_path / '.hidden.npz'):
    path.touch()
  with WorkFolder(tmp_path, {}):
    assert not left.exists() and (tmp_path / '.hidden.npz').exists()


def test_a_signal_in_the_last_step_of_a_phase_stops_the_run(tmp_path, monkeypatch):
  original = training._Loop.on_train_batch_end

  def signalling(loop, batch, logs=None):
    if loop.step == 19:
      loop.caught.append(signal.SIGTERM)
    original(loop, batch, logs)

  monkeypatch.setattr(training._Loop, 'on_train_batch_end', signalling)
  assert run(tmp_path, *UNIFORM) == 128 + signal.SIGTERM
  assert Checkpoints(tmp_path / 'checkpoints', 'float').latest and not list(
    tmp_path.glob('*.keras')
  )


def test_listed_weight_bits_leave_the_ends_of_activations_at_8_bits(tmp_path, pretrained):
  bits = ['--uql_weight_bits_list=2,4,4,3', '--uql_activation_bits=4', '--uql_quant_epochs=1']
  assert run(tmp_path, '--learner=uniform', *bits, pretrained) == 0
  report = json.loads((tmp_path / 'report.json').read_text())
  found = [(entry['weight_bits'], entry['activation_bits']) for entry in report['layers']]
  assert [pair for pair in found if pair[0] < 32] == [(2, 8), (4, 4), (4, 4), (3, 8)]


@pytest.mark.parametrize('mode', ['weights', 'cluster', 'both'])
def test_listed_bits_of_centres_reach_the_report_and_the_kernels(tmp_path, pretrained, mode):
  """conv1 has at most 4 values, by output channel; cluster trains no weight of the float model."""
  flags = ['--nuql_weight_bits_list=8,2,4,3', '--nuql_use_buckets', '--nuql_bucket_type=channel']
  flags += [f'--nuql_opt_mode={mode}', '--nuql_activation_bits=8', '--nuql_quant_epochs=1']
  assert run(tmp_path, '--learner=non-uniform', *flags, pretrained) == 0
  report = json.loads((tmp_path / 'report.json').read_text())
  found = [(entry['weight_bits'], entry['activation_bits']) for entry in report['layers']]
  assert [pair for pair in found if pair[0] < 32] == [(8, 8), (2, 8), (4, 8), (3, 8)]
  final, quantized, before = (
    keras.models.load_model(tmp_path / name, compile=False)
    for name in ('final.keras', 'quantized.keras', 'float.keras')
  )
  kernel = np.array(final.get_layer('conv1').kernel).reshape(-1, 32)
  assert all(len(np.unique(channel)) <= 4 for channel in kernel.T)
  latent = np.array(quantized.source.get_layer('conv1').kernel)
  stood_still = np.array_equal(latent, before.get_layer('conv1').kernel)
  assert stood_still == (mode == 'cluster')


@pytest.mark.slow
def test_learned_scales_and_ranges_in_all_formats(tmp_path, pretrained):
  """As in the README: int8 files are off by a step of the 8-bit output, OpenVINO's by two."""
  arguments = ['--uql_weight_range=learned', '--uql_activation_range=learned']
  assert run(tmp_path, *UNIFORM, *arguments, pretrained, '--export_formats=all') == 0
  report = json.loads((tmp_path / 'report.json').read_text())
  kinds = {
    place['transform'] for place in json.loads((tmp_path / 'plan.json').read_text())['placements']
  }
  assert kinds == {'LearnedScale', 'LearnedRange'}
  files = {file['format']: file for file in report['files']}
  model = keras.models.load_model(tmp_path / 'quantized.keras')
  low, high = model.transforms_at('dense', 'output')[0].range()
  step = (high - low) / 255
  assert len(files) == 6
  for name, file in files.items():
    steps = {'openvino_int8': 2.01, 'tflite_int8': 1.01, 'onnx_qdq': 1.01}
    farthest = step * steps[name] if name in steps else 1e-4
    assert file['max_abs_diff'] < farthest or overflows(name)
    if name in steps:
      assert file['float_ops'] == 0


@pytest.mark.parametrize('name', ['quantized.keras', 'final.keras', 'float.keras'])
def test_evaluation_of_a_damaged_model_is_one_sentence(copy, capfd, name):
  folder = copy(*UNIFORM)
  (folder / name).write_bytes(b'garbage')
  capfd.readouterr()
  assert run(folder, *UNIFORM, '--exec_mode=eval') == 2
  message = capfd.readouterr().err
  assert name in message and 'Traceback' not in message


def test_a_damaged_checkpoint_is_named(tmp_path, capfd, kill_at):
  revive = kill_at('float', 10)
  with pytest.raises(Killed):
    run(tmp_path, *UNIFORM)
  revive()
  path = Checkpoints(tmp_path / 'checkpoints', 'float').latest
  path.write_bytes(path.read_bytes()[:1000])
  assert run(tmp_path, *UNIFORM) == 2
  assert str(path) in capfd.readouterr().err
