"""Times the training step of ResNet-20: float, compressed by us, compressed by tfmot in tf_keras.

    scripts/run_local.sh tools/benchmark/step_time.py --rounds=40 --json=FILE

`rounds` says how it is timed, `step_variants` what. `brevitas_step_time.py` does the same beside
PyTorch, in an environment of its own.
"""

import importlib.metadata
import importlib.util
import os
import sys
from dataclasses import dataclass

from learners import flags
from learners.progress import ProgressReport
from pocketsize import files, report
from pocketsize.errors import UserError
from pocketsize.options import check_options, option
from tools.benchmark import rounds
from tools.benchmark.step_variants import VARIANTS, Bench

USER_ERROR = 2
REFERENCES = ('tf_keras', 'tensorflow_model_optimization')
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


def run(options, command):
  """Builds and times the variants, prints the table and writes the JSON file."""
  bench = Bench(options)
  variants = {}
  for name in options.names:
    print(f'building {name}', flush=True)
    variants[name] = variant = VARIANTS[name][0](bench)
    rounds.warm_up(variant)
  with ProgressReport('rounds', options.rounds + rounds.UPDATE_ROUNDS) as progress:
    plain, updating = rounds.measure(variants, options.rounds, lambda done: progress.say(done, {}))
  rows = rounds.summarize(
    plain, updating, {name: variant.update_every for name, variant in variants.items()}, BASES
  )
  rounds.show(
    rows,
    f'Training step of ResNet-20 ({options.shortcut}), batch {options.batch_size}, '
    f'{options.rounds} rounds',
    BASES,
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
