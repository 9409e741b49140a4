"""`non-uniform`: quantization-aware training with trained centres."""

import dataclasses

from learners import bit_flags, quantization
from learners.bits import BitAllotting
from pocketsize.options import check_options, option
from pocketsize.quantization import centre_grid, codebook, quantizers
from pocketsize.quantization.centres import STARTS
from pocketsize.quantization.non_uniform import NonUniform, NonUniformConfig
from pocketsize.quantization.placing import END_BITS, FLOAT_BITS


class NonUniformLearner(BitAllotting):
  """Weights on 2^bits centres, activations on levels; see `pocketsize.quantization.non_uniform`."""

  name = 'non-uniform'
  prefix = 'nuql'
  compressor = NonUniform

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(bit_flags.flags('nuql', codebook.BITS, 2101), quantization.DeviceFlags):
    """Flags of the learner."""

    nuql_init_style: str = option('kmeans', 'where the centres begin', choices=STARTS)
    nuql_opt_mode: str = option(
      'weights',
      'what trains: all weights while the centres follow, the centres (clusters, or cluster), both',
      choices=('weights', 'clusters', 'cluster', 'both'),
    )
    nuql_weight_bits: int = option(
      4, 'bits of the weights; 32 for float', choices=(*codebook.BITS, FLOAT_BITS)
    )
    nuql_centre_bits: int = option(
      8,
      'bits of the centres; 8 for what integer kernels compute with exactly, 32 for float centres',
      choices=centre_grid.BITS,
    )
    nuql_activation_bits: int = option(
      32, 'bits of the activations; 32 for float', choices=(*quantizers.BITS, FLOAT_BITS)
    )
    nuql_weight_bits_list: str | None = option(
      None,
      'bits of each layer with weights, comma-separated, in order; or of some, as layer:bits; or a '
      '.json file with an object of layers and bits; overrides nuql_weight_bits',
    )
    nuql_use_buckets: bool = option(
      False, 'centres for each bucket of weights instead of for each layer'
    )
    nuql_bucket_type: str = option(
      'split', 'a bucket is an output channel, or a run of weights', choices=('channel', 'split')
    )
    nuql_bucket_size: int = option(256, 'weights in a bucket of type split', lower=1)
    nuql_quant_epochs: int = option(60, 'epochs of training with quantization', lower=1)
    nuql_quantize_all_layers: bool = option(
      False, f'first and last layer like the others; if not, they have at least {END_BITS} bits'
    )
    nuql_keep_zeros: bool = option(
      True, 'weights that are 0 in the model that is quantized, such as pruned ones, stay 0'
    )

    def __post_init__(self):
      check_options(self)
      quantization.check_buckets(self, 'nuql')
      quantization.check_device(self, 'nuql')
      bit_flags.check(self, 'nuql')
      names = ['nuql_init_style', 'nuql_centre_bits', 'nuql_use_buckets']
      # `clusters` has one, as it trains no weights: it is refused where no layer has centres.
      if self.nuql_opt_mode == 'both':
        names.append('nuql_opt_mode')
      quantization.check_float_weights(self, 'nuql', names)

    def quantization(self):
      """Returns the `NonUniformConfig` of a layer."""
      return NonUniformConfig(
        weight_bits=self.nuql_weight_bits,
        activation_bits=self.nuql_activation_bits,
        granularity=quantization.granularity(self, 'nuql'),
        bucket_size=self.nuql_bucket_size,
        end_bits=0 if self.nuql_quantize_all_layers else END_BITS,
        keep_zeros=self.nuql_keep_zeros,
        target_device=self.target_device,
        start=self.nuql_init_style,
        mode=self.nuql_opt_mode,
        centre_bits=self.nuql_centre_bits,
      )

  def epochs(self):
    return self.config.nuql_quant_epochs

  def compressors(self, graph, steps):
    default = self.config.quantization()
    return [NonUniform(self.rules(graph, default, self.allotted))]
