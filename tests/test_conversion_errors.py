"""What exporting refuses, verification, and the command lines."""

import errno
import os
import shutil
import subprocess
import sys

import conversion_models as models
import keras
import numpy as np
import openvino
import pytest

from pocketsize import conversion
from pocketsize.conversion import errors, verification
from pocketsize.errors import UserError
from pocketsize.instrument import instrument, strip
from pocketsize.quantization.quantizers import ActivationQuantizer
from pocketsize.transform import Placement
from tools import command


class Counter:
  """An evaluator that counts."""

  def reset(self):
    self.samples = 0

  def update(self, y, outputs):
    self.samples += len(outputs)

  def result(self):
    return {'samples': float(self.samples)}


def quantized(bits=8):
  keras.utils.set_random_seed(0)
  return models.quantized(models.randomized(models.BUILDERS['plain']()), bits)


def test_unknown_format_names_the_legal_ones(tmp_path):
  with pytest.raises(
    UserError, match="tflite_int8, onnx,.*'tflite_int9'.*Did you mean 'tflite_int8'"
  ):
    conversion.export(quantized(), tmp_path, ['tflite_int9'])


def test_int8_needs_quantizers(tmp_path):
  model = models.BUILDERS['plain']()
  assert conversion.formats_for(model) == ('tflite', 'onnx', 'openvino')
  assert not conversion.is_quantized(instrument(model))
  with pytest.raises(
    UserError, match="'onnx_qdq' holds what quantizers learned, and the model has none"
  ):
    conversion.export(model, tmp_path, ['onnx_qdq'])


@pytest.mark.parametrize('bits', [8, 16])
def test_a_quantizer_without_data_is_named(bits, tmp_path):
  model = instrument(
    models.BUILDERS['plain'](), [Placement('image', 'output', ActivationQuantizer(bits))]
  )
  with pytest.raises(UserError, match="'image' never saw data"):
    conversion.export(model, tmp_path)


@pytest.mark.parametrize(
  'format_,package', [('onnx', 'tf2onnx'), ('onnx_qdq', 'onnx'), ('openvino', 'openvino')]
)
def test_a_missing_package_is_named_and_leaves_no_file(format_, package, tmp_path, monkeypatch):
  for name in [name for name in sys.modules if name.partition('.')[0] == package]:
    monkeypatch.delitem(sys.modules, name)
  monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(
    UserError, match=f"Package '{package}' is needed to write .* pip install {package}"
  ):
    conversion.export(quantized(), tmp_path, [format_])
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  'suffix,package', [('.tflite', 'ai-edge-litert'), ('.onnx', 'onnxruntime'), ('.xml', 'openvino')]
)
def test_a_missing_runtime_is_named(suffix, package, tmp_path, monkeypatch):
  (tmp_path / f'x{suffix}').write_bytes(b'')
  module = {'ai-edge-litert': 'ai_edge_litert.interpreter'}.get(package, package)
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(UserError, match=f"Package '{package}' is needed to run"):
    conversion.open_file(tmp_path / f'x{suffix}')


@pytest.mark.parametrize('format_', ['tflite', 'onnx', 'openvino_int8'])
def test_a_write_that_fails_keeps_the_old_file_and_leaves_no_other(format_, tmp_path, monkeypatch):
  model = quantized()
  before = {}
  for file in conversion.export(model, tmp_path, [format_]):
    before[file.path] = file.path.read_bytes()
  names = sorted(tmp_path.iterdir())
  monkeypatch.setattr('os.replace', _fail)
  with pytest.raises(OSError, match='No space left'):
    conversion.export(model, tmp_path, [format_])
  assert sorted(tmp_path.iterdir()) == names
  assert all(path.read_bytes() == content for path, content in before.items())


def _fail(*args):
  raise OSError(28, 'No space left on device')


@keras.saving.register_keras_serializable(package='test')
class _Exotic(keras.layers.Layer):
  """A layer with an operation that is in no exchange format."""

  def call(self, x):
    import tensorflow as tf

    return tf.raw_ops.Betainc(a=x * x, b=x * x + 1.0, x=tf.sigmoid(x))


@pytest.mark.parametrize('format_', ['tflite', 'onnx'])
def test_an_operation_that_a_converter_refuses_is_traced_to_its_layer(format_, tmp_path):
  inputs = keras.Input((4,))
  model = keras.Model(inputs, _Exotic(name='strange')(inputs))
  with pytest.raises(UserError, match="refuses the model at layer 'strange'"):
    conversion.export(model, tmp_path, [format_])
  assert not list(tmp_path.iterdir())


def test_open_file_refuses_what_it_cannot_run(tmp_path):
  with pytest.raises(UserError, match='ends in .tflite, .onnx, .xml'):
    conversion.open_file(tmp_path / 'model.h5')
  with pytest.raises(UserError, match='There is no file'):
    conversion.open_file(tmp_path / 'model.onnx')
  for suffix in ('.tflite', '.onnx', '.xml'):
    (tmp_path / f'broken{suffix}').write_bytes(b'broken')
    with pytest.raises(UserError, match='cannot be loaded'):
      conversion.open_file(tmp_path / f'broken{suffix}')
  file = conversion.export(models.BUILDERS['plain'](), tmp_path, ['tflite'])[0]
  with pytest.raises(UserError, match=r'takes arrays of shapes \[\(None, 12, 12, 3\)\]'):
    conversion.open_file(file.path)(np.zeros((1, 3, 12, 12), np.float32))


def test_verify_reports_what_the_file_did(tmp_path, monkeypatch):
  model = quantized()
  x = models.samples()
  references = {True: np.asarray(model(x)), False: np.asarray(strip(model)(x))}
  monkeypatch.setattr(verification.processor, 'note', {'openvino': 'It differs here.'}.get)
  files = conversion.export(model, tmp_path, ['tflite', 'tflite_int8', 'openvino'])
  batches = [(x[:20], np.zeros(20)), (x[20:], np.zeros(12))]
  entries = conversion.verify_files(
    files, lambda: iter(batches), references, Counter(), latency_rounds=2
  )
  assert [entry['format'] for entry in entries] == ['tflite', 'tflite_int8', 'openvino']
  assert all(entry['metrics'] == {'samples': 32.0} and entry['latency_ms'] > 0 for entry in entries)
  # After what the file itself differs by, of which there is nothing here.
  assert [entry['note'] for entry in entries] == ['', '', 'It differs here.']
  assert entries[0]['max_abs_diff'] < 1e-5 < entries[1]['bytes'] < entries[0]['bytes']
  assert (entries[1]['int8_ops'], entries[1]['float_ops']) == (4, 0)
  parts = [tmp_path / 'model.xml', tmp_path / 'model.bin']
  assert entries[2]['bytes'] == sum(path.stat().st_size for path in parts)
  assert set(entries[0]) == {
    'format',
    'path',
    'bytes',
    'gzip_bytes',
    'metrics',
    'latency_ms',
    'max_abs_diff',
    'int8_ops',
    'float_ops',
    'note',
  }
  with pytest.raises(UserError, match='`reference` must hold the outputs for the same samples'):
    conversion.verify(files[0], batches, references[False][:20], Counter(), latency_rounds=1)


def _tool(name, *arguments):
  return subprocess.run(
    [sys.executable, '-m', f'tools.{name}', *arguments], capture_output=True, text=True
  )


def test_a_full_disk_while_openvino_writes_is_told_as_one(tmp_path, monkeypatch):
  def broken(*arguments, **options):
    raise RuntimeError('basic_ios::clear: iostream error')

  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(openvino, 'save_model', broken)
  for free, code in ((0, errno.ENOSPC), (1 << 30, errno.EIO)):
    monkeypatch.setattr(shutil, 'disk_usage', lambda path, free=free: usage._replace(free=free))
    with pytest.raises(OSError) as caught:
      conversion.export(quantized(), tmp_path, ['openvino'])
    assert caught.value.errno == code


def test_command_lines_say_what_they_cannot_write_or_read(tmp_path):
  quantized().save(tmp_path / 'quantized.keras')
  (tmp_path / 'file').touch()
  refused = _tool(
    'conversion.export', f'--model={tmp_path}/quantized.keras', f'--output_dir={tmp_path}/file/x'
  )
  assert refused.returncode == 2 and 'cannot be written or read' in refused.stderr
  np.savez(tmp_path / 'data.npz', x=np.zeros((2, 5)), y=np.zeros(2))
  refused = _tool(
    'conversion.verify_file',
    '--file=x.tflite',
    f'--reference_model={tmp_path}/quantized.keras',
    f'--data={tmp_path}/data.npz',
  )
  assert refused.returncode == 2 and '(None, 12, 12, 3). Received: (2, 5)' in refused.stderr
  assert len(refused.stderr.strip().splitlines()) == 1


def test_command_lines_export_and_verify(tmp_path):
  model = quantized(bits=4)
  model.save(tmp_path / 'quantized.keras')
  x = models.samples()
  np.savez(tmp_path / 'data.npz', x=x, y=np.argmax(model(x), -1))
  exported = _tool(
    'conversion.export',
    f'--model={tmp_path}/quantized.keras',
    f'--output_dir={tmp_path}/out',
    '--formats=tflite,tflite_int8',
    '--tflite_int4',
  )
  assert exported.returncode == 0, exported.stderr
  assert '4-bit weights as int4 codes of the same scale' in exported.stdout
  files = f'{tmp_path}/out/quantized.tflite,{tmp_path}/out/quantized_int8.tflite'
  verified = _tool(
    'conversion.verify_file',
    f'--file={files}',
    f'--reference_model={tmp_path}/quantized.keras',
    f'--data={tmp_path}/data.npz',
  )
  assert verified.returncode == 0, verified.stderr
  assert '4 / 0' in verified.stdout and '0 / 4' in verified.stdout and '1.0000' in verified.stdout
  measured = _tool('benchmark.latency', f'--files={files}', '--rounds=2')
  assert measured.returncode == 0 and '1.000' in measured.stdout


@pytest.mark.parametrize(
  'arguments,message',
  [
    (
      ('conversion.export', '--model=none.keras', '--output_dir=out'),
      "Model 'none.keras' cannot be loaded",
    ),
    (('benchmark.latency',), '--files'),
  ],
)
def test_command_lines_say_what_is_wrong(arguments, message, tmp_path):
  result = _tool(*arguments)
  assert result.returncode == 2
  assert message in result.stderr and 'Traceback' not in result.stderr


def test_help_of_a_tool_is_no_mistake(capsys):
  with pytest.raises(SystemExit) as left:
    command._parse(['export.py', '--help'])
  printed = capsys.readouterr()
  assert left.value.code == 0 and printed.out and not printed.err


@pytest.mark.parametrize(('given', 'expected'), [(None, '1'), ('0', '0')])
def test_onnx_runtime_reports_nothing_to_its_maker_unless_the_user_says_so(
  monkeypatch, given, expected
):
  """It reads the variable when it is imported."""
  monkeypatch.setitem(sys.modules, 'onnxruntime', None)
  monkeypatch.delenv('ORT_DISABLE_TELEMETRY', raising=False)
  if given:
    monkeypatch.setenv('ORT_DISABLE_TELEMETRY', given)
  with pytest.raises(UserError, match='onnxruntime'):
    errors.require('onnxruntime', 'to run ONNX files')
  assert os.environ['ORT_DISABLE_TELEMETRY'] == expected
