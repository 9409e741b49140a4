"""TPE and Gaussian processes as searchers: studies of Optuna (Akiba et al. 2019, arXiv:1907.10902).

TPE is the tree-structured Parzen estimator (Bergstra et al. 2011); GP is expected improvement under
a Gaussian process (`gaussian_process.py`). Both suggest points of the whole grid of levels. What
exceeds the budget is repaired, and a study is told of the repaired point, which was scored, not of
the one that it suggested.
"""

import numpy as np

# How often a study is asked again for what it has not seen yet.
_TRIES = 10
# Powers of heights in (0, 1), between which `spread` halves its interval that often.
_POWERS, _HALVINGS = (1.0, 64.0), 12


def spread(problem, rng):
  """Returns random levels within the budget, [variables] int.

  Heights are drawn uniformly in [0, 1] and, if they are too dear, raised to the least power with
  which they are not: their order stays, and high and low levels remain in the choice.

  Args:
    problem: a `Problem`.
    rng: np.random.Generator.
  """
  heights = rng.random(len(problem.variables))

  def levels(power):
    return np.rint(heights**power * problem.highest).astype(int)

  low, high = np.log(_POWERS)
  if problem.is_met(levels(1.0)):
    return levels(1.0)
  for _ in range(_HALVINGS):
    middle = (low + high) / 2
    low, high = (low, middle) if problem.is_met(levels(np.exp(middle))) else (middle, high)
  return problem.repaired(levels(np.exp(high)))


class Study:
  """A searcher that asks an Optuna sampler.

  Args:
    problem: a `Problem`.
    sampler: an `optuna.samplers.BaseSampler` with a seed of its own.
    startup: so many roll-outs are `spread` before the sampler is asked.
    seed: of these.
  """

  def __init__(self, problem, sampler, startup, seed):
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    self._optuna, self._problem, self._startup = optuna, problem, startup
    self._rng = np.random.default_rng(seed)
    self._study = optuna.create_study(direction='maximize', sampler=sampler)
    self._distributions = distributions(problem)
    self._seen = set()
    self._pending = []
    self._told = 0

  def ask(self):
    """Returns levels that were not asked for before, if such are found: [variables] int."""
    for _ in range(_TRIES):
      levels = self._suggested()
      if tuple(levels) not in self._seen:
        break
    self._seen.add(tuple(levels))
    # As long as it has no value, samplers know that it is on its way.
    self._add(levels, state=self._optuna.trial.TrialState.RUNNING)
    self._pending.append((tuple(levels), len(self._study.get_trials(deepcopy=False)) - 1))
    return levels

  def tell(self, levels, reward):
    """Takes the reward of levels that `ask` returned, in the order of the asks, or of others."""
    self._told += 1
    self._seen.add(tuple(levels))
    if self._pending and self._pending[0][0] == tuple(levels):
      self._study.tell(self._pending.pop(0)[1], float(reward))
    else:
      self._add(levels, value=float(reward))

  def _suggested(self):
    if self._told < self._startup:
      return spread(self._problem, self._rng)
    trial = self._study.ask(self._distributions)
    levels = [trial.params[variable.name] for variable in self._problem.variables]
    self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
    return self._problem.repaired(levels)

  def _add(self, levels, **fields):
    params = {
      variable.name: int(level)
      for variable, level in zip(self._problem.variables, levels, strict=True)
    }
    self._study.add_trial(
      self._optuna.trial.create_trial(params=params, distributions=self._distributions, **fields)
    )


def distributions(problem):
  """Returns {name: optuna distribution of the levels} of a problem's variables."""
  from optuna.distributions import IntDistribution

  return {
    variable.name: IntDistribution(0, int(highest))
    for variable, highest in zip(problem.variables, problem.highest, strict=True)
  }


def tpe(problem, seed=0, startup=10):
  """Returns a searcher by the multivariate tree-structured Parzen estimator.

  Args:
    problem: a `Problem`.
    seed: of all random numbers.
    startup: random roll-outs before the first model; at least 1.
  """
  from optuna.samplers import TPESampler

  sampler = TPESampler(seed=seed, n_startup_trials=1, multivariate=True, constant_liar=True)
  return Study(problem, sampler, startup, seed)


def gp(problem, seed=0, startup=10):
  """Returns a searcher by expected improvement under a Gaussian process.

  Args:
    problem: a `Problem`.
    seed: of all random numbers.
    startup: random roll-outs before the first model; at least 1.
  """
  return Study(problem, _gaussian_process_sampler(problem, seed), startup, seed)


def _gaussian_process_sampler(problem, seed):
  """Returns an Optuna sampler that asks a `GaussianProcess`."""
  import optuna

  from pocketsize.allocation.gaussian_process import GaussianProcess

  states = optuna.trial.TrialState
  space = distributions(problem)
  process = GaussianProcess(problem, seed)

  class Sampler(optuna.samplers.BaseSampler):
    def infer_relative_search_space(self, study, trial):
      return space

    def sample_relative(self, study, trial, search_space):
      def trials(state):
        # The trial that is asked for runs too, and has those parameters that leave no choice.
        found = study.get_trials(deepcopy=False, states=(state,))
        return [each for each in found if each.number != trial.number]

      def points(found):
        rows = [[each.params[name] for name in space] for each in found]
        return np.array(rows, int).reshape(-1, len(space))

      done = trials(states.COMPLETE)
      rewards = np.array([each.value for each in done])
      levels = process.propose(points(done), rewards, points(trials(states.RUNNING)))
      return dict(zip(space, levels.tolist(), strict=True))

    def sample_independent(self, study, trial, param_name, param_distribution):
      # The space above has all parameters, so Optuna asks for none alone.
      raise ValueError(f'Argument `param_name` must be of the space. Received: {param_name!r}.')

  return Sampler()
