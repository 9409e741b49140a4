"""The learner uniform-tf, from flags to files that were run."""

import json
import sys

import keras
import numpy as np
import pytest
from toys import need_tfmot

from learners import main, training
from nets.convnet_at_digits import ModelHelper
from pocketsize.conversion import processor
from pocketsize.conversion.processor import overflows
from pocketsize.errors import UserError
from pocketsize.quantization import tfmot_bridge
from tests.shortcuts import unreported

need_tfmot()


def run(work_dir, *arguments):
  return main.run_with(
    ModelHelper,
    [
      'convnet_at_digits_run.py',
      f'--work_dir={work_dir}',
      '--learner=uniform-tf',
      '--nb_epochs_rat=0.1',
      *arguments,
    ],
  )


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """The folder of a run with a teacher that is also watched inside, and two stages."""
  folder = tmp_path_factory.mktemp('uniform_tf')
  arguments = ['--enbl_dst', '--loss_w_dst_features=1', '--dst_features=ReLU']
  stages = ['--uqtf_quant_delay=10', '--uqtf_freeze_bn_delay=40']
  assert run(folder, *arguments, *stages) == 0
  return folder


def test_all_files_compute_what_tfmot_trained(finished):
  report = json.loads((finished / 'report.json').read_text())
  assert report['compressed']['metrics']['accuracy'] > 0.8
  files = {entry['format']: entry for entry in report['files']}
  for name in ('tflite_int8', 'onnx_qdq', 'openvino_int8'):
    assert files[name]['float_ops'] == 0 and files[name]['int8_ops'] > 0
    assert files[name]['note'] == processor.note(name)
    difference = files[name]['metrics']['accuracy'] - report['compressed']['metrics']['accuracy']
    assert abs(difference) <= (0.03 if overflows(name) else 0.01)
  # One step of the output for LiteRT and ONNX Runtime.
  model = keras.models.load_model(finished / 'quantized.keras')
  low, high = model.transforms_at('dense', 'output')[0].range()
  assert files['tflite_int8']['max_abs_diff'] <= 1.01 * (high - low) / 255
  assert files['onnx_qdq']['max_abs_diff'] <= 1.01 * (high - low) / 255
  assert report['packed']['bits_per_weight'] < 8.5
  assert {
    layer['name']: (layer['weight_bits'], layer['activation_bits'])
    for layer in report['layers']
    if layer['macs']
  } == dict.fromkeys(('conv0', 'conv1', 'conv2', 'dense'), (8, 8))


def test_final_keras_has_the_weights_as_deployed(finished):
  final = keras.models.load_model(finished / 'final.keras', compile=False)
  quantized = keras.models.load_model(finished / 'quantized.keras')
  start = keras.models.load_model(finished / 'float.keras', compile=False)
  for name in ('conv0', 'conv1', 'conv2', 'dense'):
    np.testing.assert_array_equal(final.get_layer(name).kernel, quantized.baked(name))
    assert np.abs(final.get_layer(name).kernel - start.get_layer(name).kernel).max() > 0
  for name in ('bn0', 'bn1', 'bn2'):
    layer = final.get_layer(name)
    for weight, own in zip(layer.weights, quantized.source.get_layer(name).weights, strict=True):
      np.testing.assert_array_equal(weight, own)


def test_evaluation_needs_no_tfmot_and_finds_the_same(finished, capfd, monkeypatch):
  def missing():
    raise UserError('tfmot was asked for')

  monkeypatch.setattr(tfmot_bridge, 'tfmot', missing)
  report = json.loads((finished / 'report.json').read_text())
  capfd.readouterr()
  flags = ['--enbl_dst', '--loss_w_dst_features=1', '--dst_features=ReLU', '--exec_mode=eval']
  assert run(finished, *flags, '--uqtf_quant_delay=10', '--uqtf_freeze_bn_delay=40') == 0
  lines = capfd.readouterr().out.splitlines()
  (line,) = [line for line in lines if line.strip().startswith('compressed')]
  assert f'{report["compressed"]["metrics"]["accuracy"]:.4f}' in line


def test_it_trains_with_adam_at_a_share_of_the_rates_of_the_net(tmp_path, monkeypatch):
  rates = {}
  original = training._Loop.on_train_batch_begin

  def watching(loop, batch, logs=None):
    original(loop, batch, logs)
    kind = type(loop.model.optimizer).__name__
    rates.setdefault(kind, []).append(float(loop.model.optimizer.learning_rate))

  monkeypatch.setattr(training._Loop, 'on_train_batch_begin', watching)
  with unreported():
    assert run(tmp_path, '--uqtf_lrn_rate_dcy=0.02', '--nb_epochs_rat=0.03') == 0
  np.testing.assert_allclose(rates['Adam'], 0.02 * np.array(rates['SGD']), rtol=1e-5)
  assert len(set(rates['SGD'])) == 3


@pytest.mark.parametrize(
  'arguments, sentence',
  [
    (['--uqtf_weight_bits=1'], '--uqtf_weight_bits must be one of 2, 3,'),
    (['--uqtf_activation_bits=32'], '--uqtf_activation_bits must be one of 2, 3,'),
    (['--uqtf_quant_delay=-1'], '--uqtf_quant_delay must be an integer at least 0'),
    (['--uqtf_quant_delay=66'], '--uqtf_quant_delay must be below the 66 steps of training'),
    (['--uqtf_freeze_bn_delay=-1'], '--uqtf_freeze_bn_delay must be'),
    (['--uqtf_lrn_rate_dcy=0'], '--uqtf_lrn_rate_dcy must be'),
    (['--lrn_rate_ft=0.1'], '--lrn_rate_ft has no effect with --learner=uniform-tf'),
    (['--freeze_bn_delay=3'], 'use --uqtf_freeze_bn_delay'),
    (['--uql_weight_bits=4'], '--uql_weight_bits belongs to --learner=uniform'),
  ],
)
def test_mistakes_are_one_sentence(tmp_path, capfd, arguments, sentence):
  assert run(tmp_path, *arguments) == 2
  error = capfd.readouterr().err
  assert sentence in error and 'Traceback' not in error


def test_without_tfmot_the_sentence_says_what_to_install(tmp_path, capfd, monkeypatch):
  monkeypatch.setitem(sys.modules, 'tensorflow_model_optimization', None)
  assert run(tmp_path) == 2
  assert 'pip install tensorflow-model-optimization' in capfd.readouterr().err
  assert not (tmp_path / 'config.json').exists()
