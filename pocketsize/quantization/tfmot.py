"""Quantization-aware training by tfmot (Jacob et al. 2018, arXiv:1712.05877).

tfmot says where values are quantized and computes every step, in the layers of a tf_keras twin.
Their variables are those of the Keras 3 model and of our own quantizers at the same places, whose
grids are the same. So what is saved, exported and packed needs no tfmot.
"""

import dataclasses

import keras
import tensorflow as tf

from pocketsize import targets
from pocketsize.compressor import Compressor, Stage
from pocketsize.errors import UserError
from pocketsize.graph import IDENTITIES
from pocketsize.quantization.last_value import LastValueQuantizer
from pocketsize.quantization.quantizers import ActivationQuantizer
from pocketsize.quantization.tfmot_bridge import annotated
from pocketsize.quantization.twin import build_twin
from pocketsize.quantization.twin_layer import TwinLayer
from pocketsize.transform import Placement

# Those of TensorFlow's fake quantizers.
BITS = range(2, 17)
# Of tfmot's running averages.
MOMENTUM = 0.999


@dataclasses.dataclass(frozen=True)
class TfmotConfig:
  """How a model is quantized.

  Attributes:
    weight_bits, activation_bits: 2 to 16.
    quant_delay: steps before values are quantized, at least 0; ranges follow them before, too.
    freeze_bn_delay: steps after which batch norms use and keep their moving statistics, at least 0;
      None: never.
  """

  weight_bits: int = 8
  activation_bits: int = 8
  quant_delay: int = 0
  freeze_bn_delay: int | None = None

  def __post_init__(self):
    for name in ('weight_bits', 'activation_bits'):
      if getattr(self, name) not in BITS:
        raise UserError(
          f'`{name}` must be from {BITS[0]} to {BITS[-1]}. Received: {getattr(self, name)}.'
        )
    for name in ('quant_delay', 'freeze_bn_delay'):
      if (getattr(self, name) or 0) < 0:
        raise UserError(f'`{name}` must be at least 0. Received: {getattr(self, name)}.')


class Tfmot(Compressor):
  """Trains with tfmot's fake quantizers.

  It computes the whole model, so transforms of another compressor have no effect beside it.

  Args:
    config: a `TfmotConfig`.
  """

  Config = TfmotConfig

  def __init__(self, config):
    super().__init__([targets.Rule(config)])
    self.config = config

  def plan(self, graph):
    twin = build_twin(graph.model)
    layers, refused = annotated(twin, graph)
    self.skipped, self._layers, placements = dict(twin.refused), [], {}
    for node, names in zip(graph.nodes, twin.names, strict=True):
      # What is random is left to Keras, whose random state is a variable.
      is_random = type(node.operation).__name__ in IDENTITIES
      chain = [
        TwinLayer(layers[name], node.operation)
        for name in names
        if name in layers and not is_random
      ]
      self._layers.append(chain)
      for reason in (refused[name] for name in names if name in refused):
        self.skipped[node.path] = reason
      for point, granularity in [item for layer in chain for item in layer.points.items()]:
        quantizer = (
          LastValueQuantizer(self.config.weight_bits, granularity, (-1,))
          if granularity
          else ActivationQuantizer(self.config.activation_bits, MOMENTUM)
        )
        placements.setdefault((node.path, point), Placement(node.path, point, quantizer))
    return list(placements.values())

  def bind(self, model):
    is_on = tf.Variable(False, trainable=False) if self.config.quant_delay else None
    freezes = self.config.freeze_bn_delay is not None
    is_frozen = tf.Variable(False, trainable=False) if freezes else None
    for node, chain in zip(model.graph.nodes, self._layers, strict=True):
      for layer in chain:
        layer.connect(
          {point: model.transforms_at(node.path, point)[-1] for point in layer.points},
          (self.config.weight_bits, self.config.activation_bits),
          is_on,
          is_frozen,
        )
    self._switches = [
      (switch, delay)
      for switch, delay in (
        (is_on, self.config.quant_delay),
        (is_frozen, self.config.freeze_bn_delay),
      )
      if switch is not None
    ]
    chains = dict(zip(model.graph.nodes, self._layers, strict=True))

    def compute(node, args, kwargs, training):
      if node.is_input and not chains[node]:
        return args[0]
      if not chains[node]:
        given = {**kwargs, 'training': training} if node.takes_training else kwargs
        return node.operation(*args, **given)
      tensors = [each for each in keras.tree.flatten((args, kwargs)) if keras.ops.is_tensor(each)]
      outputs = tensors if len(tensors) > 1 else tensors[0]
      for layer in chains[node]:
        outputs = layer(outputs, training)
      return outputs

    model.computed_by = compute

  def update(self, step):
    for switch, delay in self._switches:
      switch.assign(step >= delay)

  def stage(self, step):
    return Stage.FULL if step >= self.config.quant_delay else Stage.UNCOMPRESSED
