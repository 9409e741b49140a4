"""`uniform-tf`: quantization-aware training by tfmot."""

import dataclasses

from learners.learner import Learner
from pocketsize.errors import UserError
from pocketsize.options import check_options, option
from pocketsize.quantization.tfmot import BITS, Tfmot, TfmotConfig


class UniformTf(Learner):
  """Weights and activations as tfmot quantizes them; see `pocketsize.quantization.tfmot`."""

  name = 'uniform-tf'

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config:
    """Flags of the learner."""

    uqtf_weight_bits: int = option(8, 'bits of the weights', choices=BITS)
    uqtf_activation_bits: int = option(8, 'bits of the activations', choices=BITS)
    uqtf_quant_delay: int = option(
      0, 'steps of training before weights and activations are quantized', lower=0
    )
    uqtf_freeze_bn_delay: int | None = option(
      None,
      'steps of training after which batch norms keep their moving statistics; unset: never',
      lower=0,
    )
    uqtf_lrn_rate_dcy: float = option(
      0.01, "factor on the net's own learning rates while it trains with quantization", above=0
    )

    def __post_init__(self):
      check_options(self)

  def check(self):
    if self.run.lrn_rate_ft is not None:
      raise UserError(
        '--lrn_rate_ft has no effect with --learner=uniform-tf, whose learning rates are those of '
        f'the net times --uqtf_lrn_rate_dcy. Received: --lrn_rate_ft={self.run.lrn_rate_ft}.'
      )
    if self.run.freeze_bn_delay is not None:
      raise UserError(
        '--freeze_bn_delay has no effect with --learner=uniform-tf: use --uqtf_freeze_bn_delay. '
        f'Received: --freeze_bn_delay={self.run.freeze_bn_delay}.'
      )
    steps = self._steps(self.epochs())
    if self.config.uqtf_quant_delay >= steps:
      raise UserError(
        f'--uqtf_quant_delay must be below the {steps} steps of training, or nothing is ever '
        f'quantized. Received: {self.config.uqtf_quant_delay}.'
      )
    super().check()

  def epochs(self):
    return self.helper.epochs()

  def compressors(self, graph, steps):
    return [
      Tfmot(
        TfmotConfig(
          self.config.uqtf_weight_bits,
          self.config.uqtf_activation_bits,
          self.config.uqtf_quant_delay,
          self.config.uqtf_freeze_bn_delay,
        )
      )
    ]

  def tuning_rate(self, step, steps):
    workers = self.run.batch_size * self.runtime.size / self.helper.config.batch_size_norm
    rate = self.helper.learning_rate(step / self.steps_per_epoch)
    return self.config.uqtf_lrn_rate_dcy * workers * rate

  def tuning(self, steps):
    return {'optimizer': 'adam', 'rate_flags': '--lrn_rate_init, --uqtf_lrn_rate_dcy'}
