"""Quantization-aware training with uniform levels (Jacob et al. 2018, arXiv:1712.05877).

Weights symmetric and narrow, activations affine over running ranges; where, says `placement`. Batch
norm stays as it is while training: folding it into a kernel later multiplies each output channel's
scale and leaves the integer codes as they are.
"""

import dataclasses

from pocketsize.compressor import register
from pocketsize.errors import UserError
from pocketsize.quantization.placing import Quantization, QuantizationConfig
from pocketsize.quantization.quantizers import WeightQuantizer


@dataclasses.dataclass(frozen=True)
class UniformConfig(QuantizationConfig):
  """How one layer is quantized.

  Attributes:
    weight_bits: 1 to 16; 32 leaves the weights float.
    granularity: weights share a scale by 'tensor', output 'channel' or 'bucket'.
    scale_every: steps between two fits of the weights' scales.
  """

  scale_every: int = 50

  def __post_init__(self):
    super().__post_init__()
    if self.scale_every < 1:
      raise UserError(f'`scale_every` must be at least 1. Received: {self.scale_every}.')


@register('uniform')
class Uniform(Quantization):
  """Fake quantization of weights and of the activations that integer kernels write."""

  Config = UniformConfig
  Quantizer = WeightQuantizer

  def kernel_quantizer(self, config, channel_axes):
    return WeightQuantizer(config.weight_bits, config.granularity, channel_axes, config.bucket_size)

  def update(self, step):
    for quantizer, kernel in self.due(lambda config: step % config.scale_every == 0):
      quantizer.fit(kernel)
