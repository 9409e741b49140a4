"""What a long loop shows: a bar with the time left, or plain lines where there is no terminal."""

import datetime
import sys
import time

from rich import progress
from rich.table import Column


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
    if not self.quiet and sys.stdout.isatty():
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
