"""`chn-pruned-gpu`: channel pruning by proximal gradient descent on whole layers."""

import dataclasses

import numpy as np

from learners.channel_targets import ChannelConfig
from learners.channels import ChannelLearner, read_ratios
from pocketsize.errors import UserError
from pocketsize.options import option, refuse_idle
from pocketsize.pruning.proximal import Proximal

# Whole output maps have many positions, so fewer images do.
IMAGES = 500


class ChannelPrunedProximal(ChannelLearner):
  """Channels are chosen by a group LASSO on whole layers; see `pocketsize.pruning.proximal`."""

  name = 'chn-pruned-gpu'

  # The channels up to the percentile of the ratio go.
  rounding = staticmethod(np.ceil)

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(ChannelConfig):
    """Flags of the learner."""

    cpg_prune_ratio_type: str = option(
      'uniform', 'one ratio for all convolutions, or a list', choices=('uniform', 'list')
    )
    cpg_prune_ratio: float = option(
      0.5, "share of each convolution's input channels to drop", lower=0, below=1
    )
    cpg_prune_ratio_file: str | None = option(
      None, 'file of ratios, comma-separated, one for each convolution in order'
    )
    cpg_skip_ht_layers: bool = option(True, 'leave the first and the last convolution alone')
    cpg_lrn_rate_pgd_init: float = option(1e-10, 'step size of the descent at first', above=0)
    cpg_lrn_rate_pgd_incr: float = option(1.4, 'its factor where the error fell', lower=1)
    cpg_lrn_rate_pgd_decr: float = option(
      0.7, 'its factor where the error did not', above=0, upper=1
    )
    cpg_lrn_rate_adam: float = option(0.01, 'learning rate of the regression', above=0)
    cpg_nb_iters_layer: int = option(1000, 'steps of the descent, and of the regression', lower=1)

    def __post_init__(self):
      super().__post_init__()
      if (self.cpg_prune_ratio_type == 'list') != (self.cpg_prune_ratio_file is not None):
        raise UserError(
          '--cpg_prune_ratio_type=list and --cpg_prune_ratio_file=FILE go together. '
          f'Received: {self.cpg_prune_ratio_type} and {self.cpg_prune_ratio_file}.'
        )
      if self.cpg_prune_ratio_type == 'list':
        refuse_idle(self, ('cpg_prune_ratio',), '--cpg_prune_ratio_type=uniform')
      self.refuse_with_target('cpg_prune_ratio')

  def method(self):
    config = self.config
    return Proximal(
      config.cpg_lrn_rate_pgd_init,
      config.cpg_lrn_rate_pgd_incr,
      config.cpg_lrn_rate_pgd_decr,
      config.cpg_lrn_rate_adam,
      # Workers share the iterations in PocketFlow; here they share the samples.
      config.cpg_nb_iters_layer,
    )

  def samples(self):
    return IMAGES, None

  def ratios(self, convolutions):
    if self.config.cpg_prune_ratio_type == 'list':
      ratios, dense = (
        read_ratios(self.config.cpg_prune_ratio_file, 'cpg_prune_ratio_file', convolutions),
        0.0,
      )
    else:
      ratios = dict.fromkeys(convolutions, self.config.cpg_prune_ratio)
      dense = self.config.cpg_prune_ratio
    if self.config.cpg_skip_ht_layers:
      ratios |= dict.fromkeys((*convolutions[:1], *convolutions[-1:]), 0.0)
    return ratios, dense
