"""The learner `binary`: its schedules by hand, and runs on the digits."""

import json
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

from learners import main, training
from learners.binary import BinaryLearner
from learners.checkpoint import Checkpoints
from learners.runtime import Runtime
from nets.convnet_at_digits import ModelHelper
from pocketsize.errors import UserError
from pocketsize.instrument import instrument
from tests.shortcuts import unreported

SMALL = [
  '--nb_epochs_rat=0.1',
  '--learner=binary',
  '--bin_epochs=4',
  '--bin_activations_epoch=0.5',
  '--bin_weights_epoch=1.5',
  '--summ_step=5',
  '--save_step=7',
]


def run(work_dir, *arguments):
  return main.run_with(
    ModelHelper, ['convnet_at_digits_run.py', f'--work_dir={work_dir}', *SMALL, *arguments]
  )


def learner(**flags):
  """Returns a learner of 10 steps an epoch, for its schedules."""
  made = object.__new__(BinaryLearner)
  made.config = BinaryLearner.Config(**flags)
  made.helper = types.SimpleNamespace(config=types.SimpleNamespace(loss_w_dcy=1e-4))
  made.steps_per_epoch = 10
  return made


def test_the_learning_rate_by_hand():
  """Epochs 2 to 6 of 8: half way, at 4, 0.5^2.1 of it; 0 from 6 on."""
  made = learner(bin_epochs=8, bin_lrn_rate=0.01, bin_lr_drop_epoch=2, bin_lr_drop_epochs=4)
  rates = [made.tuning_rate(10 * epoch, 80) for epoch in range(8)]
  expected = [1, 1, 1, 0.75**2.1, 0.5**2.1, 0.25**2.1, 0, 0]
  assert rates == pytest.approx([0.01 * rate for rate in expected], abs=1e-12)


def test_the_start_of_the_scale_is_the_flags():
  (compressor,) = learner(bin_scale_init='mse').compressors(None, 600)
  assert compressor.rules[0].config.scale_init == 'mse'


def test_without_flags_the_stages_are_sixths_of_the_epochs():
  """12 epochs: activations at 2, weights at 4, the rate falls from 8 to 12, no decay from 8."""
  made = learner(bin_epochs=12)
  (compressor,) = made.compressors(None, 120)
  config = compressor.rules[0].config
  assert (config.activations_begin_step, config.weights_begin_step) == (20, 40)
  assert config.scale_init == 'quantile'
  assert [made.tuning_rate(step, 120) for step in (0, 80, 100, 120)] == pytest.approx(
    [1e-3, 1e-3, 1e-3 * 0.5**2.1, 0]
  )
  decay = made.tuning(120)['weight_decay']
  assert [decay(step) for step in (0, 79, 80, 119)] == [1e-4, 1e-4, 0, 0]


def test_weight_decay_has_an_epoch_of_its_own():
  decay = learner(bin_epochs=12, bin_disable_weight_decay_epoch=0.5).tuning(120)['weight_decay']
  assert [decay(step) for step in (4, 5, 119)] == [1e-4, 0, 0]


def trained(tmp_path, weight_decay, stops=(4,)):
  """Returns the kernel after 4 steps of SGD at rate 0.1 on a loss of 0, stopped after `stops`."""
  data = tf.data.Dataset.from_tensors((np.zeros((1, 1)), np.zeros((1, 1)))).repeat()
  for steps in stops:
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer='ones')])
    schedule = training.Schedule('t', steps, lambda step: 0.1, 0.0, weight_decay, 100, 100)
    training.train(
      instrument(model),
      lambda start: data,
      lambda y, outputs: 0.0 * tf.reduce_sum(outputs),
      schedule,
      checkpoints=Checkpoints(tmp_path, 't'),
      runtime=Runtime(),
      log_dir=tmp_path / 'log',
    )
  return float(model.layers[0].kernel[0, 0])


def by_step(step):
  return [1.0, 0.0, 2.0, 0.5][step]


@pytest.mark.parametrize(
  ('weight_decay', 'stops', 'expected'),
  [
    (1.0, (4,), 0.9**4),
    (by_step, (4,), 0.9 * 1.0 * 0.8 * 0.95),
    (by_step, (1, 3, 4), 0.9 * 1.0 * 0.8 * 0.95),
  ],
)
def test_weight_decay_by_step_by_hand(tmp_path, weight_decay, stops, expected):
  """The kernel shrinks by 1 - 0.1 w at each step, wherever the training was interrupted."""
  assert trained(tmp_path, weight_decay, stops) == pytest.approx(expected, rel=1e-6)


@pytest.fixture(scope='module')
def finished(tmp_path_factory, float_file):
  """Returns the folder of a whole run with all files."""
  folder = tmp_path_factory.mktemp('binary')
  assert run(folder, f'--pretrained={float_file}') == 0
  return folder


def test_every_file_has_the_accuracy_of_keras(finished):
  """Of 360 images one may lie at a threshold; what does not is computed alike."""
  report = json.loads((finished / 'report.json').read_text())
  accuracy = report['compressed']['metrics']['accuracy']
  # Guessing has 0.1; how far one gets differs between processors.
  assert accuracy > 0.3
  assert len(report['files']) == 6
  for file in report['files']:
    assert file['metrics']['accuracy'] == pytest.approx(accuracy, abs=1.5 / 360), file['format']


def test_the_report_has_bits_and_reasons(finished):
  report = json.loads((finished / 'report.json').read_text())
  found = {
    layer['name']: (layer['weight_bits'], layer['activation_bits'], layer['skipped_because'])
    for layer in report['layers']
    if layer['macs']
  }
  assert found == {
    'conv0': (32, 32, 'first layer'),
    'conv1': (1, 1, None),
    'conv2': (1, 1, None),
    'dense': (32, 32, 'last layer'),
  }
  kernel = keras.models.load_model(finished / 'final.keras').get_layer('conv1').kernel
  magnitudes = np.abs(np.array(kernel)).reshape(-1, kernel.shape[-1])
  np.testing.assert_array_equal(magnitudes, np.broadcast_to(magnitudes[0], magnitudes.shape))


def test_a_run_stopped_in_each_stage_ends_with_the_same_bits(
  tmp_path, finished, float_file, monkeypatch
):
  class Killed(BaseException):
    pass

  original = training._Loop.on_train_batch_end
  # 11 steps an epoch: activations at 5, weights at 16, the rate falls from 29 to 44.
  for last in (3, 9, 20, 31):

    def dying(loop, batch, logs=None, last=last):
      original(loop, batch, logs)
      if loop.step == last and loop.schedule.title.startswith('compressed'):
        raise Killed

    monkeypatch.setattr(training._Loop, 'on_train_batch_end', dying)
    with pytest.raises(Killed):
      run(tmp_path, f'--pretrained={float_file}')
  monkeypatch.setattr(training._Loop, 'on_train_batch_end', original)
  with unreported():
    assert run(tmp_path, f'--pretrained={float_file}') == 0
  one, other = (
    keras.models.load_model(folder / 'quantized.keras').get_weights()
    for folder in (tmp_path, finished)
  )
  for left, right in zip(one, other, strict=True):
    np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize(
  ('arguments', 'sentence'),
  [
    (['--bin_weights_epoch=4'], '--bin_weights_epoch must be below --bin_epochs'),
    (['--bin_activations_epoch=9'], 'Received: 9 and 4'),
    (['--bin_mode=xor'], '--bin_mode must be one of xnor, dorefa'),
    (['--lrn_rate_ft=0.1'], 'whose learning rate is --bin_lrn_rate. Received: --lrn_rate_ft=0.1'),
    (['--bin_skip_op_names=conv7'], "'conv7', which matches no layer"),
    (['--bin_skip_op_names=conv1,conv2'], 'no layers to binarize: conv1: excluded; conv2'),
  ],
)
def test_a_mistake_of_the_user_is_one_sentence(tmp_path, capfd, arguments, sentence):
  assert run(tmp_path / 'work', *arguments) == 2
  message = capfd.readouterr().err
  assert sentence in message and len(message.strip().splitlines()) == 1
  assert not (tmp_path / 'work').exists()


def test_an_epoch_below_the_end_is_a_step_below_the_end():
  """0.99 epochs of 10 steps are 9 steps: rounded to 10, that stage would see no data."""
  (compressor,) = learner(
    bin_epochs=1, bin_activations_epoch=0.99, bin_weights_epoch=0.0
  ).compressors(None, 10)
  config = compressor.rules[0].config
  assert (config.activations_begin_step, config.weights_begin_step) == (9, 0)
  with pytest.raises(UserError, match='--bin_weights_epoch must be below'):
    BinaryLearner.Config(bin_epochs=1, bin_weights_epoch=1.0)
