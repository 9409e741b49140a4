"""Which input channels of which layers are chosen together, and what goes when they are chosen.

Channel pruning after He et al. 2017 (arXiv:1707.06168) chooses the *input* channels of each
convolution. A channel then goes from the network if none of its readers chose it. `TRUNKS` says
what happens where several layers read the same channels, as on the trunk of a residual network.
"""

from typing import NamedTuple

import numpy as np

from pocketsize.errors import UserError
from pocketsize.pruning.filters import without_empty_tensors

# shared: all readers of a channel choose it together, so no file needs a sampler.
# sampler: each convolution chooses for itself, as in the paper; channels that only others chose are
#   left out by a sampler (a gather) in front of it.
# whole: channels that several layers make, such as what additions join, stay; the rest as in
#   'shared'.
TRUNKS = ('shared', 'sampler', 'whole')

CONVOLUTIONS = ('Conv1D', 'Conv2D', 'Conv3D')
READERS = (*CONVOLUTIONS, 'Dense')


class Unit(NamedTuple):
  """Channels to choose from, for all layers that read them.

  Attributes:
    name: the group's, or with 'sampler' the reader's path.
    size: number of channels.
    readers: {path: for each input of the layer its place in the unit, or -1}.
  """

  name: str
  size: int
  readers: dict


def units(channels, trunk='shared'):
  """Returns (list of `Unit`s in the order of their first readers, {path or group: why not}).

  Args:
    channels: a `ChannelGraph`.
    trunk: one of `TRUNKS`.

  Raises:
    UserError: an unknown `trunk`.
  """
  if trunk not in TRUNKS:
    raise UserError(f'`trunk` must be one of {", ".join(TRUNKS)}. Received: {trunk!r}.')
  choosers, refused = readers(channels)
  if trunk == 'sampler':
    found = [
      Unit(path, len(ids), {path: np.arange(len(ids))})
      for path, ids in choosers.items()
      if type(channels.graph.layers[path]).__name__ in CONVOLUTIONS
    ]
    return found, refused
  found, skipped = [], {}
  for group in channels.groups:
    places = {path: channels.places(ids).get(group.name) for path, ids in choosers.items()}
    places = {path: place for path, place in places.items() if place is not None}
    reason = _refusal(channels, group, refused, trunk)
    if reason:
      skipped[group.name] = reason
    elif places:
      found.append(Unit(group.name, group.size, places))
    else:
      skipped[group.name] = 'no convolution or dense layer reads it'
  order = list(choosers)
  return sorted(found, key=lambda unit: order.index(next(iter(unit.readers)))), skipped


def readers(channels):
  """Returns ({path: ids that a layer reads and can choose from}, {path: why it cannot choose}).

  Both are in the order of execution.
  """
  calls = {}
  for node in channels.graph.nodes:
    calls.setdefault(id(node.operation), []).append(node.path)
  reads = {calls[id(part.layer)][0]: part.ids for part in channels.slices if part.role == 'in'}
  found, refused = {}, {}
  for node in channels.graph.nodes:
    path, layer = node.path, node.operation
    if path not in reads:
      continue
    kind = type(layer).__name__
    if kind not in READERS:
      refused[path] = f'layers of type {kind} cannot choose their inputs'
    elif getattr(layer, 'groups', 1) > 1:
      refused[path] = 'convolutions in groups cannot choose their inputs'
    elif len(calls[id(layer)]) > 1:
      refused[path] = 'it is called several times'
    else:
      found[path] = reads[path]
  return found, refused


def _refusal(channels, group, refused, trunk):
  """Returns why the readers of a group cannot choose together, or None."""
  if trunk == 'whole' and len(group.members) > 1:
    return 'several layers make it'
  for path, reason in refused.items():
    for part in channels.slices:
      reads = part.role == 'in' and part.layer is channels.graph.layers[path]
      if reads and group.name in channels.places(part.ids):
        return f'layer {path!r} reads it: {reason}'
  return None


def remaining(channels, selected):
  """Returns {group name: [channels] bool}: what at least one reader selects.

  Args:
    channels: a `ChannelGraph`.
    selected: {path: [inputs] bool}; layers that are missing read all.
  """
  keep = {group.name: np.zeros(group.size, bool) for group in channels.groups}
  read = set()
  for part in channels.slices:
    if part.role != 'in':
      continue
    path = channels.graph.paths(part.layer)[0]
    chosen = selected.get(path, np.ones(len(part.ids), bool))
    for name, places in channels.places(part.ids).items():
      read.add(name)
      present = places >= 0
      np.logical_or.at(keep[name], places[present], chosen[present])
  for name, kept in keep.items():
    if name not in read:
      kept[:] = True
  return without_empty_tensors(channels, {name: np.zeros(len(keep[name])) for name in keep}, keep)


def positions(channels, keep):
  """Returns {path: positions along the channels of a node's output that `shrink` leaves}.

  Nodes that lose no channel are missing.

  Args:
    channels: a `ChannelGraph`.
    keep: {group name: [size] bool}.
  """
  is_dropped, found = channels.dropped(keep), {}
  for node in channels.graph.nodes:
    dropped = is_dropped(channels.ids(node.outputs[0]))
    if dropped.any():
      found[node.path] = np.flatnonzero(~dropped)
  return found


def expected(channels, units, counts):
  """Returns (`keep`, `selected`) of `shrink` with so many channels as a selection would leave.

  Which ones is not known before it. Of channels that several layers choose from, each for itself,
  all are taken to stay for one or the other.

  Args:
    channels: a `ChannelGraph`.
    units: list of `Unit`s.
    counts: {unit name: channels to keep}.
  """
  selected, choosers = {}, {}
  for unit in units:
    for path, places in unit.readers.items():
      chosen = selected.setdefault(path, np.ones(len(places), bool))
      chosen &= (places < 0) | (places < counts[unit.name])
  for part in channels.slices:
    for name in channels.places(part.ids) if part.role == 'in' else ():
      choosers.setdefault(name, []).append(part.layer)
  keep = remaining(channels, selected)
  joint = {path for unit in units if len(unit.readers) > 1 for path in unit.readers}
  for name, layers in choosers.items():
    if len(layers) > 1 and not any(
      path in joint for layer in layers for path in channels.graph.paths(layer)
    ):
      keep[name][:] = True
  return keep, selected


def counts(units, ratio, multiple=1, rounding=np.floor):
  """Returns {unit name: channels to keep}.

  Args:
    units: list of `Unit`s.
    ratio: share of channels to drop, in [0, 1), or {unit name: ratio}; missing ones stay whole.
    multiple: every count is a multiple of it, rounded up; units that are smaller stay whole.
    rounding: of the exact count, if `multiple` is 1. At least one channel stays.

  Raises:
    UserError: a ratio out of range, an unknown name, or a `multiple` below 1.
  """
  ratios = ratio if isinstance(ratio, dict) else {unit.name: ratio for unit in units}
  names = [unit.name for unit in units]
  for name, value in ratios.items():
    if name not in names:
      raise UserError(f'A ratio must be for one of {", ".join(names)}. Received: {name!r}.')
    if not 0.0 <= value < 1.0:
      raise UserError(
        f'A ratio is the share of channels to drop and must be in [0, 1). Received: {value} '
        f'for {name!r}.'
      )
  if multiple < 1:
    raise UserError(f'`multiple` must be at least 1. Received: {multiple}.')
  kept = {}
  for unit in units:
    # Rounded, so that 10 * (1 - 0.8) is 2 and not the float below it.
    exact = round(unit.size * (1.0 - ratios.get(unit.name, 0.0)), 6)
    count = rounding(exact) if multiple == 1 else np.ceil(exact / multiple) * multiple
    kept[unit.name] = int(min(max(count, 1), unit.size))
  return kept
