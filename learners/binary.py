"""`binary`: weights and activations of one bit, trained in stages."""

import dataclasses

from learners.learner import Learner
from pocketsize import schedules, targets
from pocketsize.compressor import Stack
from pocketsize.errors import UserError
from pocketsize.graph import Graph
from pocketsize.options import check_options, option
from pocketsize.quantization.binary import Binary, BinaryConfig
from pocketsize.quantization.binary_quantizers import MODES, SCALE_INITIALISERS

# Of the polynomial on which the learning rate falls.
_EXPONENT = 2.1
# When a stage begins unless a flag says so, as a share of --bin_epochs.
_SHARES = {
  'bin_activations_epoch': 1 / 6,
  'bin_weights_epoch': 1 / 3,
  'bin_lr_drop_epoch': 2 / 3,
}


class BinaryLearner(Learner):
  """Float, then binary activations, then binary weights, then a falling learning rate.

  See `pocketsize.quantization.binary`.
  """

  name = 'binary'

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config:
    """Flags of the learner."""

    bin_mode: str = option(
      'xnor', "binary weights' scale: of each output channel, or of the layer", choices=MODES
    )
    bin_scale_init: str = option(
      'quantile',
      "where activations' scale begins: with a thousandth of them above it, or with the least "
      'squared error',
      choices=tuple(SCALE_INITIALISERS),
    )
    bin_epochs: int = option(60, 'epochs of training in all stages', lower=1)
    bin_activations_epoch: float | None = option(
      None, 'epoch from which activations are binary; unset: a sixth of bin_epochs', lower=0
    )
    bin_weights_epoch: float | None = option(
      None, 'epoch from which weights are binary; unset: a third of bin_epochs', lower=0
    )
    bin_lr_drop_epoch: float | None = option(
      None, 'epoch from which the learning rate falls; unset: two thirds of bin_epochs', lower=0
    )
    bin_lr_drop_epochs: float | None = option(
      None, 'epochs in which it falls to 0; unset: those that are left', above=0
    )
    bin_disable_weight_decay_epoch: float | None = option(
      None, 'epoch from which there is no weight decay; unset: bin_lr_drop_epoch', lower=0
    )
    bin_lrn_rate: float = option(1e-3, 'learning rate of Adam until it falls', above=0)
    bin_binarize_ends: bool = option(False, 'first and last layer are binary too')
    bin_skip_shortcuts: bool = option(
      False, '1x1 convolutions beside the other layers of a residual block stay float'
    )
    bin_skip_op_names: str | None = option(
      None, 'layers that stay float, comma-separated: names, or {re}pattern for all that match'
    )

    def __post_init__(self):
      check_options(self)
      for name in ('bin_activations_epoch', 'bin_weights_epoch'):
        if self.epoch(name) >= self.bin_epochs:
          raise UserError(
            f'--{name} must be below --bin_epochs, or that stage never begins. '
            f'Received: {self.epoch(name):g} and {self.bin_epochs}.'
          )

    def epoch(self, name):
      """Returns the epoch at which a stage begins: as flag `name` says, or by default."""
      given = getattr(self, name)
      return _SHARES[name] * self.bin_epochs if given is None else given

  def epochs(self):
    return self.config.bin_epochs

  def check(self):
    if self.run.lrn_rate_ft is not None:
      raise UserError(
        '--lrn_rate_ft has no effect with --learner=binary, whose learning rate is --bin_lrn_rate. '
        f'Received: --lrn_rate_ft={self.run.lrn_rate_ft}.'
      )
    graph = Graph(self.structure)
    stack = Stack(self.compressors(graph, self._steps(self.epochs())))
    if not stack.plan(graph):
      reasons = '; '.join(f'{name}: {reason}' for name, reason in stack.skipped.items())
      raise UserError(f'Model {graph.model.name!r} has no layers to binarize: {reasons}.')
    super().check()

  def compressors(self, graph, steps):
    config = BinaryConfig(
      self.config.bin_mode,
      self._begin('bin_activations_epoch'),
      self._begin('bin_weights_epoch'),
      keep_ends=not self.config.bin_binarize_ends,
      keep_shortcuts=self.config.bin_skip_shortcuts,
      scale_init=self.config.bin_scale_init,
    )
    rules = [targets.Rule(config)]
    if self.config.bin_skip_op_names:
      names = tuple(self.config.bin_skip_op_names.split(','))
      rules.append(targets.Rule(None, op_names=names, exclude=True))
    return [Binary(rules)]

  def tuning_rate(self, step, steps):
    begin = self._begin('bin_lr_drop_epoch')
    epochs = self.config.bin_lr_drop_epochs
    end = steps if epochs is None else begin + epochs * self.steps_per_epoch
    return schedules.polynomial(step, begin, end, self.config.bin_lrn_rate, 0.0, _EXPONENT)

  def tuning(self, steps):
    given = self.config.bin_disable_weight_decay_epoch
    begin = self._begin('bin_lr_drop_epoch' if given is None else 'bin_disable_weight_decay_epoch')
    factor = self.helper.config.loss_w_dcy
    return {
      'optimizer': 'adam',
      'rate_flags': '--bin_lrn_rate',
      'weight_decay': lambda step: schedules.baseline(step, begin, factor, 0.0),
    }

  def _begin(self, name):
    """Returns the step at which a stage begins; before the last one if its epoch is."""
    return int(self.config.epoch(name) * self.steps_per_epoch)
