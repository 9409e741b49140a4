"""The integers that a Keras model computes with, and whether files have the same ones."""

import numpy as np
import stored_integers
from keras import layers

from pocketsize import conversion
from pocketsize.conversion.kernels import layout
from pocketsize.quantization.range_quantizer import RangeQuantizer

INT8 = ('tflite_int8', 'onnx_qdq', 'openvino_int8')


def factors(model, path):
  """Returns what the batch norm behind a layer multiplies its output channels by, float64."""
  (node,) = (node for node in model.graph.nodes if node.path == path)
  readers = [reader.operation for reader in model.graph.consumers(node.outputs[0])]
  if not readers:
    return np.ones(node.operation.kernel.shape[-1])
  (layer,) = readers
  assert isinstance(layer, layers.BatchNormalization)
  gamma, variance = (np.array(value, np.float64) for value in (layer.gamma, layer.moving_variance))
  return gamma / np.sqrt(variance + layer.epsilon)


def trained_integers(model, path):
  """Returns (codes, scale) of a kernel, batch norm folded in; scale broadcasts against codes.

  Levels that are halves of a step from zero are odd multiples of half of it, centres multiples of
  the scale of their row.
  """
  (quantizer,) = model.transforms_at(path, 'kernel')
  found = quantizer.codes(model.baked(path, 'kernel'))
  if found.centres is not None:
    scale = quantizer.grid(model.baked(path, 'kernel')).scale
    integers = np.round(found.centres / np.reshape(scale, (-1, 1)))
    assert np.array_equal(integers.astype(np.float32) * np.reshape(scale, (-1, 1)), found.centres)
    codes = np.take_along_axis(integers, found.groups.split(found.codes), axis=1)
    codes = found.groups.join(codes) * np.sign(factors(model, path))
    return codes.astype(np.int8), scale * np.abs(factors(model, path))
  by_row = [np.reshape(row, found.groups.broadcast) for row in (found.zero_point, found.scale)]
  halves = 2 if np.any(found.zero_point % 1.0) else 1
  codes = np.asarray((found.codes - by_row[0]) * halves)
  factor = factors(model, path)
  assert np.array_equal(codes, np.round(codes))
  return (codes * np.sign(factor)).astype(np.int8), by_row[1] / halves * np.abs(factor)


def assert_in(stored, codes, scale, name):
  """Asserts that a file has codes, bit for bit, with their scale; returns their bits in it."""
  for stored_codes, stored_scale, bits in stored.kernels:
    order = layout(codes, stored_codes)
    if order is not None:
      np.testing.assert_array_equal(codes.transpose(order).ravel(), stored_codes.ravel(), name)
      wanted = np.broadcast_to(scale, codes.shape).transpose(order).reshape(stored_codes.shape)
      # A channel that batch norm erases has codes 0 and any scale.
      live = wanted != 0.0
      got = np.broadcast_to(stored_scale, wanted.shape)
      np.testing.assert_allclose(got[live], wanted[live], rtol=3e-7, err_msg=name)
      return bits
  raise AssertionError(f'no kernel has the codes of {name}')


def assert_nearest_in(stored, deployed, factor, name):
  """Asserts that a file has the int8 codes that are nearest to a kernel, by output channel."""
  step = np.abs(deployed).max(axis=tuple(range(deployed.ndim - 1))) / 127.0
  codes = (np.round(deployed / np.where(step > 0, step, 1)) * np.sign(factor)).astype(np.int8)
  assert_in(stored, codes, step * np.abs(factor), name)


def assert_activations_are_those_of(model, stored, format_):
  """Bit for bit; two units in the last place for OpenVINO's files, which have ends of ranges."""
  expected = set()
  for place in model.placements:
    if isinstance(place.transform, RangeQuantizer):
      low, high = place.transform.range()
      scale = (high - low) / 255.0
      expected.add((np.float32(scale), round(-low / scale)))
  assert len(expected) > 2
  ulps = 2 if format_ == 'openvino_int8' else 0
  for some, others in ((expected, stored.activations), (stored.activations, expected)):
    for scale, zero_point in some:
      assert any(
        zero_point == other and abs(scale - near) <= ulps * np.spacing(scale)
        for near, other in others
      ), (format_, scale, zero_point)


def export(model, folder, **options):
  return {
    file.format: (file, stored_integers.read(file.path))
    for file in conversion.export(model, folder, INT8, **options)
  }
