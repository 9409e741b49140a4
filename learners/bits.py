"""Who gets how many bits: flags and search of the learners that quantize.

The flags are PocketFlow's, under each learner's prefix.
"""

import dataclasses
import math
import pathlib

from learners import quantization
from learners.allocation import Allotting, Task
from learners.allocation_flags import SEARCHED, AllocationFlags, check_allocation
from learners.roll_outs import Tuning
from pocketsize import targets
from pocketsize.allocation import costs
from pocketsize.allocation.problem import Problem
from pocketsize.allocation.variants import Variants, quantized
from pocketsize.errors import UserError
from pocketsize.graph import Graph
from pocketsize.latency import LatencyTable
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
# Of Adam in roll-outs.
LAYERWISE_RATE = 1e-3
GLOBAL_RATE = 1e-4


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
    'nb_rlouts': (int, option(200, 'roll-outs of a search', lower=1)),
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
      option(
        tune_global_steps,
        f'steps of {prefix}_enbl_rl_global_tune, shared among the workers',
        lower=1,
      ),
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
  check_allocation(config, names(*ROLL_OUTS))
  if flag('enbl_rl_agent') and config.allocation not in (None, 'rl'):
    raise UserError(
      f'{agent} is --allocation=rl: give one of them. Received: --allocation={config.allocation}.'
    )
  if flag('weight_bits_list') is not None:
    raise UserError(
      f'--{prefix}_weight_bits_list says the bits of each layer, so there is nothing to search '
      f'for with {asked}. Received: both.'
    )
  if flag('w_bit_min') > flag('w_bit_max'):
    raise UserError(
      f'--{prefix}_w_bit_min must not be above --{prefix}_w_bit_max. '
      f'Received: {flag("w_bit_min")} and {flag("w_bit_max")}.'
    )
  if (config.budget == 'mean_bits') != (config.budget_value is None):
    raise UserError(
      f'--budget=mean_bits goes with --{prefix}_equivalent_bits, and every other --budget with '
      f'--budget_value. Received: --budget={config.budget} --budget_value={config.budget_value}.'
    )
  if config.budget != 'mean_bits':
    refuse_idle(config, names('equivalent_bits'), '--budget=mean_bits')
  if config.budget != 'latency':
    refuse_idle(config, ('budget_format', 'budget_tables'), '--budget=latency')
  if not flag('enbl_rl_global_tune'):
    refuse_idle(config, names('tune_global_steps'), f'--{prefix}_enbl_rl_global_tune')
  if not flag('enbl_rl_layerwise_tune'):
    refuse_idle(config, names('tune_layerwise_steps'), f'--{prefix}_enbl_rl_layerwise_tune')


class BitAllotting(Allotting):
  """A quantizing learner that can search for each layer's bits.

  Attributes:
    prefix: of its flags.
    compressor: class of its `Quantization` compressor.
  """

  prefix: str
  compressor: type

  def flag(self, name):
    """Returns the value of the flag <prefix>_<name>."""
    return getattr(self.config, f'{self.prefix}_{name}')

  def check(self):
    if self.config.searches:
      self.problem(Graph(self.source()))
    super().check()

  def prepared(self, model):
    if self.config.searches:
      self.allot(model, lambda: self.task(model))
    return super().prepared(model)

  def rules(self, graph, default, bits=None):
    """Returns the rules of a `Graph`: with the bits of a list, or with those that are given."""
    return quantization.rules(self.config, self.prefix, default, graph, bits)

  def problem(self, graph):
    """Returns the `Problem` of the layers that share the bits.

    Without --<prefix>_quantize_all_layers the first and the last layer have their own bits and are
    not among them.
    """
    paths = list(targets.weighted_layers(graph))
    if not self.flag('quantize_all_layers'):
      paths = paths[1:-1]
    bits = range(self.flag('w_bit_min'), self.flag('w_bit_max') + 1)
    variables = costs.bit_variables(graph, dict.fromkeys(paths, bits))
    if self.config.budget == 'mean_bits':
      return Problem(variables, costs.mean_bits(graph, variables), self.flag('equivalent_bits'))
    cost = {
      'bytes': costs.model_bytes,
      'bit_operations': self._bit_operations,
      'latency': self._latency,
    }[self.config.budget]
    return Problem(variables, cost(graph, variables), self.config.budget_value)

  def _bit_operations(self, graph, variables):
    bits = dict.fromkeys(targets.weighted_layers(graph), self.flag('activation_bits'))
    return costs.bit_operations(graph, variables, bits)

  def _latency(self, graph, variables):
    """Returns the cost in ms, from tables that are kept; rank 0 times for all."""

    def table(format):
      given = self.config.budget_tables
      folder = self.folder if given is None else pathlib.Path(given)
      return LatencyTable(format, folder / f'latency_{format}.json', is_complete=given is not None)

    format = self.config.budget_format
    return self.runtime.broadcast(
      self._on_chief(
        lambda: costs.bit_latency(graph, variables, table(INTEGER_FORMATS[format]), table(format))
      )
    )

  def task(self, model):
    """Returns the `Task` of a float model."""
    graph, default = Graph(model), self.config.quantization()
    problem = self.problem(graph)
    names = [variable.name for variable in problem.variables]
    change = quantized(model, self.compressor, dict.fromkeys(names, default))
    rollouts = self.flag('nb_rlouts')
    return Task(
      problem,
      Variants(model, problem.variables, change),
      rollouts,
      max(rollouts // 4, 1),
      self.flag('enbl_random_layers'),
      layers=[(name,) for name in names],
      value='bits of the weights',
      tuning=self._tuning(graph, default),
    )

  def _tuning(self, graph, default):
    """Returns the `Tuning` of roll-outs that the flags ask for, or None."""
    layerwise, globally = self.flag('enbl_rl_layerwise_tune'), self.flag('enbl_rl_global_tune')
    if not layerwise and not globally:
      return None
    return Tuning(
      lambda bits: [self.compressor(self.rules(graph, default, bits))],
      layerwise * self.flag('tune_layerwise_steps'),
      LAYERWISE_RATE,
      globally * math.ceil(self.flag('tune_global_steps') / self.runtime.size),
      self.run.lrn_rate_ft or GLOBAL_RATE,
      '--lrn_rate_ft',
    )
