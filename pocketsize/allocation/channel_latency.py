"""What counts of channels take in time: the latency of a table, as tables of pruning units.

As in `channel_costs`, a layer's time depends on the channels that it reads and on those that it
makes, and on pairs of units where it can be told so.
"""

import itertools
import math

import numpy as np
from scipy import optimize

from pocketsize import latency
from pocketsize.allocation.channel_costs import Kept
from pocketsize.allocation.tables import Tables


def without_slower(channels, variables, counts, table):
  """Returns (variables, counts) without the choices that are no faster than one of more channels.

  Of a few channels a runtime may compute a layer in another, slower way. Each unit is judged with
  all others whole.

  Args:
    channels: a `ChannelGraph`.
    variables, counts: what `channel_costs.unit_variables` returns.
    table: a `LatencyTable`.

  Raises:
    UserError: see `latency.sized_calls`.
  """
  calls, faster, left = latency.sized_calls(channels, table), [], {}
  for variable in variables:
    kept = counts[variable.name]
    unit = Kept(channels, {variable.name: kept})
    times = []
    for level in range(len(kept)):
      at = unit.at(lambda place, level=level: level)
      times.append(sum(call.milliseconds(call.inputs(at), call.outputs(at)) for call in calls))
    levels = [n for n, time in enumerate(times) if time < min(times[n + 1 :], default=math.inf)]
    faster.append(variable._replace(choices=tuple(variable.choices[level] for level in levels)))
    left[variable.name] = [kept[level] for level in levels]
  return faster, left


def milliseconds(channels, counts, table):
  """Returns the ms of `latency.predicted` as tables.

  Times never fall with a count: where fewer channels were measured slower, more cost as much. The
  time of a layer on which more than two units depend is replaced by a bound that is bilinear in its
  inputs and outputs, since a table of all units would be too large. So a choice may be faster than
  it costs here.

  Args:
    channels, counts: see `channel_costs.macs`.
    table: a `LatencyTable`.

  Raises:
    UserError: see `latency.predicted`.
  """
  tables = Tables()
  kept = Kept(channels, counts)
  for call in latency.sized_calls(channels, table):
    places = sorted({*kept.places_of(call.inputs), *kept.places_of(call.outputs)})
    if len(places) <= 2:
      tables.add(tuple(places), _joint(call, places, kept))
    else:
      _add_bound(tables, call, kept)
  cost = tables.cost('ms of layers')
  return cost._replace(terms=[term._replace(table=_rising(term.table)) for term in cost.terms])


def _rising(table):
  """Returns the least table that is nowhere below another one and falls along no axis."""
  for axis in range(table.ndim):
    table = np.maximum.accumulate(table, axis)
  return table


def _joint(call, places, kept):
  """Returns the table of a call's times, over at most two places."""
  sizes = {**kept.places_of(call.inputs), **kept.places_of(call.outputs)}
  table = np.zeros([sizes[place] for place in places])
  for levels in np.ndindex(table.shape):
    at = kept.at(dict(zip(places, levels, strict=True)).get)
    table[levels] = call.milliseconds(call.inputs(at), call.outputs(at))
  return table


def _add_bound(tables, call, kept):
  """Adds a + b u + c v + d u v, the least in the mean that is nowhere below the time.

  u and v go from 0 to 1 with inputs and outputs from the fewest to the most. The time is bilinear
  between the points of the latency table's grid, so that what bounds it there bounds it everywhere.
  """
  ways = [_way(count, kept) for count in (call.inputs, call.outputs)]
  grids = [_grid(low, high, step) for (low, high, _), step in zip(ways, call.steps, strict=True)]
  points = list(itertools.product(*grids))
  times = np.array([call.milliseconds(*counts) for counts in points])
  u, v = (
    np.array([_part(low, counts[axis], high) for counts in points])
    for axis, (low, high, _) in enumerate(ways)
  )
  rows = np.stack([np.ones(len(points)), u, v, u * v], axis=1)
  # No factor is negative, by the solver's default: what costs more never costs less.
  found = optimize.linprog(rows.mean(axis=0), A_ub=-rows, b_ub=-times)
  factors = np.maximum(found.x, 0.0)
  # What the solver takes for rounding.
  factors[0] += max(0.0, np.max(times - rows @ factors))
  along = [part for _, _, part in ways]
  for factor, parts in zip(factors, ([], along[:1], along[1:], along), strict=True):
    tables.add_product(factor, parts)


def _grid(low, high, step):
  """Returns the counts from `low` to `high` between which a latency table interpolates."""
  if low == high:
    return [low]
  return sorted({low, *range(-(-low // step) * step, high, step), high})


def _part(low, count, high):
  return 0.0 if low == high else (count - low) / (high - low)


def _way(count, kept):
  """Returns (fewest, most, (0, {place: [choices] its part of the way between them}))."""
  places = kept.places_of(count)
  low, high = (count(kept.at(lambda place, level=level: level)) for level in (0, -1))
  if low == high:
    return low, high, (0.0, {})
  parts = {}
  for place, size in places.items():
    found = [
      count(kept.at(lambda each, place=place, level=level: level if each == place else 0))
      for level in range(size)
    ]
    parts[place] = (np.array(found) - low) / (high - low)
  return low, high, (0.0, parts)
