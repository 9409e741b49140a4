"""Fixtures of all tests."""

import os
import pathlib

import pytest


@pytest.fixture(scope='session')
def shared():
  """The folder with data and weights that tests marked `shared` need."""
  folder = os.environ.get('POCKETSIZE_SHARED')
  if not folder:
    pytest.skip('POCKETSIZE_SHARED is not set')
  return pathlib.Path(folder)
