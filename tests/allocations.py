"""Problems of allocation for tests, and all their solutions."""

import itertools

import numpy as np
from hypothesis import strategies as st

from pocketsize.allocation.problem import Cost, Problem, Term, Variable


def rising(rng, shape):
  """Returns a table of eighths that falls along no axis, with steps of zero among them."""
  table = rng.integers(0, 9, shape) * rng.integers(0, 2, shape) / 8
  for axis in range(len(shape)):
    table = np.cumsum(table, axis)
  return table


@st.composite
def problems(draw, most=5, choices=4, places=3):
  """A `Problem` of up to `most` variables, whose terms have up to `places` of them."""
  sizes = draw(st.lists(st.integers(1, choices), min_size=1, max_size=most))
  rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  terms = [Term((place,), rising(rng, (size,))) for place, size in enumerate(sizes)]
  for _ in range(draw(st.integers(0, 4)) if places > 1 else 0):
    count = min(draw(st.integers(2, places)), len(sizes))
    among = tuple(rng.permutation(len(sizes))[:count].tolist())
    terms.append(Term(among, rising(rng, [sizes[place] for place in among])))
  variables = [Variable(f'v{place}', tuple(range(1, size + 1))) for place, size in enumerate(sizes)]
  cost = Cost('units', terms, float(rng.integers(0, 3)))
  low, high = cost.of([0] * len(sizes)), cost.of([size - 1 for size in sizes])
  # Many choices cost the same, so that many are over the last of these by next to nothing.
  between = cost.of([int(rng.integers(size)) for size in sizes])
  near = max(low, between + draw(st.sampled_from([0.0, 3e-9, -4e-9, -1e-7])))
  budget = draw(st.sampled_from([None, low, high, low + rng.random() * (high - low), near]))
  return Problem(variables, cost, budget)


def everything(problem):
  """Returns all levels that meet the budget."""
  found = itertools.product(*(range(size) for size in problem.sizes))
  return [np.array(levels) for levels in found if problem.is_met(levels)]
