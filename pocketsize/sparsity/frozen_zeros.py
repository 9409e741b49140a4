"""Weights that are zero when training begins, such as pruned ones, stay zero."""

import keras
import numpy as np
import tensorflow as tf

from pocketsize import targets
from pocketsize.transform import Placement, Transform


@keras.saving.register_keras_serializable(package='pocketsize')
class FrozenZeros(Transform):
  """Leaves a weight as it is; the gradient is 0 where it is exactly 0.

  Optimizers leave a weight of 0 where it is if its gradient was always 0, and so does weight decay.
  """

  order = 10

  def build(self, shape):
    self.built = True

  def call(self, x, training=None):
    x = tf.convert_to_tensor(x)
    return tf.where(tf.equal(x, 0), tf.zeros_like(x), x)


def freeze_zeros(graph, paths):
  """Returns `Placement`s of `FrozenZeros` at the kernels in which some weights are exactly 0.

  A kernel of zeros alone is one that training is to begin from, not a pruned one.

  Args:
    graph: a `Graph`.
    paths: of layers.
  """
  return [
    Placement(path, point, FrozenZeros())
    for path in paths
    for point in targets.weight_points(graph.layers[path])
    if _is_sparse(getattr(graph.layers[path], point))
  ]


def _is_sparse(weight):
  return 0 < np.count_nonzero(keras.ops.convert_to_numpy(weight)) < np.prod(weight.shape)
