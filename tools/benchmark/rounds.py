"""Steps of several programs timed in rounds, one step of each a round, and their table.

The order within a round rotates, so that a busy machine is busy for all; a ratio is the median of
the rounds' ratios. What is done every n-th step only is timed in rounds of its own, and 1/n of it
is added to the ratios. Knows no framework: `brevitas_step_time.py` runs it beside PyTorch.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

FIRST_STEP = 99_000
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


def warm_up(variant):
  """Runs steps of a variant that are not timed: the first ones compile."""
  for index in range(WARM_UP_STEPS):
    _timed(variant, index, with_update=True)


def measure(variants, rounds, say=lambda done: None):
  """Returns ({name: seconds}, {name: seconds}) of the rounds without and with updates.

  Args:
    variants: {name: Variant}.
    rounds: how many without updates.
    say: `say(done)` is told after each round how many are done.
  """
  names = list(variants)
  plain, updating = ({name: [] for name in names} for _ in range(2))
  for index in range(rounds + UPDATE_ROUNDS):
    with_update = index >= rounds
    first = index % len(names)
    for name in names[first:] + names[:first]:
      (updating if with_update else plain)[name].append(_timed(variants[name], index, with_update))
    say(index + 1)
  return plain, updating


def _timed(variant, index, with_update):
  number = variant.number(index, with_update)
  variant.prepare(number)
  start = time.perf_counter()
  variant.step(number)
  return time.perf_counter() - start


def summarize(plain, updating, update_every, bases):
  """Returns one dict of numbers for each variant.

  `to_<base>` is the ratio of the steps without updates, `to_<base>_with_updates` that of all steps;
  None where the base was not measured. `update_ms` is what a step with an update takes longer.

  Args:
    plain, updating: {name: seconds of the rounds}.
    update_every: {name: steps between two updates, or None}.
    bases: names of the variants to which ratios are given.
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
    for base in bases:
      ratio = total = None
      if base in plain:
        ratio = total = float(np.median(np.divide(times, plain[base])))
        if every:
          total += (float(np.median(np.divide(updating[name], updating[base]))) - ratio) / every
      row |= {f'to_{base}': ratio, f'to_{base}_with_updates': total}
    rows.append(row)
  return rows


def show(rows, title, bases):
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
    *(f'to {base}' for base in bases),
  ):
    table.add_column(heading, justify='left' if heading == 'variant' else 'right', no_wrap=True)
  for row in rows:
    table.add_row(
      row['variant'],
      *(_text(row[key], '.1f') for key in ('median_ms', 'min_ms', 'update_ms')),
      _text(row['update_every'], 'd'),
      *(_text(row[f'to_{base}_with_updates'], '.3f') for base in bases),
    )
  console.print(table)


def _text(value, form):
  return '' if value is None else format(value, form)
