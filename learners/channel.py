"""`channel`: channel pruning by LASSO and least squares, in groups of layers if asked for."""

import dataclasses
import math

import numpy as np

from learners.channel_search import ChannelSearch, SearchFlags
from learners.channels import read_ratios
from pocketsize.compressor import Stack
from pocketsize.errors import UserError
from pocketsize.instrument import instrument, strip
from pocketsize.options import check_options, option, refuse_idle
from pocketsize.pruning.lasso import Lasso


class ChannelPruned(ChannelSearch):
  """Input channels of each convolution are chosen by LASSO; see `pocketsize.pruning.lasso`."""

  name = 'channel'
  rounding = staticmethod(np.round)

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(SearchFlags):
    """Flags of the learner."""

    cp_prune_option: str = option(
      'auto',
      "each convolution's ratio: searched for by --allocation (unset: rl), one for all, a list",
      choices=('auto', 'uniform', 'list'),
    )
    cp_uniform_preserve_ratio: float = option(
      0.6, "share of each convolution's input channels to keep", above=0, upper=1
    )
    cp_prune_list_file: str = option(
      'ratio.list', 'file of shares to keep, comma-separated, one for each convolution in order'
    )
    cp_lasso: bool = option(True, 'choose by LASSO; if not, by magnitude')
    cp_quadruple: bool = option(False, 'keep multiples of 4')
    cp_list_group: int = option(1000, 'layers to prune before the model is tuned', lower=1)
    cp_finetune: bool = option(False, 'tune for a short time between two groups')
    cp_retrain: bool = option(
      False, 'train for the whole schedule between two groups; so it is without cp_finetune'
    )
    cp_nb_iters_ft_ratio: float = option(
      0.2, 'share of the schedule for which a group is tuned', above=0, upper=1
    )
    cp_lrn_rate_ft: float = option(1e-4, 'learning rate of Adam, between two groups', above=0)
    cp_nb_points_per_layer: int = option(10, 'output positions of each image', lower=1)
    cp_nb_batches: int = option(
      30, 'batches of batch_size images from which layers are reconstructed', lower=1
    )

    def __post_init__(self):
      super().__post_init__()
      check_options(self)
      self.check_search()
      if self.cp_prune_option != 'uniform':
        refuse_idle(self, ('cp_uniform_preserve_ratio',), '--cp_prune_option=uniform')
      if self.cp_prune_option != 'list':
        refuse_idle(self, ('cp_prune_list_file',), '--cp_prune_option=list')
      self.refuse_with_target('cp_uniform_preserve_ratio')
      if self.cp_finetune and self.cp_retrain:
        raise UserError('Give --cp_finetune or --cp_retrain, not both. Received: both.')
      # With --cp_retrain they may stay, so that both ways of tuning can share their other flags.
      if not (self.cp_finetune or self.cp_retrain):
        refuse_idle(self, ('cp_lrn_rate_ft', 'cp_nb_iters_ft_ratio'), '--cp_finetune')

  def method(self):
    return Lasso(self.config.cp_lasso)

  def samples(self):
    return self.config.cp_nb_batches * self.run.batch_size, self.config.cp_nb_points_per_layer

  def multiple(self):
    return math.lcm(self.config.channel_multiple, 4 if self.config.cp_quadruple else 1)

  def ratios(self, convolutions):
    if self.config.cp_prune_option == 'list':
      kept = read_ratios(self.config.cp_prune_list_file, 'cp_prune_list_file', convolutions)
      dense = 0.0
      ratios = {path: 1.0 - share for path, share in kept.items()}
    else:
      # What is searched for may be anything but 0.
      dense = 1.0 if self.config.searches else 1.0 - self.config.cp_uniform_preserve_ratio
      ratios = dict.fromkeys(convolutions, dense)
    return ratios | dict.fromkeys((*convolutions[:1], *convolutions[-1:]), 0.0), dense

  def steps(self, course):
    """Layers, and after each whole group of them but the last the name of a tuning."""
    steps, size = [], self.config.cp_list_group
    for number, step in enumerate(course.steps[1:], start=1):
      steps.append(step)
      if number % size == 0 and number < len(course.steps) - 1:
        steps.append(f'group{number // size}')
    return [course.steps[0], *steps]

  def do(self, course, step):
    if step in course.steps:
      return super().do(course, step)
    short = self.config.cp_finetune
    model = instrument(course.model, course.masks())
    stack = Stack([self.distillation(course.original)] if self.run.enbl_dst else [])
    stack.bind(model)
    self._fit(
      step,
      model,
      self.helper.epochs() * (self.config.cp_nb_iters_ft_ratio if short else 1.0),
      (lambda step, steps: self.config.cp_lrn_rate_ft) if short else self.tuning_rate,
      optimizer='adam' if short else 'sgd',
    )
    course.model.set_weights(strip(model).get_weights())
    course.rebase()
