"""Quantization-aware training with uniform levels (Jacob et al. 2018, arXiv:1712.05877).

Weights symmetric and narrow, activations affine over running ranges; where, says `placement`. Batch
norm stays as it is while training: folding it into a kernel later multiplies each output channel's
scale and leaves the integer codes as they are.
"""

import dataclasses

from pocketsize import targets
from pocketsize.compressor import Compressor, register
from pocketsize.errors import UserError
from pocketsize.quantization.groups import GRANULARITIES
from pocketsize.quantization.kernel_quantizer import KernelQuantizer
from pocketsize.quantization.placement import quantized_tensors
from pocketsize.quantization.quantizers import BITS, ActivationQuantizer, WeightQuantizer
from pocketsize.transform import Placement

FLOAT_BITS = 32
# What the first and the last layer, the model's input and its output have at least.
END_BITS = 8


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
    scale_every: steps between two fits of the weights' scales.
    momentum: of the activations' running ranges, in [0, 1).
  """

  weight_bits: int = 8
  activation_bits: int = 8
  granularity: str = 'channel'
  bucket_size: int = 256
  end_bits: int = END_BITS
  end_weight_bits: int | None = None
  scale_every: int = 50
  momentum: float = 0.99

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
    if self.granularity not in GRANULARITIES:
      raise UserError(
        f'`granularity` must be one of {", ".join(GRANULARITIES)}. Received: {self.granularity!r}.'
      )
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
        WeightQuantizer(
          config.weight_bits,
          config.granularity,
          targets.channel_axes(graph.layers[path], point),
          config.bucket_size,
        ),
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
        momentum = (readers or [writer])[0].momentum
        placements.append(
          Placement(
            tensor.path,
            tensor.point,
            ActivationQuantizer(max(bits), momentum, nonnegative=tensor.nonnegative),
          )
        )
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
      if isinstance(placement.transform, KernelQuantizer) and placement.path in self.configs
    ]

  def update(self, step):
    for path, point, transform in self._kernels:
      if step % self.configs[path].scale_every == 0:
        transform.fit(self._model.transformed(path, point, before=transform))


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
