"""Channel pruning by LASSO selection and least squares (He et al. 2017, arXiv:1707.06168).

Deviation 1: the LASSO path is followed on the Gram matrix of all sampled rows, not on a sub-sample
  of at most 400; it is exact, so the penalty needs no search: the first point of the path with as
  many channels as wanted is taken.
Deviation 2: the least squares have a small ridge towards the original kernel, which decides where
  the samples do not, such as for inputs that are always zero.
"""

import dataclasses

import numpy as np

from pocketsize.errors import UserError

# Of the mean of X'X's diagonal.
RIDGE = 1e-4


def lasso_path(gram, moments, count):
  """Returns [channels] coefficients of the LASSO with `count` of them not zero, if there are such.

  Follows min_b b'Gb / 2 - g'b + a |b|_1 from b = 0 as the penalty a falls, and stops where `count`
  are not zero; where the path ends before, those that it has.

  Args:
    gram: G, [channels, channels], positive semidefinite.
    moments: g, [channels].
    count: 1 to channels.
  """
  from sklearn.linear_model import lars_path_gram

  scale = np.sqrt(np.maximum(np.diag(gram), np.finfo(np.float64).tiny)).max()
  _, _, path = lars_path_gram(
    moments / scale, gram / scale**2, n_samples=1, method='lasso', max_iter=8 * len(gram)
  )
  path = path / scale
  sizes = (path != 0.0).sum(axis=0)
  reached = np.flatnonzero(sizes >= count)
  return path[:, reached[0]] if len(reached) else path[:, -1]


def select_by_lasso(gram, moments, count):
  """Returns [channels] bool with exactly `count` true: those with the largest LASSO coefficients.

  Where the path has fewer, the rest are those with the largest explained squares g^2 / G.
  """
  explained = np.square(moments) / np.maximum(np.diag(gram), np.finfo(np.float64).tiny)
  coefficients = np.abs(lasso_path(gram, moments, count))
  order = np.lexsort((np.arange(len(gram)), -explained, -coefficients))
  chosen = np.zeros(len(gram), bool)
  chosen[order[:count]] = True
  return chosen


def least_squares(problem, rows, start, ridge=RIDGE):
  """Returns the [weights, outputs] kernel with only `rows` that best gives the original's outputs.

  Solves min_W ||X W - Y||^2 + r ||W - W0||^2 over the rows chosen, where r is `ridge` times the
  mean of X'X's diagonal over them.

  Args:
    problem: `gram.Problem`.
    rows: [weights] bool.
    start: W0, [weights, outputs].
    ridge: not negative.
  """
  kernel = np.zeros_like(start)
  gram = problem.gram[np.ix_(rows, rows)]
  penalty = ridge * np.trace(gram) / len(gram) + np.finfo(np.float64).tiny
  right = problem.moments[rows] + penalty * start[rows]
  kernel[rows] = np.linalg.solve(gram + penalty * np.eye(len(gram)), right)
  return kernel


def group_magnitudes(problems, places, size):
  """Returns [size] sums of |W| over the rows that read each channel, in all its readers."""
  totals = np.zeros(size)
  for problem, place in zip(problems, places, strict=True):
    sums = np.abs(problem.kernel).sum(axis=1).reshape(-1, problem.inputs).sum(axis=0)
    np.add.at(totals, place[place >= 0], sums[place >= 0])
  return totals


def joint_contributions(problems, places, size):
  """Returns (G, g) over the channels of a unit, summed over its readers' relative errors.

  Each reader counts with its error relative to ||Y||^2. Inputs that are not in the unit are taken
  as they are, with the factor 1.

  Args:
    problems: `gram.Problem`s of the readers.
    places: for each, [inputs] places in the unit, or -1.
    size: channels of the unit.
  """
  gram, moments = np.zeros((size, size)), np.zeros(size)
  for problem, place in zip(problems, places, strict=True):
    products, right = problem.contributions()
    inside = place >= 0
    right = right - products[:, ~inside].sum(axis=1)
    spread = np.zeros((len(place), size))
    spread[np.flatnonzero(inside), place[inside]] = 1.0
    energy = max(problem.energy, np.finfo(np.float64).tiny)
    gram += spread.T @ products @ spread / energy
    moments += spread.T @ right / energy
  return gram, moments


@dataclasses.dataclass(frozen=True)
class Lasso:
  """How channels are chosen and kernels reconstructed.

  Attributes:
    lasso: choose by LASSO; if not, by the magnitude of the weights that read a channel.
    ridge: see `least_squares`, not negative.
  """

  lasso: bool = True
  ridge: float = RIDGE

  def __post_init__(self):
    if self.ridge < 0:
      raise UserError(f'`ridge` must be at least 0. Received: {self.ridge}.')

  def select(self, problems, places, size, count):
    """Returns [size] bool with `count` channels of a unit; see `joint_contributions`."""
    if self.lasso:
      return select_by_lasso(*joint_contributions(problems, places, size), count)
    chosen = np.zeros(size, bool)
    chosen[np.argsort(-group_magnitudes(problems, places, size), kind='stable')[:count]] = True
    return chosen

  def reconstruct(self, problem, rows):
    """Returns the [weights, outputs] kernel that reads `rows` only."""
    return least_squares(problem, rows, problem.kernel, self.ridge)
