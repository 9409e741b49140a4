"""Runs an exported file beside the model it came from:

python -m tools.conversion.verify_file --file=model_int8.tflite --reference_model=quantized.keras \\
  --data=test.npz
"""

from tools import command  # isort: skip (first: it keeps TensorFlow's start quiet)

import zipfile

import numpy as np
from absl import flags

from pocketsize import conversion
from pocketsize.errors import UserError
from pocketsize.saving import load_model

_FILE = flags.DEFINE_list('file', None, 'exported files, comma-separated: .tflite, .onnx or .xml')
_REFERENCE = flags.DEFINE_string(
  'reference_model', None, 'Keras model whose outputs the files should have'
)
_DATA = flags.DEFINE_string(
  'data', None, '.npz with x [samples, ...] and, for the accuracy, y [samples] labels'
)
_BATCH = flags.DEFINE_integer('batch_size', 256, 'samples that are computed at once', lower_bound=1)


class _Accuracy:
  """Share of samples whose largest output is the label; none without labels."""

  def reset(self):
    self._right = []

  def update(self, y, outputs):
    self._right.extend(np.argmax(outputs, axis=-1).ravel() == np.ravel(y))

  def result(self):
    return {'accuracy': float(np.mean(self._right))}


def main():
  x, y = _read(_DATA.value)
  model = load_model(_REFERENCE.value)
  inputs = getattr(model, 'source', model).inputs
  shape = tuple(inputs[0].shape) if len(inputs) == 1 else ()
  if len(shape) != x.ndim or any(n not in (None, m) for n, m in zip(shape, x.shape, strict=True)):
    raise UserError(
      f'--data must hold an x of the shape that the model takes, {shape}. Received: {x.shape}.'
    )
  starts = range(0, len(x), _BATCH.value)
  batches = [(x[start : start + _BATCH.value], y[start : start + _BATCH.value]) for start in starts]
  reference = np.concatenate([np.asarray(model(samples, training=False)) for samples, _ in batches])
  evaluator = _Accuracy()
  evaluator.reset()
  evaluator.update(y, reference)
  rows = [(_REFERENCE.value, f'{evaluator.result()["accuracy"]:.4f}', '', '', '', '')]
  files = [conversion.ExportedFile('', path, '') for path in _FILE.value]
  for entry in conversion.verify_files(
    files, lambda: batches, {True: reference, False: reference}, evaluator
  ):
    rows.append(
      (
        entry['path'],
        f'{entry["metrics"]["accuracy"]:.4f}',
        f'{entry["max_abs_diff"]:.3g}',
        f'{entry["int8_ops"]} / {entry["float_ops"]}',
        f'{entry["bytes"]:,}',
        f'{entry["latency_ms"]:.3f}',
      )
    )
  command.print_table(('file', 'accuracy', 'max diff', 'int8 / float ops', 'bytes', 'ms'), rows)


def _read(path):
  """Returns (x float32, y) of an .npz file."""
  try:
    with np.load(path, allow_pickle=False) as data:
      missing = [name for name in ('x', 'y') if name not in data]
      if missing:
        raise UserError(
          f'--data must hold arrays x and y. Received: {path}, with {", ".join(data) or "none"}.'
        )
      x, y = data['x'].astype(np.float32), data['y']
  except (OSError, ValueError, zipfile.BadZipFile, AttributeError) as error:
    if isinstance(error, UserError):
      raise
    raise UserError(
      f'--data must be an .npz file with arrays x and y. Received: {path} ({error}).'
    ) from error
  if not len(x) or len(x) != len(y):
    raise UserError(
      f'--data must hold as many x as y, and one at least. Received: {len(x)} and {len(y)}.'
    )
  return x, y


if __name__ == '__main__':
  flags.mark_flags_as_required(['file', 'reference_model', 'data'])
  command.run(main)
