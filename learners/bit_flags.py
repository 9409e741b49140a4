"""Flags of searches for the bits of each layer: PocketFlow's, under each learner's prefix."""

import dataclasses

from learners.allocation_flags import SEARCHED, AllocationFlags, check_allocation
from pocketsize.allocation.costs import INTEGER_BITS
from pocketsize.errors import UserError
from pocketsize.options import option, refuse_idle

BUDGETS = ('mean_bits', 'bytes', 'bit_operations', 'latency')
# The formats whose layers are timed, and the same in integers.
INTEGER_FORMATS = {'tflite': 'tflite_int8', 'onnx': 'onnx_qdq', 'openvino': 'openvino_int8'}
# Flags that searches by roll-outs have, without their prefix.
ROLL_OUTS = (
  'nb_rlouts',
  'enbl_random_layers',
  'enbl_rl_global_tune',
  'enbl_rl_layerwise_tune',
  'tune_global_steps',
  'tune_layerwise_steps',
)
BUDGET = ('budget', 'budget_value', 'budget_format', 'budget_tables')


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetFlags(AllocationFlags):
  """Flags of searches for bits that have no prefix."""

  budget: str = option(
    'mean_bits',
    'what a choice of bits may cost at most: bits of a weight in the mean, bytes of all weights, '
    'bit-operations of a sample, or ms of the layers of a file',
    choices=BUDGETS,
  )
  budget_value: float | None = option(
    None, 'budget in bytes, bit-operations or ms; for mean_bits there is another flag', above=0
  )
  budget_format: str = option(
    'openvino', 'format whose runtime measures the latency', choices=tuple(INTEGER_FORMATS)
  )
  budget_tables: str | None = option(
    None,
    "folder with the layers' times, latency_<format>.json of an earlier run; unset: they are "
    'measured',
  )


def flags(prefix, bits, tune_global_steps):
  """Returns the dataclass of the flags of a learner's search for bits.

  Args:
    prefix: of their names, such as 'uql'.
    bits: range of the legal bits of weights.
    tune_global_steps: default of that flag.
  """
  fields = {
    'enbl_rl_agent': (bool, option(False, 'search for the bits of each layer; --allocation=rl')),
    'equivalent_bits': (
      float,
      option(4.0, 'bits of a weight in the mean, at most, if bits are searched for', lower=1),
    ),
    'w_bit_min': (int, option(2, 'fewest bits of a layer, of those to choose from', choices=bits)),
    'w_bit_max': (int, option(8, 'most bits of a layer, of those to choose from', choices=bits)),
    'nb_rlouts': (int, option(200, 'roll-outs of a search', lower=2)),
    'enbl_random_layers': (
      bool,
      option(True, 'the agent visits the layers in another order in each roll-out'),
    ),
    'enbl_rl_global_tune': (
      bool,
      option(False, 'the model of a roll-out is trained before it is scored'),
    ),
    'enbl_rl_layerwise_tune': (
      bool,
      option(
        False,
        "the layers of a roll-out's model are brought near to the float model's before it is "
        'trained or scored',
      ),
    ),
    'tune_global_steps': (
      int,
      option(tune_global_steps, f'steps of {prefix}_enbl_rl_global_tune', lower=1),
    ),
    'tune_layerwise_steps': (
      int,
      option(100, f'steps of {prefix}_enbl_rl_layerwise_tune', lower=1),
    ),
  }
  return dataclasses.make_dataclass(
    f'{prefix.title()}BitFlags',
    [(f'{prefix}_{name}', *field) for name, field in fields.items()],
    bases=(BudgetFlags,),
    namespace={
      'searches': property(
        lambda self: self.allocation is not None or getattr(self, f'{prefix}_enbl_rl_agent')
      )
    },
    frozen=True,
    kw_only=True,
  )


def check(config, prefix):
  """Raises a UserError for flags of the search that contradict each other or have no effect."""

  def names(*words):
    return [f'{prefix}_{word}' for word in words]

  def flag(name):
    return getattr(config, f'{prefix}_{name}')

  agent, asked = f'--{prefix}_enbl_rl_agent', f'--allocation or --{prefix}_enbl_rl_agent'
  if not config.searches:
    searched = [*names('w_bit_min', 'w_bit_max'), *names(*ROLL_OUTS), f'{prefix}_equivalent_bits']
    refuse_idle(config, [*searched, *SEARCHED, *BUDGET], asked)
    return
  check_allocation(config, names(*ROLL_OUTS), names('enbl_random_layers'))
  if flag('enbl_rl_agent') and config.allocation not in (None, 'rl'):
    raise UserError(
      f'{agent} is --allocation=rl: give one of them. Received: --allocation={config.allocation}.'
    )
  if flag('weight_bits_list') is not None:
    raise UserError(
      f'--{prefix}_weight_bits_list says the bits of each layer, so there is nothing to search '
      f'for with {asked}. Received: both.'
    )
  if flag('quantize_all_layers'):
    refuse_idle(config, names('weight_bits'), 'layers whose bits are not searched for')
  low, high = flag('w_bit_min'), flag('w_bit_max')
  if low > high:
    raise UserError(
      f'--{prefix}_w_bit_min must not be above --{prefix}_w_bit_max. Received: {low} and {high}.'
    )
  if (config.budget == 'mean_bits') != (config.budget_value is None):
    raise UserError(
      f'--budget=mean_bits goes with --{prefix}_equivalent_bits, and every other --budget with '
      f'--budget_value. Received: --budget={config.budget} --budget_value={config.budget_value}.'
    )
  if config.budget == 'mean_bits' and not low <= flag('equivalent_bits') <= high:
    raise UserError(
      f'--{prefix}_equivalent_bits must lie between --{prefix}_w_bit_min and '
      f'--{prefix}_w_bit_max. Received: {flag("equivalent_bits")}, with {low} and {high}.'
    )
  if config.budget != 'mean_bits':
    refuse_idle(config, names('equivalent_bits'), '--budget=mean_bits')
  if config.budget == 'latency':
    _check_latency(prefix, low, high, flag('activation_bits'))
  else:
    refuse_idle(config, ('budget_format', 'budget_tables'), '--budget=latency')
  if not flag('enbl_rl_global_tune'):
    refuse_idle(config, names('tune_global_steps'), f'--{prefix}_enbl_rl_global_tune')
  if not flag('enbl_rl_layerwise_tune'):
    refuse_idle(config, names('tune_layerwise_steps'), f'--{prefix}_enbl_rl_layerwise_tune')


def _check_latency(prefix, low, high, activation_bits):
  """Raises a UserError if all choices take one time, or layers do not compute in integers."""
  if activation_bits > INTEGER_BITS:
    raise UserError(
      f'--budget=latency is about layers that compute in integers, so --{prefix}_activation_bits '
      f'must be at most {INTEGER_BITS}. Received: {activation_bits}.'
    )
  if not low <= INTEGER_BITS < high:
    raise UserError(
      f'--budget=latency needs bits to choose from that take different times: up to {INTEGER_BITS}'
      f', in integers, and more, in float. Received: --{prefix}_w_bit_min={low} and '
      f'--{prefix}_w_bit_max={high}.'
    )
