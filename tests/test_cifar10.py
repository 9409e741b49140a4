"""CIFAR-10 from tiny files in every layout, and from damaged ones."""

import hashlib
import io
import pickle
import tarfile

import numpy as np
import pytest

from datasets import cifar10
from datasets.cifar10 import Cifar10
from pocketsize.errors import UserError

STEMS = [f'data_batch_{i}' for i in range(1, 6)] + ['test_batch']
RECORDS = 20
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(scope='module')
def batches():
  """{stem: (planes uint8 [20, 3072], labels [20])}."""
  rng = np.random.default_rng(10)
  return {
    stem: (
      rng.integers(0, 256, size=(RECORDS, 3072), dtype=np.uint8),
      rng.integers(0, 10, size=RECORDS).tolist(),
    )
    for stem in STEMS
  }


def _binary(batches):
  return {
    f'{stem}.bin': np.column_stack([np.array(labels, np.uint8), planes]).tobytes()
    for stem, (planes, labels) in batches.items()
  }


def _pickled(batches, protocol=2):
  return {
    stem: pickle.dumps({b'data': planes, b'labels': labels}, protocol)
    for stem, (planes, labels) in batches.items()
  }


def _write(folder, contents):
  folder.mkdir(parents=True, exist_ok=True)
  for name, content in contents.items():
    (folder / name).write_bytes(content)
  return folder


def _pack(path, contents, inner='cifar-10-batches-bin'):
  with tarfile.open(path, 'w:gz') as archive:
    for name, content in {'readme.html': b'<html>', **contents}.items():
      member = tarfile.TarInfo(f'{inner}/{name}')
      member.size = len(content)
      archive.addfile(member, io.BytesIO(content))
  return path


def _layouts(folder, batches):
  """{layout: path to give}."""
  binary, pickled = _binary(batches), _pickled(batches)
  _write(folder / 'with_bin' / 'cifar-10-batches-bin', binary)
  _write(folder / 'with_py' / 'cifar-10-batches-py', pickled)
  (folder / 'with_archive').mkdir()
  _pack(folder / 'with_archive' / 'cifar-10-python.tar.gz', pickled, 'cifar-10-batches-py')
  return {
    'binary': _write(folder / 'binary', binary),
    'binary inside': folder / 'with_bin',
    'pickled': _write(folder / 'pickled', pickled),
    'pickled by protocol 5': _write(folder / 'pickled5', _pickled(batches, 5)),
    'pickled inside': folder / 'with_py',
    'archive inside': folder / 'with_archive',
    'archive itself': _pack(folder / 'any.tar.gz', binary),
  }


def test_every_layout_gives_the_same_samples(tmp_path, batches):
  for layout, path in _layouts(tmp_path, batches).items():
    (x, y), (test_x, test_y) = cifar10.read(path)
    assert x.shape == (100, 32, 32, 3) and x.dtype == np.uint8 and y.dtype == np.int64, layout
    planes, labels = batches['data_batch_2']
    assert list(y[20:40]) == labels and list(test_y) == batches['test_batch'][1], layout
    # Pixel (row 3, column 4) of the green plane: planes lie behind each other, rows inside them.
    np.testing.assert_array_equal(x[20:40, 3, 4, 1], planes[:, 1024 + 3 * 32 + 4])
    assert len(test_x) == RECORDS


def test_pixels_are_normalised_per_channel(tmp_path, batches):
  data = Cifar10(_write(tmp_path, _binary(batches)), (0.1, 0.2, 0.3), (0.5, 0.25, 0.2))
  raw = batches['test_batch'][0].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
  expected = (raw / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.25, 0.2]
  ((x, _),) = data.load('test', batch=20).as_numpy_iterator()
  assert x.dtype == np.float32
  np.testing.assert_allclose(x, expected, atol=1e-5)


def test_padding_is_black_before_normalisation(tmp_path):
  white = {stem: (np.full((20, 3072), 255, np.uint8), [0] * 20) for stem in STEMS}
  data = Cifar10(_write(tmp_path, _binary(white)), *HALVES)
  x, _ = next(data.load('train', batch=64, training=True).as_numpy_iterator())
  # White is (1 - 0.5) / 0.5 = 1 and black is -1; some of 64 crops reach beyond the border.
  assert set(np.unique(np.round(x, 5))) == {-1.0, 1.0}
  assert x[:, 4:28, 4:28].min() > 0.99
  black_rows = (x[:, :, 16, 0] < 0).sum(axis=1)
  assert black_rows.max() == 4  # 0 to 4 black rows above or below, each width many times in 64


def test_small_sets_split_and_size(tmp_path, batches):
  data = Cifar10(_write(tmp_path, _binary(batches)), *HALVES, nb_smpls_val=30)
  assert [data.size(s) for s in ('train', 'fit', 'val', 'test')] == [100, 70, 30, 20]


def _error(path):
  with pytest.raises(UserError) as caught:
    cifar10.read(path)
  return str(caught.value)


def test_a_missing_folder_is_named(tmp_path):
  assert 'must be an existing folder' in _error(tmp_path / 'nowhere')
  assert str(tmp_path / 'nowhere') in _error(tmp_path / 'nowhere')


def test_a_folder_without_batches_says_what_was_looked_for(tmp_path):
  message = _error(tmp_path)
  for name in ('data_batch_1.bin', 'test_batch.bin', 'cifar-10-batches-py', 'binary.tar.gz'):
    assert name in message


def test_a_missing_batch_is_named(tmp_path, batches):
  contents = _binary(batches)
  del contents['data_batch_3.bin']
  assert 'without data_batch_3.bin.' in _error(_write(tmp_path / 'folder', contents))
  assert 'without data_batch_3' in _error(_pack(tmp_path / 'a.tar.gz', contents))


def test_an_unreadable_file_is_named(tmp_path, batches, monkeypatch):
  _write(tmp_path, _binary(batches))

  def refuse(path):
    raise PermissionError(13, 'Permission denied', str(path))

  monkeypatch.setattr('pathlib.Path.read_bytes', refuse)
  assert "cannot be read: [Errno 13] Permission denied: '" in _error(tmp_path)


@pytest.mark.parametrize('size, begins', [(0, 0), (3072, 0), (3073 * 4 + 1, 12292)])
def test_a_truncated_file_says_where_it_ends_short(tmp_path, batches, size, begins):
  contents = _binary(batches)
  contents['data_batch_4.bin'] = contents['data_batch_4.bin'][:size]
  message = _error(_write(tmp_path, contents))
  assert 'data_batch_4.bin must have a size that is a multiple of 3073 bytes' in message
  assert f'Received: {size} bytes' in message
  assert f'begins at byte offset {begins} ends short at {size}.' in message


def test_a_corrupt_label_says_where_it_is(tmp_path, batches):
  contents = _binary(batches)
  content = bytearray(contents['test_batch.bin'])
  content[7 * 3073] = 255
  message = _error(_write(tmp_path, {**contents, 'test_batch.bin': bytes(content)}))
  assert 'test_batch.bin, record 7 at byte offset 21511: the label must be 0 to 9.' in message
  assert message.endswith('Received: 255.')


class Malicious:
  def __reduce__(self):
    return (print, ('this must not be printed',))


GOOD_PLANES = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
  'content, message',
  [
    (b'', 'damaged at byte offset 0 of 0: EOFError'),
    (pickle.dumps({b'data': GOOD_PLANES})[:3000], 'of 3000: '),
    (b'\x80\x02garbage', 'is not, or is damaged'),
    (pickle.dumps(Malicious()), 'print does not belong into a data file'),
    (pickle.dumps([1, 2]), '`data` must be a uint8 array'),
    (pickle.dumps({b'data': GOOD_PLANES.astype(float), b'labels': [1, 2]}), 'must be a uint8'),
    (pickle.dumps({b'data': GOOD_PLANES[:, 1:], b'labels': [1, 2]}), r'Received: (2, 3071)'),
    (pickle.dumps({b'data': GOOD_PLANES, b'labels': [1]}), '`labels` must be a list of 2 integers'),
    (pickle.dumps({b'data': GOOD_PLANES, b'labels': [1, 10]}), 'record 1: the label must be'),
  ],
)
def test_a_corrupt_pickle_is_refused(tmp_path, batches, capsys, content, message):
  error = _error(_write(tmp_path, {**_pickled(batches), 'data_batch_5': content}))
  assert message in error and 'data_batch_5' in error
  assert not capsys.readouterr().out


def test_a_damaged_archive_is_refused(tmp_path, batches):
  path = _pack(tmp_path / 'cifar-10-binary.tar.gz', _binary(batches))
  content = path.read_bytes()
  flipped = bytearray(content)
  flipped[len(content) // 2 : len(content) // 2 + 64] = bytes(64)
  for damaged in (b'no archive', b'', content[: len(content) // 2], bytes(flipped)):
    path.write_bytes(damaged)
    message = _error(tmp_path)
    assert str(path) in message and 'byte offset' in message


def test_links_in_an_archive_are_not_followed(tmp_path, batches):
  with tarfile.open(tmp_path / 'a.tar.gz', 'w:gz') as archive:
    for name in _binary(batches):
      member = tarfile.TarInfo(name)
      member.type, member.linkname = tarfile.SYMTYPE, '/etc/passwd'
      archive.addfile(member)
  assert 'without data_batch_1' in _error(tmp_path / 'a.tar.gz')


def test_without_a_folder_the_official_archive_is_fetched(tmp_path, batches, monkeypatch):
  monkeypatch.setenv('POCKETSIZE_CACHE', str(tmp_path / 'cache'))
  path = _pack(tmp_path / 'cifar-10-binary.tar.gz', _binary(batches))
  monkeypatch.setattr(cifar10, 'URL', path.as_uri())
  with pytest.raises(UserError, match='md5 sum c32a1d4a.* --data_dir_local'):
    Cifar10(None, *HALVES)
  monkeypatch.setattr(cifar10, 'MD5', hashlib.md5(path.read_bytes()).hexdigest())
  assert Cifar10(None, *HALVES).size('train') == 100


@pytest.mark.shared
def test_the_whole_set_has_5000_training_images_of_each_class(shared):
  (x, y), (_, test_y) = cifar10.read(shared / 'data')
  assert len(x) == 50000
  assert list(np.bincount(y)) == [5000] * 10 and list(np.bincount(test_y)) == [1000] * 10
