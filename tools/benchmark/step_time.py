"""Times the training step of ResNet-20: float, compressed by us, compressed by tfmot in tf_keras.

    scripts/run_local.sh tools/benchmark/step_time.py --rounds=40 --json=FILE

A round is one step of every variant, in an order that rotates, so that a busy machine is busy for
all; a ratio is the median of the rounds' ratios. What an algorithm does every n-th step only (new
masks, new scales) is timed in rounds of its own, and 1/n of it is added to the ratios.
"""

import importlib.metadata
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table

from learners import flags
from learners.progress import ProgressReport
from nets.resnet_at_cifar10 import ModelHelper
from pocketsize import files, report
from pocketsize.configure import compress
from pocketsize.errors import UserError
from pocketsize.instrument import instrument
from pocketsize.options import check_options, option
from pocketsize.quantization.twin import build_twin
from pocketsize.quantization.uniform import UniformConfig
from pocketsize.sparsity.magnitude import MagnitudeConfig

USER_ERROR = 2
REFERENCES = ('tf_keras', 'tensorflow_model_optimization')
LEARNING_RATE, MOMENTUM = 0.01, 0.9
# Pruning late in the growth of a long run: masks hold the full ratio, and still change.
RATIO, PRUNING_STEPS, FIRST_STEP = 0.75, 100_000, 99_000
UPDATE_ROUNDS = 10
WARM_UP_STEPS = 2


class Variant(NamedTuple):
  """A training step to be timed.

  Attributes:
    step: `step(number)` trains one batch, including what the algorithm does before step `number`.
    prepare: `prepare(number)` sets a count that the model keeps itself; not timed.
    update_every: steps between two updates; None if all steps are alike.
  """

  step: Callable[[int], None]
  prepare: Callable[[int], None] = lambda number: None
  update_every: int | None = None

  def number(self, index, with_update):
    """Returns the number of a step without updates, the `index`-th, or of one with them."""
    if with_update or self.update_every is None:
      return FIRST_STEP
    return FIRST_STEP + 1 + index % (self.update_every - 1)


class Bench:
  """What the variants have in common: the net and one batch.

  Args:
    options: `Options`.
  """

  def __init__(self, options):
    self.helper = ModelHelper(ModelHelper.Config(resnet_size=20, shortcut=options.shortcut))
    rng = np.random.default_rng(0)
    self.images = rng.normal(size=(options.batch_size, 32, 32, 3)).astype(np.float32)
    self.labels = rng.integers(0, 10, options.batch_size)

  def net(self):
    return self.helper.build()

  def twin(self):
    return build_twin(self.net()).model

  def keras(self, model, before=lambda number: None, **fields):
    """Returns the variant that trains a Keras 3 model after `before(number)`."""
    model.compile(
      keras.optimizers.SGD(LEARNING_RATE, MOMENTUM),
      keras.losses.SparseCategoricalCrossentropy(from_logits=True),
      jit_compile=False,
    )
    model.make_train_function()
    return self._variant(model.train_function, before, **fields)

  def tf_keras(self, model, before=lambda number: None, **fields):
    """Returns the variant that trains a tf_keras model after `before(number)`."""
    import tf_keras

    model.compile(
      tf_keras.optimizers.SGD(LEARNING_RATE, MOMENTUM),
      tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True),
      jit_compile=False,
    )
    return self._variant(model.make_train_function(), before, **fields)

  def _variant(self, train, before, **fields):
    batches = iter(tf.data.Dataset.from_tensors((self.images, self.labels)).repeat())

    def step(number):
      before(number)
      float(train(batches)['loss'])

    return Variant(step, **fields)

  def compressed(self, update_every, **entry):
    """Returns the variant with one of our algorithms; `entry` is that of a config_list."""
    model, stack = compress(self.net(), [entry], calibration=[self.images])
    return self.keras(model, stack.update, update_every=update_every)


def _magnitude(bench):
  return bench.compressed(
    MagnitudeConfig.update_every, algorithm='magnitude', ratio=RATIO, end_step=PRUNING_STEPS
  )


def _uniform(bench, activation_bits):
  return bench.compressed(
    UniformConfig.scale_every, algorithm='uniform', weight_bits=8, activation_bits=activation_bits
  )


def _tfmot_quantize(bench):
  from tensorflow_model_optimization.quantization.keras import quantize_model

  return bench.tf_keras(quantize_model(bench.twin()))


def _tfmot_prune(bench):
  from tensorflow_model_optimization.sparsity import keras as sparsity

  schedule = sparsity.PolynomialDecay(
    0.0, RATIO, 0, PRUNING_STEPS, frequency=MagnitudeConfig.update_every
  )
  model = sparsity.prune_low_magnitude(bench.twin(), pruning_schedule=schedule)
  callback = sparsity.UpdatePruningStep()
  callback.set_model(model)
  callback.on_train_begin()

  def prepare(number):
    for layer in callback.prunable_layers:
      # The layer counts up before it looks at its schedule.
      layer.pruning_step.assign(number - 1)

  return bench.tf_keras(
    model, callback.on_train_batch_begin, prepare=prepare, update_every=MagnitudeConfig.update_every
  )


# Name -> (function of the Bench, whether it needs tf_keras and tfmot).
VARIANTS = {
  'float': (lambda bench: bench.keras(instrument(bench.net())), False),
  'keras': (lambda bench: bench.keras(bench.net()), False),
  'tf_keras': (lambda bench: bench.tf_keras(bench.twin()), True),
  'uniform-8-8': (lambda bench: _uniform(bench, 8), False),
  'uniform-8-32': (lambda bench: _uniform(bench, 32), False),
  'magnitude-75': (_magnitude, False),
  'tfmot-quantize': (_tfmot_quantize, True),
  'tfmot-prune-75': (_tfmot_prune, True),
}
BASES = ('float', 'tf_keras')


@dataclass(frozen=True, kw_only=True)
class Options:
  """Flags of the benchmark."""

  rounds: int = option(40, 'rounds that are timed', lower=1)
  batch_size: int = option(128, 'images in a batch', lower=1)
  shortcut: str = option('projection', "the net's shortcut", choices=('projection', 'pad'))
  variants: str = option(','.join(VARIANTS), 'what is timed, separated by commas')
  json: str | None = option(None, 'file to write the numbers to')

  def __post_init__(self):
    check_options(self)
    unknown = [name for name in self.names if name not in VARIANTS]
    if unknown:
      raise UserError(
        f'--variants must be among {", ".join(VARIANTS)}. '
        f'Received: {", ".join(map(repr, unknown))}.'
      )
    missing = [name for name in REFERENCES if not importlib.util.find_spec(name)]
    if missing and any(VARIANTS[name][1] for name in self.names):
      needed = ', '.join(name for name in self.names if VARIANTS[name][1])
      raise UserError(
        f'--variants={needed} need the packages of requirements-dev.txt. '
        f'Not installed: {", ".join(missing)}.'
      )

  @property
  def names(self):
    return list(dict.fromkeys(self.variants.split(',')))


def measure(variants, rounds):
  """Returns ({name: seconds}, {name: seconds}) of the rounds without and with updates.

  Args:
    variants: {name: Variant}.
    rounds: how many without updates.
  """
  names = list(variants)
  plain, updating = ({name: [] for name in names} for _ in range(2))
  with ProgressReport('rounds', rounds + UPDATE_ROUNDS) as progress:
    for index in range(rounds + UPDATE_ROUNDS):
      with_update = index >= rounds
      first = index % len(names)
      for name in names[first:] + names[:first]:
        (updating if with_update else plain)[name].append(
          _timed(variants[name], index, with_update)
        )
      progress.say(index + 1, {})
  return plain, updating


def _timed(variant, index, with_update):
  number = variant.number(index, with_update)
  variant.prepare(number)
  start = time.perf_counter()
  variant.step(number)
  return time.perf_counter() - start


def summarize(plain, updating, update_every):
  """Returns one dict of numbers for each variant.

  `to_<base>` is the ratio of the steps without updates, `to_<base>_with_updates` that of all steps;
  None where the base was not measured. `update_ms` is what a step with an update takes longer.

  Args:
    plain, updating: {name: seconds of the rounds}.
    update_every: {name: steps between two updates, or None}.
  """
  rows = []
  for name, times in plain.items():
    every = update_every[name]
    update = np.median(updating[name]) - np.median(times)
    row = {
      'variant': name,
      'median_ms': 1e3 * float(np.median(times)),
      'min_ms': 1e3 * min(times),
      'update_ms': 1e3 * float(update) if every else None,
      'update_every': every,
    }
    for base in BASES:
      ratio = total = None
      if base in plain:
        ratio = total = float(np.median(np.divide(times, plain[base])))
        if every:
          total += (float(np.median(np.divide(updating[name], updating[base]))) - ratio) / every
      row |= {f'to_{base}': ratio, f'to_{base}_with_updates': total}
    rows.append(row)
  return rows


def show(rows, title):
  """Prints the rows as a table."""
  console = Console(width=None if Console().is_terminal else 120)
  table = Table(
    title=title, caption='The ratios are of medians over rounds and include the updates.'
  )
  for heading in (
    'variant',
    'median ms',
    'min ms',
    'update ms',
    'every',
    *(f'to {base}' for base in BASES),
  ):
    table.add_column(heading, justify='left' if heading == 'variant' else 'right', no_wrap=True)
  for row in rows:
    table.add_row(
      row['variant'],
      *(_text(row[key], '.1f') for key in ('median_ms', 'min_ms', 'update_ms')),
      _text(row['update_every'], 'd'),
      *(_text(row[f'to_{base}_with_updates'], '.3f') for base in BASES),
    )
  console.print(table)


def _text(value, form):
  return '' if value is None else format(value, form)


def run(options, command):
  """Builds and times the variants, prints the table and writes the JSON file."""
  bench = Bench(options)
  variants = {}
  for name in options.names:
    print(f'building {name}', flush=True)
    variants[name] = variant = VARIANTS[name][0](bench)
    for index in range(WARM_UP_STEPS):
      _timed(variant, index, with_update=True)
  rows = summarize(
    *measure(variants, options.rounds),
    {name: variant.update_every for name, variant in variants.items()},
  )
  show(
    rows,
    f'Training step of ResNet-20 ({options.shortcut}), batch {options.batch_size}, '
    f'{options.rounds} rounds',
  )
  if options.json:
    files.write_json(
      options.json,
      {
        'command': command,
        'versions': report.versions() | _reference_versions(),
        'cpus': os.cpu_count(),
        'batch_size': options.batch_size,
        'shortcut': options.shortcut,
        'rounds': options.rounds,
        'rows': rows,
      },
    )


def _reference_versions():
  return {
    name: importlib.metadata.version(name) for name in REFERENCES if importlib.util.find_spec(name)
  }


def main(argv):
  """Runs the benchmark for a command line and returns the exit code."""
  try:
    run(flags.make(flags.parse(argv, {'benchmark': Options}), Options), ' '.join(argv))
  except UserError as error:
    print(error, file=sys.stderr)
    return USER_ERROR
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv))
