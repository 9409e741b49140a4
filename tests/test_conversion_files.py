"""Exported files, run in their runtimes, against Keras."""

import functools
import os
import pathlib
import subprocess
import sys

import conversion_models as models
import keras
import numpy as np
import onnx
import openvino
import pytest
from ai_edge_litert.interpreter import Interpreter

from pocketsize import conversion, targets
from pocketsize.conversion.kernels import layout
from pocketsize.conversion.processor import overflows
from pocketsize.conversion.tflite_graph import TfliteGraph
from pocketsize.graph import Graph
from pocketsize.instrument import instrument, strip
from pocketsize.quantization.codebook import Codebook
from pocketsize.quantization.dorefa import Dorefa
from pocketsize.quantization.learned import LearnedRange, LearnedScale
from pocketsize.transform import Placement, Transform

ROOT = pathlib.Path(__file__).parent.parent
X = models.samples()
INT8 = ('tflite_int8', 'onnx_qdq', 'openvino_int8')
FLOAT = ('tflite', 'onnx', 'openvino')


@pytest.fixture(autouse=True)
def _seed():
  keras.utils.set_random_seed(0)


def build(name, **kwargs):
  return models.quantized(models.randomized(models.BUILDERS[name]()), **kwargs)


def export(model, folder, formats):
  return {file.format: file for file in conversion.export(model, folder, formats)}


def run(file):
  return conversion.open_file(file.path)(X)[0]


def outputs(model):
  return np.asarray(model(X, training=False))


def int8_constants(path):
  """Returns the codes of the kernels in a .tflite or .onnx file."""
  if path.suffix == '.tflite':
    interpreter = Interpreter(str(path))
    interpreter.allocate_tensors()
    kept = [
      detail
      for detail in interpreter.get_tensor_details()
      if detail['dtype'] == np.int8 and detail['quantization_parameters']['scales'].size > 1
    ]
    return [interpreter.get_tensor(detail['index']) for detail in kept]
  arrays = [onnx.numpy_helper.to_array(constant) for constant in onnx.load(path).graph.initializer]
  return [
    array.astype(np.int8)
    for array in arrays
    if array.dtype.name in ('int4', 'int8') and array.ndim > 1
  ]


def trained_codes(model):
  """Yields (path, codes) of the kernels, with the signs of the batch norms behind them."""
  for path, layer in model.graph.layers.items():
    for point in targets.weight_points(layer):
      deployed = model.baked(path, point)
      scale = model.transforms_at(path, point)[-1].grid(deployed).scale
      codes = np.round(deployed / np.where(scale > 0, scale, 1)).astype(np.int8)
      node = next(node for node in model.graph.nodes if node.path == path)
      followers = model.graph.consumers(node.outputs[0])
      if followers and isinstance(followers[0].operation, keras.layers.BatchNormalization):
        sign = np.sign(np.array(followers[0].operation.gamma)).astype(np.int8)
        axes = targets.channel_axes(layer, point)
        codes = codes * (
          sign[:, None] if axes == (-2,) else sign.reshape(codes.shape[-len(axes) :])
        )
      yield path, codes


# ONNX Runtime has no integer ConvTranspose; OpenVINO counts the rounding of a pooling at the end.
FLOAT_OPS = {('transposed', 'onnx_qdq'): 1, ('depthwise', 'openvino_int8'): 1}


@pytest.mark.parametrize(
  ('name', 'kinds'),
  [
    *((name, {}) for name in models.BUILDERS if name != 'own_activations'),
    ('plain', {'weights': LearnedScale, 'activations': LearnedRange}),
    ('depthwise', {'bits': 2, 'weights': functools.partial(Codebook, centre_bits=8)}),
  ],
)
def test_int8_files_compute_what_keras_computes(name, kinds, tmp_path):
  model = build(name, **kinds)
  files = export(model, tmp_path, INT8)
  expected, step = outputs(model), models.output_step(model)
  # All round biases to int32, so an output in a hundred of each layer is one step off, and steps
  # add up where branches meet. OpenVINO adds inside the convolution without rounding the summand
  # first: up to 5 steps in the residual net, over five seeds.
  steps_off = 2 if name in ('residual', 'concatenation') else 1
  farthest = {'tflite_int8': steps_off, 'onnx_qdq': steps_off, 'openvino_int8': 2 * steps_off}
  farthest['openvino_int8'] += 2 * (name == 'residual')
  for format_, file in files.items():
    steps = np.abs(run(file) - expected) / step
    if not overflows(format_):
      assert steps.max() < farthest[format_] + 0.01
      assert steps.mean() < (2.0 if (name, format_) == ('residual', 'openvino_int8') else 0.5)
    int8_ops, float_ops = conversion.count_ops(file.path)
    assert int8_ops >= 2
    assert float_ops == FLOAT_OPS.get((name, format_), 0)


def test_layers_with_activations_of_their_own_run_in_int8(tmp_path):
  """LiteRT rounds SiLU and softmax to 8 bits; the other two compute activations in float."""
  model = build('own_activations')
  expected = outputs(model)
  for format_, file in export(model, tmp_path, INT8).items():
    np.testing.assert_allclose(run(file), expected, atol=2 / 256)
    int8_ops, float_ops = conversion.count_ops(file.path)
    assert int8_ops >= 3
    assert float_ops == {'tflite_int8': 0, 'onnx_qdq': 3, 'openvino_int8': 1}[format_]


@pytest.mark.slow
def test_the_same_model_gives_the_same_files(tmp_path):
  """Whatever the process did before, and however Python orders its sets; it is never forked.

  OpenVINO reported to its maker from forks, which copy what a large process has in memory.
  """
  build('residual', bits=4).save(tmp_path / 'model.keras')
  program = (
    'import os, sys, pocketsize\n'
    'forks = []\n'
    'os.register_at_fork(before=lambda: forks.append(1))\n'
    'from pocketsize.saving import load_model\n'
    'for folder in sys.argv[2:]: pocketsize.export(load_model(sys.argv[1]), folder)\n'
    'assert not forks'
  )
  folders = [tmp_path / name for name in 'abc']
  for seed, made in (('1', folders[:2]), ('2', folders[2:])):
    subprocess.run(
      [sys.executable, '-c', program, tmp_path / 'model.keras', *made],
      env={**os.environ, 'PYTHONHASHSEED': seed, 'PYTHONPATH': str(ROOT)},
      check=True,
      capture_output=True,
    )
  for path in folders[0].iterdir():
    for other in folders[1:]:
      assert path.read_bytes() == (other / path.name).read_bytes(), path.name


@pytest.mark.parametrize('name', models.BUILDERS)
@pytest.mark.parametrize(
  ('bits', 'kinds'),
  [
    (8, {}),
    (4, {}),
    (4, {'weights': LearnedScale, 'activations': LearnedRange}),
    (3, {'weights': Dorefa}),
  ],
  ids=['8', '4', '4-learned', '3-dorefa'],
)
def test_files_hold_the_codes_of_training(name, bits, kinds, tmp_path):
  model = build(name, bits=bits, **kinds)
  for file in export(model, tmp_path, ('tflite_int8', 'onnx_qdq')).values():
    stored = int8_constants(file.path)
    for path, codes in trained_codes(model):
      assert any(layout(codes, array) for array in stored), path


@pytest.mark.parametrize('name', models.BUILDERS)
def test_float_files_compute_what_the_stripped_model_computes(name, tmp_path):
  model = build(name)
  expected = outputs(strip(model))
  files = export(model, tmp_path, FLOAT if name in ('depthwise', 'residual') else FLOAT[:2])
  for file in files.values():
    np.testing.assert_allclose(run(file), expected, atol=1e-5)
    assert conversion.count_ops(file.path)[0] == 0


def test_the_batch_may_differ_and_an_openvino_file_has_two_parts(tmp_path):
  model = build('plain')
  for file in conversion.export(model, tmp_path):
    runner = conversion.open_file(file.path)
    several = runner(X)[0]
    np.testing.assert_allclose(
      np.concatenate([runner(X[:5])[0], runner(X[5:])[0]]), several, atol=1e-5
    )
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {
    'model.tflite',
    'model_int8.tflite',
    'model.onnx',
    'model_qdq.onnx',
    'model.xml',
    'model.bin',
    'model_int8.xml',
    'model_int8.bin',
  }


def test_weights_alone_quantized_compute_in_float(tmp_path):
  model = build('residual', activation_bits=None)
  for file in export(model, tmp_path, INT8).values():
    np.testing.assert_allclose(run(file), outputs(model), atol=1e-5)
    assert 'computed in float' in file.note
    assert conversion.count_ops(file.path)[0] == 0
    if file.path.suffix != '.xml':
      assert len(int8_constants(file.path)) == 7


@pytest.mark.parametrize(
  'bits,words', [(1, '1-bit weights as int'), (12, '12-bit weights as float32')]
)
def test_other_bits_export_as_the_nearest_and_say_so(bits, words, tmp_path):
  model = build('plain', bits=bits)
  for format_, file in export(model, tmp_path, INT8).items():
    assert words in file.note
    steps = np.abs(run(file) - outputs(model)) / models.output_step(model)
    assert steps.max() < 2.01
    int8_ops, float_ops = conversion.count_ops(file.path)
    # Beside 3 layers with weights there is the max pooling.
    assert (int8_ops, float_ops) == ((4, 0) if bits < 9 else (1, 3)), format_


def test_activations_of_more_than_eight_bits_stay_float(tmp_path):
  model = build('plain', activation_bits=12)
  for file in export(model, tmp_path, INT8[:2]).values():
    assert '12-bit activations as float32 (image and 3 more)' in file.note
    assert conversion.count_ops(file.path)[0] == 0
    np.testing.assert_allclose(run(file), outputs(model), atol=0.02)


def test_activations_of_less_than_eight_bits_get_eight_over_their_range(tmp_path):
  model = build('plain', activation_bits=4)
  file = export(model, tmp_path, ['tflite_int8'])['tflite_int8']
  assert '4-bit activations as 8 bits over the same range (image and 3 more)' in file.note
  assert conversion.count_ops(file.path) == (4, 0)
  # The file rounds to finer steps, so it differs by a few of the model's 15.
  assert np.abs(run(file) - outputs(model)).max() < 4 * 17 * models.output_step(model)


def test_buckets_export_by_channel(tmp_path):
  model = build('plain', granularity='bucket')
  file = export(model, tmp_path, ['tflite_int8'])['tflite_int8']
  assert 'groups that no format has' in file.note
  assert (np.abs(run(file) - outputs(model)) / models.output_step(model)).max() < 5


def test_a_layer_left_float_amid_int8(tmp_path):
  model = models.randomized(models.BUILDERS['plain']())
  quantized = models.quantized(model)
  kept = [
    place for place in quantized.placements if place[:2] != (Graph(model).nodes[4].path, 'kernel')
  ]
  partly = instrument(model, kept)
  for file in export(partly, tmp_path, INT8).values():
    assert conversion.count_ops(file.path) == (3, 1)
    steps = np.abs(run(file) - outputs(partly)) / models.output_step(partly)
    assert steps.max() < 1.01 or overflows(file.format)


class _Mask(Transform):
  """Keeps the given share of a kernel's largest weights."""

  order = 10

  def __init__(self, kernel, density):
    super().__init__()
    self.mask = np.float32(np.abs(kernel) >= np.quantile(np.abs(kernel), 1.0 - density))

  def call(self, x, training=None):
    return x * self.mask


def _stored_zeros(path):
  """Returns the number of exact zeros in the kernels of a file."""
  if path.suffix == '.tflite':
    arrays = [array for _, array in TfliteGraph(path.read_bytes()).constants()]
  elif path.suffix == '.onnx':
    arrays = [
      onnx.numpy_helper.to_array(constant) for constant in onnx.load(path).graph.initializer
    ]
  else:
    ops = openvino.Core().read_model(path).get_ops()
    arrays = [op.data for op in ops if op.get_type_name() == 'Constant']
  return sum(int((array == 0).sum()) for array in arrays if array.size > 100)


@pytest.mark.parametrize('bits', [None, 8])
def test_sparse_kernels_have_exact_zeros_in_every_file(bits, tmp_path):
  model = models.randomized(models.BUILDERS['plain']())
  masks = []
  for path, layer in targets.weighted_layers(Graph(model)).items():
    masks.append(Placement(path, 'kernel', _Mask(np.array(layer.kernel), density=0.25)))
  sparse = models.quantized(model, bits=bits, activation_bits=bits, masks=masks)
  zeros = sum(
    int((sparse.baked(path, 'kernel') == 0).sum()) for path in targets.weighted_layers(sparse.graph)
  )
  files = conversion.export(sparse, tmp_path)
  assert len(files) == (6 if bits else 3)
  for file in files:
    assert _stored_zeros(file.path) >= zeros > 0.74 * 3000


def test_a_channel_that_batch_norm_erases_keeps_its_bias(tmp_path):
  model = models.randomized(models.BUILDERS['plain']())
  for layer in model.layers:
    if isinstance(layer, keras.layers.BatchNormalization):
      gamma = np.array(layer.gamma)
      gamma[1:4] = 1e-9, -1e-12, 1e-30
      layer.gamma.assign(gamma)
  quantized = models.quantized(model)
  for file in export(quantized, tmp_path, INT8).values():
    steps = np.abs(run(file) - outputs(quantized)) / models.output_step(quantized)
    assert steps.max() < 1.01 or overflows(file.format)


def test_a_layer_called_twice_and_a_batch_norm_that_cannot_fold(tmp_path):
  inputs = keras.Input((12, 12, 3), name='image')
  shared = keras.layers.Conv2D(3, 3, padding='same')
  x = keras.layers.BatchNormalization()(keras.layers.ReLU()(shared(shared(inputs))))
  model = models.quantized(models.randomized(keras.Model(inputs, x)))
  expected, stripped = outputs(model), outputs(strip(model))
  files = export(model, tmp_path, ('tflite', 'onnx', 'tflite_int8', 'onnx_qdq'))
  for format_, file in files.items():
    if 'int8' in format_ or 'qdq' in format_:
      assert (np.abs(run(file) - expected) / models.output_step(model)).max() < 2.01
    else:
      np.testing.assert_allclose(run(file), stripped, atol=1e-5)


def test_several_inputs_and_outputs_keep_names_and_order(tmp_path):
  left, right = keras.Input((4,), name='zebra'), keras.Input((6,), name='ant')
  first = keras.layers.Dense(3, name='yak')(keras.layers.Concatenate()([left, right]))
  model = keras.Model([left, right], [first, keras.layers.Dense(2, name='bee')(first)])
  rng = np.random.default_rng(0)
  arrays = [rng.normal(size=(5, 4)).astype(np.float32), rng.normal(size=(5, 6)).astype(np.float32)]
  expected = [np.asarray(y) for y in model(arrays)]
  for file in conversion.export(model, tmp_path):
    for y, wanted in zip(conversion.open_file(file.path)(*arrays), expected, strict=True):
      np.testing.assert_allclose(y, wanted, atol=1e-5)


def test_a_saved_quantized_model_exports_the_same_file(tmp_path):
  model = build('nested')
  model.save(tmp_path / 'quantized.keras')
  again = keras.models.load_model(tmp_path / 'quantized.keras')
  first = export(model, tmp_path / 'a', ['tflite_int8'])['tflite_int8'].path.read_bytes()
  assert export(again, tmp_path / 'b', ['tflite_int8'])['tflite_int8'].path.read_bytes() == first
