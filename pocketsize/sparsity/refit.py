"""What is left of a layer, refitted to what the whole layer gives: least squares under a mask.

What PocketFlow's roll-outs reach by steps of Adam, layer by layer, is solved for at once: given X'X
and X'Y (`gram.Problem`), no image is needed. Every output has a mask of its own, so each is a
problem of its own; they are solved side by side by conjugate gradients, of which a step is one
product of matrices.
"""

import numpy as np

from pocketsize.pruning.lasso import RIDGE

_ITERATIONS = 100
# Of the squared residual, relative to that of the weights as they are.
_TOLERANCE = 1e-8


def refit(problem, mask, ridge=RIDGE):
  """Returns the [weights, outputs] kernel under a mask that best gives the original's outputs.

  Solves min_W ||X W - Y||^2 + r ||W - W0||^2 over the weights that the mask keeps, with W0 the
  original kernel and r `ridge` times the mean of X'X's diagonal, up to a residual of 1e-4 of that
  at the masked W0, or 100 steps. A step takes (k c)^2 m multiply-accumulates, for k kernel
  positions, c inputs and m outputs.

  Args:
    problem: `gram.Problem`.
    mask: [weights, outputs] of 0 and 1.
    ridge: not negative.
  """
  gram, start = problem.gram, problem.kernel
  penalty = ridge * np.trace(gram) / len(gram) + np.finfo(np.float64).tiny
  diagonal = np.diag(gram)[:, None] + penalty

  def product(directions):
    return mask * (gram @ directions + penalty * directions)

  kernel = mask * start
  residual = mask * (problem.moments + penalty * start) - product(kernel)
  direction = scaled = residual / diagonal
  energy = first = (residual * scaled).sum(axis=0)
  for _ in range(_ITERATIONS):
    if (energy <= _TOLERANCE * first).all():
      break
    moved = product(direction)
    step = _ratio(energy, (direction * moved).sum(axis=0))
    kernel = kernel + step * direction
    residual = residual - step * moved
    scaled = residual / diagonal
    before, energy = energy, (residual * scaled).sum(axis=0)
    direction = scaled + _ratio(energy, before) * direction
  return kernel


def _ratio(numerator, denominator):
  """Returns the quotient, 0 where there is nothing left to divide."""
  return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0.0)
