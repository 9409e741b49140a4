"""How many channels stay: by each learner's ratios, or by a target of MACs or latency."""

import dataclasses
import pathlib

import numpy as np

from pocketsize import cost
from pocketsize.errors import UserError
from pocketsize.latency import RUNTIMES, LatencyTable
from pocketsize.options import check_options, option, refuse_idle
from pocketsize.pruning import filters, units
from pocketsize.pruning.latency_budget import choose_for_latency

# Ratios are tried in steps of a thousandth.
_STEPS = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChannelConfig:
  """Flags of every learner that drops channels."""

  channel_trunk: str = option(
    'shared',
    'channels that several layers read, as on a residual trunk: chosen by all readers together, by '
    'each for itself behind a channel sampler, or left whole',
    choices=units.TRUNKS,
  )
  channel_multiple: int = option(
    1,
    'every layer keeps a multiple of it, rounded up, or with --target_scope=network to the nearest '
    'one; runtimes like 8',
    lower=1,
  )
  channel_memory: float = option(
    2.0, "GiB for the samples' activations while channels are chosen", above=0
  )
  target: str = option(
    'ratio',
    "what is to be met: the learner's ratio, or --target_share of the multiply-accumulates or of "
    "the file's latency",
    choices=('ratio', 'macs', 'latency'),
  )
  target_share: float | None = option(
    None, 'share of MACs or latency to keep at most', above=0, upper=1
  )
  target_scope: str = option(
    'group',
    'with a target, drop the same share everywhere, or in the whole network the channels that cost '
    'the least error for the MACs that they save',
    choices=('group', 'network'),
  )
  target_format: str = option(
    'openvino', 'format whose runtime measures the latency', choices=tuple(RUNTIMES)
  )
  target_table: str | None = option(
    None,
    "file with layers' measured times, of any nets, which gets those that it lacks; all that a run "
    'uses are in latency_<format>.json of --work_dir too',
  )

  def __post_init__(self):
    check_options(self)
    if (self.target == 'ratio') != (self.target_share is None):
      raise UserError(
        '--target=macs or latency and --target_share=SHARE go together. '
        f'Received: --target={self.target} and --target_share={self.target_share}.'
      )
    for name, user in (
      ('target_scope', ('macs', 'latency')),
      ('target_format', ('latency',)),
      ('target_table', ('latency',)),
    ):
      value = getattr(self, name)
      if value != type(self).__dataclass_fields__[name].default and self.target not in user:
        raise UserError(
          f'--{name} has no effect without --target={" or ".join(user)}. '
          f'Received: --{name}={value} and --target={self.target}.'
        )
    if self.channel_trunk == 'sampler' and (self.target, self.target_scope) not in (
      ('ratio', 'group'),
      ('macs', 'group'),
    ):
      raise UserError(
        '--channel_trunk=sampler goes with --target=ratio or macs and --target_scope=group. '
        f'Received: --target={self.target} and --target_scope={self.target_scope}.'
      )

  def refuse_with_target(self, *names):
    """Raises a UserError if flags of `names`, of how much goes, are set and so is a target."""
    if self.target != 'ratio':
      refuse_idle(self, names, '--target=ratio')


def kept_counts(config, channels, found, ratios, multiple, rounding, folder, scores=None):
  """Returns {unit name: channels to keep}.

  Args:
    config: `ChannelConfig`.
    channels: a `ChannelGraph`.
    found: list of `Unit`s.
    ratios: {unit name: share to drop}. With a target, units of ratio 0 stay whole and the others
      get what meets it.
    multiple, rounding: see `units.counts`.
    folder: for the table of latencies.
    scores: {group name: [channels]} by which the whole network is ranked, for that scope.

  Raises:
    UserError: the target cannot be met.
  """
  if config.target == 'ratio':
    return units.counts(found, ratios, multiple, rounding)
  pruned = [unit for unit in found if ratios[unit.name]]
  if config.channel_trunk == 'sampler':
    return _counts_for_macs(config.target_share, channels, found, pruned, multiple, rounding)
  names = [unit.name for unit in pruned]
  skip = [group.name for group in channels.groups if group.name not in names]
  if scores is None:
    scores = {group.name: np.arange(group.size) / group.size for group in channels.groups}
  arguments = {'multiple': multiple, 'scope': config.target_scope, 'skip': skip}
  if config.target == 'macs':
    keep = filters.choose(channels, scores, macs=config.target_share, **arguments)
  else:
    table = latency_table(config, folder)
    keep = choose_for_latency(channels, scores, config.target_share, table, **arguments).keep
  return {unit.name: int(np.sum(keep[unit.name])) for unit in found}


def latency_table(config, folder):
  """Returns the `LatencyTable` of a run, in whose folder all times are kept that it uses.

  Args:
    config: `ChannelConfig`.
    folder: of the run.
  """
  path = pathlib.Path(folder) / f'latency_{config.target_format}.json'
  # Its own grid: counts between are interpolated, so that few layers are timed.
  return LatencyTable(config.target_format, path, known=config.target_table)


def _counts_for_macs(share, channels, found, pruned, multiple, rounding):
  """Returns the counts of the least common ratio whose MACs are at most `share`."""
  left = cost.macs_share(channels)
  least = 1.0
  for step in range(_STEPS):
    ratios = {unit.name: step / _STEPS for unit in pruned}
    counts = units.counts(found, ratios, multiple, rounding)
    least = left(*units.expected(channels, found, counts))
    if least <= share:
      return counts
  raise UserError(
    f'--target_share cannot be met: with {multiple} channels in every layer {least:.3f} of the '
    f'multiply-accumulates are left. Received: {share}.'
  )
