"""Filter pruning: a score for each channel, and the choice of those that stay.

Criteria are functions of a matrix with a row for each channel. A channel that several layers make
has the sum of its scores in them (its cluster's, as in NNCF), each divided by the layer's mean so
that wide kernels do not outweigh narrow ones.
"""

import math

import numpy as np

from pocketsize.cost import macs_share
from pocketsize.errors import UserError

# With a budget, the ratio is searched in ever finer steps of a thousandth.
_SHARES = 1000
_STEPS = (100, 10, 1)
# A ratio below 1 that leaves a group no more than one `multiple`.
_MOST = 1.0 - 1e-9


def l1(rows):
  """Returns the sums of magnitudes (Li et al. 2017, arXiv:1608.08710).

  Args:
    rows: [channels, weights] array.
  """
  return np.abs(rows).sum(axis=1)


def l2(rows):
  """Returns the Euclidean norms of [channels, weights] rows."""
  return np.sqrt(np.square(rows).sum(axis=1))


def geometric_median(rows):
  """Returns each row's summed distance to all rows: little where the others can stand for it.

  He et al. 2019 (arXiv:1811.00250), equation 4.

  Args:
    rows: [channels, weights] array.
  """
  squares = np.square(rows).sum(axis=1)
  distances = squares[:, None] + squares[None] - 2.0 * rows @ rows.T
  return np.sqrt(np.maximum(distances, 0.0)).sum(axis=1)


CRITERIA = {'l1': l1, 'l2': l2, 'geometric_median': geometric_median}


def scores(channels, criterion='l2', seed=0, skip=()):
  """Returns {group name: [channels] scores}; the least goes first.

  Args:
    channels: a `ChannelGraph`.
    criterion: 'l1', 'l2' or 'geometric_median' of the kernels that make a channel, or scale it as
      depthwise ones do; 'bn_scale' for
      the magnitude of the batch norms' factors (Liu et al. 2017, arXiv:1708.06519); or 'random'.
    seed: of 'random'.
    skip: names of groups that may have no score.

  Raises:
    UserError: an unknown criterion, or 'bn_scale' for channels that no batch norm scales.
  """
  if criterion == 'random':
    rng = np.random.default_rng(seed)
    return {group.name: rng.random(group.size) for group in channels.groups}
  if criterion not in (*CRITERIA, 'bn_scale'):
    raise UserError(
      f'`criterion` must be one of {", ".join([*CRITERIA, "bn_scale", "random"])}. '
      f'Received: {criterion!r}.'
    )
  totals = {group.name: np.zeros(group.size) for group in channels.groups}
  scaled = set()
  for part in channels.slices:
    gamma = part.weight == 'gamma'
    if part.role != 'out' or part.weight == 'bias' or gamma != (criterion == 'bn_scale'):
      continue
    weight = np.moveaxis(np.array(getattr(part.layer, part.weight)), part.axis, 0)
    values = (l1 if gamma else CRITERIA[criterion])(weight.reshape(len(weight), -1))
    values = values / max(values.mean(), np.finfo(np.float32).tiny)
    for name, places in channels.places(part.ids).items():
      known = places >= 0
      np.add.at(totals[name], places[known], values[known])
      scaled.add(name)
  missing = [name for name in totals if name not in scaled and name not in skip]
  if missing:
    raise UserError(
      f'Criterion {criterion!r} needs a batch norm behind every layer to prune. '
      f'Received: none behind {", ".join(missing)}.'
    )
  return totals


def choose(
  channels,
  scores,
  *,
  ratio=None,
  macs=None,
  cost=None,
  budget=None,
  scope='group',
  multiple=1,
  skip=(),
):
  """Returns {group name: [channels] bool}, what `shrink` and `mask` take as `keep`.

  Args:
    channels: a `ChannelGraph`.
    scores: {group name: [channels]}; of equal scores the first go first.
    ratio: share of channels to drop, in [0, 1).
    macs: instead of `ratio`, share of the model's multiply-accumulates to keep at most, in (0, 1].
    cost: instead of both, a function from such a dict to a share of what the whole model costs. It
      may be noisy: little more may be dropped than had to be, never too little.
    budget: of `cost`, the share to keep at most, in (0, 1].
    scope: 'group' drops the same share of every group, 'network' the least of all channels; what
      the last step left of a budget is then filled with the best channels that fit.
    multiple: every group keeps a multiple of it, rounded up with scope 'group' and to the nearest
      with 'network', but at least one; groups that are smaller stay whole.
    skip: names of groups that stay whole.

  Raises:
    UserError: a value out of range, or `macs` or `budget` below what is left of one `multiple` in
      each group.
  """
  if (ratio, macs, cost).count(None) != 2:
    raise UserError(
      f'Give either `ratio` or `macs`, or `cost` with `budget`. Received: {ratio}, {macs}, {cost}.'
    )
  if (cost is None) != (budget is None):
    raise UserError(f'`cost` and `budget` go together. Received: {cost} and {budget}.')
  if ratio is not None and not 0.0 <= ratio < 1.0:
    raise UserError(f'`ratio` is the share to drop and must be in [0, 1). Received: {ratio}.')
  name = 'budget' if macs is None else 'macs'
  if macs is not None:
    cost, budget = macs_share(channels), macs
  if ratio is None:
    ratio = _ratio_within(channels, scores, cost, budget, name, scope, multiple, skip)
  keep = _chooser(channels, scores, scope, multiple, skip)(ratio)
  return keep if cost is None or scope == 'group' else _filled(scores, keep, cost, budget, multiple)


def ratio_for(channels, scores, macs, *, scope='group', multiple=1, skip=()):
  """Returns the least `ratio` with which `choose` meets a target of `macs`, in [0, 1).

  Args and errors: see `choose`.
  """
  cost = macs_share(channels)
  return _ratio_within(channels, scores, cost, macs, 'macs', scope, multiple, skip)


def _ratio_within(channels, scores, cost, budget, name, scope, multiple, skip):
  """Returns the least ratio found with which `cost` says that the budget is met.

  The cost falls with the ratio, but for noise: so the first step that meets the budget is looked
  for, and before it, where it is not met, the same in smaller steps.
  """
  if not 0.0 < budget <= 1.0:
    raise UserError(f'`{name}` is the share to keep and must be in (0, 1]. Received: {budget}.')
  keep_at = _chooser(channels, scores, scope, multiple, skip)
  costs_by_counts = {}

  def cost_at(share):
    keep = keep_at(share / _SHARES)
    counts = tuple(int(np.sum(kept)) for kept in keep.values())
    if counts not in costs_by_counts:
      costs_by_counts[counts] = cost(keep)
    return costs_by_counts[counts]

  high = width = _SHARES
  for step in _STEPS:
    shares = range(max(high - width, 0), high + 1, step)
    high = next((share for share in shares if cost_at(share) <= budget), None)
    if high is None:
      least = min(costs_by_counts.values())
      raise UserError(
        f'`{name}` cannot be met: with {multiple} channels in every group {least:.3f} are left. '
        f'Received: {budget}.'
      )
    width = step
  return min(high / _SHARES, _MOST)


def _chooser(channels, scores, scope, multiple, skip):
  """Returns a function from the ratio to the `keep` of `choose`."""
  if scope not in ('group', 'network'):
    raise UserError(f"`scope` must be 'group' or 'network'. Received: {scope!r}.")
  if multiple < 1:
    raise UserError(f'`multiple` must be at least 1. Received: {multiple}.')
  unknown = set(skip) - set(scores)
  if unknown:
    raise UserError(
      f'`skip` must name groups out of {", ".join(scores)}. Received: {sorted(unknown)[0]!r}.'
    )
  pruned = {name: values for name, values in scores.items() if name not in skip}
  count = _counts(pruned, scope, multiple)
  return lambda ratio: without_empty_tensors(channels, scores, _kept(scores, count(ratio)))


def _filled(scores, keep, cost, budget, multiple):
  """Returns `keep` with more channels, the best first, until no group has room for another one.

  A step of the ratio may drop much: one channel of a residual trunk is read by many layers.
  """
  waiting = {name for name, kept in keep.items() if not kept.all()}
  while waiting:
    name = max(sorted(waiting), key=lambda name: scores[name][~keep[name]].max())
    dropped = np.flatnonzero(~keep[name])
    best = dropped[np.argsort(-scores[name][dropped], kind='stable')][:multiple]
    more = {**keep, name: keep[name] | np.isin(np.arange(len(keep[name])), best)}
    fits = cost(more) <= budget
    keep = more if fits else keep
    if not fits or more[name].all():
      waiting.remove(name)
  return keep


def most_kept(sizes, ratio, scope, multiple):
  """Returns how many channels `choose` keeps at most, whatever the scores are.

  Ties aside, and channels that it keeps for tensors that would lose all.

  Args:
    sizes: of the groups that are not skipped.
    ratio, scope, multiple: see `choose`.
  """
  if scope == 'network':
    # Rounding adds less than one `multiple` to a group, and keeping one at least does not add more.
    return sum(sizes) - round(ratio * sum(sizes)) + multiple * len(sizes)
  scores = {number: np.zeros(size) for number, size in enumerate(sizes)}
  return sum(_counts(scores, scope, multiple)(ratio).values())


def remaining_macs(channels, keep):
  """Returns the share of the model's multiply-accumulates that `keep` leaves."""
  return macs_share(channels)(keep)


def _counts(scores, scope, multiple):
  """Returns a function from the ratio to {group name: channels to keep}."""
  everything = np.sort(np.concatenate([np.zeros(0), *scores.values()]))

  def count(ratio):
    if scope == 'group':
      kept = {name: (1.0 - ratio) * len(values) for name, values in scores.items()}
    else:
      cut = round(ratio * len(everything))
      threshold = everything[cut] if cut < len(everything) else np.inf
      kept = {name: int((values >= threshold).sum()) for name, values in scores.items()}
    # Rounded up everywhere, the network's ranking would only tell which groups lose everything.
    nearest = 0.5 if scope == 'network' else 0.0
    return {
      name: len(scores[name])
      if number == len(scores[name])
      else min(
        len(scores[name]), multiple * max(1, math.ceil(round(number / multiple - nearest, 6)))
      )
      for name, number in kept.items()
    }

  return count


def _kept(scores, counts):
  keep = {}
  for name, values in scores.items():
    keep[name] = np.ones(len(values), bool)
    if name in counts:
      order = np.argsort(values, kind='stable')
      keep[name][order[: len(values) - counts[name]]] = False
  return keep


def _left(keep, places):
  """Returns how many of a tensor's channels `keep` leaves."""
  return sum(keep[name][found[found >= 0]].sum() for name, found in places.items())


def tensors_of_one(channels, keep):
  """Returns how many tensors, such as slices, have one channel left in `keep`."""
  return sum(_left(keep, channels.places(ids)) == 1 for ids in channels.tensors)


def without_empty_tensors(channels, scores, keep):
  """Returns `keep` with the best channel of each tensor, such as a slice, that would lose all."""
  for ids in channels.tensors:
    places = channels.places(ids)
    present = sum((found >= 0).sum() for found in places.values())
    if present == len(ids) and not _left(keep, places):
      best = max(
        ((scores[name][place], name, place) for name, found in places.items() for place in found),
        key=lambda entry: entry[0] if entry[2] >= 0 else -math.inf,
      )
      keep[best[1]][best[2]] = True
  return keep
