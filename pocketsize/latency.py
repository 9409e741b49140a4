"""Latency of smaller models, predicted from a table of layers that were timed in their runtime.

The table knows layers with weights only. What lies between them, and how the runtime fits them
together, is seen by running whole files: `pruning.latency_budget` corrects the prediction by that.
"""

import functools
import importlib.metadata
import math
import pathlib
import platform
from typing import NamedTuple

import numpy as np

from pocketsize import targets
from pocketsize.errors import UserError
from pocketsize.latency_files import TableFile, merged
from pocketsize.layer_timing import COUNTS, Call, LayerTimer

# The float formats, and what runs them.
RUNTIMES = {'tflite': 'ai-edge-litert', 'onnx': 'onnxruntime', 'openvino': 'openvino'}
# The same of the formats whose layers have weights and activations of 8 bits.
INTEGER_RUNTIMES = {
  'tflite_int8': 'ai-edge-litert',
  'onnx_qdq': 'onnxruntime',
  'openvino_int8': 'openvino',
}


# Of the grid of a layer's counts, at most: with pairs of them a layer has some 300 entries.
_STEPS = 16


class LatencyTable:
  """Times of layers by their counts of channels, in ms; a layer is timed when first asked for.

  Counts on a grid are timed, others are interpolated; layers that differ in their counts and
  weights only share entries.

  Args:
    format: one of `RUNTIMES` or `INTEGER_RUNTIMES`.
    path: of the JSON file that keeps the entries; in memory only if None.
    known: of another such file, of any nets: what it has is not timed again, and it gets what it
      lacks. Where both have an entry that of `path` counts.
    multiple: step of the grid, at least 1; of layers with more than 16 steps to a whole count so
      many times it that there are 16. Whole counts belong to the grid too.
    timer: `timer(layer, shape)` gives the ms of a new Keras layer that reads `shape`, without
      batch; `LayerTimer` if None.
    is_complete: the file at `path` has all layers that will be asked for: none is timed.

  Raises:
    UserError: another format, a `multiple` below 1, a file of another format, processor or version
      of the runtime, or a complete file that is missing.
  """

  def __init__(self, format, path=None, multiple=8, timer=None, is_complete=False, known=None):
    runtimes = {**RUNTIMES, **INTEGER_RUNTIMES}
    if format not in runtimes:
      raise UserError(f'`format` must be one of {", ".join(runtimes)}. Received: {format!r}.')
    if multiple < 1:
      raise UserError(f'`multiple` must be at least 1. Received: {multiple}.')
    self.format, self.multiple = format, multiple
    self._timer = timer or LayerTimer(format)
    runtime = runtimes[format]
    origin = {
      'format': format,
      'processor': _processor(),
      'runtime': f'{runtime} {importlib.metadata.version(runtime)}',
    }
    self._path, self._is_complete = path, is_complete
    self._files = [TableFile(each, origin) for each in (known, path) if each is not None]
    if is_complete and not (path and pathlib.Path(path).exists()):
      raise UserError(
        f'A latency table that is complete must be a file that is there. Received: {path}.'
      )
    self._entries = merged(*(file.read() for file in self._files))
    if known and path and self._entries:
      # Now, so that a later start finds the times of this one, whatever becomes of the other file.
      self._keep()

  def milliseconds(self, layer, shape, inputs=None, outputs=None):
    """Returns the time of one call of a layer like `layer`, bilinear between the grid's points.

    Args:
      layer: a Keras layer of `targets.WEIGHTS_BY_TYPE`.
      shape: of its input without the batch, all channels there.
      inputs, outputs: counts of channels; those of `shape` and of `layer` if None. Depthwise
        layers have no `outputs` of their own.

    Raises:
      UserError: a size in `shape` is unknown, the layer cannot be exported, or it is missing in a
        complete table.
    """
    return self._interpolated(Call(layer, shape), inputs, outputs)

  def _interpolated(self, call, inputs, outputs):
    in_step, out_step = self._steps(call)
    return sum(
      in_part * out_part * self._entry(call, in_point, out_point)
      for in_point, in_part in _points(inputs or call.inputs, call.inputs, in_step, call.groups)
      for out_point, out_part in _points(
        outputs or call.outputs, call.outputs, out_step, call.groups
      )
    )

  def _steps(self, call):
    """Returns the grid's steps of inputs and of outputs, 1 where a layer has no such count."""
    least = math.lcm(self.multiple, call.groups)
    return [
      least * math.ceil(whole / (_STEPS * least)) if whole else 1
      for whole in (call.inputs, call.outputs)
    ]

  def _entry(self, call, inputs, outputs):
    entries = self._entries.setdefault(call.signature, {})
    key = f'{inputs}' if outputs is None else f'{inputs}x{outputs}'
    if key not in entries:
      if self._is_complete:
        raise UserError(
          f'Latency table {self._path} is of another net: it has no layer like {call.name!r} '
          f'({call.signature}, channels {key}). Give another path, or none to time the layers.'
        )
      entries[key] = self._timer(*call.resized(inputs, outputs))
      self._keep()
    return entries[key]

  def _keep(self):
    for file in self._files:
      file.add(self._entries)


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


class SizedCall(NamedTuple):
  """One call of a layer with weights, by how many channels it reads and makes.

  Attributes:
    inputs, outputs: functions from `kept`, which counts the kept ones among ids, to the channels
      that the layer then reads and makes; None for outputs that follow from the inputs.
    milliseconds: function from both counts to the time of the call.
    steps: pair of those of the table's grid, between whose points the time is bilinear.
  """

  inputs: object
  outputs: object
  milliseconds: object
  steps: tuple


def sized_calls(channels, table):
  """Returns a `SizedCall` for each call of a layer with weights.

  Args:
    channels: a `ChannelGraph`.
    table: a `LatencyTable`.

  Raises:
    UserError: an unknown size of a layer's input.
  """
  # A depthwise kernel counts the channels that it reads among those that it makes.
  read = {
    part.layer: part.ids
    for part in channels.slices
    if part.weight in targets.weight_points(part.layer)[:1]
    and (part.role == 'in' or part.axis == -2 and _is_depthwise(part))
  }
  return [
    _sized(channels, table, node, read.get(node.operation))
    for node in channels.graph.nodes
    if targets.weight_points(node.operation)
  ]


def _sized(channels, table, node, read):
  call = Call(node.operation, channels.graph.shape(node.inputs[0])[1:])

  def inputs(kept):
    return call.inputs if read is None else kept(read) * call.inputs // len(read)

  def outputs(kept):
    changed = channels.changes.get(node.operation, lambda kept: {})(kept)
    return next((changed[name] for name in COUNTS if name in changed), call.outputs)

  return SizedCall(
    inputs, outputs, functools.partial(table._interpolated, call), tuple(table._steps(call))
  )


def _predictor(channels, table):
  """Returns `predicted` as a function of `keep` alone."""
  calls = sized_calls(channels, table)

  def predict(keep):
    is_dropped = channels.dropped(keep)

    def kept(ids):
      return int(np.sum(~is_dropped(ids)))

    return sum(call.milliseconds(call.inputs(kept), call.outputs(kept)) for call in calls)

  return predict
