"""What a compression did: plan.json, report.json (docs/report.md) and the table on the screen."""

import importlib.metadata
import platform

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from pocketsize import cost, targets
from pocketsize.graph import Graph, inlined
from pocketsize.quantization.calibrated import Calibrated
from pocketsize.quantization.fusion import MOVING
from pocketsize.quantization.kernel_quantizer import KernelQuantizer
from pocketsize.quantization.placement import JOINING

FLOAT_BITS = 32
PACKAGES = (
  'pocketsize',
  'tensorflow',
  'keras',
  'numpy',
  'tf2onnx',
  'onnx',
  'onnxruntime',
  'openvino',
  'ai-edge-litert',
)


def plan(model, stack):
  """Returns what `stack` decided for an `Instrumented` model, as JSON values.

  {'placements': [{path, point, transform, config}], 'skipped': {path: reason}}
  """
  return {
    'placements': [
      {
        'path': path,
        'point': point,
        'transform': type(transform).__name__,
        'config': transform.get_config(),
      }
      for path, point, transform in model.placements
    ],
    'skipped': stack.skipped,
  }


def weight_bits(model, path):
  """Returns the bits of a layer's weights in an `Instrumented` model; 32 for float."""
  bits = [
    transform.bits
    for place, _, transform in model.placements
    if place == path and isinstance(transform, KernelQuantizer) and transform.is_on
  ]
  return max(bits, default=FLOAT_BITS)


def activation_bits(model, path):
  """Returns the bits of a layer's first input in an `Instrumented` model; 32 for float."""
  node, point = next(node for node in model.graph.nodes if node.path == path), 'input'
  while True:
    bits = [
      transform.bits
      for transform in model.transforms_at(node.path, point)
      if isinstance(transform, Calibrated) and transform.is_on
    ]
    if bits:
      return bits[-1]
    moves = type(node.operation).__name__ in MOVING | JOINING
    if not node.inputs or (point == 'output' and not moves):
      return FLOAT_BITS
    node, point = model.graph.producer(node.inputs[0]), 'output'


def layers(model, skipped, float_graph=None):
  """Returns report['layers'] of an `Instrumented` model.

  Args:
    skipped: {path: reason} of the layers that a compressor left alone.
    float_graph: `Graph` of the model before compression, if channels were dropped since.
  """
  deployed = model.deployed()
  before = inlined(
    {layer.name: layer.channels for layer in cost.layer_costs(float_graph or model.graph)}
  )
  entries = []
  for layer in cost.layer_costs(model.graph):
    kernels = _kernels(model.graph.layers[layer.name], deployed[layer.name])
    weights = np.concatenate([np.ravel(kernel) for kernel in kernels]) if kernels else None
    entries.append(
      {
        'name': layer.name,
        'params': layer.params,
        'macs': layer.macs,
        'weight_bits': weight_bits(model, layer.name),
        'activation_bits': activation_bits(model, layer.name),
        'sparsity': round(1.0 - np.count_nonzero(weights) / weights.size, 6) if kernels else 0.0,
        'channels_before': before[layer.name],
        'channels_after': layer.channels,
        'skipped_because': skipped.get(layer.name),
      }
    )
  return entries


def _kernels(layer, arrays):
  """Returns those of the arrays of a layer's weights that can be compressed."""
  points = {id(getattr(layer, point)) for point in targets.weight_points(layer)}
  return [
    array for weight, array in zip(layer.weights, arrays, strict=True) if id(weight) in points
  ]


def mean_weight_bits(model):
  """Returns the mean bits of all weights that can be compressed, each weight counting once."""
  sizes = {
    path: sum(np.prod(getattr(layer, point).shape) for point in targets.weight_points(layer))
    for path, layer in targets.weighted_layers(model.graph).items()
  }
  return float(
    sum(size * weight_bits(model, path) for path, size in sizes.items())
    / max(sum(sizes.values()), 1)
  )


def versions():
  """Returns {package: version} of what computes the numbers, and Python's."""
  found = {'python': platform.python_version()}
  for package in PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def build(
  model,
  *,
  float_model,
  names,
  float_metrics,
  metrics,
  bytes_,
  files,
  seconds,
  command,
  pruned=None,
  skipped=None,
  packed=None,
):
  """Returns the report, as JSON values.

  Args:
    model: `Instrumented`, trained.
    float_model: the Keras model before compression.
    names: {'model': ..., 'dataset': ..., 'learner': ...}.
    float_metrics, metrics: {name: value} of the float model and of `model`.
    bytes_: (float, compressed) sizes on disk of the two as .keras files.
    files: entries of `conversion.verify_files`.
    seconds: {phase: seconds}.
    command: the command line.
    pruned: (Keras model, its metrics) after channels were dropped and before it was trained, or
      None.
    skipped: {path: reason}.
    packed: what `packed.verify` says of the packed file, or None.
  """
  weights = [array for arrays in model.deployed().values() for array in arrays]
  parts = {} if pruned is None else {'pruned': _part(*pruned)}
  return {
    **names,
    'float': {**_part(float_model, float_metrics), 'bytes': bytes_[0]},
    **parts,
    'compressed': {
      'metrics': metrics,
      'params': sum(weight.size for weight in weights),
      'nonzero_params': cost.nonzero(weights),
      'macs': cost.macs(model.graph),
      'mean_weight_bits': round(mean_weight_bits(model), 4),
      'bytes': bytes_[1],
    },
    'files': files,
    **({} if packed is None else {'packed': packed}),
    'layers': layers(model, skipped or {}, Graph(float_model)),
    'seconds': seconds,
    'command': command,
    'versions': versions(),
  }


def _part(model, metrics):
  return {
    'metrics': metrics,
    'params': model.count_params(),
    'macs': cost.macs(Graph(model)),
  }


def _packed_line(packed):
  return (
    f'packed: {packed["bytes"]:,} bytes ({packed["plain_bytes"]:,} before entropy coding), '
    f'{packed["bits_per_weight"]:.2f} bits per weight, read back to the last bit'
    + (f'; {packed["note"]}' if packed['note'] else '')
  )


def show(report, console=None):
  """Prints the table of a report: float against compressed against each file.

  That of a ResNet-20 fits into 80 columns; what is wider is not cut.
  """
  console = console or Console(width=max(Console().width, 120))
  metric = next(iter(report['float']['metrics']))
  title = f'{report["model"]} on {report["dataset"]}, {report["learner"]}'
  table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, pad_edge=False, title_justify='left')
  headings = (metric, 'bytes', 'params', 'zeros', 'M MACs', 'ms', 'max diff', 'int8/f32')
  table.add_column('Keras, files', no_wrap=True)
  for heading in headings:
    table.add_column(heading, justify='right', no_wrap=True)
  for name in ('float', 'pruned', 'compressed'):
    if name not in report:
      continue
    part = report[name]
    zeros = 1.0 - part['nonzero_params'] / part['params'] if 'nonzero_params' in part else None
    table.add_row(
      name,
      f'{part["metrics"][metric]:.4f}',
      f'{part["bytes"]:,}' if 'bytes' in part else '',
      f'{part["params"]:,}',
      '' if zeros is None else f'{zeros:.0%}',
      f'{part["macs"] / 1e6:,.2f}',
    )
  for file in report['files']:
    table.add_row(
      file['format'],
      f'{file["metrics"][metric]:.4f}',
      f'{file["bytes"]:,}',
      '',
      '',
      '',
      f'{file["latency_ms"]:.3f}',
      f'{file["max_abs_diff"]:.2g}',
      f'{file["int8_ops"]}/{file["float_ops"]}',
    )
  console.print(table)
  if 'packed' in report:
    console.print(_packed_line(report['packed']), highlight=False, soft_wrap=True)
  for file in report['files']:
    if file.get('note'):
      line = f'{file["format"]}: {file["note"]}'
      console.print(line, style='dim', highlight=False, soft_wrap=True)
  skipped = [
    f'{layer["name"]} ({layer["skipped_because"]})'
    for layer in report['layers']
    if layer['skipped_because']
  ]
  if skipped:
    console.print('Left alone: ' + ', '.join(skipped), highlight=False, soft_wrap=True)
