"""The choice of channels for a budget of latency, held by the whole file in its runtime."""

import functools
import pathlib
import tempfile
from typing import NamedTuple

import keras
import numpy as np

from pocketsize import conversion, latency
from pocketsize.errors import UserError
from pocketsize.pruning import filters
from pocketsize.shrink import shrink

_ATTEMPTS = 8
# A measured share below this part of the budget drops more than it must.
_TIGHT = 0.95
# Drops all that may be dropped.
_ALL = 1.0 - 1e-9


class Choice(NamedTuple):
  """Channels that stay, and what that gives.

  Attributes:
    keep: {group name: [channels] bool}.
    model: the smaller Keras model.
    predicted, measured: its latency as a share of the original's, by the table and by its file.
  """

  keep: dict
  model: keras.Model
  predicted: float
  measured: float


def measured(model, reference, format, rounds=100):
  """Returns the latency of a model's file as a share of another's, run in turn, batch 1.

  Args:
    model: a Keras model.
    reference: another, or the path of its exported file.
    format: one of `latency.RUNTIMES`.
    rounds: of ten calls of each file, see `conversion.quickest`.

  Raises:
    UserError: see `conversion.export`.
  """
  with tempfile.TemporaryDirectory() as folder:
    paths = [
      each if isinstance(each, str | pathlib.Path) else _export(each, folder, format, name)
      for name, each in (('model', model), ('reference', reference))
    ]
    smaller, whole = conversion.quickest(paths, rounds)
  return smaller / whole


def _export(model, folder, format, name):
  return conversion.export(model, folder, [format], name)[0].path


def choose_for_latency(
  channels, scores, share, table, *, measure=None, multiple=8, scope='group', skip=()
):
  """Returns a `Choice` whose file takes at most `share` of the latency of the whole model's file.

  Channels are chosen by the table, the file is run, and the budget that the table gets is corrected
  by what it measured, at most seven times.

  Args:
    channels: a `ChannelGraph`.
    scores, multiple, scope, skip: see `filters.choose`.
    share: of latency to keep at most, in (0, 1].
    table: a `LatencyTable`.
    measure: `measure(smaller model)` gives its share of latency; `measured` if None.

  Raises:
    UserError: `share` is out of range or cannot be met, or see `filters.choose`.
  """
  if not 0.0 < share <= 1.0:
    raise UserError(f'`share` is the latency to keep and must be in (0, 1]. Received: {share}.')
  choose = functools.partial(
    filters.choose, channels, scores, multiple=multiple, scope=scope, skip=skip
  )
  with tempfile.TemporaryDirectory() as folder:
    if measure is None:
      reference = _export(channels.graph.model, folder, table.format, 'reference')
      measure = functools.partial(measured, reference=reference, format=table.format)
    tried = _tried(channels, choose, share, latency.relative(channels, table), measure)
  fitting = [choice for choice in tried if choice.measured <= share]
  if not fitting:
    least = min(choice.measured for choice in tried)
    raise UserError(
      f'`share` cannot be met: with {multiple} channels in every group {least:.3f} of the latency '
      f'are left. Received: {share}.'
    )
  return max(fitting, key=lambda choice: choice.measured)


def _tried(channels, choose, share, cost, measure):
  """Returns the `Choice`s on the way to one that fits tightly, in the order they were tried."""
  smallest = choose(ratio=_ALL)
  least, budget, tried = cost(smallest), share, []
  for attempt in range(_ATTEMPTS):
    hopeless = attempt == _ATTEMPTS - 1 and all(choice.measured > share for choice in tried)
    keep = smallest if hopeless or least > budget else choose(cost=cost, budget=budget)
    if any(_same(keep, choice.keep) for choice in tried):
      break
    model = shrink(channels.graph.model, keep, channels.keep_shift)
    tried.append(Choice(keep, model, cost(keep), measure(model)))
    if _TIGHT * share <= tried[-1].measured <= share:
      break
    # The middle of what fits tightly is aimed at, and always less than what was too much.
    above = [choice.predicted for choice in tried if choice.measured > share]
    aim = _prediction_for(0.5 * (1.0 + _TIGHT) * share, tried)
    budget = min([1.0, aim, *(0.999 * predicted for predicted in above)])
  return tried


def _prediction_for(aim, tried):
  """Returns the predicted share to ask for: on the line through the measured ones around `aim`."""
  known = sorted([(1.0, 1.0), *((choice.measured, choice.predicted) for choice in tried)])
  upper = next((place for place, (share, _) in enumerate(known) if share >= aim), len(known) - 1)
  (low, low_predicted), (high, high_predicted) = known[max(upper, 1) - 1], known[max(upper, 1)]
  if high <= low or high_predicted <= low_predicted:
    return low_predicted * aim / low
  slope = (high_predicted - low_predicted) / (high - low)
  return max(low_predicted + (aim - low) * slope, 0.5 * low_predicted)


def _same(keep, other):
  return all(np.array_equal(kept, other[name]) for name, kept in keep.items())
