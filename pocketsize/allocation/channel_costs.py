"""What counts of channels cost: MACs and parameters as tables of pruning units.

A layer's cost depends on the channels that it reads and on those that it makes, so tables are of
pairs of units; what several units make together, such as a concatenation, is a sum over them. Where
some channels of a unit lie more often in a weight than others, as many of the frequent ones are
taken to stay as can, so that no choice of channels costs more.
"""

import math

import numpy as np

from pocketsize import cost
from pocketsize.allocation.costs import described
from pocketsize.allocation.tables import Tables
from pocketsize.pruning import units as pruning_units


def unit_variables(channels, units, ratios, multiple=1, rounding=np.floor):
  """Returns (the `Variable`s of ratios of channels to drop, {unit name: counts that are kept}).

  Args:
    channels: a `ChannelGraph`.
    units: its `Unit`s of trunk 'shared' or 'whole'.
    ratios: the legal ratios, in [0, 1), of all units; or {unit name: ratios} of some.
    multiple, rounding: see `units.counts`.

  Returns:
    Both in the order of `units`; the counts are [choices] ints, rising, none of them twice.

  Raises:
    UserError: see `units.counts`.
  """
  choices = ratios if isinstance(ratios, dict) else {unit.name: ratios for unit in units}
  found = [unit for unit in units if unit.name in choices]
  # Refuses unknown names.
  pruning_units.counts(units, dict.fromkeys(choices, 0.0), multiple)
  ordered, counts = {}, {}
  for unit in found:
    # Of ratios that leave as many channels the least one, so that no model has two choices.
    ratio_of = {
      pruning_units.counts([unit], ratio, multiple, rounding)[unit.name]: ratio
      for ratio in sorted(set(choices[unit.name]), reverse=True)
    }
    ordered[unit.name], counts[unit.name] = tuple(ratio_of.values()), list(ratio_of)
  features = [
    # The MACs that go with half of the channels.
    (
      unit.size,
      1.0 - macs(channels, {unit.name: [(unit.size + 1) // 2]}).of([0]),
      len(unit.readers),
    )
    for unit in found
  ]
  return described(ordered, features), counts


def macs(channels, counts):
  """Returns the share of MACs that is left; `cost.macs_share` as tables.

  Args:
    channels: a `ChannelGraph`.
    counts: {name of a group: [choices] kept channels, rising}, in the order of the variables;
      groups that are missing stay whole.
  """
  by_weight, slices = cost.weight_macs(channels.graph), cost.weight_slices(channels)
  total, tables = sum(by_weight.values()), Tables()
  for (layer, weight), amount in by_weight.items():
    parts = [part for part in slices if (part.layer, part.weight) == (layer, weight)]
    _add_weight(tables, channels, counts, parts, amount / total)
  return tables.cost('share of MACs')


def params(channels, counts):
  """Returns the share of parameters that is left in the model that `shrink` makes.

  Biases that `shrink` gives to layers without one, for the constants that dropped channels leave,
  are always counted, so that the share of the whole model may lie a little above 1.

  Args: see `macs`.
  """
  layers = list(dict.fromkeys(channels.graph.layers.values()))
  total = sum(layer.count_params() for layer in layers)
  slices = {}
  for part in channels.slices:
    slices.setdefault(id(getattr(part.layer, part.weight)), []).append(part)
  tables = Tables()
  for layer in layers:
    for weight in layer.weights:
      share = math.prod(weight.shape) / total
      _add_weight(tables, channels, counts, slices.get(id(weight), []), share)
  for layer, ids in channels.folds.items():
    if layer.bias is None and not counts.keys().isdisjoint(channels.places(ids)):
      made = [part for part in slices[id(layer.kernel)] if part.role == 'out']
      _add_weight(tables, channels, counts, made, layer.kernel.shape[-1] / total)
  return tables.cost('share of parameters')


def _add_weight(tables, channels, counts, slices, amount):
  """Adds what of an amount is left when a weight shrinks along its slices."""
  kept = Kept(channels, counts)
  factors = []
  for part in slices:
    constant, values_by_place = kept.of(part.ids)
    size = len(part.ids)
    shares = {place: values / size for place, values in values_by_place.items()}
    factors.append((constant / size, shares))
  tables.add_product(amount, factors)


class Kept:
  """How many of some channels stay, at which levels.

  Args:
    channels, counts: see `macs`.
  """

  def __init__(self, channels, counts):
    self._channels, self._counts = channels, counts
    self._places = {name: place for place, name in enumerate(counts)}
    self._sizes = {group.name: group.size for group in channels.groups}

  def of(self, ids):
    """Returns (how many of `ids` always stay, {place: [choices] how many of its unit stay})."""
    constant, values = len(ids), {}
    for name, positions in self._channels.places(ids).items():
      if name in self._counts:
        times = np.bincount(positions[positions >= 0], minlength=self._sizes[name])
        most = np.concatenate([[0], np.cumsum(np.sort(times)[::-1])])
        constant -= int(most[-1])
        values[self._places[name]] = most[np.asarray(self._counts[name])].astype(float)
    return constant, values

  def at(self, level_of):
    """Returns the function from ids to the count that stays.

    Args:
      level_of: function from a place to its level.
    """

    def kept(ids):
      constant, values = self.of(ids)
      return int(constant + sum(each[level_of(place)] for place, each in values.items()))

    return kept

  def places_of(self, count):
    """Returns the places that a function of `kept` depends on, with their numbers of choices."""
    found = {}

    def kept(ids):
      found.update({place: len(values) for place, values in self.of(ids)[1].items()})
      return len(ids)

    count(kept)
    return found
