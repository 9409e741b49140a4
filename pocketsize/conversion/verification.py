"""Files are believed only after they ran: accuracy, difference from Keras, operations, latency."""

import gzip
import pathlib
import time

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
    reference: [samples, ...] outputs of Keras.
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
    references: {whether quantized: [samples, ...] outputs of Keras for these samples, in order}.
    evaluator: has reset(), update(y, outputs), result().
    latency_rounds: see `latency`.
    track: `track(files)` gives the files one by one; it may show progress.

  Returns:
    A list of dicts: format, path, bytes (of all its parts), gzip_bytes, metrics, latency_ms (one
    thread, batch 1, measured in turn with the others), max_abs_diff (from Keras), int8_ops,
    float_ops, note.

  Raises:
    UserError: a runtime's package is missing, or the samples do not fit.
  """
  entries = []
  for file in track(files):
    metrics, difference = _run(
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
        'note': '; '.join(filter(None, (file.note, processor.note(file.format)))),
      }
    )
  for entry, milliseconds in zip(
    entries, latency([file.path for file in files], latency_rounds), strict=True
  ):
    entry['latency_ms'] = round(milliseconds, 4)
  return entries


def parts(path):
  """Returns the paths that make up an exported file: OpenVINO's weights lie beside the .xml."""
  path = pathlib.Path(path)
  return [path, path.with_suffix('.bin')] if path.suffix == '.xml' else [path]


def size(path):
  """Returns the bytes on disk of an exported file, all its parts."""
  return sum(part.stat().st_size for part in parts(path))


def _run(path, batches, reference, evaluator):
  """Returns (metrics, largest difference from `reference`) of a file."""
  runner = open_file(path)
  evaluator.reset()
  difference, samples = 0.0, 0
  for x, y in batches:
    outputs = runner(*(x if isinstance(x, tuple) else (x,)))
    outputs = outputs[0] if len(outputs) == 1 else outputs
    evaluator.update(y, outputs)
    expected = reference[samples : samples + len(y)]
    if np.shape(expected) != np.shape(outputs):
      raise UserError(
        f'Argument `reference` must hold the outputs for the same samples. Received: shape '
        f'{np.shape(reference)}, and {np.shape(outputs)} from {path} at sample {samples}.'
      )
    difference = max(difference, float(np.max(np.abs(outputs - expected), initial=0.0)))
    samples += len(y)
  if samples != len(reference):
    raise UserError(
      'Argument `reference` must hold the outputs for the same samples. Received: '
      f'{len(reference)} outputs, {samples} samples.'
    )
  return evaluator.result(), difference


def latency(paths, rounds=30, threads=1):
  """Measures several files in turn, so that their ratios hold on a busy machine too.

  Args:
    paths: exported files.
    rounds: each calls every file in a burst of 10 after one call to warm up, in rotating order.
    threads: of each runtime.

  Returns:
    List of the median latencies at batch 1, in ms, in the order of `paths`.
  """
  return [float(np.median(times)) for times in _bursts(paths, rounds, threads)]


def quickest(paths, rounds=30, threads=1):
  """Returns what `latency` does, of the tenth of the calls that other programs disturbed least.

  Medians say what happened on this machine now; these ratios are those of an idle one.

  Args: see `latency`; in place of a path there may be a `Runner`.
  """
  return [float(np.quantile(times, 0.1)) for times in _bursts(paths, rounds, threads)]


def _bursts(paths, rounds, threads):
  """Returns a [files, rounds, 10] array of times, in ms."""
  rng = np.random.default_rng(0)
  runners = [path if isinstance(path, Runner) else open_file(path, threads) for path in paths]
  inputs = [
    [rng.normal(size=(1, *shape[1:])).astype(np.float32) for shape in runner.shapes]
    for runner in runners
  ]
  seconds = np.zeros((len(runners), rounds, _BURST))
  for turn in range(rounds):
    for index in np.roll(np.arange(len(runners)), turn):
      runners[index](*inputs[index])
      for call in range(_BURST):
        began = time.perf_counter()
        runners[index](*inputs[index])
        seconds[index, turn, call] = time.perf_counter() - began
  return 1e3 * seconds
