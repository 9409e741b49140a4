"""Quantization-aware training with uniform levels (Jacob et al. 2018, arXiv:1712.05877).

Weights symmetric and narrow, activations affine; where, says `placement`. Scales are fitted to the
kernels and ranges are running averages, or both are trained (`learned`). Batch norm stays as it is
while training: folding it into a kernel later multiplies each output channel's scale and leaves the
integer codes as they are. Where output channels share a scale, that is another scale for each; with
`fold_batch_norm` they share it once folded (`folded`).
"""

import dataclasses

from pocketsize.compressor import register
from pocketsize.errors import UserError
from pocketsize.quantization import ranges
from pocketsize.quantization.asymmetric import AsymmetricWeightQuantizer
from pocketsize.quantization.dorefa import Dorefa, DorefaActivation
from pocketsize.quantization.folded import Factors, FoldedQuantizer, folded
from pocketsize.quantization.learned import LearnedRange, LearnedScale, Pact
from pocketsize.quantization.placing import Quantization, QuantizationConfig
from pocketsize.quantization.quantizers import WeightQuantizer
from pocketsize.quantization.shared import running_range

WEIGHT_RANGES = ('fitted', 'learned', 'learned_log2', 'dorefa', 'asymmetric')
_SYMMETRIC_RANGES = ('learned_symmetric', 'learned_log2')
ACTIVATION_RANGES = ('running', 'learned', *_SYMMETRIC_RANGES, 'pact', 'dorefa')


def needs_more_bits(activation_range, bits):
  """Returns whether `bits` are too few: a symmetric range of 1 bit has no level above 0."""
  return bits == 1 and activation_range in _SYMMETRIC_RANGES


@dataclasses.dataclass(frozen=True)
class UniformConfig(QuantizationConfig):
  """How one layer is quantized.

  Attributes:
    weight_bits: 1 to 16; 32 leaves the weights float.
    granularity: weights share a scale by 'tensor', output 'channel' or 'bucket'.
    scale_every: steps between two fits of the weights' scales, where they are not trained.
    weight_range: 'fitted' scales; 'learned' scales (LSQ), by their log2 with 'learned_log2' (TQT);
      'dorefa', through tanh; 'asymmetric', fitted with a zero point.
    activation_range: 'running' averages; 'learned' ranges, 'learned_symmetric' ones, by log2 of
      their end with 'learned_log2' (TQT); for what is never negative 'pact', a learned end with a
      penalty, or 'dorefa', from 0 to 1, and running averages for the rest.
    range_start: how ranges are found in the calibration batches, and scales in the kernels:
      'min_max', 'mean_min_max', 'mixed_min_max', 'threesigma', 'percentile', 'mean_percentile',
      'mse'; 'auto': the mean of the batches' extremes; the largest magnitude of a row, or the least
      squared error up to 4 bits.
    pact_decay: factor w of the penalty w/2 alpha^2 over the ends alpha of 'pact', not negative.
    fold_batch_norm: weights are put on levels as they are with the batch norm behind them folded
      in; it matters where output channels share a scale. Needs 2 bits.
  """

  scale_every: int = 50
  weight_range: str = 'fitted'
  activation_range: str = 'running'
  range_start: str = ranges.AUTO
  pact_decay: float = 1e-4
  fold_batch_norm: bool = False

  def __post_init__(self):
    super().__post_init__()
    for name, legal in (
      ('weight_range', WEIGHT_RANGES),
      ('activation_range', ACTIVATION_RANGES),
      ('range_start', ranges.NAMES),
    ):
      if getattr(self, name) not in legal:
        raise UserError(
          f'`{name}` must be one of {", ".join(legal)}. Received: {getattr(self, name)!r}.'
        )
    if needs_more_bits(self.activation_range, self.activation_bits):
      raise UserError(
        f'`activation_range` {self.activation_range!r} needs `activation_bits` of at least 2. '
        f'Received: {self.activation_bits}.'
      )
    if not self.pact_decay >= 0.0:
      raise UserError(f'`pact_decay` must be at least 0. Received: {self.pact_decay}.')
    if self.fold_batch_norm and self.weight_bits == 1:
      # A sign forgets how large a weight is. Nothing would hold a channel's size, which follows
      # from the factor, and the factor from it.
      raise UserError('`fold_batch_norm` needs `weight_bits` of at least 2. Received: 1.')
    if self.scale_every < 1:
      raise UserError(f'`scale_every` must be at least 1. Received: {self.scale_every}.')


@register('uniform')
class Uniform(Quantization):
  """Fake quantization of weights and of the activations that integer kernels write."""

  Config = UniformConfig
  Quantizer = (WeightQuantizer, LearnedScale, Dorefa, AsymmetricWeightQuantizer, FoldedQuantizer)

  def plan(self, graph):
    placements = super().plan(graph)
    return folded(placements, graph, lambda path: self._folds(path))

  def _folds(self, path):
    return path in self.configs and self.configs[path].fold_batch_norm

  def kernel_quantizer(self, config, channel_axes):
    arguments = (config.weight_bits, config.granularity, channel_axes, config.bucket_size)
    if config.weight_range == 'dorefa':
      return Dorefa(*arguments)
    if config.weight_range == 'asymmetric':
      return AsymmetricWeightQuantizer(*arguments, start=config.range_start)
    if config.weight_range == 'fitted':
      return WeightQuantizer(*arguments, start=config.range_start)
    log2 = config.weight_range == 'learned_log2'
    return LearnedScale(*arguments, start=config.range_start, log2=log2)

  def activation_quantizer(self, config, bits, nonnegative, calls):
    start, kind = config.range_start, config.activation_range
    if kind == 'pact' and nonnegative:
      return Pact(bits, config.pact_decay, start=start)
    if kind == 'dorefa' and nonnegative:
      return DorefaActivation(bits)
    if kind in ('running', 'pact', 'dorefa'):
      return running_range(calls, bits, config.momentum, nonnegative, start=start)
    symmetric, log2 = kind in _SYMMETRIC_RANGES, kind == 'learned_log2'
    return LearnedRange(bits, nonnegative, start=start, symmetric=symmetric, log2=log2)

  def bind(self, model):
    super().bind(model)
    self._factors = Factors(model)
    # Scales may be fitted before the first step.
    self._factors.update()
    self._pacts = [transform for transform in model.transforms if isinstance(transform, Pact)]

  def update(self, step):
    self._factors.update()
    for quantizer, kernel in self.due(lambda config: step % config.scale_every == 0):
      if quantizer.refits or not quantizer.is_fitted:
        quantizer.fit(kernel)

  def loss(self, x, y, outputs):
    return sum(transform.penalty() for transform in self._pacts)
