"""`uniform`: quantization-aware training with uniform levels."""

import dataclasses

from learners import bit_flags, quantization
from learners.bits import BitAllotting
from pocketsize.errors import UserError
from pocketsize.options import check_options, option
from pocketsize.quantization.placing import END_BITS, FLOAT_BITS
from pocketsize.quantization.quantizers import BITS
from pocketsize.quantization.ranges import AUTO, NAMES
from pocketsize.quantization.uniform import (
  ACTIVATION_RANGES,
  WEIGHT_RANGES,
  Uniform,
  UniformConfig,
  needs_more_bits,
)


class UniformLearner(BitAllotting):
  """Weights and activations on 2^bits levels; see `pocketsize.quantization.uniform`."""

  name = 'uniform'
  prefix = 'uql'
  compressor = Uniform

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(bit_flags.flags('uql', BITS, 2000), quantization.DeviceFlags):
    """Flags of the learner."""

    uql_weight_bits: int = option(
      4, 'bits of the weights; 32 for float', choices=(*BITS, FLOAT_BITS)
    )
    uql_activation_bits: int = option(
      32, 'bits of the activations; 32 for float', choices=(*BITS, FLOAT_BITS)
    )
    uql_weight_bits_list: str | None = option(
      None,
      'bits of each layer with weights, comma-separated, in order; or of some, as layer:bits; or a '
      '.json file with an object of layers and bits; overrides uql_weight_bits',
    )
    uql_use_buckets: bool = option(
      False, 'one scale for each bucket of weights instead of one for each layer'
    )
    uql_bucket_type: str = option(
      'channel', 'a bucket is an output channel, or a run of weights', choices=('channel', 'split')
    )
    uql_bucket_size: int = option(256, 'weights in a bucket of type split', lower=1)
    uql_quant_epochs: int = option(60, 'epochs of training with quantization', lower=1)
    uql_quantize_all_layers: bool = option(
      False, f'first and last layer like the others; if not, they have at least {END_BITS} bits'
    )
    uql_keep_zeros: bool = option(
      True, 'weights that are 0 in the model that is quantized, such as pruned ones, stay 0'
    )
    uql_weight_range: str = option(
      'fitted',
      'scales of weights: fitted, or trained, or trained by their log2; dorefa goes through tanh, '
      'asymmetric has a zero point',
      choices=WEIGHT_RANGES,
    )
    uql_activation_range: str = option(
      'running',
      'ranges of activations: running averages, or trained, or trained by the log2 of their end; '
      'where nothing is negative pact trains the end, and dorefa goes from 0 to 1',
      choices=ACTIVATION_RANGES,
    )
    uql_range_start: str = option(
      AUTO,
      'how ranges begin, from training batches, and scales, from weights; auto: mean of the '
      "batches' extremes; largest weight, or least squared error up to 4 bits",
      choices=NAMES,
    )
    uql_fold_bn: bool = option(
      False,
      'weights are put on levels as they are with batch norm folded in; it matters where output '
      'channels share a scale, and needs 2 bits',
    )

    def __post_init__(self):
      check_options(self)
      quantization.check_buckets(self, 'uql')
      quantization.check_device(self, 'uql')
      bit_flags.check(self, 'uql')

      names = ('uql_weight_range', 'uql_fold_bn', 'uql_use_buckets')
      quantization.check_float_weights(self, 'uql', names)
      float_weights = quantization.has_float_weights(self, 'uql')
      for name, has_effect, without in (
        (
          'uql_activation_range',
          self.uql_activation_bits != FLOAT_BITS,
          f'--uql_activation_bits={FLOAT_BITS}',
        ),
        (
          'uql_range_start',
          self.uql_activation_bits != FLOAT_BITS
          or not (float_weights or self.uql_weight_range == 'dorefa'),
          f'--uql_activation_bits={FLOAT_BITS} and weights that are float or dorefa',
        ),
      ):
        value = getattr(self, name)
        if value != self.__dataclass_fields__[name].default and not has_effect:
          raise UserError(f'--{name} has no effect with {without}. Received: {value}.')
      for name in ('uql_weight_bits', 'uql_w_bit_min'):
        if self.uql_fold_bn and getattr(self, name) == 1:
          raise UserError(f'--uql_fold_bn needs --{name} of at least 2. Received: 1.')
      if needs_more_bits(self.uql_activation_range, self.uql_activation_bits):
        raise UserError(
          f'--uql_activation_range={self.uql_activation_range} needs --uql_activation_bits of at '
          f'least 2. Received: {self.uql_activation_bits}.'
        )

    def quantization(self):
      """Returns the `UniformConfig` of a layer."""
      return UniformConfig(
        weight_bits=self.uql_weight_bits,
        activation_bits=self.uql_activation_bits,
        granularity=quantization.granularity(self, 'uql'),
        bucket_size=self.uql_bucket_size,
        end_bits=0 if self.uql_quantize_all_layers else END_BITS,
        keep_zeros=self.uql_keep_zeros,
        target_device=self.target_device,
        weight_range=self.uql_weight_range,
        activation_range=self.uql_activation_range,
        range_start=self.uql_range_start,
        fold_batch_norm=self.uql_fold_bn,
      )

  def epochs(self):
    return self.config.uql_quant_epochs

  def compressors(self, graph, steps):
    # The penalty of PACT has the factor of the weight decay (Choi et al. 2018, section 3.2).
    default = dataclasses.replace(
      self.config.quantization(), pact_decay=self.helper.config.loss_w_dcy
    )
    return [Uniform(self.rules(graph, default, self.allotted))]
