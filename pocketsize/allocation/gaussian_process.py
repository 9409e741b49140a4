"""Expected improvement under a Gaussian process.

Optuna's own needs PyTorch; this one is scikit-learn's regression (Rasmussen and Williams 2006) and
the criterion of Jones et al. (1998, 'Efficient Global Optimization').
"""

import warnings

import numpy as np
from scipy import optimize, special
from threadpoolctl import threadpool_limits

from pocketsize.allocation.studies import spread

# Candidates of each kind: anywhere, near the best points, and their neighbours in each climb.
_ANYWHERE, _NEARBY, _SWAPS, _CLIMBS = 128, 128, 96, 3
# Near means near one of so many best points, with this share of the levels drawn anew.
_PARENTS, _REDRAWN = 5, 0.2
# The hyperparameters begin where they were, so a few iterations of L-BFGS-B are enough.
_ITERATIONS = 8


def expected_improvement(mean, std, best):
  """Returns E[max(f - best, 0)] for f ~ N(mean, std^2) (Jones et al. 1998, equation 15).

  Args:
    mean, std: [points] floats; a `std` of 0 is a value that is known.
    best: the value to be exceeded.
  """
  gain = mean - best
  safe = np.maximum(std, 1e-12)
  score = gain / safe
  # The normal distribution by hand: `scipy.stats` takes longer to import than all of SciPy else.
  density = np.exp(-(score**2) / 2.0) / np.sqrt(2.0 * np.pi)
  return np.where(std > 0, gain * special.ndtr(score) + safe * density, np.maximum(gain, 0))


class GaussianProcess:
  """Proposes the levels within the budget of which the most improvement is expected.

  Heights (levels over the highest one) are the inputs, in [0, 1]. The kernel is Matern 5/2 with a
  length scale for each variable, plus white noise; it is fitted by likelihood at every proposal.
  Trials on their way count with the mean that is predicted for them, so that the workers of a
  round look at different places (the 'kriging believer' of Ginsbourger et al. 2010).

  Args:
    problem: a `Problem`.
    seed: of all random numbers.
  """

  def __init__(self, problem, seed):
    # Imported here, since few programs propose.
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    self._problem = problem
    self._rng = np.random.default_rng(seed)
    scales = np.ones(len(problem.variables))
    self._kernel = ConstantKernel(1.0, (1e-2, 1e2)) * Matern(scales, (0.05, 20.0), nu=2.5)
    self._kernel += WhiteKernel(1e-2, (1e-5, 1.0))

  def propose(self, points, rewards, pending):
    """Returns the best candidate that has no trial yet, [variables] int.

    Args:
      points: [trials, variables] levels that were scored, at least one.
      rewards: [trials] floats.
      pending: [trials, variables] levels on their way.
    """
    rewards = (rewards - rewards.mean()) / (rewards.std() or 1.0)
    # The matrices are small, and sums then have the same order on any number of cores.
    with threadpool_limits(1):
      model = self._fitted(points, rewards, pending)
      return self._climb(model, points[np.argsort(-rewards, kind='stable')], pending)

  def _heights(self, levels):
    return levels / np.maximum(self._problem.highest, 1)

  def _fitted(self, points, rewards, pending):
    """Returns the regression of standardised rewards; its kernel is where the next one begins."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor

    model = GaussianProcessRegressor(self._kernel, optimizer=_few_iterations)
    with warnings.catch_warnings():
      # A length scale at its bound is a variable that does not matter.
      warnings.simplefilter('ignore', ConvergenceWarning)
      model.fit(self._heights(points), rewards)
    self._kernel = model.kernel_
    if len(pending):
      believed = model.predict(self._heights(pending))
      model = GaussianProcessRegressor(self._kernel, optimizer=None)
      model.fit(
        self._heights(np.concatenate([points, pending])), np.concatenate([rewards, believed])
      )
    return model

  def _climb(self, model, points, pending):
    """Returns the candidate of the highest expected improvement; `points`: the best one first."""
    seen = {tuple(levels) for levels in [*points.tolist(), *pending.tolist()]}
    best = model.predict(self._heights(points)).max()
    candidates = [spread(self._problem, self._rng) for _ in range(_ANYWHERE)]
    candidates += [self._near(points[:_PARENTS]) for _ in range(_NEARBY)]
    candidates += self._neighbours(points[0])
    chosen, highest = candidates[0], -np.inf
    for _ in range(_CLIMBS):
      fresh = [levels for levels in candidates if tuple(levels.tolist()) not in seen]
      seen.update(tuple(levels.tolist()) for levels in fresh)
      if not fresh:
        break
      improvement = self._improvement(model, np.array(fresh), best)
      if improvement.max() <= highest:
        break
      chosen, highest = fresh[int(improvement.argmax())], improvement.max()
      candidates = self._neighbours(chosen)
    return chosen

  def _improvement(self, model, levels, best):
    mean, std = model.predict(self._heights(levels), return_std=True)
    # The score is to be improved, not its noise, which is in the deviation.
    variance = np.maximum(std**2 - model.kernel_.k2.noise_level, 0.0)
    return expected_improvement(mean, np.sqrt(variance), best)

  def _near(self, parents):
    levels = self._rng.choice(parents).copy()
    drawn = self._rng.random(len(levels)) < _REDRAWN
    levels[drawn] = self._rng.integers(self._problem.sizes[drawn])
    return self._problem.repaired(levels)

  def _neighbours(self, levels):
    """Returns `levels` with one variable a step up or down, and with one up and another down."""
    count = len(levels)
    steps = np.concatenate([np.eye(count, dtype=int), -np.eye(count, dtype=int)])
    up, down = self._rng.integers(count, size=(2, _SWAPS))
    swaps = steps[up] + steps[count + down]
    return [self._problem.repaired(levels + step) for step in np.concatenate([steps, swaps])]


def _few_iterations(loss, initial, bounds):
  """An optimizer of hyperparameters for GaussianProcessRegressor."""
  found = optimize.minimize(
    loss, initial, jac=True, bounds=bounds, method='L-BFGS-B', options={'maxiter': _ITERATIONS}
  )
  return found.x, found.fun
