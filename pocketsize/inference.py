"""A model in inference, as fast as TensorFlow computes it from its variables.

Every batch norm that folds into the layer before it is a factor of that layer's kernel, computed
from the variables at each call. So whoever assigns kernels or statistics, or differentiates, sees
the model itself, and saves its passes over the activations.
"""

import keras
import tensorflow as tf

from pocketsize import folding, fused_bn, targets
from pocketsize.calls import call_with_weights
from pocketsize.graph import Graph, functional
from pocketsize.quantization.groups import Groups


class Inference:
  """Computes a model as in inference; traceable and differentiable in its weights.

  Args:
    model: a built Functional or Sequential model; what is computed follows its variables.

  Attributes:
    model, graph: as given, and its `Graph`.
  """

  def __init__(self, model):
    self.model = model
    self.graph = Graph(model)
    self._folded = folding.foldable(self.graph, _differs_in_dtype)
    self._gone = set(self._folded.values())
    self._compiled = tf.function(self._run, input_signature=[self._signature()], autograph=False)

  def __call__(self, x):
    """Returns the outputs, tensors in the structure that the model has them, of inputs x."""
    return self._packed(self._run(self.tensors(x)))

  def compiled(self, x):
    """Returns the same as a call, by one compiled function for all sizes of a batch."""
    return self._packed(self._compiled(self.tensors(x)))

  def tensors(self, x):
    """Returns inputs x, arrays or tensors as the model takes them, as a flat list of tensors."""
    return functional(self.model)._standardize_inputs(x)

  def _signature(self):
    return [
      tf.TensorSpec(self.graph.shape(number), self.graph.dtype(number))
      for number in self.graph.inputs
    ]

  def _packed(self, outputs):
    return keras.tree.pack_sequence_as(functional(self.model)._outputs_struct, outputs)

  def _run(self, tensors):
    return self.graph.run(tensors, self._call, training=False)

  def _call(self, node, args, kwargs):
    if node.is_input or node in self._gone:
      return args[0]
    if node in self._folded:
      return self._with_batch_norm(node, args, kwargs)
    if fused_bn.applicable(node.operation, args, kwargs):
      return fused_bn.batch_norm(node.operation, args[0], False)
    return node.operation(*args, **kwargs)

  def _with_batch_norm(self, node, args, kwargs):
    """Computes a linear layer with the batch norm behind it folded in."""
    layer, norm = node.operation, self._folded[node].operation
    gamma = norm.gamma.value if norm.scale else None
    factor = folding.batch_norm_factor(norm.moving_variance.value, norm.epsilon, gamma)
    offset = (norm.beta.value if norm.center else 0.0) - norm.moving_mean.value * factor
    point = targets.weight_points(layer)[-1]
    kernel = getattr(layer, point).value
    axes = targets.channel_axes(layer, point)
    spread = tf.reshape(factor, Groups(tuple(kernel.shape), 'channel', axes).broadcast)
    weights = {point: kernel * spread}
    if layer.bias is not None:
      weights['bias'] = layer.bias.value * factor + offset
      return call_with_weights(layer, weights, args, kwargs)
    return tf.nn.bias_add(call_with_weights(layer, weights, args, kwargs), offset)


def _differs_in_dtype(*nodes):
  return any(node.operation.compute_dtype != 'float32' for node in nodes)
