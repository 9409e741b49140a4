"""The report: numbers of a model whose weights are known."""

import io
import json

import keras
import numpy as np
import pytest
from keras import layers
from rich.console import Console
from toys import conv_net, images

import pocketsize
from pocketsize import report
from pocketsize.instrument import instrument


def pruned_and_quantized():
  """conv_net with half the weights dropped; 4 bits inside, 8 at the ends; 'conv1' is not pruned."""
  return pocketsize.compress(
    conv_net(),
    [
      {'algorithm': 'magnitude', 'ratio': 0.5},
      {'algorithm': 'magnitude', 'op_names': ['conv1'], 'exclude': True},
      {'algorithm': 'uniform', 'weight_bits': 4, 'activation_bits': 6},
    ],
    calibration=[images()],
  )


def built(model, stack, **fields):
  return report.build(
    model,
    **{
      'float_model': model.source,
      'names': {'model': 'toy', 'dataset': 'noise', 'learner': 'both'},
      'float_metrics': {'accuracy': 0.75},
      'metrics': {'accuracy': 0.5},
      'bytes_': (4000, 1000),
      'files': [],
      'seconds': {'train': 1.5},
      'command': 'run',
      'skipped': stack.skipped,
      **fields,
    },
  )


def test_the_layers_by_hand():
  """conv0 108 weights at 64 positions, conv1 144 at 16, head 16 and 4 biases; batch norm 4 * 4."""
  entries = {entry['name']: entry for entry in report.layers(pruned_and_quantized()[0], {})}
  assert list(entries) == ['conv0', 'bn0', 'conv1', 'bn1', 'head']
  assert entries['conv0'] == {
    'name': 'conv0',
    'params': 108,
    'macs': 108 * 64,
    'weight_bits': 8,
    'activation_bits': 8,
    'sparsity': 0.5,
    'channels_before': 4,
    'channels_after': 4,
    'skipped_because': None,
  }
  assert (
    entries['bn0']['params'] == 16
    and entries['bn0']['macs'] == 0
    and entries['bn0']['weight_bits'] == 32
  )
  assert (entries['conv1']['weight_bits'], entries['conv1']['activation_bits']) == (4, 6)
  assert (
    entries['head']['weight_bits'],
    entries['head']['activation_bits'],
    entries['head']['sparsity'],
  ) == (8, 8, 0.5)


def test_the_mean_weight_bits_count_each_weight_once():
  """(108 * 8 + 144 * 4 + 16 * 8) / 268."""
  assert report.mean_weight_bits(pruned_and_quantized()[0]) == pytest.approx(
    (108 * 8 + 144 * 4 + 16 * 8) / 268
  )


def test_a_float_model_has_32_bits_everywhere():
  model = pocketsize.instrument(conv_net())
  assert report.mean_weight_bits(model) == 32
  assert {
    (entry['weight_bits'], entry['activation_bits']) for entry in report.layers(model, {})
  } == {(32, 32)}


def test_activation_bits_are_found_behind_a_pool_that_only_moves():
  inputs = keras.Input((8, 8, 3))
  x = layers.MaxPooling2D()(layers.Conv2D(2, 3, name='conv')(inputs))
  model, _ = pocketsize.compress(
    keras.Model(inputs, layers.Dense(2, name='head')(layers.Flatten()(x))),
    [{'algorithm': 'uniform', 'activation_bits': 5, 'end_bits': 0}],
  )
  assert report.activation_bits(model, 'head') == 5


def test_the_whole_report_is_json_and_counts_what_is_left():
  """Zero are 54 of conv0, 8 of head, at first 16 of batch norm and 4 biases; of 304 in all."""
  model, stack = pruned_and_quantized()
  whole = json.loads(json.dumps(built(model, stack)))
  params = 108 + 16 + 144 + 16 + 16 + 4
  assert whole['float'] == {
    'metrics': {'accuracy': 0.75},
    'params': params,
    'macs': 108 * 64 + 144 * 16 + 16,
    'bytes': 4000,
  }
  zeros = sum(int(np.sum(weight == 0)) for weight in pocketsize.strip(model).get_weights())
  assert whole['compressed']['nonzero_params'] == params - zeros
  assert zeros >= 54 + 8 + 16 + 4
  assert whole['compressed']['params'] == params and whole['compressed']['bytes'] == 1000
  assert whole['compressed']['macs'] == whole['float']['macs']
  assert (whole['model'], whole['learner'], whole['command']) == ('toy', 'both', 'run')
  assert whole['versions']['keras'] == keras.__version__


def test_the_plan_is_json_and_names_every_placement():
  model, stack = pruned_and_quantized()
  plan = json.loads(json.dumps(report.plan(model, stack)))
  assert [(place['path'], place['point'], place['transform']) for place in plan['placements']][
    :3
  ] == [
    ('conv0', 'kernel', 'Mask'),
    ('head', 'kernel', 'Mask'),
    ('conv0', 'kernel', 'WeightQuantizer'),
  ]
  assert len(plan['placements']) == len(model.placements) == 2 + 3 + 5
  assert plan['placements'][3]['config']['bits'] == 4


def test_what_one_compressor_takes_is_not_reported_as_left_alone():
  model, stack = pruned_and_quantized()
  assert stack.skipped == {}
  _, both = pocketsize.compress(
    conv_net(),
    [
      {'algorithm': 'magnitude', 'op_names': ['conv0']},
      {'algorithm': 'uniform', 'op_names': ['conv0']},
      {'algorithm': 'uniform', 'op_names': ['head'], 'exclude': True},
    ],
  )
  assert both.skipped == {'conv1': 'no rule names it', 'head': 'no rule names it'}


def test_the_table_has_a_row_for_each_file_and_says_what_was_left_alone():
  model, stack = pocketsize.compress(
    conv_net(), [{'algorithm': 'magnitude', 'op_names': ['conv1']}]
  )
  file = {
    'format': 'tflite',
    'metrics': {'accuracy': 0.625},
    'bytes': 1234,
    'latency_ms': 0.5,
    'max_abs_diff': 0.25,
    'int8_ops': 7,
    'float_ops': 2,
    'note': 'weights of 4 bits as int8',
  }
  text = io.StringIO()
  report.show(built(model, stack, files=[file]), Console(file=text, width=140))
  lines = text.getvalue().splitlines()
  row = next(line for line in lines if 'tflite' in line and '0.6250' in line)
  assert all(cell in row.split() for cell in ('1,234', '0.500', '0.25', '7/2'))
  assert any({'float', '0.7500', '4,000'} <= set(line.split()) for line in lines)
  assert any({'compressed', '0.5000'} <= set(line.split()) for line in lines)
  assert 'tflite: weights of 4 bits as int8' in text.getvalue()
  assert 'Left alone: conv0 (no rule names it), head (no rule names it)' in text.getvalue().replace(
    '\n', ' '
  )


def test_the_packed_file_has_a_line_below_the_table():
  model, stack = pruned_and_quantized()
  packed = {'bytes': 71_234, 'plain_bytes': 83_000, 'bits_per_weight': 2.104, 'note': ''}
  for note, end in (('', ''), ('as float32: conv0', '; as float32: conv0')):
    text = io.StringIO()
    result = built(model, stack, packed={**packed, 'note': note})
    report.show(result, Console(file=text, width=80))
    assert (
      'packed: 71,234 bytes (83,000 before entropy coding), 2.10 bits per weight, read back to the '
      f'last bit{end}\n'
    ) in text.getvalue()
  assert 'packed' not in built(model, stack)


def test_the_table_of_a_resnet_20_fits_80_columns():
  model, stack = pruned_and_quantized()
  file = {
    'format': 'openvino_int8',
    'metrics': {'accuracy': 0.9173},
    'bytes': 1_093_652,
    'latency_ms': 0.247,
    'max_abs_diff': 1.2e-05,
    'int8_ops': 32,
    'float_ops': 0,
    'note': '',
  }
  result = built(model, stack, files=[file])
  for part in (result['float'], result['compressed']):
    part |= {'params': 271_098, 'macs': 40_551_040, 'bytes': 1_340_387}
  text = io.StringIO()
  report.show(result, Console(file=text, width=120))
  table = text.getvalue().splitlines()[:6]
  assert max(len(line.rstrip()) for line in table) < 80


def test_layers_whose_names_differ_by_a_slash_only_are_not_mixed_up():
  inner = keras.Input((8, 8, 3))
  base = keras.Model(inner, keras.layers.Conv2D(4, 3, name='conv')(inner), name='base')
  inputs = keras.Input((8, 8, 3))
  model = keras.Model(inputs, keras.layers.Conv2D(7, 3, name='base_conv')(base(inputs)))
  entries = report.layers(instrument(model), {})
  assert [(entry['channels_before'], entry['channels_after']) for entry in entries] == [
    (4, 4),
    (7, 7),
  ]
