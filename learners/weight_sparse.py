"""`weight-sparse`: gradual magnitude pruning of single weights, from the float model."""

import dataclasses
import math

import numpy as np

from learners.allocation import Allotting, Task
from learners.allocation_flags import SEARCHED, AllocationFlags, check_allocation, check_start
from learners.roll_outs import Tuning
from pocketsize import targets
from pocketsize.allocation import costs
from pocketsize.allocation.problem import Problem
from pocketsize.allocation.variants import Variants, refitted, sparse
from pocketsize.errors import UserError
from pocketsize.graph import Graph
from pocketsize.options import check_options, option, refuse_idle
from pocketsize.pruning.sampling import Sampling, is_regression
from pocketsize.sparsity.magnitude import Magnitude, MagnitudeConfig, heuristic_ratios

# Ratios of a layer to choose from.
_RATIOS = 33
# Layers at both ends are left whole by a search if they have this share of all weights at most.
_SMALL_ENDS = 0.01
_ROLL_OUTS = (
  'ws_nb_rlouts',
  'ws_nb_rlouts_min',
  'ws_reward_type',
  'ws_nb_iters_rg',
  'ws_lrn_rate_rg',
  'ws_nb_iters_ft',
  'ws_lrn_rate_ft',
)


class WeightSparse(Allotting):
  """The smallest weights of each layer become zero; see `pocketsize.sparsity.magnitude`."""

  name = 'weight-sparse'

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(AllocationFlags):
    """Flags of the learner."""

    ws_prune_ratio: float = option(0.75, 'share of all weights to drop', lower=0, below=1)
    ws_prune_ratio_prtl: str = option(
      'optimal',
      "each layer's ratio: the same, growing with its size, or searched for by --allocation, "
      'unset: rl',
      choices=('uniform', 'heurist', 'optimal'),
    )
    ws_prune_ratio_exp: float = option(3.0, 'exponent of the growth of the ratio', above=0)
    ws_iter_ratio_beg: float = option(
      0.1, 'the ratio begins to grow at this share of the training', lower=0, upper=1
    )
    ws_iter_ratio_end: float = option(
      0.5, 'the ratio is reached at this share of the training', lower=0, upper=1
    )
    ws_mask_update_step: float = option(500, 'steps between two updates of the masks', lower=1)

    ws_nb_rlouts: int = option(200, 'roll-outs of a search', lower=2)
    ws_nb_rlouts_min: int = option(50, 'roll-outs before the agent is trained', lower=1)
    ws_reward_type: str = option(
      'single-obj',
      'what a roll-out is worth: what score_by says, with as many weights dropped as by '
      'ws_prune_ratio in each layer; or accuracy times ln(1 + ratio), whatever the ratio',
      choices=('single-obj', 'multi-obj'),
    )
    ws_nb_iters_rg: int = option(
      0, "steps that bring each layer near to the float model's in a roll-out", lower=0
    )
    ws_lrn_rate_rg: float = option(0.03, 'learning rate of Adam for ws_nb_iters_rg', above=0)
    ws_nb_iters_ft: int = option(0, 'training steps of a roll-out', lower=0)
    ws_lrn_rate_ft: float = option(3e-4, 'learning rate of Adam for ws_nb_iters_ft', above=0)

    ws_nb_smpls_refit: int = option(
      1000,
      'training images from which what is left of each layer is refitted by least squares in a '
      'roll-out that does not train; 0: it is not',
      lower=0,
    )

    def __post_init__(self):
      check_options(self)
      if self.ws_iter_ratio_beg > self.ws_iter_ratio_end:
        raise UserError(
          '--ws_iter_ratio_beg must not be above --ws_iter_ratio_end. '
          f'Received: {self.ws_iter_ratio_beg} and {self.ws_iter_ratio_end}.'
        )
      if not self.searches:
        names = (*_ROLL_OUTS, *SEARCHED, 'ws_nb_smpls_refit')
        refuse_idle(self, names, '--ws_prune_ratio_prtl=optimal')
        return
      check_allocation(self, _ROLL_OUTS, ('ws_nb_rlouts_min',))
      check_start(self, 'ws_nb_rlouts', 'ws_nb_rlouts_min')
      if self.ws_reward_type == 'multi-obj':
        refuse_idle(self, ('score_by', 'search_start'), '--ws_reward_type=single-obj')
      if not self.ws_nb_iters_rg:
        refuse_idle(self, ('ws_lrn_rate_rg',), '--ws_nb_iters_rg')
      if not self.ws_nb_iters_ft:
        refuse_idle(self, ('ws_lrn_rate_ft',), '--ws_nb_iters_ft')
      if self.trains_roll_outs:
        refuse_idle(self, ('ws_nb_smpls_refit',), '--ws_nb_iters_rg=0 and --ws_nb_iters_ft=0')
      if self.allocation == 'hawq':
        refuse_idle(self, ('ws_nb_smpls_refit',), 'another --allocation than hawq')

    @property
    def searches(self):
      """Whether ratios are searched for."""
      return self.ws_prune_ratio_prtl == 'optimal'

    @property
    def trains_roll_outs(self):
      """Whether a roll-out is trained before it is scored."""
      return bool(self.ws_nb_iters_rg or self.ws_nb_iters_ft)

  def check(self):
    if self.config.searches:
      self.problem(Graph(self.structure))
    super().check()

  def prepared(self, model):
    if self.config.searches:
      self.allot(model, lambda: self.task(model))
    return super().prepared(model)

  def problem(self, graph):
    """Returns the `Problem` of the layers' ratios, with PocketFlow's bounds.

    With r the ratio of all, each layer's lies between max(0, 1 - 3 (1 - r)) and 1 - (1 - r) / 3.
    """
    kept = 1.0 - self.config.ws_prune_ratio
    low, high = max(0.0, 1.0 - 3.0 * kept), 1.0 - kept / 3.0
    ratios = {*np.linspace(low, high, _RATIOS).tolist(), self.config.ws_prune_ratio}
    choices = dict.fromkeys(targets.weighted_layers(graph), sorted(ratios))
    sizes = dict(zip(choices, costs.weights(graph, choices), strict=True))
    ends = {*list(choices)[:1], *list(choices)[-1:]}
    if sum(sizes[path] for path in ends) <= _SMALL_ENDS * sum(sizes.values()):
      choices |= dict.fromkeys(ends, (0.0,))
    variables = costs.ratio_variables(graph, choices)
    if self.config.ws_reward_type != 'single-obj':
      return Problem(variables, costs.density(graph, variables))
    # The common ratio stays a choice, though whole weights may come to a few less.
    common = costs.ratio_variables(graph, [self.config.ws_prune_ratio])
    rounded = costs.density(graph, common).of([0] * len(common))
    return Problem(variables, costs.density(graph, variables), max(kept, rounded))

  def task(self, model):
    """Returns the `Task` of a float model."""
    graph = Graph(model)
    problem = self.problem(graph)
    tuning = None
    if self.config.trains_roll_outs:
      tuning = Tuning(
        lambda ratios: [Magnitude(self._rules(ratios, 0, 0))],
        self.config.ws_nb_iters_rg,
        self.config.ws_lrn_rate_rg,
        self.config.ws_nb_iters_ft,
        self.config.ws_lrn_rate_ft,
        '--ws_lrn_rate_rg, --ws_lrn_rate_ft',
      )
    return Task(
      problem,
      Variants(model, problem.variables, self._change(graph)),
      self.config.ws_nb_rlouts,
      self.config.ws_nb_rlouts_min,
      layers=[(variable.name,) for variable in problem.variables],
      value='share of the weights that is dropped',
      reward=_multi_objective if self.config.ws_reward_type == 'multi-obj' else None,
      middle=self.config.ws_prune_ratio if self.config.ws_reward_type == 'multi-obj' else None,
      tuning=tuning,
    )

  def _change(self, graph):
    """Returns the `change` of `Variants`: what a roll-out has in place of a kernel."""
    # Second derivatives are those of the weights as they are.
    images = 0 if self.allocator == 'hawq' else self.config.ws_nb_smpls_refit
    if not images or self.config.trains_roll_outs:
      return sparse
    paths = [path for path in targets.weighted_layers(graph) if is_regression(graph.layers[path])]
    sampling = Sampling(graph, seed=self.run.seed)
    return refitted(sampling.problems(paths, self.own_images(images)))

  def epochs(self):
    return self.helper.epochs()

  def compressors(self, graph, steps):
    begin, end = (
      int(steps * share) for share in (self.config.ws_iter_ratio_beg, self.config.ws_iter_ratio_end)
    )
    return [Magnitude(self._rules(self._ratios(graph), begin, end))]

  def _ratios(self, graph):
    """Returns {path: ratio} of the layers of a `Graph`."""
    if self.allotted:
      return self.allotted
    paths, ratio = list(targets.weighted_layers(graph)), self.config.ws_prune_ratio
    if self.config.ws_prune_ratio_prtl == 'heurist':
      return dict(zip(paths, heuristic_ratios(costs.weights(graph, paths), ratio), strict=True))
    return dict.fromkeys(paths, ratio)

  def _rules(self, ratios, begin, end):
    """Returns the rules for {path: ratio}, which grow from step `begin` to `end`."""
    every, exponent = int(self.config.ws_mask_update_step), self.config.ws_prune_ratio_exp
    return [
      targets.Rule(MagnitudeConfig(float(ratio), begin, end, every, exponent), op_names=(path,))
      for path, ratio in ratios.items()
    ]


def _multi_objective(accuracy, density):
  """Returns accuracy ln(1 + ratio), PocketFlow's reward without a budget."""
  return accuracy * math.log(2.0 - density)
