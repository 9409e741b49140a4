"""`chn-pruned-rmt`: channel pruning remastered, with ISTA and regression by Adam."""

import dataclasses

from learners.channel_targets import ChannelConfig
from learners.channels import ChannelLearner
from pocketsize.errors import UserError
from pocketsize.options import option, refuse_idle
from pocketsize.pruning.ista import Ista

# Flags that say which channels go. A command that differs by its warm start may keep all others.
_CHOICE = (
  'cpr_prune_ratio',
  'target',
  'channel_trunk',
  'channel_multiple',
  'cpr_skip_frst_layer',
  'cpr_skip_last_layer',
  'cpr_skip_op_names',
)


class ChannelPrunedRemastered(ChannelLearner):
  """Input channels of each convolution are chosen by ISTA; see `pocketsize.pruning.ista`."""

  name = 'chn-pruned-rmt'

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(ChannelConfig):
    """Flags of the learner."""

    cpr_prune_ratio: float = option(
      0.5, "share of each convolution's input channels to drop", lower=0, below=1
    )
    cpr_skip_frst_layer: bool = option(True, 'leave the first convolution alone')
    cpr_skip_last_layer: bool = option(False, 'leave the last convolution alone')
    cpr_skip_op_names: str | None = option(
      None, 'leave convolutions alone whose names have one of these, comma-separated'
    )
    cpr_nb_smpls: int = option(5000, 'images from which layers are reconstructed', lower=1)
    cpr_nb_crops_per_smpl: int = option(10, 'output positions of each image', lower=1)
    cpr_ista_lrn_rate: float = option(0.01, 'step size of ISTA', above=0, upper=1)
    cpr_ista_nb_iters: int = option(100, 'iterations of ISTA', lower=1)
    cpr_lstsq_lrn_rate: float = option(0.001, 'learning rate of the regression', above=0)
    cpr_lstsq_nb_iters: int = option(100, 'steps of the regression', lower=0)
    cpr_warm_start: bool = option(False, 'take the pruned model of --cpr_save_path_ws')
    cpr_save_path_ws: str | None = option(None, 'pruned.keras of an earlier run')

    def __post_init__(self):
      super().__post_init__()
      if self.cpr_warm_start != (self.cpr_save_path_ws is not None):
        raise UserError(
          '--cpr_warm_start and --cpr_save_path_ws=FILE go together. '
          f'Received: {self.cpr_warm_start} and {self.cpr_save_path_ws}.'
        )
      if self.cpr_warm_start:
        refuse_idle(self, _CHOICE, '--cpr_warm_start=false')
      self.refuse_with_target('cpr_prune_ratio')

  def prepared(self, model):
    if self.config.cpr_warm_start:
      return self.kept('pruned.keras', lambda: self._loaded(self.config.cpr_save_path_ws))
    return super().prepared(model)

  def check(self):
    if self.config.cpr_warm_start:
      self._loaded(self.config.cpr_save_path_ws)
    super().check()

  def method(self):
    config = self.config
    return Ista(
      config.cpr_ista_lrn_rate,
      config.cpr_ista_nb_iters,
      config.cpr_lstsq_lrn_rate,
      config.cpr_lstsq_nb_iters,
      self.helper.config.loss_w_dcy,
    )

  def samples(self):
    return self.config.cpr_nb_smpls, self.config.cpr_nb_crops_per_smpl

  def ratios(self, convolutions):
    ratios = dict.fromkeys(convolutions, self.config.cpr_prune_ratio)
    if self.config.cpr_skip_frst_layer:
      ratios |= dict.fromkeys(convolutions[:1], 0.0)
    if self.config.cpr_skip_last_layer:
      ratios |= dict.fromkeys(convolutions[-1:], 0.0)
    for word in filter(None, (self.config.cpr_skip_op_names or '').split(',')):
      named = [path for path in convolutions if word in path]
      if not named:
        raise UserError(
          f'--cpr_skip_op_names must be parts of the names {", ".join(convolutions)}. '
          f'Received: {word!r}.'
        )
      ratios.update(dict.fromkeys(named, 0.0))
    return ratios, self.config.cpr_prune_ratio
