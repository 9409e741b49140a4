"""`filters`: whole filters are dropped by a criterion, at once or as training goes on."""

import dataclasses

from learners.learner import Learner
from pocketsize import configure
from pocketsize.compressor import Stack
from pocketsize.errors import UserError
from pocketsize.graph import Graph
from pocketsize.instrument import instrument, strip
from pocketsize.options import check_options, option, refuse_idle
from pocketsize.pruning.filter_config import CRITERIA, SCHEDULES, SCOPES, FilterConfig
from pocketsize.pruning.filter_pruning import FilterPruning
from pocketsize.shrink import compact
from pocketsize.targets import Rule


class FilterLearner(Learner):
  """The filters of the least importance go; see `pocketsize.pruning.filter_pruning`."""

  name = 'filters'

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config:
    """Flags of the learner."""

    fp_ratio: float | None = option(
      None, 'share of the channels to drop; this or fp_macs', lower=0, below=1
    )
    fp_macs: float | None = option(
      None, 'share of the multiply-accumulates to keep at most', above=0, upper=1
    )
    fp_criterion: str = option('l2', 'what tells the least important filters', choices=CRITERIA)
    fp_scope: str = option(
      'group', 'the same share everywhere, or the least of the whole network', choices=SCOPES
    )
    fp_schedule: str = option('once', 'how the ratio grows', choices=SCHEDULES)
    fp_initial_ratio: float = option(0.0, 'ratio at the first step', lower=0, below=1)
    fp_iter_ratio_beg: float = option(
      0.0, 'the ratio begins to grow at this share of the training', lower=0, upper=1
    )
    fp_iter_ratio_end: float = option(
      0.5, 'the ratio is reached at this share of the training', lower=0, upper=1
    )
    fp_mask_update_step: int = option(100, 'steps between two choices of filters', lower=1)
    fp_multiple: int = option(
      1, 'every layer keeps a multiple of it, rounded as by channel_multiple', lower=1
    )
    fp_prune_first_conv: bool = option(False, 'convolutions that read the input lose filters too')
    fp_prune_downsample_convs: bool = option(False, 'so do convolutions with strides')
    fp_prune_batch_norms: bool = option(
      True, 'batch norms lose the shift of dropped channels; if not, the next layer takes it up'
    )

    def __post_init__(self):
      check_options(self)
      if (self.fp_ratio is None) == (self.fp_macs is None):
        raise UserError(
          '--fp_ratio=RATIO or --fp_macs=SHARE says how much is dropped: give one of them. '
          f'Received: {self.fp_ratio} and {self.fp_macs}.'
        )
      if self.fp_criterion == 'taylor' and not self.fp_iter_ratio_beg:
        raise UserError(
          '--fp_criterion=taylor looks at gradients of the training before it drops filters: give '
          '--fp_iter_ratio_beg above 0. Received: 0.0.'
        )
      if self.fp_schedule == 'once':
        names = ('fp_initial_ratio', 'fp_iter_ratio_end', 'fp_mask_update_step')
        refuse_idle(self, names, f'--fp_schedule={" or ".join(SCHEDULES[1:])}')
      elif self.fp_iter_ratio_beg > self.fp_iter_ratio_end:
        raise UserError(
          '--fp_iter_ratio_beg must not be above --fp_iter_ratio_end. '
          f'Received: {self.fp_iter_ratio_beg} and {self.fp_iter_ratio_end}.'
        )
      if self.fp_schedule == 'baseline' and not self.fp_iter_ratio_beg:
        refuse_idle(self, ('fp_initial_ratio',), '--fp_iter_ratio_beg')

    @property
    def is_at_once(self):
      """Whether filters go before the training begins, so that a smaller model is trained."""
      return self.fp_schedule == 'once' and not self.fp_iter_ratio_beg

    def pruning(self, steps, seed):
      """Returns the `FilterConfig` for so many steps of training."""
      return FilterConfig(
        ratio=self.fp_ratio,
        macs=self.fp_macs,
        criterion=self.fp_criterion,
        scope=self.fp_scope,
        schedule=self.fp_schedule,
        initial_ratio=self.fp_initial_ratio,
        begin_step=int(steps * self.fp_iter_ratio_beg),
        end_step=int(steps * self.fp_iter_ratio_end),
        update_every=self.fp_mask_update_step,
        multiple=self.fp_multiple,
        prune_first_conv=self.fp_prune_first_conv,
        prune_downsample_convs=self.fp_prune_downsample_convs,
        prune_batch_norms=self.fp_prune_batch_norms,
        seed=seed,
      )

  def epochs(self):
    return self.helper.epochs()

  def check(self):
    self._filters(Graph(self.structure), self._steps(self.epochs()))
    super().check()

  def compressors(self, graph, steps):
    if self.config.is_at_once:
      return []
    return [FilterPruning([Rule(self.config.pruning(steps, self.run.seed))])]

  def prepared(self, model):
    if not self.config.is_at_once:
      return model
    stack = self._filters(Graph(model), steps=1)
    self.skipped = stack.skipped
    return self.kept('pruned.keras', lambda: self._compacted(configure.attach(model, stack), stack))

  def finished(self, model):
    return model if self.config.is_at_once else instrument(self._compacted(model, model.stack))

  def _filters(self, graph, steps):
    """Returns a planned `Stack`; what cannot be met is found here."""
    pruning = FilterPruning([Rule(self.config.pruning(steps, self.run.seed))])
    stack = Stack([pruning])
    stack.plan(graph)
    if not pruning.configs:
      reasons = '; '.join(f'{name}: {reason}' for name, reason in pruning.skipped.items())
      raise UserError(f'Model {graph.model.name!r} has no filters to drop: {reasons}.')
    return stack

  def _compacted(self, model, stack):
    stack.update(0 if self.config.is_at_once else self._steps(self.epochs()))
    return compact(strip(model), keep_shift=not self.config.fp_prune_batch_norms)
