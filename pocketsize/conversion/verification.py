"""Files are believed only after they ran: accuracy, difference from Keras, operations, latency."""

import gzip
import itertools
import pathlib
import time

import keras
import numpy as np

from pocketsize.conversion import processor
from pocketsize.conversion.formats import QUANTIZED_FORMATS
from pocketsize.conversion.inspection import count_ops
from pocketsize.conversion.runners import Runner, open_file
from pocketsize.errors import UserError

# A burst is short enough that a busy moment of the machine meets all files alike, and long enough
# that the caches belong to the file that is measured.
_BURST = 10


def verify(file, batches, reference, evaluator, latency_rounds=30):
  """Runs one file; see `verify_files`.

  Args:
    file: an `ExportedFile`.
    batches: iterable of NumPy (x, y).
    reference: [samples, ...] outputs of Keras, an array; for several outputs a list of them.
    evaluator: see `verify_files`.
    latency_rounds: see `latency`.

  Returns:
    One entry of the report's `files`.
  """
  return verify_files(
    [file], lambda: batches, {True: reference, False: reference}, evaluator, latency_rounds
  )[0]


def verify_files(files, batches, references, evaluator, latency_rounds=30, track=iter):
  """Runs every file on all samples in its own runtime.

  Args:
    files: `ExportedFile`s.
    batches: function without arguments; each call gives the same NumPy (x, y) anew. x is an array
      [batch, ...], or a tuple of them for several inputs.
    references: {whether quantized: [samples, ...] outputs of Keras for these samples, in order, an
      array; for several outputs a list of them}.
    evaluator: has reset(), update(y, outputs), result(). For several outputs it gets the list.
    latency_rounds: see `latency`.
    track: `track(files)` gives the files one by one; it may show progress.

  Returns:
    A list of dicts: format, path, bytes (of all its parts), gzip_bytes, metrics, latency_ms (one
    thread, batch 1, measured in turn with the others), max_abs_diff (from Keras, over all outputs;
    the same infinity and NaN at the same place differ by 0), int8_ops, float_ops, note.

  Raises:
    UserError: a runtime's package is missing, or the samples do not fit.
  """
  entries, shapes = [], None
  for file in track(files):
    metrics, difference, shapes = _run(
      file.path, batches(), references[file.format in QUANTIZED_FORMATS], evaluator
    )
    int8_ops, float_ops = count_ops(file.path)
    content = [path.read_bytes() for path in parts(file.path)]
    entries.append(
      {
        'format': file.format,
        'path': str(file.path),
        'bytes': sum(map(len, content)),
        'gzip_bytes': sum(len(gzip.compress(part, mtime=0)) for part in content),
        'metrics': metrics,
        'latency_ms': None,
        'max_abs_diff': difference,
        'int8_ops': int8_ops,
        'float_ops': float_ops,
        'note': _note(file, difference),
      }
    )
  for entry, milliseconds in zip(
    entries, latency([file.path for file in files], latency_rounds, shapes=shapes), strict=True
  ):
    entry['latency_ms'] = round(milliseconds, 4)
  return entries


def _note(file, difference):
  notes = [file.note, processor.note(file.format)]
  if not np.isfinite(difference):
    notes.append('outputs that are not finite differ from those of Keras')
  return '; '.join(filter(None, notes))


def parts(path):
  """Returns the paths that make up an exported file: OpenVINO's weights lie beside the .xml."""
  path = pathlib.Path(path)
  return [path, path.with_suffix('.bin')] if path.suffix == '.xml' else [path]


def size(path):
  """Returns the bytes on disk of an exported file, all its parts."""
  return sum(part.stat().st_size for part in parts(path))


def _run(path, batches, reference, evaluator):
  """Returns (metrics, largest difference from `reference`, shapes of one sample) of a file."""
  runner = open_file(path)
  evaluator.reset()
  several = isinstance(reference, list | tuple | dict)
  references = keras.tree.flatten(reference) if several else [reference]
  difference, samples, shapes = 0.0, 0, None
  for x, y in batches:
    inputs = x if isinstance(x, tuple) else (x,)
    shapes = shapes or [np.shape(array)[1:] for array in inputs]
    outputs = runner(*inputs)
    evaluator.update(y, outputs[0] if len(outputs) == 1 else outputs)
    count = len(inputs[0])
    expected = [values[samples : samples + count] for values in references]
    if [values.shape for values in expected] != [values.shape for values in outputs]:
      raise UserError(
        'Argument `reference` must hold the outputs for the same samples. Received: shapes '
        f'{_shapes(references)}, and {_shapes(outputs)} from {path} at sample {samples}.'
      )
    difference = float(np.max([difference, *map(_difference, outputs, expected)]))
    samples += count
  if any(samples != len(values) for values in references):
    raise UserError(
      'Argument `reference` must hold the outputs for the same samples. Received: '
      f'{len(references[0])} outputs, {samples} samples.'
    )
  return evaluator.result(), difference, shapes


def _shapes(arrays):
  return ', '.join(str(np.shape(array)) for array in arrays)


def _difference(outputs, expected):
  """Returns the largest absolute difference of two arrays; NaN where only one of them has it."""
  equal = (outputs == expected) | (np.isnan(outputs) & np.isnan(expected))
  with np.errstate(invalid='ignore'):
    # Booleans do not subtract.
    dtype = np.result_type(outputs, expected, np.float32)
    differences = np.abs(np.subtract(outputs, expected, dtype=dtype))
  return np.max(differences, where=~equal, initial=0.0)


def latency(paths, rounds=30, threads=1, shapes=None):
  """Measures several files in turn, so that their ratios hold on a busy machine too.

  Args:
    paths: exported files.
    rounds: each calls every file in a burst of 10 after one call to warm up, in rotating order.
    threads: of each runtime.
    shapes: of one sample of each input, for files whose inputs may have several sizes.

  Returns:
    List of the median latencies at batch 1, in ms, in the order of `paths`.

  Raises:
    UserError: `shapes` is None, and a size is not known; or a file cannot be run.
  """
  return [float(np.median(times)) for times in _bursts(paths, rounds, threads, shapes)]


def quickest(paths, rounds=30, threads=1):
  """Returns what `latency` does, of the tenth of the calls that other programs disturbed least.

  Medians say what happened on this machine now; these ratios are those of an idle one.

  Args: see `latency`; in place of a path there may be a `Runner`.
  """
  return [float(np.quantile(times, 0.1)) for times in _bursts(paths, rounds, threads)]


def _bursts(paths, rounds, threads, shapes=None):
  """Returns a [files, rounds, 10] array of times, in ms."""
  rng = np.random.default_rng(0)
  runners = [path if isinstance(path, Runner) else open_file(path, threads) for path in paths]
  inputs = [_random_inputs(runner, shapes, rng) for runner in runners]
  seconds = np.zeros((len(runners), rounds, _BURST))
  for turn in range(rounds):
    for index in np.roll(np.arange(len(runners)), turn):
      runners[index](*inputs[index])
      for call in range(_BURST):
        began = time.perf_counter()
        runners[index](*inputs[index])
        seconds[index, turn, call] = time.perf_counter() - began
  return 1e3 * seconds


def _random_inputs(runner, shapes, rng):
  """Returns the arrays of one sample: normal numbers; zeros for integers, which may be indices."""
  shapes = shapes or [shape[1:] for shape in runner.shapes]
  if None in itertools.chain(*shapes):
    raise UserError(
      'Inputs of any size have no latency of their own: give `shapes`, or let `verify` measure it '
      f'on samples. Received: a file that takes {runner.shapes}.'
    )
  return [
    rng.normal(size=(1, *shape)).astype(dtype)
    if np.issubdtype(dtype, np.floating)
    else np.zeros((1, *shape), dtype)
    for shape, dtype in zip(shapes, runner.dtypes, strict=True)
  ]
