"""Channel pruning remastered: ISTA with a bisected penalty, then regression by Adam.

PocketFlow's `chn-pruned-rmt`, after He et al. 2017 (arXiv:1707.06168).
ISTA: Beck and Teboulle 2009, equation 1.4.

Deviation 1: both work on the Gram matrices of all sampled rows instead of a sub-sample and of
  full batches of rows; the iterations are the same.
Deviation 2: ISTA starts from ones, the unpruned layer, instead of random numbers, so that workers
  and repetitions choose the same channels.
Deviation 3: exactly as many channels as wanted are kept; where no penalty gives that number, those
  with the largest coefficients of the next one.
"""

import dataclasses

import numpy as np

from pocketsize.errors import UserError
from pocketsize.pruning.lasso import joint_contributions


def ista(gram, moments, penalty, step, iterations):
  """Returns [channels] coefficients b after `iterations` of b <- soft(b - step (Gb - g), step a).

  Args:
    gram: G, [channels, channels].   moments: g, [channels].
    penalty: a, not negative.        step: of the gradient, positive.
  """
  coefficients = np.ones(len(gram))
  for _ in range(iterations):
    moved = coefficients - step * (gram @ coefficients - moments)
    coefficients = np.sign(moved) * np.maximum(np.abs(moved) - step * penalty, 0.0)
  return coefficients


def select_by_ista(gram, moments, count, step=0.01, iterations=100):
  """Returns [channels] bool with exactly `count` true.

  The penalty is doubled from 0.1 until at most `count` coefficients are left, then bisected until
  exactly so many are, or its interval is 1e-8 wide. G and g are divided by the norm of G first.
  """
  norm = max(np.linalg.norm(gram), np.finfo(np.float64).tiny)
  gram, moments = gram / norm, moments / norm

  def solve(penalty):
    return np.abs(ista(gram, moments, penalty, step, iterations))

  low, high = 0.0, 0.1
  best, more = solve(high), solve(low)
  while np.count_nonzero(best) > count:
    low, more = high, best
    high *= 2.0
    best = solve(high)
  while np.count_nonzero(best) != count and high - low > 1e-8:
    middle = (low + high) / 2.0
    found = solve(middle)
    if np.count_nonzero(found) > count:
      low, more = middle, found
    else:
      high, best = middle, found
  # Of those that the next penalty leaves, first the ones that this one leaves too.
  order = np.lexsort((np.arange(len(gram)), -more, -best))
  chosen = np.zeros(len(gram), bool)
  chosen[order[:count]] = True
  return chosen


def adam(gradient, start, rate, iterations):
  """Yields what `iterations` of Adam make of `start` (Kingma and Ba 2015; 0.9, 0.999, 1e-8).

  Args:
    gradient: function from an array to the gradient there.
    start: array, not changed.
    rate: learning rate, positive.
  """
  value, first, second = start, np.zeros_like(start), np.zeros_like(start)
  for step in range(1, iterations + 1):
    slope = gradient(value)
    first += 0.1 * (slope - first)
    second += 0.001 * (np.square(slope) - second)
    corrected = np.sqrt(second / (1.0 - 0.999**step)) + 1e-8
    value = value - rate * first / (1.0 - 0.9**step) / corrected
    yield value


def regress(problem, rows, start, rate, iterations, weight_decay=0.0):
  """Returns the [weights, outputs] kernel with only `rows`, by Adam from `start`.

  Minimises ||X W - Y||^2 / (2 N) + weight_decay ||W||^2 / 2 for N rows of X.

  Args:
    problem: `gram.Problem`.
    rows: [weights] bool.
    start: [weights, outputs].
  """
  scale = 1.0 / max(problem.rows, 1)
  gram, moments = problem.gram[np.ix_(rows, rows)] * scale, problem.moments[rows] * scale

  def gradient(weights):
    return gram @ weights - moments + weight_decay * weights

  kernel = np.zeros_like(start)
  kernel[rows] = start[rows]
  for weights in adam(gradient, start[rows], rate, iterations):
    kernel[rows] = weights
  return kernel


@dataclasses.dataclass(frozen=True)
class Ista:
  """How channels are chosen and kernels reconstructed.

  Attributes:
    step, iterations: of ISTA. G has norm 1, so that a step above 1 may diverge.
    rate, regression_steps: of Adam.
    weight_decay: of the regression.
  """

  step: float = 0.01
  iterations: int = 100
  rate: float = 0.001
  regression_steps: int = 100
  weight_decay: float = 0.0

  def __post_init__(self):
    if not 0 < self.step <= 1:
      raise UserError(f'`step` must be in (0, 1]. Received: {self.step}.')
    if self.rate <= 0:
      raise UserError(f'`rate` must be positive. Received: {self.rate}.')
    if self.iterations < 1 or self.regression_steps < 0:
      raise UserError(
        '`iterations` must be at least 1 and `regression_steps` at least 0. '
        f'Received: {self.iterations} and {self.regression_steps}.'
      )

  def select(self, problems, places, size, count):
    """Returns [size] bool with `count` channels of a unit; see `lasso.joint_contributions`."""
    gram, moments = joint_contributions(problems, places, size)
    return select_by_ista(gram, moments, count, self.step, self.iterations)

  def reconstruct(self, problem, rows):
    """Returns the [weights, outputs] kernel that reads `rows` only."""
    return regress(
      problem, rows, problem.kernel, self.rate, self.regression_steps, self.weight_decay
    )
