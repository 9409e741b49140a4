"""The configuration of filter pruning: how much, what first, and when."""

import dataclasses

from pocketsize import schedules
from pocketsize.errors import UserError

CRITERIA = ('l1', 'l2', 'geometric_median', 'bn_scale', 'taylor', 'random')
SCHEDULES = ('once', 'exponential', 'exponential_with_bias', 'baseline', 'polynomial')
SCOPES = ('group', 'network')


@dataclasses.dataclass(frozen=True)
class FilterConfig:
  """Which share of the channels to drop and when.

  Attributes:
    ratio: final share of channels to drop, in [0, 1); this or `macs`.
    macs: share of the model's multiply-accumulates to keep at most, in (0, 1]; the schedule goes to
      the ratio that meets it.
    criterion: what the least important channels are told by: 'l1', 'l2' or 'geometric_median' of
      the kernels, 'bn_scale', 'random', or 'taylor' by the gradients of training (so nothing can be
      dropped at step 0).
    scope: 'group' drops the same share of every group, 'network' the least of all channels.
    schedule: 'once' drops at `begin_step` and keeps to it; 'baseline' drops the whole ratio at
      `begin_step` and chooses anew until `end_step`; 'exponential', 'exponential_with_bias' and
      'polynomial' grow from `begin_step` to `end_step`.
    initial_ratio: share to drop from the first step to `begin_step`, not above `ratio`; 0 with
      'once'.
    begin_step: the step at which the ratio begins to grow.
    end_step: the step at which it is reached; not above `begin_step`: at once.
    update_every: steps between two new masks.
    exponent: of the polynomial growth, positive.
    multiple: every group keeps a multiple of it, see `filters.choose`; smaller groups stay whole.
    prune_first_conv: whether convolutions that read an input of the model lose channels.
    prune_downsample_convs: whether convolutions with strides above 1 do.
    prune_batch_norms: whether normalizations lose the shift of dropped channels; else those are
      constants, which `compact` puts into the bias of the layers that read them.
    seed: of 'random'.
  """

  ratio: float | None = None
  macs: float | None = None
  criterion: str = 'l2'
  scope: str = 'group'
  schedule: str = 'once'
  initial_ratio: float = 0.0
  begin_step: int = 0
  end_step: int = 0
  update_every: int = 100
  exponent: float = 3.0
  multiple: int = 1
  prune_first_conv: bool = False
  prune_downsample_convs: bool = False
  prune_batch_norms: bool = True
  seed: int = 0

  def __post_init__(self):
    if (self.ratio is None) == (self.macs is None):
      raise UserError(
        'Filter pruning needs `ratio`, in [0, 1), or `macs`, in (0, 1], and not both. '
        f'Received: {self.ratio} and {self.macs}.'
      )
    if self.ratio is not None and not 0.0 <= self.ratio < 1.0:
      raise UserError(
        f'`ratio` is the share of channels to drop and must be in [0, 1). Received: {self.ratio}.'
      )
    if self.macs is not None and not 0.0 < self.macs <= 1.0:
      raise UserError(
        '`macs` is the share of multiply-accumulates to keep and must be in (0, 1]. '
        f'Received: {self.macs}.'
      )
    for name, legal in (('criterion', CRITERIA), ('scope', SCOPES), ('schedule', SCHEDULES)):
      if getattr(self, name) not in legal:
        raise UserError(
          f'`{name}` must be one of {", ".join(legal)}. Received: {getattr(self, name)!r}.'
        )
    for name, least in (('begin_step', 0), ('end_step', 0), ('update_every', 1), ('multiple', 1)):
      if getattr(self, name) < least:
        raise UserError(f'`{name}` must be at least {least}. Received: {getattr(self, name)}.')
    if self.exponent <= 0:
      raise UserError(f'`exponent` must be positive. Received: {self.exponent}.')
    most = 0.0 if self.schedule == 'once' else 1.0 if self.ratio is None else self.ratio
    if not 0.0 <= self.initial_ratio <= most or self.initial_ratio == 1.0:
      raise UserError(
        "`initial_ratio` must be in [0, 1) and not above `ratio`, and 0 with schedule 'once'. "
        f'Received: {self.initial_ratio}.'
      )
    if self.criterion == 'taylor' and not self.drops_nothing_at(0):
      raise UserError(
        "Criterion 'taylor' has seen no gradient at step 0: give `begin_step` above 0 and "
        '`initial_ratio` 0, or score with `pocketsize.pruning.taylor.taylor_scores`. '
        f'Received: {self.begin_step} and {self.initial_ratio}.'
      )
    if self.ratio is not None and self.end_step > self.begin_step:
      # Raises if there is no such curve.
      self.ratio_at(self.begin_step + 0.5 * (self.end_step - self.begin_step))

  @classmethod
  def neutral(cls):
    """Returns the configuration that changes nothing."""
    return cls(ratio=0.0)

  @property
  def last_step(self):
    """The step at which the last masks are made."""
    return self.begin_step if self.schedule == 'once' else max(self.begin_step, self.end_step)

  def ratio_at(self, step, final=None):
    """Returns the ratio that masks made at `step` have.

    Args:
      step: the step.
      final: where the schedule goes; None for `ratio`.
    """
    final = self.ratio if final is None else final
    begin, end, initial = self.begin_step, self.end_step, self.initial_ratio
    if self.schedule in ('once', 'baseline'):
      return schedules.baseline(step, begin, initial, final)
    if self.schedule == 'polynomial':
      return schedules.polynomial(step, begin, end, initial, final, self.exponent)
    grow = getattr(schedules, self.schedule)
    return grow(step, begin, end, initial, final)

  def drops_nothing_at(self, step):
    """Returns whether the ratio at `step` is 0, whichever one meets `macs` in the end."""
    return self.ratio_at(step, 0.999 if self.ratio is None else self.ratio) == 0.0

  def is_due(self, step):
    """Returns whether new masks are made before optimizer step `step`."""
    if step < self.begin_step:
      return step == 0 and self.initial_ratio > 0.0
    return step == self.last_step or (
      step < self.last_step and (step - self.begin_step) % self.update_every == 0
    )
