"""Where data lies: the order of the sources, `path.conf`, the checked download."""

import hashlib
import pathlib

import pytest

from datasets import paths
from pocketsize.errors import UserError


@pytest.fixture(autouse=True)
def empty_places(tmp_path, monkeypatch):
  """Neither this machine's environment nor its path.conf takes part."""
  (tmp_path / 'here').mkdir()
  (tmp_path / 'repository').mkdir()
  monkeypatch.chdir(tmp_path / 'here')
  monkeypatch.setattr(paths, '_REPOSITORY', tmp_path / 'repository')
  monkeypatch.delenv('POCKETSIZE_DATA_DIR_CIFAR10', raising=False)
  monkeypatch.setenv('POCKETSIZE_CACHE', str(tmp_path / 'cache'))


def test_each_source_is_asked_in_turn(tmp_path, monkeypatch):
  def found(flag=None):
    return paths.resolve_folder('cifar10', flag)

  assert found() is None
  (tmp_path / 'repository' / 'path.conf').write_text('data_dir_local_cifar10 = /repository\n')
  assert found() == pathlib.Path('/repository')
  (tmp_path / 'here' / 'path.conf').write_text('data_dir_local_cifar10 = /here\n')
  assert found() == pathlib.Path('/here')
  monkeypatch.setenv('POCKETSIZE_DATA_DIR_CIFAR10', '/environment')
  assert found() == pathlib.Path('/environment')
  assert found('/flag') == pathlib.Path('/flag')


def test_pocketflows_file_is_understood(tmp_path):
  path = tmp_path / 'path.conf'
  path.write_text(
    '# data files\n\n'
    'data_hdfs_host = None\n'
    'data_dir_local_cifar10 = /data/cifar 10   # ours\n'
    'model_http_url = https://api.ai.tencent.com/pocketflow\n'
  )
  assert paths.read_path_conf(path) == {
    'data_dir_local_cifar10': '/data/cifar 10',
    'model_http_url': 'https://api.ai.tencent.com/pocketflow',
  }


def test_the_template_sets_nothing():
  template = pathlib.Path(__file__).resolve().parents[1] / 'path.conf.template'
  assert paths.read_path_conf(template) == {}


@pytest.mark.parametrize('line', ['data_dir_local_cifar10', 'a =', '= /data', 'a b = c'])
def test_a_malformed_line_is_named(tmp_path, line):
  (tmp_path / 'here' / 'path.conf').write_text(f'# one\n{line}\n')
  with pytest.raises(UserError, match=r'path\.conf, line 2: must be `key = value`. Received: '):
    paths.resolve_folder('cifar10', None)


def test_a_file_that_is_no_text_is_refused(tmp_path):
  (tmp_path / 'here' / 'path.conf').write_bytes(b'\xff\xfe\x00')
  with pytest.raises(UserError, match='must be a text file'):
    paths.resolve_folder('cifar10', None)


def test_a_download_is_checked_kept_and_made_once(tmp_path):
  source = tmp_path / 'set.bin'
  source.write_bytes(b'content')
  md5 = hashlib.md5(b'content').hexdigest()
  target = paths.fetch(source.as_uri(), md5, instead='Or else.')
  assert target == tmp_path / 'cache' / 'set.bin' and target.read_bytes() == b'content'
  source.unlink()
  assert paths.fetch(source.as_uri(), md5, instead='Or else.') == target


def test_a_download_with_the_wrong_sum_leaves_nothing(tmp_path):
  source = tmp_path / 'set.bin'
  source.write_bytes(b'tampered')
  with pytest.raises(UserError, match=r'must have the md5 sum 00\. Received: .* Or else\.'):
    paths.fetch(source.as_uri(), '00', instead='Or else.')
  assert list((tmp_path / 'cache').iterdir()) == []


def test_a_failed_download_says_what_to_do_instead(tmp_path):
  with pytest.raises(UserError, match=r'failed: .* Give a folder\.'):
    paths.fetch((tmp_path / 'absent').as_uri(), '00', instead='Give a folder.')
