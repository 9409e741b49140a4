"""Gradients of a loss by kernels, where only the part of a model behind a layer is computed."""

import keras
import numpy as np
import tensorflow as tf

from pocketsize.calls import with_preactivation
from pocketsize.pruning.batches import in_order


def channel_scores(gradient):
  """Returns [inputs] sums of squares of a kernel's gradient, [..., inputs, outputs]."""
  squares = np.square(np.asarray(gradient, np.float64)).sum(axis=-1)
  return squares.reshape(-1, squares.shape[-1]).sum(axis=0)


def kernel_gradients(graph, paths, loss):
  """Returns a function (inputs, labels) -> (loss, its gradients by the kernels of some layers).

  Args:
    graph: `Graph` of a model with one output; it runs in inference mode.
    paths: of the layers.
    loss: `loss(labels, output)`, a scalar.
  """
  kernels = [graph.layers[path].kernel.value for path in paths]

  @tf.function(autograph=False)
  def compute(arrays, labels):
    with tf.GradientTape(watch_accessed_variables=False) as tape:
      tape.watch(kernels)
      value = loss(labels, graph.run(arrays, training=False)[0])
    return value, tape.gradient(value, kernels)

  def gradients(inputs, labels):
    arrays = [tf.convert_to_tensor(array) for array in in_order(graph.model, inputs)]
    return compute(arrays, tf.convert_to_tensor(labels))

  return gradients


class Tail:
  """Computes what comes after a layer, and L_M + L_p with its gradient; traced once.

  L_M is half the squared error of the layer's outputs, before its activation, against those of the
  original layer, summed over channels, the mean over places and samples; L_p is `loss` of what the
  part computes. Layers are in inference mode.

  Args:
    graph: `Graph` of the model.
    index: number of the layer's node.
    target: number of the tensor that goes into `loss`; made by that node or a later one.
    original: the same layer of the original model.
    loss: `loss(labels, value of the tensor)`, a scalar.

  Attributes:
    tensors: numbers of the tensors that the part reads, ascending.
  """

  def __init__(self, graph, index, target, original, loss):
    self._graph, self._target, self._original, self._loss = graph, target, original, loss
    self._first = graph.nodes[index]
    needed, self._nodes = {target}, []
    for position in range(len(graph.nodes) - 1, index - 1, -1):
      node = graph.nodes[position]
      # The layer itself, whether it leads there or not: another branch may be the block's last.
      if node is self._first or (not node.is_input and needed & set(node.outputs)):
        self._nodes.append(node)
        needed = (needed - set(node.outputs)) | set(node.inputs)
    self._nodes.reverse()
    self.tensors = sorted(needed)
    self._compute = tf.function(self._value_and_gradient, autograph=False)

  def gradient(self, kernel, values, read, labels):
    """Returns (L_M + L_p, its gradient by the kernel).

    Args:
      kernel: the layer's, an array.
      values: {number: value} that has `tensors`.
      read: what the layer reads in the original model.
      labels: of the batch.
    """
    arrays = [tf.convert_to_tensor(values[number]) for number in self.tensors]
    return self._compute(
      tf.constant(kernel), arrays, tf.convert_to_tensor(read), tf.convert_to_tensor(labels)
    )

  def _value_and_gradient(self, kernel, arrays, read, labels):
    wanted, _ = _outputs(self._original, lambda: self._original(read))
    values, found = dict(zip(self.tensors, arrays, strict=True)), []

    def call(node, args, kwargs):
      layer = node.operation
      if node is not self._first:
        return layer(*args, **kwargs)
      with keras.StatelessScope(state_mapping=[(layer.kernel, kernel)]):
        before, outputs = _outputs(layer, lambda: layer(*args, **kwargs))
      found.append(before)
      return outputs

    with tf.GradientTape(watch_accessed_variables=False) as tape:
      tape.watch(kernel)
      for node in self._nodes:
        self._graph.step(node, values, call, training=False)
      # Half the sum over the outputs, the mean over the places.
      error = 0.5 * kernel.shape[-1] * tf.reduce_mean(tf.square(found[0] - wanted))
      total = error + self._loss(labels, values[self._target])
    return total, tape.gradient(total, kernel)


def _outputs(layer, compute):
  """Returns (outputs before the layer's activation, its outputs)."""
  before = []

  def keep(_, x):
    before.append(x)
    return x

  outputs = with_preactivation(layer, [None], keep, compute)
  return before[0], outputs
