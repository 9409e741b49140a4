"""What the command lines share: user errors, saved models, tables."""

import sys

from absl import app
from rich.console import Console
from rich.table import Table

from pocketsize.errors import UserError

USER_ERROR = 2


def run(main):
  """Parses flags and runs `main()`; a mistake of the user becomes one sentence and exit code 2."""

  def guarded(argv):
    try:
      if len(argv) > 1:
        raise UserError(f'All arguments are flags, --name=value. Received: {argv[1]!r}.')
      main()
    except UserError as error:
      _leave(error)
    except OSError as error:
      _leave(f'{error.filename or "A file"} cannot be written or read: {error.strerror or error}.')

  app.run(guarded, flags_parser=_parse)


def _parse(argv):
  # absl itself leaves with code 1 and prints its help, also where that was asked for.
  from absl import flags

  if '--help' in argv[1:]:
    app.usage(shorthelp=True, writeto_stdout=True, exitcode=0)
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    _leave(str(error).splitlines()[-1].removeprefix('flags.'))


def _leave(message):
  print(message, file=sys.stderr)
  sys.exit(USER_ERROR)


def print_table(headings, rows):
  """Prints a table; the first column is text, the others are numbers."""
  table = Table()
  for index, heading in enumerate(headings):
    table.add_column(heading, justify='right' if index else 'left', no_wrap=True)
  for row in rows:
    table.add_row(*row)
  Console(width=None if sys.stdout.isatty() else 160).print(table)
