"""What a run leaves behind: models, exported files that were run, and the report."""

import functools
import json
import time

import keras
import numpy as np
import tensorflow as tf

from learners.progress import ProgressReport
from pocketsize import conversion, packed, report
from pocketsize.errors import UserError
from pocketsize.files import write_json
from pocketsize.instrument import Instrumented, instrument, strip
from pocketsize.saving import load_model, save_model


class Results:
  """Writes and measures the results in a work folder; used by one process.

  Args:
    folder: the work folder, a path.
    learner: the value of --learner.
    helper: the net's `ModelHelper`.
    run: `RunConfig`.
    dataset: the helper's data set.
  """

  def __init__(self, folder, learner, helper, run, dataset):
    self.folder = folder
    self.learner = learner
    self.helper = helper
    self.run = run
    self.dataset = dataset

  @property
  def _packed(self):
    return self.folder / 'exports' / f'{self.helper.name}.packed'

  def existing(self, name):
    """Returns the path of a result, or raises a UserError if it is not there."""
    if not (self.folder / name).exists():
      raise UserError(
        f'--exec_mode=eval needs a finished run in --work_dir. Received: {self.folder}, which has '
        f'no {name}.'
      )
    return self.folder / name

  def save(self, model):
    """Writes final.keras and, if `model` (`Instrumented`) has quantizers, quantized.keras."""
    save_model(strip(model), self.folder / 'final.keras')
    if conversion.is_quantized(model):
      # Without the loss and the optimizer of the training, which nobody else could load.
      save_model(instrument(model.source, model.placements), self.folder / 'quantized.keras')

  def write_report(self, float_model, model, seconds, began, command):
    """Exports and packs `model`, runs the files, writes report.json and prints its table.

    Args:
      float_model: the Keras model before compression.
      model: `Instrumented`, trained.
      seconds: {phase: seconds} so far; the phases of this method are added.
      began: `time.monotonic()` at the start of the run.
      command: the command line.

    Returns:
      The report.
    """
    exports = time.monotonic()
    files = conversion.export(
      model,
      self.folder / 'exports',
      self.run.formats,
      name=self.helper.name,
      track=functools.partial(ProgressReport.over, 'exporting'),
      tflite_int4=self.run.tflite_int4,
    )
    write_json(
      self.folder / 'exports' / 'files.json',
      [{'format': file.format, 'name': file.path.name, 'note': file.note} for file in files],
    )
    if packed.has_codes(model):
      packed.write(model, self._packed)
    seconds['export'] = round(time.monotonic() - exports, 2)
    result = self._measure(float_model, model, files, seconds, began, command)
    write_json(self.folder / 'report.json', _valid(result))
    report.show(result)
    return result

  def show_again(self, float_model):
    """Measures the models and files in the folder and prints the table; changes no file."""
    quantized = self.folder / 'quantized.keras'
    path = quantized if quantized.exists() else self.existing('final.keras')
    load_model(self.existing('final.keras'))
    model = load_model(path)
    model = model if isinstance(model, Instrumented) else instrument(model)
    files = [
      conversion.ExportedFile(
        entry['format'], self.folder / 'exports' / entry['name'], entry['note']
      )
      for entry in json.loads(self.existing('exports/files.json').read_text())
    ]
    report.show(self._measure(float_model, model, files, {}, time.monotonic(), ''))

  def _measure(self, float_model, model, files, seconds, began, command):
    evaluation = time.monotonic()
    models = {
      'float': instrument(float_model),
      'compressed': model,
      'compressed, as float files': conversion.float_version(model),
    }
    if (self.folder / 'pruned.keras').exists():
      models['pruned, not trained'] = instrument(load_model(self.folder / 'pruned.keras'))
    (float_metrics, _), (metrics, outputs), (_, float_outputs), *rest = [
      self._evaluate(models[name])
      for name in ProgressReport.over(f'evaluating on {self.run.eval_split}', list(models))
    ]
    verification = time.monotonic()
    entries = conversion.verify_files(
      files,
      self._batches,
      {True: outputs, False: float_outputs},
      self.helper.evaluator(),
      track=functools.partial(
        ProgressReport.over,
        f'running files on {self.run.eval_split}',
        name=lambda file: file.format,
      ),
    )
    now = time.monotonic()
    seconds |= {
      'evaluation': round(verification - evaluation, 2),
      'verification': round(now - verification, 2),
      'total': round(now - began, 2),
    }
    return report.build(
      model,
      float_model=float_model,
      names={
        'model': self.helper.name,
        'dataset': self.helper.dataset_name,
        'learner': self.learner,
      },
      float_metrics=float_metrics,
      metrics=metrics,
      bytes_=[(self.folder / name).stat().st_size for name in ('float.keras', 'final.keras')],
      files=entries,
      seconds=seconds,
      command=command,
      pruned=(models['pruned, not trained'].source, rest[0][0]) if rest else None,
      skipped=json.loads(self.existing('plan.json').read_text())['skipped'],
      packed=packed.verify(self._packed, model) if self._packed.exists() else None,
    )

  def _batches(self):
    """Returns an iterator over the evaluation split as NumPy (x, y)."""
    return self.dataset.load(
      self.run.eval_split, batch=self.run.batch_size_eval
    ).as_numpy_iterator()

  def _evaluate(self, model):
    """Returns (metrics, outputs) of a model on the evaluation split.

    Outputs are an array [samples, ...]; for several a list of them.
    """
    evaluator = self.helper.evaluator()
    specs = [tf.TensorSpec((None, *x.shape[1:]), x.dtype) for x in model.source.inputs]
    predict = tf.function(
      lambda *x: model(x[0] if len(x) == 1 else list(x), training=False),
      input_signature=specs,
      autograph=False,
    )
    kept = []
    for x, y in self._batches():
      outputs = predict(*(x if isinstance(x, tuple) else (x,)))
      outputs = [tensor.numpy() for tensor in keras.tree.flatten(outputs)]
      evaluator.update(y, outputs[0] if len(outputs) == 1 else outputs)
      kept.append(outputs)
    outputs = [np.concatenate(batches) for batches in zip(*kept, strict=True)]
    return evaluator.result(), outputs[0] if len(outputs) == 1 else outputs


def _valid(report):
  """Returns a report with strings for the numbers that JSON has not: 'NaN', 'Infinity'."""
  return json.loads(json.dumps(report), parse_constant=str)
