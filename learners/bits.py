"""Who gets how many bits, for all learners that quantize."""

import pathlib

from learners import quantization
from learners.allocation import Allotting, Task
from learners.bit_flags import INTEGER_FORMATS
from learners.roll_outs import Tuning
from pocketsize import report, targets
from pocketsize.allocation import costs
from pocketsize.allocation.problem import Problem
from pocketsize.allocation.variants import Variants, quantized
from pocketsize.errors import UserError
from pocketsize.graph import Graph
from pocketsize.instrument import instrument
from pocketsize.latency import LatencyTable
from pocketsize.quantization.placing import END_BITS

# Of Adam in roll-outs.
LAYERWISE_RATE = 1e-3
GLOBAL_RATE = 1e-4


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
      graph = Graph(self.structure)
      self._planned(graph, {each.name: each.choices[0] for each in self.variables(graph)})
      # Layers are not timed before the folder for their times is this run's.
      if self.config.budget != 'latency' or self.config.budget_tables is not None:
        self.problem(graph)
    super().check()

  def prepared(self, model):
    if self.config.searches:
      self.allot(model, lambda: self.task(model))
    return super().prepared(model)

  def rules(self, graph, default, bits=None):
    """Returns the rules of a `Graph`: with the bits of a list, or with those that are given."""
    return quantization.rules(self.config, self.prefix, default, graph, bits)

  def variables(self, graph):
    """Returns the `Variable`s of the layers that share the bits.

    Without --<prefix>_quantize_all_layers the first and the last layer have bits of their own. They
    are not in the mean of bits; what is paid for the whole model has them with that one choice.
    """
    paths = list(targets.weighted_layers(graph))
    choices = dict.fromkeys(paths, range(self.flag('w_bit_min'), self.flag('w_bit_max') + 1))
    if not self.flag('quantize_all_layers'):
      choices |= dict.fromkeys(_ends(paths), (max(self.flag('weight_bits'), END_BITS),))
    if all(len(bits) == 1 for bits in choices.values()):
      raise UserError(
        'There must be layers with several bits to choose from, and the first and the last have '
        f'bits of their own without --{self.prefix}_quantize_all_layers. Received: --{self.prefix}_'
        f'w_bit_min={self.flag("w_bit_min")}, --{self.prefix}_w_bit_max={self.flag("w_bit_max")} '
        f'and the layers {", ".join(paths)}.'
      )
    if self.config.budget == 'mean_bits' and not self.flag('quantize_all_layers'):
      choices = {path: choices[path] for path in paths[1:-1]}
    return costs.bit_variables(graph, choices)

  def problem(self, graph):
    """Returns the `Problem` of a `Graph`'s layers."""
    variables = self.variables(graph)
    if self.config.budget == 'mean_bits':
      return Problem(variables, costs.mean_bits(graph, variables), self.flag('equivalent_bits'))
    cost = {
      'bytes': costs.model_bytes,
      'bit_operations': self._bit_operations,
      'latency': self._latency,
    }[self.config.budget]
    return Problem(variables, cost(graph, variables), self.config.budget_value)

  def _bit_operations(self, graph, variables):
    """Returns the cost; activations count as they are planned, whoever else reads them."""
    lowest = {variable.name: variable.choices[0] for variable in variables}
    planned = instrument(graph.model, self._planned(graph, lowest))
    bits = {path: report.activation_bits(planned, path) for path in targets.weighted_layers(graph)}
    return costs.bit_operations(graph, variables, bits)

  def _planned(self, graph, bits):
    """Returns the `Placement`s of a `Graph` with so many bits for the weights of layers."""
    return self.compressor(self.rules(graph, self.config.quantization(), bits)).plan(graph)

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
      layers=[(name,) for name in names],
      value='bits of the weights',
      random_order=self.flag('enbl_random_layers'),
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
      globally * self.flag('tune_global_steps'),
      GLOBAL_RATE,
      f'or fewer steps, --{self.prefix}_tune_global_steps',
    )


def _ends(paths):
  """Returns the paths of the first and the last layer."""
  return *paths[:1], *paths[-1:]
