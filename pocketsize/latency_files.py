"""Files of the times of layers, which several processes may fill at once."""

import json
import pathlib

from pocketsize import report
from pocketsize.errors import UserError
from pocketsize.files import write_json


class TableFile:
  """The JSON file of a `LatencyTable`.

  Args:
    path: of the file, which need not be there.
    origin: {name: text} of what the times hold for only.
  """

  def __init__(self, path, origin):
    self._path, self._origin = pathlib.Path(path), origin

  def read(self):
    """Returns {signature of a layer: {channels: ms}}, nothing without a file.

    Raises:
      UserError: it is no such file, or one of another origin.
    """
    if not self._path.exists():
      return {}
    try:
      content = json.loads(self._path.read_text())
      found = {key: content[key] for key in self._origin}
      entries = merged(content['milliseconds'])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise UserError(
        f'{self._path} is no table of latencies: remove it to time anew. Received: {error!r}.'
      ) from error
    for key, own in self._origin.items():
      if found[key] != own:
        raise UserError(
          f'Latency table {self._path} holds for one {key} only, and here that is {own!r}: give '
          f'another path. Received: {found[key]!r}.'
        )
    return entries

  def add(self, entries):
    """Writes the entries beside what others have written meanwhile, in whose place they go."""
    content = {'versions': report.versions(), 'milliseconds': merged(self.read(), entries)}
    write_json(self._path, {**self._origin, **content})


def merged(*tables):
  """Returns the entries of all {signature: {channels: ms}}; where several have one, the last's."""
  found = {}
  for table in tables:
    for signature, entries in table.items():
      found.setdefault(signature, {}).update(entries)
  return found
