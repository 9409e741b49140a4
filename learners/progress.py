"""What a long loop shows: a bar with the time left, or plain lines where there is no terminal."""

import contextlib
import datetime
import sys
import time

from rich import progress
from rich.table import Column

# Roll-outs between two lines where there is no bar.
SHOWN_EVERY = 10


class ProgressReport:
  """Shows how far a loop of known length is. A context manager.

  Args:
    title: what the loop does.
    total: its steps.
    start: steps done before.
    quiet: show nothing (all workers but the first).
  """

  def __init__(self, title, total, start=0, quiet=False):
    self.title = title
    self.total = total
    self.start = start
    self.quiet = quiet
    self._bar = None

  def __enter__(self):
    self._began = time.monotonic()
    if not self.quiet and sys.stdout and sys.stdout.isatty():
      self._bar = progress.Progress(
        progress.TextColumn('{task.description}', table_column=Column(no_wrap=True)),
        progress.BarColumn(bar_width=20),
        progress.MofNCompleteColumn(table_column=Column(no_wrap=True)),
        progress.TimeRemainingColumn(table_column=Column(no_wrap=True)),
        # The facts have what is left of the line.
        progress.TextColumn(
          '{task.fields[facts]}',
          table_column=Column(no_wrap=True, overflow='ellipsis', ratio=1),
        ),
        expand=True,
      )
      self._task = self._bar.add_task(self.title, total=self.total, completed=self.start, facts='')
      self._bar.start()
    return self

  def __exit__(self, *exception):
    if self._bar:
      self._bar.stop()

  @classmethod
  def over(cls, title, items, name=str, quiet=False):
    """Yields `items`, a sequence, and shows how many are done and the `name(item)` at work."""
    with cls(title, len(items), quiet=quiet) as report:
      for done, item in enumerate(items):
        report.say(done, {'now': name(item)})
        yield item
        report.advance(done + 1)

  def advance(self, step):
    """Says that `step` steps are done."""
    if self._bar:
      self._bar.update(self._task, completed=step)

  def say(self, step, facts):
    """Shows {name: text} at `step`: behind the bar, or as a line of its own with the time left."""
    text = '  '.join(f'{name} {value}' for name, value in facts.items())
    if self._bar:
      self._bar.update(self._task, completed=step, facts=text)
    elif not self.quiet:
      left = ''
      if step > self.start:
        rate = (time.monotonic() - self._began) / (step - self.start)
        left = f'  left {datetime.timedelta(seconds=round(rate * (self.total - step)))}'
      print(f'{self.title}: {step}/{self.total}  {text}{left}', flush=True)


class SearchReport:
  """What a search shows on the screen. A context manager.

  Args:
    name: of the allocator.
    rollouts: how many there will be.
    quiet: show nothing.
  """

  def __init__(self, name, rollouts, quiet):
    self._title, self._quiet = f'allotting by {name}', quiet
    self._rollouts, self._best = rollouts, None
    self._open = contextlib.ExitStack()
    self._report = None

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self._open.close()

  def track(self, done, best):
    """Shows a round of roll-outs; without a bar every tenth one, and each that is the best."""
    if self._report is None:
      self._report = self._open.enter_context(
        # A search that goes on has done some before: the time left follows from those since then.
        ProgressReport(self._title, self._rollouts, start=done, quiet=self._quiet)
      )
    if best != self._best or done % SHOWN_EVERY == 0:
      self._best = best
      self._report.say(done, {'best': f'{best.reward:.4f}', 'cost': f'{best.cost:.4g}'})
    self._report.advance(done)

  def follow(self, rounds):
    """Yields rounds, of measured losses or of second derivatives."""
    return ProgressReport.over(self._title, rounds, quiet=self._quiet)
