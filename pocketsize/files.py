"""Files that are whole or absent: written under a temporary name, then renamed."""

import contextlib
import json
import os
import pathlib
import re
import secrets

# What `atomic_path` names its temporary files: hidden, with eight random digits.
_TEMPORARY = re.compile(r'\..+\.[0-9a-f]{8}\.\w+')


@contextlib.contextmanager
def atomic_path(path):
  """Yields a temporary path beside `path`; renames it to `path` when the block ends well.

  The temporary name keeps the suffix, since savers choose a format by it. On an error the temporary
  file is removed and `path` is left as it was.

  Args:
    path: the final path; its folder is made if it is missing.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.{path.stem}.{secrets.token_hex(4)}{path.suffix}')
  try:
    yield temporary
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def remove_temporary(folder):
  """Removes what killed processes left of `atomic_path` in a folder and those below it."""
  for path in pathlib.Path(folder).rglob('.*.*'):
    if path.is_file() and _TEMPORARY.fullmatch(path.name):
      path.unlink(missing_ok=True)


def write_json(path, value):
  """Writes `value` as indented JSON, whole or not at all."""
  with atomic_path(path) as temporary:
    temporary.write_text(json.dumps(value, indent=2) + '\n')
