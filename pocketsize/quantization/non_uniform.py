"""Quantization-aware training with trained centres (Han et al. 2016, Deep Compression,
arXiv:1510.00149, section 3; PocketFlow's `non-uniform`).

Each weight is replaced by the nearest of the centres of its row (`codebook`), which by default are
integers times a scale of their row (`centre_grid`), as integer kernels hold them; activations are
those of `uniform`. What trains is the mode:

- `weights`: all weights of the model, through the codebooks. The centres follow: at the first step
  and every `refit_every` steps they move to the means of the weights assigned to them, by k-means
  from where they are. PocketFlow lets them stand between the extremes of their row, which two
  weights decide; means cost no training and have the least squared error of any centres.
- `both`: all weights, and the centres by gradient.
- `clusters`: the centres only. All weights of the user's model stand still, kernels, biases and
  batch norm's alike, as in PocketFlow; moving statistics go on moving.
"""

import dataclasses
from typing import ClassVar

from pocketsize.compressor import register
from pocketsize.errors import UserError
from pocketsize.quantization import centre_grid
from pocketsize.quantization.centres import STARTS
from pocketsize.quantization.codebook import BITS, Codebook
from pocketsize.quantization.placing import Quantization, QuantizationConfig

MODES = ('weights', 'clusters', 'both')


@dataclasses.dataclass(frozen=True)
class NonUniformConfig(QuantizationConfig):
  """How one layer is quantized, and what trains.

  Attributes:
    weight_bits: 1 to 8, for 2 to 256 centres in each row; 32 leaves the weights float.
    granularity: weights share centres by 'tensor', output 'channel' or 'bucket'.
    start: where the centres begin: 'quantile', 'uniform' or 'kmeans'.
    mode: what trains, 'weights', 'clusters' (or 'cluster') or 'both'; one for all layers.
    refit_every: steps between two moves of the centres to the means of their weights, in mode
      'weights'.
    keep_zeros: as of `QuantizationConfig`; rows that have such weights have a centre of exactly 0.
    centre_bits: of the centres of a tensor or a channel, 8 for what integer kernels compute with
      exactly, or 32 for float; those of buckets are float.
  """

  WEIGHT_BITS: ClassVar[range] = BITS

  weight_bits: int = 4
  granularity: str = 'tensor'
  start: str = 'kmeans'
  mode: str = 'weights'
  refit_every: int = 50
  centre_bits: int = 8

  def __post_init__(self):
    super().__post_init__()
    if self.mode == 'cluster':
      object.__setattr__(self, 'mode', 'clusters')
    for name, legal in (('start', STARTS), ('mode', MODES)):
      if getattr(self, name) not in legal:
        raise UserError(
          f'`{name}` must be one of {", ".join(legal)}. Received: {getattr(self, name)!r}.'
        )
    if self.refit_every < 1:
      raise UserError(f'`refit_every` must be at least 1. Received: {self.refit_every}.')
    if self.centre_bits not in centre_grid.BITS:
      raise UserError(f'`centre_bits` must be 8, or 32 for float. Received: {self.centre_bits}.')


@register('non-uniform')
class NonUniform(Quantization):
  """Weights on trained centres, activations on uniform levels."""

  Config = NonUniformConfig
  Quantizer = Codebook

  def kernel_quantizer(self, config, channel_axes):
    return Codebook(
      config.weight_bits,
      config.granularity,
      channel_axes,
      config.bucket_size,
      config.start,
      trains=config.mode != 'weights',
      keep_zeros=config.keep_zeros,
      centre_bits=config.centre_bits,
    )

  def plan(self, graph):
    placements = super().plan(graph)
    modes = sorted({config.mode for config in self.configs.values()})
    if len(modes) > 1:
      raise UserError(
        f'`mode` must be the same for all layers: what trains is the model. '
        f'Received: {", ".join(modes)}.'
      )
    self.trains_source = modes != ['clusters']
    if not self.trains_source and not any(
      isinstance(placement.transform, Codebook) for placement in placements
    ):
      raise UserError(
        "`mode` 'clusters' trains centres only, and no layer has any: `weight_bits` must be from "
        f'{BITS[0]} to {BITS[-1]} somewhere. Received: 32 everywhere.'
      )
    return placements

  def update(self, step):
    if step == 0:
      for quantizer, kernel in self.due(lambda config: True):
        quantizer.fit(kernel)
    for quantizer, kernel in self.due(
      lambda config: config.mode == 'weights' and step % config.refit_every == 0
    ):
      quantizer.follow(kernel)
