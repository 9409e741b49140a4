"""What is kept of what roll-outs ask for: as much as memory has room for."""

import numpy as np
import pytest

from pocketsize.allocation.kept import Kept


def test_arrays_are_made_once_and_beyond_the_memory_each_time():
  made = []

  def maker(value, count):
    def make():
      made.append(value)
      return np.full(count, value, np.float32)

    return make

  kept = Kept(memory=16)
  assert kept.get('a', maker(1, 2)).tolist() == [1, 1]
  with pytest.warns(UserWarning, match='exceed `memory`'):
    kept.get('b', maker(2, 3))
  # Eight bytes are left, and it warns once.
  assert kept.get('c', maker(3, 2)).tolist() == [3, 3]
  assert kept.get('b', maker(2, 3)).tolist() == [2, 2, 2]
  assert kept.get('a', maker(1, 2)).tolist() == [1, 1]
  kept.get('c', maker(3, 2))
  assert made == [1, 2, 3, 2]


def test_an_array_that_is_there_anyway_takes_no_memory():
  own, kept = np.ones(100), Kept(memory=8)
  assert kept.get('own', lambda: own, own) is own
  assert kept.get('other', lambda: np.ones(1), own).tolist() == [1.0]
  assert kept.get('other', lambda: pytest.fail('made twice'), own).tolist() == [1.0]
