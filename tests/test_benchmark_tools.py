"""The step benchmark and the tf_keras twin that it measures against."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from nets import convnet_at_digits, resnet_at_cifar10
from pocketsize.quantization.twin import build_twin
from tools.benchmark import rounds, step_time, step_variants

ROOT = pathlib.Path(__file__).parents[1]
needs_references = pytest.mark.skipif(
  not all(map(importlib.util.find_spec, step_time.REFERENCES)),
  reason='tf_keras or tensorflow_model_optimization is not installed',
)


def _randomized(module, **options):
  """A net whose weights are random everywhere, batch norm's positive; outputs are of order one."""
  model = module.ModelHelper(module.ModelHelper.Config(**options)).build()
  rng = np.random.default_rng(5)
  for weight in model.weights:
    if weight.path.endswith(('kernel', 'bias')):
      weight.assign(rng.normal(scale=0.1, size=weight.shape))
    else:
      weight.assign(rng.uniform(0.5, 1.5, size=weight.shape))
  return model


@needs_references
@pytest.mark.parametrize(
  ('module', 'options'),
  [(convnet_at_digits, {}), (resnet_at_cifar10, {}), (resnet_at_cifar10, {'shortcut': 'pad'})],
)
def test_the_twin_computes_the_same(module, options):
  model = _randomized(module, **options)
  twin, _, refused = build_twin(model)
  # Or a step would be compared with one that leaves weights out.
  assert refused == {}
  x = np.random.default_rng(6).normal(size=(3, *model.input_shape[1:])).astype(np.float32)
  np.testing.assert_allclose(twin(x), model(x), atol=1e-4, rtol=1e-4)
  assert np.ptp(model(x), axis=0).min() > 1e-3
  assert twin.count_params() == model.count_params()


@needs_references
@pytest.mark.slow
def test_step_time_by_its_path(tmp_path):
  """Padded shortcut: tfmot has to accept the twin's way to add channels."""
  file = tmp_path / 'steps.json'
  result = subprocess.run(
    [
      sys.executable, 'tools/benchmark/step_time.py', '--rounds=1', '--batch_size=4',
      '--shortcut=pad', '--variants=float,tfmot-quantize', f'--json={file}',
    ],
    cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True,
  )  # fmt: skip
  assert result.returncode == 0, result.stderr
  numbers = json.loads(file.read_text())
  rows = {row['variant']: row for row in numbers['rows']}
  assert list(rows) == ['float', 'tfmot-quantize']
  assert rows['float']['to_float'] == 1.0
  assert rows['tfmot-quantize']['to_float'] > 0
  assert rows['float']['to_tf_keras'] is None
  assert all(name in result.stdout for name in rows)
  assert numbers['batch_size'] == 4


@pytest.mark.slow
@pytest.mark.skipif(
  not importlib.util.find_spec('brevitas'), reason='Brevitas has an environment of its own'
)
def test_step_time_of_brevitas_by_its_path():
  result = subprocess.run(
    [sys.executable, 'tools/benchmark/brevitas_step_time.py', '--rounds=1', '--batch_size=2'],
    cwd=ROOT, capture_output=True, text=True,
  )  # fmt: skip
  assert result.returncode == 0, result.stderr
  assert 'brevitas-8-8' in result.stdout


def test_updates_count_by_their_share():
  """100 and 150 ms a step, 350 with an update, every 50 steps: (49 * 1.5 + 3.5) / 50 = 1.54."""
  rows = rounds.summarize(
    {'float': [0.1, 0.2, 0.1], 'pruned': [0.15, 0.3, 0.15]},
    {'float': [0.1, 0.1], 'pruned': [0.35, 0.35]},
    {'float': None, 'pruned': 50},
    ('float', 'tf_keras'),
  )
  pruned = rows[1]
  assert pruned['median_ms'] == pytest.approx(150)
  assert pruned['update_ms'] == pytest.approx(200)
  assert pruned['to_float'] == pytest.approx(1.5)
  assert pruned['to_float_with_updates'] == pytest.approx(1.54)
  assert pruned['to_tf_keras'] is None
  assert rows[0]['to_float_with_updates'] == 1.0


def test_masks_are_in_force_and_only_update_steps_are_due():
  variant = rounds.Variant(lambda number: None, update_every=100)
  config = step_variants.MagnitudeConfig(
    ratio=step_variants.RATIO, end_step=step_variants.PRUNING_STEPS, update_every=100
  )
  assert config.is_due(variant.number(0, True))
  assert not any(config.is_due(variant.number(index, False)) for index in range(250))
  assert config.ratio_at(rounds.FIRST_STEP) == pytest.approx(0.75, abs=1e-5)
  assert variant.number(98, False) == variant.number(0, False) + 98


@pytest.mark.parametrize(
  ('argument', 'message'),
  [
    ('--variants=float,pytorch', "--variants must be among float, .* Received: 'pytorch'"),
    ('--rounds=0', '--rounds must be .* Received: 0'),
    ('--round=3', 'Unknown command line flag'),
  ],
)
def test_bad_flags_are_one_sentence_and_exit_code_2(argument, message, capsys):
  assert step_time.main(['step_time.py', argument]) == 2
  output = capsys.readouterr()
  assert output.out == ''
  assert len(output.err.splitlines()) == 1
  assert re.search(message, output.err)


@pytest.mark.parametrize('arguments, code', [(['--net=convnet_at_digits'], 0), (['--net=odd'], 2)])
def test_the_benchmark_of_selections_runs(arguments, code):
  done = subprocess.run(
    [sys.executable, '-m', 'tools.benchmark.selection', '--samples=200', *arguments],
    cwd=ROOT,
    text=True,
    capture_output=True,
  )
  assert done.returncode == code, done.stderr
  assert ('convnet' in done.stdout) if code == 0 else ("Received: 'odd'" in done.stderr)


@pytest.mark.parametrize('arguments, code', [(['--net=resnet_at_cifar10'], 0), (['--net=odd'], 2)])
def test_the_benchmark_of_searches_runs(arguments, code):
  done = subprocess.run(
    [
      sys.executable, '-m', 'tools.benchmark.search', '--samples=6', '--batch=4', '--rollouts=2',
      '--bn_samples=4', '--hawq', '--distilled', '--trace_samples=4', '--trace_batch=2',
      '--iterations=2', '--mean_bits=3', *arguments,
    ],
    cwd=ROOT, text=True, capture_output=True,
  )  # fmt: skip
  assert done.returncode == code, done.stderr
  if code == 2:
    assert "Received: 'odd'" in done.stderr
    return
  _, found = (line.split('│') for line in done.stdout.splitlines() if 'resnet_20' in line)
  assert 2.9 < float(found[-2]) <= 3.0
