"""Verification of files with several inputs or outputs, of any size, integers or not finite."""

import json
import types

import keras
import numpy as np
import pytest
from keras import layers

from learners import results
from pocketsize import conversion
from pocketsize.errors import UserError
from pocketsize.instrument import instrument

RNG = np.random.default_rng(0)
FORMATS = ('tflite', 'onnx', 'openvino')


class Kept:
  """An evaluator that keeps what it gets."""

  def reset(self):
    self.outputs = []

  def update(self, y, outputs):
    self.outputs.append(outputs)

  def result(self):
    return {'batches': float(len(self.outputs))}


def verified(model, folder, x, reference, formats=FORMATS):
  """Returns the entries of the files of a model, on two batches."""
  arrays = x if isinstance(x, tuple) else (x,)
  batches = []
  for part in (slice(0, 3), slice(3, None)):
    batch = tuple(array[part] for array in arrays)
    y = (np.zeros(len(batch[0])), np.zeros(len(batch[0])), np.zeros(len(batch[0])))
    batches.append((batch if isinstance(x, tuple) else batch[0], y))
  return conversion.verify_files(
    conversion.export(model, folder, formats),
    lambda: batches,
    {False: reference},
    Kept(),
    latency_rounds=1,
  )


def two_of_each():
  left, right = keras.Input((5,), name='left'), keras.Input((4,), name='right')
  x = layers.Dense(4)(left) + right
  return keras.Model([left, right], [layers.Dense(2)(x), layers.Dense(3)(x)])


def test_several_inputs_and_outputs(tmp_path):
  model = two_of_each()
  x = tuple(RNG.normal(size=(8, size)).astype(np.float32) for size in (5, 4))
  reference = [np.array(y) for y in model(list(x))]
  for entry in verified(model, tmp_path, x, reference):
    assert entry['max_abs_diff'] < 1e-5 and entry['metrics'] == {'batches': 2.0}
  reference[1][7, 2] += 0.5
  (entry,) = verified(model, tmp_path, x, reference, ['onnx'])
  assert entry['max_abs_diff'] == pytest.approx(0.5, abs=1e-5)
  with pytest.raises(
    UserError, match=r'Received: shapes \(8, 2\), \(7, 3\), and \(5, 2\), \(5, 3\)'
  ):
    verified(model, tmp_path, x, [reference[0], reference[1][:7]], ['onnx'])


def test_a_run_evaluates_several_inputs_and_outputs(tmp_path):
  model = instrument(two_of_each())
  x = tuple(RNG.normal(size=(8, size)).astype(np.float32) for size in (5, 4))
  batches = [(tuple(array[part] for array in x), np.zeros(4)) for part in np.split(np.arange(8), 2)]
  evaluator = Kept()
  evaluator.reset()
  run = results.Results(
    tmp_path,
    'full-prec',
    types.SimpleNamespace(evaluator=lambda: evaluator),
    types.SimpleNamespace(eval_split='test', batch_size_eval=4),
    types.SimpleNamespace(
      load=lambda split, batch: types.SimpleNamespace(as_numpy_iterator=lambda: iter(batches))
    ),
  )
  metrics, outputs = run._evaluate(model)
  assert metrics == {'batches': 2.0}
  for y, expected in zip(outputs, model(list(x)), strict=True):
    np.testing.assert_allclose(y, expected, atol=1e-6)


def test_inputs_of_any_size(tmp_path):
  inputs = keras.Input((None, None, 3))
  outputs = layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3)(inputs))
  model = keras.Model(inputs, outputs)
  x = RNG.normal(size=(8, 9, 7, 3)).astype(np.float32)
  for entry in verified(model, tmp_path, x, np.asarray(model(x))):
    assert entry['max_abs_diff'] < 1e-5 and entry['latency_ms'] > 0.0
    assert entry['float_ops'] == 2
    runner = conversion.open_file(entry['path'])
    assert runner.shapes == [(None, None, None, 3)]
    np.testing.assert_allclose(runner(x[:, 1:])[0], model(x[:, 1:]), atol=1e-5)
    with pytest.raises(UserError, match=r'\(None, None, None, 3\)\]. Received: \[\(8, 9, 7, 2\)\]'):
      runner(x[..., 1:])
    with pytest.raises(UserError, match='Inputs of any size have no latency of their own'):
      conversion.latency([entry['path']], 1)
    assert conversion.latency([entry['path']], 1, shapes=[(5, 6, 3)])[0] > 0.0


def test_integer_inputs(tmp_path):
  inputs = keras.Input((5,), dtype='int32')
  outputs = layers.Dense(2)(layers.Flatten()(layers.Embedding(10, 4)(inputs)))
  model = keras.Model(inputs, outputs)
  x = RNG.integers(0, 10, (8, 5))
  for entry in verified(model, tmp_path, x, np.asarray(model(x))):
    assert entry['max_abs_diff'] < 1e-5 and entry['latency_ms'] > 0.0
    with pytest.raises(UserError, match='takes arrays of int32. Received: float64'):
      conversion.open_file(entry['path'])(x / 2)


def test_outputs_that_are_not_finite(tmp_path):
  inputs = keras.Input((3,))
  model = keras.Model(inputs, keras.ops.log(inputs))
  x = np.array([[1.0, 0.0, -1.0]] * 4, np.float32)
  same = np.array([[0.0, -np.inf, np.nan]] * 4, np.float32)
  for reference, difference in (
    (same, 0.0),
    (np.where(np.isnan(same), np.float32(2.0), same), np.nan),
    (np.where(np.isinf(same), np.float32(2.0), same), np.inf),
  ):
    (entry,) = verified(model, tmp_path, x, reference, ['onnx'])
    np.testing.assert_equal(entry['max_abs_diff'], difference)
    assert ('not finite' in entry['note']) == (difference != 0.0)
    written = json.dumps(results._valid(entry), allow_nan=False)
    shown = {0.0: 0.0, np.inf: 'Infinity'}.get(difference, 'NaN')
    assert json.loads(written)['max_abs_diff'] == shown
