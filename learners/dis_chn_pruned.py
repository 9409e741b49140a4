"""`dis-chn-pruned`: channels are chosen by what they tell about the classes."""

import dataclasses

import numpy as np

from learners.channel_targets import ChannelConfig
from learners.channels import ChannelLearner
from pocketsize.errors import UserError
from pocketsize.options import option
from pocketsize.pruning.discrimination import Discrimination, DiscriminationAware, Diverged
from pocketsize.pruning.heads import classes

# Their inputs and outputs at a layer are kept, so that a step computes nothing in front of it.
IMAGES = 2560
RATE_FLAG = '--dcp_lrn_rate_adam'


class DiscriminationPruned(ChannelLearner):
  """Channels are added greedily, with losses inside the net; see `pruning.discrimination`."""

  name = 'dis-chn-pruned'

  # Channels join until the share of those that are left out is not above the ratio.
  rounding = staticmethod(np.ceil)

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(ChannelConfig):
    """Flags of the learner."""

    dcp_prune_ratio: float = option(
      0.5, "share of each convolution's input channels to drop", lower=0, below=1
    )
    dcp_nb_stages: int = option(3, "losses inside the net, besides the net's own", lower=0)
    dcp_lrn_rate_adam: float = option(
      1e-3, 'learning rate of Adam, for blocks and for layers', above=0
    )
    dcp_nb_iters_block: int = option(
      10000, 'steps that all weights are tuned for before a block is pruned', lower=1
    )
    dcp_nb_iters_layer: int = option(
      500, 'steps that a layer is tuned for after a channel joined it', lower=1
    )

    def __post_init__(self):
      super().__post_init__()
      self.refuse_with_target('dcp_prune_ratio')

  def plan(self, model):
    classes(model)
    return super().plan(model)

  def method(self):
    return Discrimination(
      self.config.dcp_nb_stages,
      self.config.dcp_lrn_rate_adam,
      self._share(self.config.dcp_nb_iters_layer),
    )

  def samples(self):
    return IMAGES, None

  def ratios(self, convolutions):
    ratios = dict.fromkeys(convolutions, self.config.dcp_prune_ratio)
    return ratios | dict.fromkeys(convolutions[:1], 0.0), self.config.dcp_prune_ratio

  def course(self, model, found, counts):
    samples, _ = self.samples()
    return DiscriminationAware(
      model,
      found,
      counts,
      self.method(),
      self.batches(samples),
      self.helper.loss,
      seed=self.run.seed,
      total=self.runtime.allreduce_sum,
      memory=int(self.config.channel_memory * 2**30),
    )

  def do(self, course, step):
    if step in course.blocks:
      self._tune(course, step)
      return
    try:
      super().do(course, step)
    except Diverged as error:
      raise UserError(f'{error} The flag is {RATE_FLAG}.') from error

  def _tune(self, course, block):
    """Trains all weights for a block's head."""
    model = course.headed(block)
    self._fit(
      block,
      model,
      self._share(self.config.dcp_nb_iters_block) / self.steps_per_epoch,
      lambda step, steps: self.config.dcp_lrn_rate_adam,
      loss=course.block_loss(block),
      optimizer='adam',
      rate_flags=RATE_FLAG,
    )
    course.adopt(model)

  def _share(self, iterations):
    """Returns this worker's part of a number of steps, at least 1."""
    return max(iterations // self.runtime.size, 1)
