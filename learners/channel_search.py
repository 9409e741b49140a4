"""`auto`: the ratio of each group of channels is searched for, under a budget or against it."""

import dataclasses
import math

import numpy as np

from learners.allocation import Allotting, Task
from learners.allocation_flags import SEARCHED, AllocationFlags, check_allocation, check_start
from learners.channel_targets import ChannelConfig, latency_table
from learners.channels import ChannelLearner
from pocketsize import cost
from pocketsize.allocation import channel_costs, channel_latency
from pocketsize.allocation.problem import Problem
from pocketsize.allocation.reconstructed import Reconstructed
from pocketsize.errors import UserError
from pocketsize.latency import predicted
from pocketsize.options import option, refuse_idle

# Ratios of a group to choose from.
_RATIOS = 17
_ROLL_OUTS = ('cp_nb_rlouts', 'cp_nb_rlouts_min', 'cp_reward_policy')


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchFlags(ChannelConfig, AllocationFlags):
  """Flags of a search for ratios of channels."""

  cp_preserve_ratio: float = option(
    0.5,
    'share of multiply-accumulates to keep at most, if ratios are searched for; no limit with '
    'cp_reward_policy=flops, but what the choices follow from, and where the search begins',
    above=0,
    upper=1,
  )
  cp_reward_policy: str = option(
    'accuracy',
    'what a roll-out is worth: what score_by says, within the budget; or minus its error times the '
    'logarithm of its FLOPs, whatever they are',
    choices=('accuracy', 'flops'),
  )
  cp_noise_tolerance: float = option(
    0.15, 'cp_reward_policy=flops: an error below it counts as much', lower=0, upper=1
  )
  cp_nb_rlouts: int = option(200, 'roll-outs of a search', lower=2)
  cp_nb_rlouts_min: int = option(50, 'roll-outs before the agent is trained', lower=1)

  @property
  def searches(self):
    """Whether ratios are searched for."""
    return self.cp_prune_option == 'auto'

  def check_search(self):
    """Raises a UserError for flags that contradict each other or have no effect."""
    if not self.searches:
      names = ('cp_preserve_ratio', 'cp_noise_tolerance', *_ROLL_OUTS, *SEARCHED)
      refuse_idle(self, names, '--cp_prune_option=auto')
      return
    check_allocation(self, _ROLL_OUTS, ('cp_nb_rlouts_min',))
    check_start(self, 'cp_nb_rlouts', 'cp_nb_rlouts_min')
    refuse_idle(self, ('target_scope',), '--cp_prune_option=uniform')
    if self.channel_trunk == 'sampler':
      raise UserError(
        '--cp_prune_option=auto goes with --channel_trunk=shared or whole. Received: sampler.'
      )
    if self.target != 'ratio':
      refuse_idle(self, ('cp_preserve_ratio', 'cp_reward_policy'), '--target=ratio')
    if self.cp_reward_policy != 'flops':
      refuse_idle(self, ('cp_noise_tolerance',), '--cp_reward_policy=flops')
    else:
      refuse_idle(self, ('score_by', 'search_start'), '--cp_reward_policy=accuracy')


class ChannelSearch(ChannelLearner, Allotting):
  """A channel learner that can search; the final model begins afresh with what was found."""

  def check(self):
    if self.config.searches:
      # Roll-outs refit to batches of these that all workers gather.
      self.dataset.steps_per_epoch('fit', self.run.batch_size, self.runtime.size)
    super().check()

  def check_target(self, channels, found):
    if self.config.searches:
      self._problem(channels, found)
    else:
      super().check_target(channels, found)

  def decided(self, model, channels, found):
    if not self.config.searches:
      return super().decided(model, channels, found)
    self.allot(model, lambda: self._task(model, channels, found))
    counts = {unit.name: unit.size for unit in found}
    variables, kept = self._choices(channels, found)
    for variable in variables:
      level = variable.choices.index(self.allotted[variable.name])
      counts[variable.name] = kept[variable.name][level]
    return counts

  def _choices(self, channels, found):
    """Returns what `unit_variables` does, of the units that need not stay whole.

    At least a share of 1.5 log10(p + 1) of a unit is kept, with p that of the MACs, as in
    PocketFlow.
    """
    share = (
      self.config.cp_preserve_ratio if self.config.target == 'ratio' else self.config.target_share
    )
    highest = 1.0 - 1.5 * math.log10(share + 1.0)
    ratios = np.linspace(0.0, max(highest, 0.0), _RATIOS).tolist()
    whole = self.unit_ratios(channels, found)
    free = [name for name, ratio in whole.items() if ratio]
    if not free:
      raise UserError(
        'There must be channels whose ratio is searched for: those that the first and the last '
        f'convolution read stay whole. Received: none but those of {", ".join(whole)}.'
      )
    return channel_costs.unit_variables(
      channels, found, dict.fromkeys(free, ratios), self.multiple(), self.rounding
    )

  def _problem(self, channels, found):
    """Returns (the `Problem` of the ratios, {unit name: channels that each choice keeps})."""
    variables, counts = self._choices(channels, found)
    if self.config.target == 'latency':
      return self._latency(channels, variables, counts)
    share = {'ratio': self.config.cp_preserve_ratio, 'macs': self.config.target_share}
    budget = share[self.config.target] if self.config.cp_reward_policy == 'accuracy' else None
    return Problem(variables, channel_costs.macs(channels, counts), budget), counts

  def _latency(self, channels, variables, counts):
    """Returns what `_problem` does, by layers that rank 0 times for all."""

    def timed():
      table = latency_table(self.config, self.folder)
      found = channel_latency.without_slower(channels, variables, counts, table)
      milliseconds = channel_latency.milliseconds(channels, found[1], table)
      return *found, milliseconds, predicted(channels, {}, table)

    faster, left, milliseconds, whole = self.runtime.broadcast(self._on_chief(timed))
    least, share = milliseconds.of([0] * len(faster)), self.config.target_share
    if least > share * whole:
      raise UserError(
        f'--target_share must be at least {math.ceil(1000 * least / whole) / 1000}: the layers '
        f'take {whole:.3g} ms, and {least:.3g} with the fewest channels to choose from. Received: '
        f'{share}.'
      )
    return Problem(faster, milliseconds, share * whole), left

  def _task(self, model, channels, found):
    problem, counts = self._problem(channels, found)
    by_name = {unit.name: unit for unit in found}
    units = [by_name[variable.name] for variable in problem.variables]
    # In one order on all workers, as a set would not be.
    readers = dict.fromkeys(path for unit in units for path in unit.readers)
    return Task(
      problem,
      # Of images that are not held out.
      Reconstructed(
        units, counts, self.survey(model, split='fit').problems(readers), self.method()
      ),
      self.config.cp_nb_rlouts,
      self.config.cp_nb_rlouts_min,
      layers=[tuple(unit.readers) for unit in units],
      value='share of the channels that is dropped',
      reward=self._reward(2 * cost.macs(channels.graph)),
      # Where nothing bounds the cost, PocketFlow's agent begins with this share of every group.
      middle=None if problem.budget < math.inf else 1.0 - self.config.cp_preserve_ratio,
    )

  def _reward(self, flops):
    """Returns PocketFlow's reward without a budget: (accuracy, share of MACs) -> number."""
    if self.config.cp_reward_policy == 'accuracy':
      return None
    least = self.config.cp_noise_tolerance
    return lambda accuracy, share: -max(least, 1.0 - accuracy) * math.log(flops * share)
