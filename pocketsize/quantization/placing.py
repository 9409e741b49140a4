"""What compressors that quantize have in common: a layer's configuration, and the plan.

The first and the last layer have more bits than the others; a quantizer goes to each kernel, and to
each tensor that `placement` names for the device if one of its readers asks for it. Tensors of one
range get the same quantizer, with the bits of the one that has most.
"""

import abc
import dataclasses
from typing import ClassVar

from pocketsize import targets
from pocketsize.compressor import Compressor
from pocketsize.errors import UserError
from pocketsize.quantization.devices import DEFAULT, DEVICES
from pocketsize.quantization.groups import GRANULARITIES
from pocketsize.quantization.placement import quantized_tensors, sources
from pocketsize.quantization.quantizers import BITS
from pocketsize.quantization.shared import running_range
from pocketsize.sparsity.frozen_zeros import freeze_zeros
from pocketsize.transform import Placement

FLOAT_BITS = 32
# What the first and the last layer, the model's input and its output have at least.
END_BITS = 8


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
  """How one layer is quantized.

  Attributes:
    weight_bits: see the algorithm; 32 leaves the weights float.
    activation_bits: of the layer's inputs, 1 to 16; 32 leaves them float.
    granularity: weights share what their quantizer knows by 'tensor', output 'channel' or 'bucket'.
    bucket_size: weights in a bucket.
    end_bits: the first and the last layer have at least so many bits for their weights and
      activations; 0 treats them like the others. The model's output has at least 8 in any case.
    end_weight_bits: instead of `end_bits` for the weights; None: the same.
    momentum: of the activations' running ranges, in [0, 1).
    keep_zeros: weights of exactly 0, such as pruned ones, stay 0 while the model is trained.
    target_device: the runtime that decides where activations are quantized, 'litert', 'openvino' or
      'onnxruntime', or 'all'; one for all layers.
  """

  WEIGHT_BITS: ClassVar[range] = BITS

  weight_bits: int = 8
  activation_bits: int = 8
  granularity: str = 'channel'
  bucket_size: int = 256
  end_bits: int = END_BITS
  end_weight_bits: int | None = None
  momentum: float = 0.99
  keep_zeros: bool = True
  target_device: str = DEFAULT

  def __post_init__(self):
    for name, legal in (('weight_bits', self.WEIGHT_BITS), ('activation_bits', BITS)):
      bits = getattr(self, name)
      if bits not in legal and bits != FLOAT_BITS:
        raise UserError(
          f'`{name}` must be from {legal[0]} to {legal[-1]}, or {FLOAT_BITS} for float. '
          f'Received: {bits}.'
        )
    for name in ('end_bits', 'end_weight_bits'):
      bits, legal = getattr(self, name), self.WEIGHT_BITS
      if bits not in (0, *legal, FLOAT_BITS) and not (name == 'end_weight_bits' and bits is None):
        raise UserError(
          f'`{name}` must be 0 (treat them like the others), from {legal[0]} to {legal[-1]}, or '
          f'{FLOAT_BITS} for float. Received: {bits}.'
        )
    for name, legal in (('granularity', GRANULARITIES), ('target_device', DEVICES)):
      if getattr(self, name) not in legal:
        raise UserError(
          f'`{name}` must be one of {", ".join(legal)}. Received: {getattr(self, name)!r}.'
        )
    if self.bucket_size < 1 or not 0.0 <= self.momentum < 1.0:
      raise UserError(
        '`bucket_size` must be at least 1 and `momentum` in [0, 1). '
        f'Received: {self.bucket_size}, {self.momentum}.'
      )

  @classmethod
  def neutral(cls):
    """Returns the configuration that changes nothing."""
    return cls(weight_bits=FLOAT_BITS, activation_bits=FLOAT_BITS, keep_zeros=False)


class Quantization(Compressor):
  """Quantizes weights, and the activations that integer kernels write.

  Attributes:
    Config: a `QuantizationConfig`.
    Quantizer: the `KernelQuantizer` that `kernel_quantizer` makes, or a tuple of them.
    configs: {path: configuration}, of the ends with their own bits; filled by `plan`.
  """

  Quantizer: type | tuple

  @abc.abstractmethod
  def kernel_quantizer(self, config, channel_axes):
    """Returns the quantizer of a kernel.

    Args:
      config: of its layer.
      channel_axes: axes of the kernel that count the output channels.
    """

  def activation_quantizer(self, config, bits, nonnegative, calls):
    """Returns the quantizer of tensors of one range: running averages, unless an algorithm has
    others.

    Args:
      config: of the first layer that reads them.
      bits: 1 to 16.
      nonnegative: none of them is ever negative.
      calls: how many they are.
    """
    return running_range(calls, bits, config.momentum, nonnegative)

  def plan(self, graph):
    configs, self.skipped = targets.resolve(graph, self.rules)
    self.configs = _with_ends(configs, list(targets.weighted_layers(graph)))
    weights = [
      Placement(
        path,
        point,
        self.kernel_quantizer(config, targets.channel_axes(graph.layers[path], point)),
      )
      for path, config in self.configs.items()
      if config.weight_bits != FLOAT_BITS
      for point in targets.weight_points(graph.layers[path])
    ]
    activations = self._activations(graph)
    self._note_float_inputs(graph, {placement[:2] for placement in activations})
    kept = [path for path, config in self.configs.items() if config.keep_zeros]
    return freeze_zeros(graph, kept) + weights + activations

  def _activations(self, graph):
    devices = sorted({config.target_device for config in self.configs.values()})
    if len(devices) > 1:
      raise UserError(
        '`target_device` must be the same for all layers: a file is for one runtime or for all. '
        f'Received: {", ".join(devices)}.'
      )
    groups = {}
    for tensor in quantized_tensors(graph, *devices):
      config, bits = self._asked_for(graph, tensor)
      if bits:
        groups.setdefault(tensor.group, []).append((tensor, config, bits))
    placements = []
    for group in groups.values():
      tensors, configs, bits = zip(*group, strict=True)
      quantizer = self.activation_quantizer(
        configs[0],
        max(bits),
        all(tensor.nonnegative for tensor in tensors),
        sum(tensor.calls for tensor in tensors),
      )
      placements += [Placement(tensor.path, tensor.point, quantizer) for tensor in tensors]
    return placements

  def _note_float_inputs(self, graph, places):
    """Reports the layers that shall read quantized activations and can not, or raises if all are.

    Args:
      places: where activations are quantized, (path, point).
    """
    asked = [path for path in self.configs if self.configs[path].activation_bits != FLOAT_BITS]
    if not asked:
      return
    device = self.configs[asked[0]].target_device
    sources_by_path = sources(graph, device)
    bare = [path for path in asked if not sources_by_path[path] & places]
    if bare == asked:
      received = ', '.join(f'{self.configs[path].activation_bits} for {path}' for path in bare)
      raise UserError(
        f'`activation_bits` must be {FLOAT_BITS} for layers of which no input can be quantized: '
        f'they read integers, or what a softmax gives, which stays float on device {device!r}. '
        f'Received: {received}.'
      )
    self.skipped |= dict.fromkeys(bare, 'its activations only: what it reads cannot be quantized')

  def _asked_for(self, graph, tensor):
    """Returns (the configuration that decides how a tensor is quantized, its bits or 0)."""
    readers = [self.configs[path] for path in tensor.readers if path in self.configs]
    writer = self._writer(graph, tensor.path)
    bits = [config.activation_bits for config in readers if config.activation_bits != FLOAT_BITS]
    if tensor.reaches_output and writer and writer.activation_bits != FLOAT_BITS:
      bits.append(max(END_BITS, writer.activation_bits))
    return (readers or [writer])[0], max(bits, default=0)

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
    self._quantizers = [
      placement
      for placement in model.placements
      if isinstance(placement.transform, self.Quantizer) and placement.path in self.configs
    ]

  def due(self, is_due):
    """Yields (quantizer, the kernel that it gets, a tensor) of the layers that are due.

    Args:
      is_due: function of a layer's configuration.
    """
    for path, point, quantizer in self._quantizers:
      if is_due(self.configs[path]):
        yield quantizer, self._model.transformed(path, point, before=quantizer)


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
