"""`weight-sparse`: gradual magnitude pruning of single weights, from the float model."""

import dataclasses
import math

from learners.learner import Learner
from pocketsize import targets
from pocketsize.errors import UserError
from pocketsize.options import check_options, option
from pocketsize.sparsity.magnitude import Magnitude, MagnitudeConfig, heuristic_ratios


class WeightSparse(Learner):
  """The smallest weights of each layer become zero; see `pocketsize.sparsity.magnitude`."""

  name = 'weight-sparse'

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config:
    """Flags of the learner."""

    ws_prune_ratio: float = option(0.75, 'share of all weights to drop', lower=0, below=1)
    ws_prune_ratio_prtl: str = option(
      'optimal',
      "each layer's ratio: the same, growing with its size, or searched for",
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

    def __post_init__(self):
      check_options(self)
      if self.ws_prune_ratio_prtl == 'optimal':
        raise UserError(
          '--ws_prune_ratio_prtl=optimal searches by reinforcement learning, which is not there '
          'yet. '
          'Use uniform or heurist. Received: optimal, the default.'
        )
      if self.ws_iter_ratio_beg > self.ws_iter_ratio_end:
        raise UserError(
          '--ws_iter_ratio_beg must not be above --ws_iter_ratio_end. '
          f'Received: {self.ws_iter_ratio_beg} and {self.ws_iter_ratio_end}.'
        )

  def epochs(self):
    return self.helper.epochs()

  def compressors(self, graph, steps):
    paths = list(targets.weighted_layers(graph))
    ratios = [self.config.ws_prune_ratio] * len(paths)
    if self.config.ws_prune_ratio_prtl == 'heurist':
      ratios = heuristic_ratios(
        [_weights(graph.layers[path]) for path in paths], self.config.ws_prune_ratio
      )
    begin, end = (
      int(steps * share) for share in (self.config.ws_iter_ratio_beg, self.config.ws_iter_ratio_end)
    )
    return [
      Magnitude(
        [
          targets.Rule(
            MagnitudeConfig(
              float(ratio),
              begin,
              end,
              int(self.config.ws_mask_update_step),
              self.config.ws_prune_ratio_exp,
            ),
            op_names=(path,),
          )
          for path, ratio in zip(paths, ratios, strict=True)
        ]
      )
    ]


def _weights(layer):
  return sum(math.prod(getattr(layer, point).shape) for point in targets.weight_points(layer))
