"""What each channel is worth to the layers that read it, for ranking the whole network's channels.

Channels of a unit are dropped one by one, always the one whose loss raises the least-squares error
of the readers' outputs the least; the rise, relative to the outputs' squares, is what it is worth.
Divided by the multiply-accumulates that go with it, channels of different layers compare. Backward
elimination: Reeves 1999, IEEE Transactions on Signal Processing 47(7).
"""

import numpy as np

from pocketsize import cost
from pocketsize.pruning.lasso import joint_contributions

# Of the mean of G's diagonal, so that equal channels have an inverse.
_RIDGE = 1e-9


def marginal_errors(gram, moments):
  """Returns [channels] rises of min_b b'Gb - 2 g'b as channels go, the cheapest first.

  They are made ascending in the order of elimination. The last channel's is infinite.

  Args:
    gram: G, [channels, channels], positive semidefinite.   moments: g, [channels].
  """
  size = len(gram)
  ridge = _RIDGE * np.trace(gram) / size + np.finfo(np.float64).tiny
  inverse = np.linalg.inv(gram + ridge * np.eye(size))
  factors = inverse @ moments
  rises, alive, highest = np.full(size, np.inf), np.ones(size, bool), 0.0
  for _ in range(size - 1):
    # Without channel i the error is higher by b_i^2 / (G^-1)_ii.
    diagonal = np.where(alive, np.diag(inverse), 1.0)
    losses = np.where(alive, np.square(factors) / np.maximum(diagonal, ridge**2), np.inf)
    worst = int(np.argmin(losses))
    highest = max(highest, float(losses[worst]))
    rises[worst] = highest
    alive[worst] = False
    column = inverse[:, worst] / inverse[worst, worst]
    factors = factors - column * factors[worst]
    inverse = inverse - np.outer(column, inverse[worst])
  return rises


def worths(channels, units, problems):
  """Returns {group name: [channels]} errors per share of the multiply-accumulates saved.

  Args:
    channels: a `ChannelGraph`.
    units: list of `Unit`s whose names are those of groups.
    problems: {path: `gram.Problem`} of all their readers.
  """
  left = cost.macs_share(channels)
  found = {group.name: np.zeros(group.size) for group in channels.groups}
  for unit in units:
    gram, moments = joint_contributions(
      [problems[path] for path in unit.readers], list(unit.readers.values()), unit.size
    )
    errors = marginal_errors(gram, moments)
    # Each channel of a group saves the same. A finite number for the last one, which never goes.
    saved = 1.0 - left({unit.name: np.arange(unit.size) > 0}) if unit.size > 1 else 1.0
    found[unit.name] = np.minimum(errors / saved, np.finfo(np.float64).max)
  return found
