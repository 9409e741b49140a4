"""Quantization-aware training with uniform levels (Jacob et al. 2018, arXiv:1712.05877).

Weights symmetric and narrow, activations affine; where, says `placement`. Scales are fitted to the
kernels and ranges are running averages, or both are trained (`learned`). Batch norm stays as it is
while training: folding it into a kernel later multiplies each output channel's scale and leaves the
integer codes as they are.
"""

import dataclasses

from pocketsize import targets
from pocketsize.compressor import Compressor, register
from pocketsize.errors import UserError
from pocketsize.quantization import ranges
from pocketsize.quantization.asymmetric import AsymmetricWeightQuantizer
from pocketsize.quantization.dorefa import Dorefa
from pocketsize.quantization.groups import GRANULARITIES
from pocketsize.quantization.kernel_quantizer import KernelQuantizer
from pocketsize.quantization.learned import LearnedRange, LearnedScale, Pact
from pocketsize.quantization.placement import quantized_tensors
from pocketsize.quantization.quantizers import BITS, ActivationQuantizer, WeightQuantizer
from pocketsize.transform import Placement

FLOAT_BITS = 32
# What the first and the last layer, the model's input and its output have at least.
END_BITS = 8
WEIGHT_RANGES = ('fitted', 'learned', 'learned_log2', 'dorefa', 'asymmetric')
ACTIVATION_RANGES = ('running', 'learned', 'learned_symmetric', 'pact')


@dataclasses.dataclass(frozen=True)
class UniformConfig:
  """How one layer is quantized.

  Attributes:
    weight_bits: 1 to 16; 32 leaves the weights float.
    activation_bits: of the layer's inputs, 1 to 16; 32 leaves them float.
    granularity: weights share a scale by 'tensor', output 'channel' or 'bucket'.
    bucket_size: weights in a bucket.
    end_bits: the first and the last layer have at least so many bits for their weights and
      activations, the model's input and output as well; 0 treats them like the others.
    end_weight_bits: instead of `end_bits` for the weights; None: the same.
    scale_every: steps between two fits of the weights' scales, where they are not trained.
    momentum: of the activations' running ranges, in [0, 1).
    weight_range: 'fitted' scales; 'learned' scales (LSQ), by their log2 with 'learned_log2' (TQT);
      'dorefa', through tanh; 'asymmetric', fitted with a zero point.
    activation_range: 'running' averages; 'learned' ranges, 'learned_symmetric' ones; 'pact', a
      learned end with a penalty for what a ReLU writes, running averages for the rest.
    range_start: how ranges are found in the calibration batches, and scales in the kernels:
      'min_max', 'mean_min_max', 'mixed_min_max', 'threesigma', 'percentile', 'mean_percentile',
      'mse'; 'auto': the mean of the batches' extremes; the largest magnitude of a row, or the least
      squared error up to 4 bits.
    pact_decay: factor w of the penalty w/2 alpha^2 over the ends alpha of 'pact', not negative.
  """

  weight_bits: int = 8
  activation_bits: int = 8
  granularity: str = 'channel'
  bucket_size: int = 256
  end_bits: int = END_BITS
  end_weight_bits: int | None = None
  scale_every: int = 50
  momentum: float = 0.99
  weight_range: str = 'fitted'
  activation_range: str = 'running'
  range_start: str = ranges.AUTO
  pact_decay: float = 1e-4

  def __post_init__(self):
    for name in ('weight_bits', 'activation_bits'):
      bits = getattr(self, name)
      if bits not in BITS and bits != FLOAT_BITS:
        raise UserError(
          f'`{name}` must be from {BITS[0]} to {BITS[-1]}, or {FLOAT_BITS} for float. '
          f'Received: {bits}.'
        )
    for name in ('end_bits', 'end_weight_bits'):
      bits = getattr(self, name)
      if bits not in (0, *BITS, FLOAT_BITS) and not (name == 'end_weight_bits' and bits is None):
        raise UserError(
          f'`{name}` must be 0 (treat them like the others), from {BITS[0]} to {BITS[-1]}, or '
          f'{FLOAT_BITS} for float. Received: {bits}.'
        )
    for name, legal in (
      ('granularity', GRANULARITIES),
      ('weight_range', WEIGHT_RANGES),
      ('activation_range', ACTIVATION_RANGES),
      ('range_start', ranges.NAMES),
    ):
      if getattr(self, name) not in legal:
        raise UserError(
          f'`{name}` must be one of {", ".join(legal)}. Received: {getattr(self, name)!r}.'
        )
    if self.activation_range == 'learned_symmetric' and self.activation_bits == 1:
      raise UserError(
        "`activation_range` 'learned_symmetric' needs `activation_bits` of at least 2. Received: 1."
      )
    if not self.pact_decay >= 0.0:
      raise UserError(f'`pact_decay` must be at least 0. Received: {self.pact_decay}.')
    if self.bucket_size < 1 or self.scale_every < 1 or not 0.0 <= self.momentum < 1.0:
      raise UserError(
        '`bucket_size` and `scale_every` must be at least 1, `momentum` in [0, 1). '
        f'Received: {self.bucket_size}, {self.scale_every}, {self.momentum}.'
      )

  @classmethod
  def neutral(cls):
    """Returns the configuration that changes nothing."""
    return cls(weight_bits=FLOAT_BITS, activation_bits=FLOAT_BITS)


@register('uniform')
class Uniform(Compressor):
  """Fake quantization of weights and of the activations that integer kernels write."""

  Config = UniformConfig

  def plan(self, graph):
    configs, self.skipped = targets.resolve(graph, self.rules)
    self.configs = _with_ends(configs, list(targets.weighted_layers(graph)))
    weights = [
      Placement(
        path,
        point,
        _kernel_quantizer(config, targets.channel_axes(graph.layers[path], point)),
      )
      for path, config in self.configs.items()
      if config.weight_bits != FLOAT_BITS
      for point in targets.weight_points(graph.layers[path])
    ]
    return weights + self._activations(graph)

  def _activations(self, graph):
    placements = []
    for tensor in quantized_tensors(graph):
      readers = [self.configs[path] for path in tensor.readers if path in self.configs]
      writer = self._writer(graph, tensor.path)
      bits = [config.activation_bits for config in readers if config.activation_bits != FLOAT_BITS]
      if tensor.reaches_output and writer and writer.activation_bits != FLOAT_BITS:
        bits.append(max(END_BITS, writer.activation_bits))
      if bits:
        config = (readers or [writer])[0]
        quantizer = _range_quantizer(config, max(bits), tensor.nonnegative)
        placements.append(Placement(tensor.path, tensor.point, quantizer))
    return placements

  def _writer(self, graph, path):
    """Returns the configuration of the nearest weighted layer before `path`, or None."""
    node = next(node for node in graph.nodes if node.path == path)
    while node.path not in self.configs:
      if node.path in self.skipped or not node.inputs:
        return None
      node = graph.producer(node.inputs[0])
    return self.configs[node.path]

  def bind(self, model):
    self._model = model
    self._kernels = [
      placement
      for placement in model.placements
      if isinstance(placement.transform, KernelQuantizer)
    ]
    self._pacts = [transform for transform in model.transforms if isinstance(transform, Pact)]

  def update(self, step):
    for path, point, transform in self._kernels:
      if step % self.configs[path].scale_every == 0 and (
        transform.refits or not transform.is_fitted
      ):
        transform.fit(self._model.transformed(path, point, before=transform))

  def loss(self, x, y, outputs):
    return sum(transform.penalty() for transform in self._pacts)


def _kernel_quantizer(config, channel_axes):
  """Returns the quantizer of a kernel whose output channels are counted by `channel_axes`."""
  arguments = (config.weight_bits, config.granularity, channel_axes, config.bucket_size)
  if config.weight_range == 'dorefa':
    return Dorefa(*arguments)
  if config.weight_range == 'asymmetric':
    return AsymmetricWeightQuantizer(*arguments, start=config.range_start)
  if config.weight_range == 'fitted':
    return WeightQuantizer(*arguments, start=config.range_start)
  return LearnedScale(
    *arguments, start=config.range_start, log2=config.weight_range == 'learned_log2'
  )


def _range_quantizer(config, bits, nonnegative):
  """Returns the quantizer of an activation."""
  start, kind = config.range_start, config.activation_range
  if kind == 'pact' and nonnegative:
    return Pact(bits, config.pact_decay, start=start)
  if kind in ('running', 'pact'):
    return ActivationQuantizer(bits, config.momentum, nonnegative, start=start)
  symmetric = kind == 'learned_symmetric'
  return LearnedRange(bits, nonnegative, start=start, symmetric=symmetric)


def _with_ends(configs, paths):
  """Returns {path: config}, the first and last of the model's `paths` at `end_bits` or more."""
  ends = {path: configs[path] for path in (*paths[:1], *paths[-1:]) if path in configs}
  raised = {
    path: dataclasses.replace(
      config,
      weight_bits=max(
        config.weight_bits,
        config.end_bits if config.end_weight_bits is None else config.end_weight_bits,
      ),
      activation_bits=max(config.activation_bits, config.end_bits),
    )
    for path, config in ends.items()
  }
  return {**configs, **raised}
