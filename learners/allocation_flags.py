"""Flags of the searches for what each layer gets."""

import dataclasses

from pocketsize.allocation.allocators import ALLOCATORS
from pocketsize.errors import UserError
from pocketsize.options import option, refuse_idle
from pocketsize.rl.ddpg import DdpgConfig

PREFIX = 'ddpg_'

AgentFlags = dataclasses.make_dataclass(
  'AgentFlags',
  [
    (
      f'{PREFIX}{field.name}',
      field.type,
      dataclasses.field(default=field.default, metadata=field.metadata),
    )
    for field in dataclasses.fields(DdpgConfig)
  ],
  frozen=True,
  kw_only=True,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllocationFlags(AgentFlags):
  """Flags of every learner that can search for what each layer gets."""

  allocation: str | None = option(
    None,
    'what decides what each layer gets: an agent that learns from roll-outs (rl), second '
    'derivatives of the loss (hawq), measured losses of single layers (sensitivity), Parzen '
    'estimators (tpe), a Gaussian process (gp); or the same for all (uniform), less for larger '
    'layers (heuristic)',
    choices=tuple(ALLOCATORS),
  )
  nb_smpls_score: int = option(
    1000, 'held-out training images by which a choice is scored', lower=1
  )
  nb_smpls_score_bn: int = option(
    256,
    'training images from which the moving statistics of batch norms are estimated anew for each '
    'score; 0: they stay',
    lower=0,
  )
  score_by: str = option(
    'loss',
    "what a choice is scored by: the loss of the training, which tells apart what the net's metric "
    'does not on so few images, or the metric',
    choices=('loss', 'metric'),
  )
  search_start: str = option(
    'uniform',
    'choice around which rl begins, and that tpe and gp know from the beginning: the same for all, '
    'or that of hawq or sensitivity',
    choices=('uniform', 'hawq', 'sensitivity'),
  )
  nb_smpls_trace: int = option(
    256, 'hawq: held-out training images for second derivatives of the loss', lower=1
  )
  hawq_iterations: int = option(
    200, 'hawq: random vectors for second derivatives, at most', lower=2
  )
  hawq_tolerance: float = option(
    0.01, 'hawq: relative change of their means at which no more vectors are drawn', above=0
  )

  def agent(self):
    """Returns the `DdpgConfig`."""
    names = [field.name for field in dataclasses.fields(DdpgConfig)]
    try:
      return DdpgConfig(**{name: getattr(self, PREFIX + name) for name in names})
    except UserError as error:
      raise UserError(str(error).replace('--', f'--{PREFIX}')) from error


# All of them, and those that only the allocators that have them read.
SEARCHED = tuple(field.name for field in dataclasses.fields(AllocationFlags))
_AGENT = tuple(field.name for field in dataclasses.fields(AgentFlags))
_TRACES = ('nb_smpls_trace', 'hawq_iterations', 'hawq_tolerance')
_ADAPTING = ('ddpg_noise_dst_finl', 'ddpg_noise_adpt_rat')
BY_ROLL_OUTS = ('rl', 'tpe', 'gp')


def check_allocation(config, roll_outs, agent):
  """Raises a UserError for flags that the allocator has no use for.

  Args:
    config: `AllocationFlags` of a search; unset --allocation is the agent.
    roll_outs: names of the learner's flags about roll-outs; the first is how many there are.
    agent: names of those that the agent alone reads.
  """
  name = config.allocation or 'rl'
  if name not in BY_ROLL_OUTS:
    refuse_idle(config, (*roll_outs, 'search_start'), f'--allocation={" or ".join(BY_ROLL_OUTS)}')
  if name != 'rl':
    refuse_idle(config, (*_AGENT, *agent), '--allocation=rl')
  else:
    for names, needed, is_set in (
      (_ADAPTING, '--ddpg_noise_prtl=adapt', config.ddpg_noise_prtl == 'adapt'),
      (('ddpg_noise_std_finl',), '--ddpg_noise_prtl=tdecy', config.ddpg_noise_prtl == 'tdecy'),
      (('ddpg_bsln_decy_rate',), '--ddpg_enbl_bsln_func', config.ddpg_enbl_bsln_func),
    ):
      if not is_set:
        refuse_idle(config, names, needed)
  if 'hawq' not in (name, config.search_start):
    refuse_idle(config, _TRACES, '--allocation=hawq or --search_start=hawq')
  config.agent()


def check_start(config, rollouts, rollouts_min):
  """Raises a UserError if the agent would never propose what it has learned.

  Args:
    config: `AllocationFlags` of a search.
    rollouts, rollouts_min: names of the flags of how many roll-outs there are, and of after how
      many the agent is trained.
  """
  count, first = getattr(config, rollouts), getattr(config, rollouts_min)
  if config.allocation in (None, 'rl') and first >= count:
    raise UserError(
      f'--{rollouts_min} must be below --{rollouts}, or the agent proposes nothing that it has '
      f'learned. Received: {first} and {count}.'
    )
