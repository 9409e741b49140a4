"""Arrays that roll-outs ask for again and again, made once, within a bound on memory."""

import warnings

MEMORY = 2 * 2**30


class Kept:
  """Arrays by key.

  Args:
    memory: bytes; once they are full, arrays that are not among those kept are made each time, with
      a warning. All kernels of ResNet-50 at seven bits have 0.7 GB as float32.
  """

  def __init__(self, memory=MEMORY):
    self._left = memory
    self._is_full = False
    self._arrays = {}

  def get(self, key, make, own=None):
    """Returns the array of a key.

    Args:
      key: hashable.
      make: called without arguments for an array that is not there.
      own: an array that takes no further memory, should it be what `make` returns.
    """
    if key in self._arrays:
      return self._arrays[key]
    array = make()
    size = 0 if array is own else array.nbytes
    if size <= self._left:
      self._left -= size
      self._arrays[key] = array
    elif not self._is_full:
      self._is_full = True
      warnings.warn(
        'The kernels of all choices exceed `memory`: those beyond are computed each time.',
        stacklevel=2,
      )
    return array
