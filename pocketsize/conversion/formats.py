"""From a model to files: which formats there are and how each is written."""

import difflib
import os
import pathlib
from typing import NamedTuple

from pocketsize.conversion import onnx, openvino, tflite
from pocketsize.conversion.errors import Folded, require
from pocketsize.conversion.lowering import Lowered
from pocketsize.errors import UserError
from pocketsize.files import atomic_path
from pocketsize.instrument import ACTIVATION_POINTS, Instrumented, instrument, strip
from pocketsize.quantization.range_quantizer import RangeQuantizer


class ExportedFile(NamedTuple):
  """A file and what there is to say about it.

  Attributes:
    format: one of `FORMATS`.
    path: of the file; OpenVINO's weights lie beside it, with suffix .bin.
    note: sentences about what differs from training, or ''.
  """

  format: str
  path: pathlib.Path
  note: str


class _Format(NamedTuple):
  writer: object
  suffix: str
  quantized: bool
  packages: tuple


_LITERT = ('ai_edge_litert',)
_ONNX = ('tf2onnx', 'onnx', 'onnxruntime')
_OPENVINO = ('tf2onnx', 'onnx', 'openvino')
_FORMATS = {
  'tflite': _Format(tflite.convert, '.tflite', False, _LITERT),
  'tflite_int8': _Format(tflite.convert, '_int8.tflite', True, _LITERT),
  'onnx': _Format(onnx.convert, '.onnx', False, _ONNX),
  'onnx_qdq': _Format(onnx.convert, '_qdq.onnx', True, _ONNX),
  'openvino': _Format(openvino.convert, '.xml', False, _OPENVINO),
  'openvino_int8': _Format(openvino.convert, '_int8.xml', True, _OPENVINO),
}
FORMATS = tuple(_FORMATS)
QUANTIZED_FORMATS = frozenset(name for name, kind in _FORMATS.items() if kind.quantized)


def is_quantized(model):
  """Returns whether `model` has quantizers, of weights or of activations."""
  return isinstance(model, Instrumented) and any(
    hasattr(transform, 'bits') for transform in model.transforms
  )


def float_version(model):
  """Returns an `Instrumented` model that computes what the float formats of `model` do.

  Weights are as deployed; of the activations' transforms those stay that files hold as operations.

  Args:
    model: `Instrumented`. Its weights are copied, its transforms shared.
  """
  return instrument(
    strip(model),
    [
      placement
      for placement in model.placements
      if placement.point in ACTIVATION_POINTS
      and not isinstance(placement.transform, RangeQuantizer)
    ],
  )


def formats_for(model):
  """Returns the `FORMATS` that `model` can be written in: those of int8 need quantizers."""
  return tuple(name for name in FORMATS if is_quantized(model) or name not in QUANTIZED_FORMATS)


def check_formats(model, formats=None):
  """Returns the formats to write `model` in, after a look whether they can be written and run.

  Args:
    model: `Instrumented`, or a Functional or Sequential model.
    formats: names out of `FORMATS`; all that fit the model if None.

  Raises:
    UserError: an unknown format, an int8 format of a model without quantizers, a missing package.
  """
  formats = _known(model, formats)
  for format_ in formats:
    for package in _FORMATS[format_].packages:
      require(package, f'for {format_} files')
  return formats


def _known(model, formats):
  formats = formats_for(model) if formats is None else tuple(formats)
  for unknown in [name for name in formats if name not in _FORMATS]:
    near = difflib.get_close_matches(unknown, _FORMATS, n=1)
    raise UserError(
      f'`formats` must be names out of {", ".join(_FORMATS)}. Received: {unknown!r}.'
      + (f' Did you mean {near[0]!r}?' if near else '')
    )
  for format_ in formats:
    if format_ not in formats_for(model):
      raise UserError(
        f'Format {format_!r} holds what quantizers learned, and the model has none. Export it as '
        f'{", ".join(formats_for(model))}, or train it with quantizers.'
      )
  return formats


def export(model, folder, formats=None, name='model', track=iter, tflite_int4=False):
  """Writes a model in several formats. A file is whole or absent.

  Float formats compute with the kernels as deployed and float activations, int8 formats with what
  the quantizers learned; no data is used. Binary activations are in both, as float operations.
  Models of mixed precision are computed in float32.

  Args:
    model: `Instrumented`, or a Functional or Sequential model.
    folder: of the files; made if it is missing.
    formats: names out of `FORMATS`; all that fit the model if None.
    name: what the files' names begin with.
    track: `track(formats)` gives the formats one by one; it may show progress.
    tflite_int4: whether TFLite files, too, store codes from -8 to 7 in 4 bits. They are smaller for
      it, and slower, as LiteRT then computes without its fast kernels. The others expand them when
      they load a file, so they always do.

  Returns:
    A list of `ExportedFile`.

  Raises:
    UserError: an unknown format, an int8 format of a model without quantizers, a missing package,
      an operation that a converter refuses, or one that it folds with a kernel whatever is between.
  """
  formats = _known(model, formats)
  lowered = {
    quantized: Lowered(model, quantized)
    for quantized in dict.fromkeys(_FORMATS[format_].quantized for format_ in formats)
  }
  files = []
  for format_ in track(formats):
    kind = _FORMATS[format_]
    path = pathlib.Path(folder, name + kind.suffix)
    int4 = tflite_int4 or kind.writer is not tflite.convert
    packed = _write(kind, lowered[kind.quantized], path, int4)
    files.append(ExportedFile(format_, path, _note(lowered[kind.quantized], packed)))
  return files


def _write(kind, lowered, path, int4):
  """Writes a file and returns the list of kernels that it stores in 4 bits."""
  with atomic_path(path) as temporary:
    try:
      packed = _convert(kind, lowered, temporary, int4)
      # OpenVINO writes its weights beside the .xml.
      if temporary.with_suffix('.bin').exists():
        os.replace(temporary.with_suffix('.bin'), path.with_suffix('.bin'))
    finally:
      temporary.with_suffix('.bin').unlink(missing_ok=True)
  return packed


def _convert(kind, lowered, path, int4):
  """Writes a file, with operations between what its converter would fold into one."""
  while True:
    try:
      return kind.writer(lowered, path, int4)
    except Folded as folded:
      lowered = lowered.separated(folded.paths)
      if lowered is None:
        raise UserError(
          f'The converter of *{kind.suffix} folds kernels into other operations, of which an int8 '
          f'file would be wrong; float formats hold them. Received: {", ".join(folded.paths)}.'
        ) from folded


def _note(lowered, packed):
  notes = list(lowered.notes)
  integers = [kernel for kernel in lowered.kernels if kernel.codes is not None]
  if integers and not lowered.has_activations:
    notes.append('integer weights, expanded by the runtime; computed in float')
  stored = set(map(id, packed))
  narrow = [kernel for kernel in integers if kernel.bits < 8]
  for name, kernels in (
    ('int4', [kernel for kernel in narrow if id(kernel) in stored]),
    ('int8', [kernel for kernel in narrow if id(kernel) not in stored]),
  ):
    if kernels:
      bits = ', '.join(f'{bits}-bit' for bits in sorted({kernel.bits for kernel in kernels}))
      notes.append(f'{bits} weights as {name} codes of the same scale')
  return '; '.join(notes)
