"""What stands in a tf_keras twin for what tf_keras cannot hold: the Keras operation itself."""

import functools

import keras
import tensorflow as tf

from pocketsize.conversion.errors import require


class _Call:
  """A node of a graph in the configuration of a layer, of which tfmot makes deep copies.

  Args:
    graph: a `Graph`.
    node: of it.
  """

  def __init__(self, graph, node):
    self.graph = graph
    self.node = node

  def __deepcopy__(self, memo):
    return self

  # Keras is traced as it is; tf_keras would convert it.
  @tf.autograph.experimental.do_not_convert
  def compute(self, inputs):
    """Returns what the node computes of its distinct inputs; the model's state stays as it is."""
    values = dict(zip(dict.fromkeys(self.node.inputs), inputs, strict=True))
    with keras.StatelessScope():
      self.graph.step(self.node, values, training=False)
    # Without the masks of Keras, which tf_keras would pass on to layers that take none.
    outputs = [tf.identity(values[number]) for number in self.node.outputs]
    return outputs if len(outputs) > 1 else outputs[0]


@functools.cache
def _layer_type():
  tf_keras = require('tf_keras', 'for a twin')

  @tf_keras.utils.register_keras_serializable('pocketsize')
  class StandIn(tf_keras.layers.Layer):
    """Computes a node as Keras does when it is not trained; has no weights of its own.

    Args:
      of: a `_Call`.
    """

    def __init__(self, of, **kwargs):
      super().__init__(autocast=False, **kwargs)
      self._of = of

    def call(self, inputs):
      return self._of.compute(tf.nest.flatten(inputs))

    def get_config(self):
      return {**super().get_config(), 'of': self._of}

  return StandIn


def stand_in(graph, node, name):
  """Returns the tf_keras layer called `name` that computes a node, of its distinct inputs.

  It shows tfmot the shape of a model, and is not quantized.

  Args:
    graph: a `Graph`.
    node: of it, no input.
    name: of the layer.
  """
  return _layer_type()(_Call(graph, node), name=name)
