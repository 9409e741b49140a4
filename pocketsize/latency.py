"""Latency of smaller models, predicted from a table of layers that were timed in their runtime.

The table knows layers with weights only. What lies between them, and how the runtime fits them
together, is seen by running whole files: `pruning.latency_budget` corrects the prediction by that.
"""

import importlib.metadata
import json
import math
import pathlib
import platform

import numpy as np

from pocketsize import report, targets
from pocketsize.errors import UserError
from pocketsize.files import write_json
from pocketsize.layer_timing import LayerTimer

# The float formats, and what runs them.
RUNTIMES = {'tflite': 'ai-edge-litert', 'onnx': 'onnxruntime', 'openvino': 'openvino'}
# What a layer's time depends on, beside the sizes of its input and its counts of channels.
_ARGUMENTS = (
  'kernel_size',
  'strides',
  'padding',
  'output_padding',
  'dilation_rate',
  'groups',
  'depth_multiplier',
  'data_format',
  'equation',
  'output_shape',
)
_COUNTS = ('filters', 'units')
_PLAIN = {'activation': 'linear', 'use_bias': True, 'dtype': 'float32'}


class LatencyTable:
  """Times of layers by their counts of channels, in ms; a layer is timed when first asked for.

  Counts on a grid are timed, others are interpolated; layers that differ in their counts and
  weights only share entries.

  Args:
    format: 'tflite', 'onnx' or 'openvino'.
    path: of the JSON file that keeps the entries; in memory only if None.
    multiple: step of the grid, at least 1; a layer's whole counts belong to the grid too.
    timer: `timer(layer, shape)` gives the ms of a new Keras layer that reads `shape`, without
      batch; `LayerTimer` if None.

  Raises:
    UserError: another format, a `multiple` below 1, or a file of another format, processor or
      version of the runtime.
  """

  def __init__(self, format, path=None, multiple=8, timer=None):
    if format not in RUNTIMES:
      raise UserError(f'`format` must be one of {", ".join(RUNTIMES)}. Received: {format!r}.')
    if multiple < 1:
      raise UserError(f'`multiple` must be at least 1. Received: {multiple}.')
    self.format, self.multiple = format, multiple
    self._timer = timer or LayerTimer(format)
    self._path = None if path is None else pathlib.Path(path)
    runtime = RUNTIMES[format]
    self._origin = {
      'format': format,
      'processor': _processor(),
      'runtime': f'{runtime} {importlib.metadata.version(runtime)}',
    }
    self._entries = self._read() if self._path and self._path.exists() else {}

  def milliseconds(self, layer, shape, inputs=None, outputs=None):
    """Returns the time of one call of a layer like `layer`, bilinear between the grid's points.

    Args:
      layer: a Keras layer of `targets.WEIGHTS_BY_TYPE`.
      shape: of its input without the batch, all channels there.
      inputs, outputs: counts of channels; those of `shape` and of `layer` if None. Depthwise
        layers have no `outputs` of their own.

    Raises:
      UserError: a size in `shape` is unknown, or the layer cannot be exported.
    """
    return self._interpolated(_Call(layer, shape), inputs, outputs)

  def _interpolated(self, call, inputs, outputs):
    step = math.lcm(self.multiple, call.groups)
    return sum(
      in_part * out_part * self._entry(call, in_point, out_point)
      for in_point, in_part in _points(inputs or call.inputs, call.inputs, step, call.groups)
      for out_point, out_part in _points(outputs or call.outputs, call.outputs, step, call.groups)
    )

  def _entry(self, call, inputs, outputs):
    entries = self._entries.setdefault(call.signature, {})
    key = f'{inputs}' if outputs is None else f'{inputs}x{outputs}'
    if key not in entries:
      entries[key] = self._timer(*call.resized(inputs, outputs))
      if self._path:
        content = {**self._origin, 'versions': report.versions(), 'milliseconds': self._entries}
        write_json(self._path, content)
    return entries[key]

  def _read(self):
    try:
      content = json.loads(self._path.read_text())
      found = {key: content[key] for key in self._origin}
      entries = content['milliseconds']
    except (ValueError, KeyError, TypeError) as error:
      raise UserError(
        f'{self._path} is no table of latencies: remove it to time anew. Received: {error!r}.'
      ) from error
    for key, own in self._origin.items():
      if found[key] != own:
        raise UserError(
          f'Latency table {self._path} holds for one {key} only, and here that is {own!r}: give '
          f'another path. Received: {found[key]!r}.'
        )
    return entries


class _Call:
  """What a layer's time depends on: its arguments and the sizes of its input."""

  def __init__(self, layer, shape):
    config = layer.get_config()
    if None in shape:
      raise UserError(
        f"Layer {layer.name!r} cannot be timed: give the model's inputs fixed sizes. "
        f'Received: {tuple(shape)}.'
      )
    self._layer, self._shape = layer, tuple(shape)
    self._axis = 0 if config.get('data_format') == 'channels_first' else len(shape) - 1
    self._count = next((name for name in _COUNTS if name in config), None)
    self.inputs, self.outputs = shape[self._axis], config.get(self._count)
    self.groups = config.get('groups', 1)
    sizes = 'x'.join(map(str, self._shape[: self._axis] + self._shape[self._axis + 1 :]))
    arguments = [f'{name}={config[name]}' for name in _ARGUMENTS if name in config]
    self.signature = ' '.join([type(layer).__name__, *arguments, f'positions={sizes or 1}'])

  def resized(self, inputs, outputs):
    """Returns (new layer, shape of its input) with other counts of channels."""
    config = {key: value for key, value in self._layer.get_config().items() if key != 'name'}
    # EinsumDense says which axes its bias has.
    plain = {key: value for key, value in _PLAIN.items() if key in config}
    counts = {} if outputs is None else {self._count: outputs}
    shape = list(self._shape)
    shape[self._axis] = inputs
    return type(self._layer).from_config({**config, **plain, **counts}), tuple(shape)


def _points(count, whole, step, least):
  """Returns [(point of the grid, its part in `count`)], one or two points."""
  if count is None or count == whole or count % step == 0:
    return [(count, 1.0)]
  below = max(count - count % step, least)
  above = min(count - count % step + step, whole)
  part = (count - below) / (above - below)
  return [(point, share) for point, share in ((below, 1.0 - part), (above, part)) if share]


def _processor():
  """Returns the name of the processor."""
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:
    lines = []
  names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
  return next(iter(names), platform.processor() or platform.machine())


def predicted(channels, keep, table):
  """Returns the latency of `shrink(model, keep)` in ms, the sum over its layers with weights.

  Args:
    channels: a `ChannelGraph`.
    keep: {name of a group: [channels] bool}; groups that are missing are kept whole.
    table: a `LatencyTable`.

  Raises:
    UserError: see `ChannelGraph.dropped` and `LatencyTable.milliseconds`.
  """
  return _predictor(channels, table)(keep)


def relative(channels, table):
  """Returns a function from `keep` to the share of the whole model's predicted latency."""
  predict = _predictor(channels, table)
  whole = predict({})
  return lambda keep: predict(keep) / whole


def _is_depthwise(part):
  return targets.channel_axes(part.layer, part.weight) == (-2, -1)


def _predictor(channels, table):
  """Returns `predicted` as a function of `keep` alone."""
  # A depthwise kernel counts the channels that it reads among those that it makes.
  read = {
    part.layer: part.ids
    for part in channels.slices
    if part.weight in targets.weight_points(part.layer)[:1]
    and (part.role == 'in' or part.axis == -2 and _is_depthwise(part))
  }
  calls = [
    (node.operation, _Call(node.operation, channels.graph.shape(node.inputs[0])[1:]))
    for node in channels.graph.nodes
    if targets.weight_points(node.operation)
  ]

  def predict(keep):
    is_dropped = channels.dropped(keep)

    def kept(ids):
      return int(np.sum(~is_dropped(ids)))

    total = 0.0
    for layer, call in calls:
      ids = read.get(layer)
      inputs = call.inputs if ids is None else kept(ids) * call.inputs // len(ids)
      changed = channels.changes.get(layer, lambda kept: {})(kept)
      outputs = next((changed[name] for name in _COUNTS if name in changed), call.outputs)
      total += table._interpolated(call, inputs, outputs)
    return total

  return predict
