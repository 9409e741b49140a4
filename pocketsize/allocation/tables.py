"""Costs as sums and products of tables: an algebra of what depends on a few levels each."""

import numpy as np

from pocketsize.allocation.problem import Cost, Term


class Tables:
  """A sum of tables, by the places that they depend on."""

  def __init__(self):
    self._sum = {}

  def add(self, places, table):
    """Adds a table.

    Args:
      places: numbers of the variables along its axes, each once, in any order.
      table: float array, with an axis for each place.
    """
    order = np.argsort(places).astype(int)
    places = tuple(places[axis] for axis in order)
    self._sum[places] = self._sum.get(places, 0.0) + np.transpose(table, order)

  def add_product(self, scale, factors):
    """Adds scale * product of factors.

    Args:
      scale: number.
      factors: pairs (constant, {place: [choices] values}), each of which stands for their sum.
    """
    product = Tables()
    product.add((), np.array(scale, float))
    for factor in factors:
      product = product._times(*factor)
    for places, table in product._sum.items():
      self.add(places, table)

  def _times(self, constant, values_by_place):
    product = Tables()
    for places, table in self._sum.items():
      if constant:
        product.add(places, table * constant)
      for place, values in values_by_place.items():
        if place in places:
          shape = [len(values) if each == place else 1 for each in places]
          product.add(places, table * np.reshape(values, shape))
        else:
          product.add((*places, place), table[..., None] * values)
    return product

  def cost(self, name):
    """Returns the sum as a `Cost`."""
    terms = [Term(places, table) for places, table in sorted(self._sum.items()) if places]
    return Cost(name, terms, float(self._sum.get((), 0.0)))
