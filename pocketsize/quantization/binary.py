"""Training with binary weights and activations, in stages (Rastegari et al. 2016, arXiv:1603.05279;
Zhou et al. 2016, arXiv:1606.06160).

Activations are binarized where a binarized layer reads them, so that sums of residual branches keep
their values. When they begin and when weights do is a matter of the step.
"""

import dataclasses

from pocketsize import targets
from pocketsize.compressor import Compressor, Stage, register
from pocketsize.errors import UserError
from pocketsize.quantization.binary_quantizers import (
  MODES,
  SCALE_INITIALISERS,
  BinaryActivation,
  BinaryKernel,
  Switched,
)
from pocketsize.quantization.fusion import kernel_nodes
from pocketsize.transform import Placement

# Depthwise kernels and those of attention have too few weights to an output for a sign to say much.
TYPES = ('Conv1D', 'Conv2D', 'Conv3D', 'Dense')


@dataclasses.dataclass(frozen=True)
class BinaryConfig:
  """How one layer is binarized, and when.

  Attributes:
    mode: 'xnor', one scale for each output channel of a kernel; 'dorefa', one for the kernel.
    activations_begin_step: the step from which the layer's input is binary; None: never.
    weights_begin_step: the step from which its kernel is; None: never.
    keep_ends: the first and the last layer of the model stay float.
    keep_shortcuts: 1x1 convolutions beside the other layers of a residual block stay float.
    scale_init: where the scale of activations begins: 'quantile', with a thousandth of them above
      it; 'mse', with the least squared error.
  """

  mode: str = 'xnor'
  activations_begin_step: int | None = 0
  weights_begin_step: int | None = 0
  keep_ends: bool = True
  keep_shortcuts: bool = False
  scale_init: str = 'quantile'

  def __post_init__(self):
    for name, legal in (('mode', MODES), ('scale_init', SCALE_INITIALISERS)):
      if getattr(self, name) not in legal:
        received = getattr(self, name)
        raise UserError(f'`{name}` must be one of {", ".join(legal)}. Received: {received!r}.')
    for name in ('activations_begin_step', 'weights_begin_step'):
      step = getattr(self, name)
      if step is not None and step < 0:
        raise UserError(f'`{name}` must be at least 0, or None for never. Received: {step}.')

  @classmethod
  def neutral(cls):
    """Returns the configuration that changes nothing."""
    return cls(activations_begin_step=None, weights_begin_step=None)

  @property
  def begin_steps(self):
    """The steps at which something becomes binary."""
    steps = (self.activations_begin_step, self.weights_begin_step)
    return [step for step in steps if step is not None]


@register('binary')
class Binary(Compressor):
  """Binary inputs and kernels of convolutions and dense layers."""

  Config = BinaryConfig

  def plan(self, graph):
    configs, self.skipped = targets.resolve(graph, self.rules)
    reasons = {path: _left_float(graph, path, config) for path, config in configs.items()}
    self.skipped |= {path: reason for path, reason in reasons.items() if reason}
    self.configs = {path: config for path, config in configs.items() if not reasons[path]}
    placements = []
    for path, config in self.configs.items():
      layer = graph.layers[path]
      if config.activations_begin_step is not None:
        is_first = getattr(layer, 'data_format', None) == 'channels_first'
        binary = BinaryActivation(1 if is_first else -1, config.scale_init)
        placements.append(Placement(path, 'input', binary))
      if config.weights_begin_step is not None:
        axes = targets.channel_axes(layer, 'kernel')
        placements.append(Placement(path, 'kernel', BinaryKernel(config.mode, axes)))
    return placements

  def bind(self, model):
    self._switches = [
      (
        transform,
        self.configs[path].activations_begin_step
        if point == 'input'
        else self.configs[path].weights_begin_step,
      )
      for path, point, transform in model.placements
      if isinstance(transform, Switched)
    ]

  def update(self, step):
    for transform, begin in self._switches:
      transform.switch(step >= begin)

  def stage(self, step):
    begun = {step >= begin for config in self.configs.values() for begin in config.begin_steps}
    if begun == {False}:
      return Stage.UNCOMPRESSED
    return Stage.PARTIAL if False in begun else Stage.FULL

  def statistics(self):
    """Returns the shares of the places whose activations and weights are binary now."""
    return {
      name: sum(transform.is_on for transform in found) / len(found)
      for name, kind in (('binary_activations', BinaryActivation), ('binary_weights', BinaryKernel))
      if (found := [transform for transform, _ in self._switches if isinstance(transform, kind)])
    }


def _left_float(graph, path, config):
  """Returns why a layer stays float, or None."""
  layer, paths = graph.layers[path], list(targets.weighted_layers(graph))
  if type(layer).__name__ not in TYPES:
    return f'layers of type {type(layer).__name__} are not binarized'
  if config.keep_ends and path in (paths[0], paths[-1]):
    return 'first layer' if path == paths[0] else 'last layer'
  return 'shortcut convolution' if config.keep_shortcuts and is_shortcut(graph, path) else None


def is_shortcut(graph, path):
  """Returns whether a layer is a 1x1 convolution on the short way through a residual block.

  That is: something else reads its input too, and its result, with the batch norm that it may have,
  goes into an addition.

  Args:
    graph: a `Graph`.
    path: of a layer.
  """
  node = next(node for node in graph.nodes if node.path == path)
  if set(getattr(node.operation, 'kernel_size', ())) != {1}:
    return False
  readers = graph.consumers(kernel_nodes(graph, node)[-1].outputs[0])
  return len(graph.consumers(node.inputs[0])) > 1 and any(
    type(reader.operation).__name__ == 'Add' for reader in readers
  )
