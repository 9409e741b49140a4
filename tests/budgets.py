"""Problems of allocation for tests: layers of different sizes under a mean of bits."""

import numpy as np

from pocketsize.allocation.problem import Cost, Problem, Term, Variable
from pocketsize.allocation.studies import spread

BITS = (2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)


def mean_bits(shares, budget, choices=BITS):
  """Returns the problem of layers that have these shares of the weights."""
  variables = [Variable(f'layer{i}', choices, (share,)) for i, share in enumerate(shares)]
  terms = [Term((i,), share * np.array(choices)) for i, share in enumerate(shares)]
  return Problem(variables, Cost('mean weight bits', terms), budget)


def layers(count, seed, budget=4.0):
  """Returns a problem of random sizes, and levels -> score: less is lost with every bit more.

  The loss of a layer falls by a factor with each bit, as a quantizer's error does, from a first
  one that differs much between layers.
  """
  rng = np.random.default_rng(seed)
  shares, losses = np.exp(rng.normal(0, 1, count)), np.exp(rng.normal(0, 1.5, count))
  shares, losses = shares / shares.sum(), losses / losses.sum()
  return mean_bits(shares, budget), lambda levels: 1 - float(losses @ 0.4 ** np.asarray(levels))


class RandomSearcher:
  """Proposes random levels within the budget, whatever it is told."""

  def __init__(self, problem, seed):
    self._problem, self._rng = problem, np.random.default_rng(seed)

  def ask(self):
    return spread(self._problem, self._rng)

  def tell(self, levels, reward):
    pass


def proposals(searcher, score, rollouts):
  """Returns the levels that a searcher proposes one by one, [rollouts, variables]."""
  asked = []
  for _ in range(rollouts):
    asked.append(searcher.ask())
    searcher.tell(asked[-1], score(asked[-1]))
  return np.array(asked)
