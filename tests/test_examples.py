"""The examples run as they are."""

import pathlib
import re
import subprocess
import sys

import keras
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_transfer_learning_keeps_the_frozen_base(tmp_path):
  done = subprocess.run(
    [
      sys.executable,
      ROOT / 'examples' / 'transfer_learning.py',
      '--epochs=2',
      f'--output_dir={tmp_path}',
    ],
    cwd=ROOT,
    env={'PYTHONPATH': str(ROOT), 'PATH': '/usr/bin:/bin'},
    text=True,
    capture_output=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  figures = {
    name: float(value)
    for name, value in re.findall(r'^([\w ]+): ([\d.]+)(?:,|$)', done.stdout, re.MULTILINE)
  }
  assert set(figures) == {'float model', 'quantized model', 'tflite', 'tflite_int8'}
  # Ten classes: half right is far from chance; one step of 8 bits may turn two images.
  assert figures['float model'] > 0.5
  assert figures['tflite_int8'] == pytest.approx(figures['quantized model'], abs=2.5 / 397)
  model = keras.models.load_model(tmp_path / 'final.keras')
  base = model.get_layer('base')
  assert not base.trainable and not base.trainable_weights
  assert [weight.path for weight in model.trainable_weights] == ['head/kernel', 'head/bias']
