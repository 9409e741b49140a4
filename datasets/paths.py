"""Where a data set lies: flag, environment or `path.conf`; and a checked download."""

import hashlib
import http.client
import os
import pathlib
import re
import urllib.request

from pocketsize.errors import UserError
from pocketsize.files import atomic_path

_REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


def resolve_folder(name, flag_value):
  """Returns the folder (or archive) of a data set, or None when nothing names one.

  Looked at in this order: `flag_value`, the environment variable POCKETSIZE_DATA_DIR_<NAME>,
  `data_dir_local_<name>` in the `path.conf` of the current folder, the same in that of the
  repository. An empty value and `None` in `path.conf` mean unset. Existence is not checked.

  Args:
    name: of the data set, as in the file names, such as 'cifar10'.
    flag_value: value of `--data_dir_local`, or None.

  Raises:
    UserError: a `path.conf` has a malformed line.
  """
  value = flag_value or os.environ.get(f'POCKETSIZE_DATA_DIR_{name.upper()}')
  for folder in (pathlib.Path.cwd(), _REPOSITORY):
    if not value and (folder / 'path.conf').is_file():
      value = read_path_conf(folder / 'path.conf').get(f'data_dir_local_{name}')
  return pathlib.Path(value).expanduser() if value else None


def read_path_conf(path):
  """Returns the entries of a `path.conf` as a dict of text, without those that are `None`.

  A line is `key = value`; `#` begins a comment at the start of a line or after a space.

  Raises:
    UserError: the file cannot be read or a line is malformed; with file and line number.
  """
  try:
    lines = pathlib.Path(path).read_text(encoding='utf-8').splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'{path} must be a text file that can be read. Received: {error}.') from error
  value_by_key = {}
  for number, line in enumerate(lines, start=1):
    line = re.sub(r'(^|\s)#.*', '', line).strip()
    if not line:
      continue
    match = re.fullmatch(r'(\w+)\s*=\s*(\S.*)', line)
    if not match:
      raise UserError(f'{path}, line {number}: must be `key = value`. Received: {line!r}.')
    value_by_key[match[1]] = match[2]
  return {key: value for key, value in value_by_key.items() if value != 'None'}


def fetch(url, md5, *, instead):
  """Returns the path of a downloaded file, which is kept in the cache folder.

  The folder is POCKETSIZE_CACHE, by default ~/.cache/pocketsize. The file gets its name when it
  is whole and its checksum right, so what is found there under that name can be used.

  Args:
    url: of the file.   md5: of its bytes, hexadecimal.
    instead: sentence for the error message: what the user can do without the download.

  Raises:
    UserError: the download failed, or it is not the file that was expected.
  """
  cache = os.environ.get('POCKETSIZE_CACHE') or '~/.cache/pocketsize'
  target = pathlib.Path(cache).expanduser() / url.rsplit('/', 1)[-1]
  if target.is_file():
    return target
  digest = hashlib.md5(usedforsecurity=False)
  try:
    with (
      urllib.request.urlopen(url, timeout=60) as response,
      atomic_path(target) as part,
      open(part, 'wb') as file,
    ):
      while block := response.read(1 << 20):
        digest.update(block)
        file.write(block)
      if digest.hexdigest() != md5:
        raise UserError(
          f'The download of {url} must have the md5 sum {md5}. Received: {digest.hexdigest()}. '
          f'{instead}'
        )
  except (OSError, http.client.HTTPException) as error:
    raise UserError(f'Downloading {url} to {target.parent} failed: {error}. {instead}') from error
  return target
