"""The replay buffer of an agent: a ring of transitions."""

import numpy as np

from pocketsize.errors import UserError

COLUMNS = ('states', 'actions', 'rewards', 'terminals', 'next_states')


class Replay:
  """The last `size` transitions, float32: five columns of one row each, see `COLUMNS`."""

  def __init__(self, size, state_size, action_size):
    shapes = ((state_size,), (action_size,), (), (), (state_size,))
    self.columns = [np.zeros((size, *shape), np.float32) for shape in shapes]
    self._size, self._count = size, 0

  @property
  def is_full(self):
    return self._count >= self._size

  def add(self, *columns):
    """Adds n transitions; what finds no free place takes that of the oldest.

    Args:
      columns: five arrays of n rows, in the order of `COLUMNS`; n >= 0.

    Raises:
      UserError: an array has another shape, or a number in it is not finite.
    """
    count = len(columns[0])
    for name, values, column in zip(COLUMNS, columns, self.columns, strict=True):
      shape = (count, *column.shape[1:])
      if np.shape(values) != shape or not np.all(np.isfinite(values)):
        raise UserError(
          f'`{name}` must be finite numbers of shape {shape}. Received: {values} of shape '
          f'{np.shape(values)}.'
        )
    places = (self._count + np.arange(count)) % self._size
    for column, values in zip(self.columns, columns, strict=True):
      column[places] = values
    self._count += count

  def sample(self, rng, count):
    """Returns five arrays of `count` rows, drawn uniformly with replacement from a full buffer."""
    places = rng.integers(self._size, size=count)
    return [column[places] for column in self.columns]
