"""CIFAR-10: 60,000 photographs of 32x32 pixels in ten classes (Krizhevsky 2009).

Reads both official layouts, loose or still in their archive:
https://www.cs.toronto.edu/~kriz/cifar.html
"""

import io
import pathlib
import pickle
import tarfile
import zlib

import numpy as np

from datasets.augmentation import random_crop, random_flip
from datasets.dataset import InMemoryDataset
from datasets.paths import fetch
from pocketsize.errors import UserError

URL = 'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz'
MD5 = 'c32a1d4ab5d03f1284b67883e8d87530'

_STEMS = ('data_batch_1', 'data_batch_2', 'data_batch_3', 'data_batch_4', 'data_batch_5')
_TEST = 'test_batch'
_FOLDERS = ('cifar-10-batches-bin', 'cifar-10-batches-py')
_ARCHIVES = ('cifar-10-binary.tar.gz', 'cifar-10-python.tar.gz')
_PIXELS = 3 * 32 * 32
_RECORD = 1 + _PIXELS  # bytes: a label, then the planes red, green and blue
_LARGEST = 1 << 28  # bytes of one file in an archive; the official ones have 31 million


class Cifar10(InMemoryDataset):
  """x [batch, 32, 32, 3] normalised, y 0 to 9; as many samples as the files hold.

  In training an image is padded by 4 pixels, cut out at a random place and flipped by chance.

  Args:
    folder: folder or .tar.gz archive of the data; None downloads the official archive once.
    mean, std: of the three channels, for pixels in [0, 1]: the net gets (x / 255 - mean) / std.
    nb_smpls_val: training samples that are held out as 'val'.

  Raises:
    UserError: there is no data, or a file is truncated or corrupt; says which and where.
  """

  def __init__(self, folder, mean, std, nb_smpls_val=5000):
    if folder is None:
      folder = fetch(
        URL,
        MD5,
        instead='Give a folder that holds CIFAR-10 with --data_dir_local, POCKETSIZE_DATA_DIR_'
        'CIFAR10 or a line in path.conf.',
      )
    super().__init__(*read(folder), nb_smpls_val)
    # As long as an image, since NumPy is three times as fast along 3072 numbers as along 3.
    self._scale = np.tile(1 / (255 * np.asarray(std)), 32 * 32).astype(np.float32)
    self._shift = np.tile(-np.asarray(mean) / np.asarray(std), 32 * 32).astype(np.float32)

  def preprocess(self, x, rng=None):
    if rng is not None:
      x = random_flip(random_crop(x, 4, rng), rng)
    flat = x.reshape(len(x), -1).astype(np.float32)
    flat *= self._scale
    flat += self._shift
    return flat.reshape(x.shape)


def read(path):
  """Returns ((x, y) of the training set, (x, y) of the test set).

  x is uint8 [samples, 32, 32, 3], y int64 [samples].

  Args:
    path: a folder with the batch files, or with one of the official folders or archives in it;
      or an archive itself.

  Raises:
    UserError: as the class says.
  """
  path = pathlib.Path(path)
  try:
    if path.is_dir():
      parsed = _read_folder(path)
    elif path.is_file():
      parsed = _read_archive(path)
    else:
      raise UserError(
        'The folder of CIFAR-10, named by --data_dir_local, POCKETSIZE_DATA_DIR_CIFAR10 or '
        f'path.conf, must be an existing folder or .tar.gz archive. Received: {path}.'
      )
  except OSError as error:
    raise UserError(f'CIFAR-10 in {path} cannot be read: {error}.') from error
  images, labels = zip(*(parsed[stem] for stem in _STEMS), strict=True)
  return (np.concatenate(images), np.concatenate(labels)), parsed[_TEST]


def _read_folder(folder):
  """{stem: (x, y)} from the first of the places in `folder` that has a batch file."""
  for place in (folder, *(folder / name for name in _FOLDERS)):
    for suffix in ('.bin', ''):
      paths = {stem: place / (stem + suffix) for stem in (*_STEMS, _TEST)}
      if not any(path.is_file() for path in paths.values()):
        continue
      _refuse_missing(place, [path.name for path in paths.values() if not path.is_file()])
      return {stem: _parse(path, path.read_bytes()) for stem, path in paths.items()}
  for name in _ARCHIVES:
    if (folder / name).is_file():
      return _read_archive(folder / name)
  raise UserError(
    f'The folder of CIFAR-10 must hold data_batch_1.bin to data_batch_5.bin and test_batch.bin, '
    f'the same without .bin, or one of {", ".join((*_FOLDERS, *_ARCHIVES))}. '
    f'Received: {folder}, which holds none of them.'
  )


def _read_archive(path):
  """{stem: (x, y)} straight from a .tar.gz: nothing is unpacked to disk, other members ignored."""
  wanted = {stem + suffix for stem in (*_STEMS, _TEST) for suffix in ('.bin', '')}
  parsed, offset, last = {}, 0, 'its beginning'
  try:
    with tarfile.open(path, 'r|gz') as archive:
      for member in archive:
        name = pathlib.PurePosixPath(member.name).name
        offset, last = member.offset, member.name
        if name not in wanted or not member.isfile():
          continue
        if member.size > _LARGEST:
          raise UserError(
            f'{path}: {name} must have at most {_LARGEST} bytes. Received: {member.size}.'
          )
        content = archive.extractfile(member).read()
        parsed[name.removesuffix('.bin')] = _parse(path / name, content)
  except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
    raise UserError(
      f'{path} must be a .tar.gz archive of CIFAR-10 and is not, or is damaged behind {last}, '
      f'which begins at byte offset {offset} of the unpacked archive: {error}.'
    ) from error
  _refuse_missing(
    path,
    [stem for stem in (*_STEMS, _TEST) if stem not in parsed],
    f'; its last member, {last}, begins at byte offset {offset} of the unpacked archive',
  )
  return parsed


def _refuse_missing(place, missing, note=''):
  if missing:
    raise UserError(
      f'CIFAR-10 must have five training batches and a test batch. Received: {place} without '
      f'{", ".join(missing)}{note}.'
    )


def _parse(path, content):
  """(x, y) of one batch file, whose layout its name tells."""
  parse = parse_binary if path.suffix == '.bin' else parse_pickled
  planes, labels = parse(path, content)
  images = planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
  return np.ascontiguousarray(images), labels.astype(np.int64)


def parse_binary(path, content):
  """Returns (planes uint8 [records, 3072], labels [records]) of the binary layout.

  Args:
    path: for the messages.   content: bytes of the file.

  Raises:
    UserError: the file ends inside a record, has none, or has a label above 9.
  """
  whole = len(content) // _RECORD * _RECORD
  if not content or whole != len(content):
    raise UserError(
      f'{path} must have a size that is a multiple of {_RECORD} bytes and not 0. Received: '
      f'{len(content)} bytes; the record that begins at byte offset {whole} ends short at '
      f'{len(content)}.'
    )
  records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD)
  labels = records[:, 0]
  if labels.max() > 9:
    record = int(np.argmax(labels > 9))
    raise UserError(
      f'{path}, record {record} at byte offset {record * _RECORD}: the label must be 0 to 9. '
      f'Received: {labels[record]}.'
    )
  return records[:, 1:], labels


def parse_pickled(path, content):
  """Returns (planes uint8 [records, 3072], labels [records]) of the python layout.

  Args:
    path: for the messages.   content: bytes of the file.

  Raises:
    UserError: not a pickle of arrays, dicts, lists and bytes, or not that of a CIFAR-10 batch.
  """
  stream = io.BytesIO(content)
  try:
    batch = _ArrayUnpickler(stream, encoding='bytes').load()
  # Damaged pickles fail in any way that their opcodes can: IndexError, KeyError, MemoryError ...
  except Exception as error:
    raise UserError(
      f'{path} must be a pickled batch of CIFAR-10 and is not, or is damaged at byte offset '
      f'{stream.tell()} of {len(content)}: {type(error).__name__}: {error}.'
    ) from error
  entries = batch if isinstance(batch, dict) else {}
  planes = entries.get(b'data', entries.get('data'))
  labels = entries.get(b'labels', entries.get('labels'))
  if not isinstance(planes, np.ndarray) or planes.dtype != np.uint8 or planes.ndim != 2:
    raise UserError(f'{path}: `data` must be a uint8 array [records, {_PIXELS}].')
  if not len(planes) or planes.shape[1] != _PIXELS:
    raise UserError(
      f'{path}: `data` must have the shape [records, {_PIXELS}]. Received: {planes.shape}.'
    )
  if not isinstance(labels, list) or len(labels) != len(planes):
    raise UserError(f'{path}: `labels` must be a list of {len(planes)} integers.')
  for record, label in enumerate(labels):
    if type(label) is not int or not 0 <= label <= 9:
      raise UserError(f'{path}, record {record}: the label must be 0 to 9. Received: {label!r}.')
  return planes, np.array(labels)


class _ArrayUnpickler(pickle.Unpickler):
  """An unpickler that can make arrays and plain containers, and call nothing else."""

  _ADMITTED = {
    ('numpy', 'dtype'),
    ('numpy', 'ndarray'),
    ('numpy.core.multiarray', '_reconstruct'),
    ('numpy._core.multiarray', '_reconstruct'),
    ('numpy._core.numeric', '_frombuffer'),
    ('_codecs', 'encode'),
  }

  def find_class(self, module, name):
    if (module, name) not in self._ADMITTED:
      raise pickle.UnpicklingError(f'{module}.{name} does not belong into a data file')
    # The official files were written by a NumPy that still had `numpy.core`.
    return super().find_class(module.replace('numpy.core.', 'numpy._core.'), name)
