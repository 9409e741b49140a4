"""Channel pruning by proximal gradient descent with a group LASSO (PocketFlow's `chn-pruned-gpu`).

Each step goes down the gradient of the layer's regression error and then shrinks the weights that
read a channel towards zero, as a group: W_i <- W_i max(1 - tau / |W_i|, 0) (Parikh and Boyd 2014,
section 6.5.4). The threshold tau is that percentile of the norms |W_i| which rises linearly from 0
to the wanted ratio. Adam then refits the weights that are left.

Deviation 1: the error is that of all sampled rows, from their Gram matrix, in every step.
Deviation 2: the step size never exceeds the inverse of the largest eigenvalue of X'X, beyond
  which the descent may diverge, so no choice of rates ends in numbers that are not finite.
Deviation 3: whether the error fell is asked of the descent alone. The threshold raises it by
  design, and with it in the comparison step sizes vanish.
Deviation 4: Adam's best weights are taken, so that the regression never does harm.
"""

import dataclasses

import numpy as np

from pocketsize.errors import UserError
from pocketsize.pruning.ista import adam

_TINY = np.finfo(np.float64).tiny


def group_factors(norms, threshold):
  """Returns max(1 - threshold / norm, 0) for [channels] norms; 0 for a norm of 0."""
  return np.where(norms > threshold, 1.0 - threshold / np.maximum(norms, _TINY), 0.0)


def descend(problems, places, size, count, rates=(1e-10, 1.4, 0.7), iterations=1000):
  """Returns [size] norms of the weights that read each channel after the proximal descent.

  Of several readers the squared norms, relative to their kernels', are summed.

  Args:
    problems: `gram.Problem`s of a unit's readers.
    places: for each, [inputs] places in the unit, or -1.
    size: channels of the unit.
    count: channels to keep.
    rates: (first step size, its factor where the error fell, its factor where it did not).
    iterations: number of steps.
  """
  first, grow, fall = rates
  kernels = [problem.kernel.copy() for problem in problems]
  scales = [max(np.square(kernel).sum(), _TINY) for kernel in kernels]
  rows = [
    np.tile(place, len(problem.kernel) // problem.inputs)
    for problem, place in zip(problems, places, strict=True)
  ]
  limits = [1.0 / max(np.linalg.eigvalsh(problem.gram)[-1], _TINY) for problem in problems]
  sizes = [min(first, limit) for limit in limits]
  norms = np.zeros(size)
  for step in range(1, iterations + 1):
    squares = np.zeros(size)
    for number, problem in enumerate(problems):
      slope = problem.gram @ kernels[number] - problem.moments
      moved = sizes[number] * slope
      # ||Y - X W||^2 falls by 2 <moved, slope> - <moved, X'X moved>.
      gain = (moved * (2.0 * slope - problem.gram @ moved)).sum()
      kernels[number] = kernels[number] - moved
      sizes[number] = min(sizes[number] * (grow if gain > 0 else fall), limits[number])
      inside = rows[number] >= 0
      row_squares = np.square(kernels[number]).sum(axis=1) / scales[number]
      np.add.at(squares, rows[number][inside], row_squares[inside])
    norms = np.sqrt(squares)
    share = step / iterations * (1.0 - count / size)
    factors = group_factors(norms, np.quantile(norms, share) if share else 0.0)
    for number, row in enumerate(rows):
      kernels[number] = kernels[number] * np.where(row >= 0, factors[row], 1.0)[:, None]
    norms = norms * factors
  return norms


def refit(problem, rows, start, rate, iterations):
  """Returns the [weights, outputs] kernel with only `rows`: the best that Adam meets from `start`.

  Minimises ||X W - Y||^2 / (2 N) for N rows of X.
  """
  scale = 1.0 / max(problem.rows, 1)
  gram, moments = problem.gram[np.ix_(rows, rows)] * scale, problem.moments[rows] * scale

  def error(weights):
    return float(((gram @ weights - 2.0 * moments) * weights).sum())

  best = start[rows]
  least = error(best)
  for weights in adam(lambda weights: gram @ weights - moments, best, rate, iterations):
    found = error(weights)
    if found < least:
      best, least = weights, found
  kernel = np.zeros_like(start)
  kernel[rows] = best
  return kernel


@dataclasses.dataclass(frozen=True)
class Proximal:
  """How channels are chosen and kernels refitted.

  Attributes:
    first, grow, fall: step size of the descent at first, and its factors.
    rate: of Adam.
    iterations: of either.
  """

  first: float = 1e-10
  grow: float = 1.4
  fall: float = 0.7
  rate: float = 0.01
  iterations: int = 1000

  def __post_init__(self):
    if min(self.first, self.rate, self.fall) <= 0 or self.grow < 1 or self.fall > 1:
      raise UserError(
        '`first` and `rate` must be positive, `grow` at least 1 and `fall` in (0, 1]. '
        f'Received: {self.first}, {self.rate}, {self.grow} and {self.fall}.'
      )
    if self.iterations < 1:
      raise UserError(f'`iterations` must be at least 1. Received: {self.iterations}.')

  def select(self, problems, places, size, count):
    """Returns [size] bool with the `count` channels of a unit whose weights are left largest."""
    rates = (self.first, self.grow, self.fall)
    norms = descend(problems, places, size, count, rates, self.iterations)
    chosen = np.zeros(size, bool)
    chosen[np.argsort(-norms, kind='stable')[:count]] = True
    return chosen

  def reconstruct(self, problem, rows):
    """Returns the [weights, outputs] kernel that reads `rows` only."""
    return refit(problem, rows, problem.kernel, self.rate, self.iterations)
