"""`uniform`: quantization-aware training with uniform levels."""

import dataclasses

from learners import quantization
from learners.learner import Learner
from pocketsize.options import check_options, option
from pocketsize.quantization.placing import END_BITS, FLOAT_BITS
from pocketsize.quantization.quantizers import BITS
from pocketsize.quantization.uniform import Uniform, UniformConfig


class UniformLearner(Learner):
  """Weights and activations on 2^bits levels; see `pocketsize.quantization.uniform`."""

  name = 'uniform'

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config:
    """Flags of the learner."""

    uql_weight_bits: int = option(
      4, 'bits of the weights; 32 for float', choices=(*BITS, FLOAT_BITS)
    )
    uql_activation_bits: int = option(
      32, 'bits of the activations; 32 for float', choices=(*BITS, FLOAT_BITS)
    )
    uql_weight_bits_list: str | None = option(
      None, 'bits of each layer with weights, comma-separated, in order; overrides uql_weight_bits'
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

    def __post_init__(self):
      check_options(self)
      quantization.check_buckets(self, 'uql')

    def quantization(self):
      """Returns the `UniformConfig` of a layer."""
      return UniformConfig(
        weight_bits=self.uql_weight_bits,
        activation_bits=self.uql_activation_bits,
        granularity=quantization.granularity(self, 'uql'),
        bucket_size=self.uql_bucket_size,
        end_bits=0 if self.uql_quantize_all_layers else END_BITS,
      )

  def epochs(self):
    return self.config.uql_quant_epochs

  def compressors(self, graph, steps):
    default = self.config.quantization()
    return [Uniform(quantization.rules(self.config, 'uql', default, graph))]
