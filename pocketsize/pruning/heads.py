"""Classifiers inside a network: where they read, what they are, and a model that trains with one.

The additional losses of discrimination-aware pruning (Zhuang et al. 2018, arXiv:1810.11809, section
3.2); they are no part of the pruned network.
"""

import math

import keras

from pocketsize.errors import UserError
from pocketsize.graph import Graph
from pocketsize.instrument import Instrumented


def classes(model):
  """Returns the number of classes of a classifier.

  Raises:
    UserError: the model has not one output of [batch, classes] logits.
  """
  graph = Graph(model)
  shapes = [graph.shape(number) for number in graph.outputs]
  if len(shapes) != 1 or len(shapes[0]) != 2 or not shapes[0][1]:
    raise UserError(
      'Discrimination-aware pruning wants a classifier with one output, [batch, classes]. '
      f'Received: {model.name!r} with outputs {shapes}.'
    )
  return shapes[0][1]


def block_ends(convolutions, stages):
  """Returns the last convolutions of all blocks but the last one, whose end is the network's.

  There are `stages` + 1 blocks of ceil((L + 1) / (stages + 1)) of the L convolutions; those that
  get none are left out.

  Args:
    convolutions: paths in the order of execution.
    stages: not negative.
  """
  size = math.ceil((len(convolutions) + 1) / (stages + 1))
  ends = range(size, size * stages + 1, size)
  return [
    convolutions[min(end, len(convolutions)) - 1] for end in ends if end - size < len(convolutions)
  ]


def make_head(shape, layer, count, seed):
  """Returns a classifier of a convolution's output: batch norm, ReLU, mean over places, dense.

  Args:
    shape: of the output, with the batch.
    layer: the convolution.
    count: classes.
    seed: of the dense layer's weights.
  """
  axis = 1 if layer.data_format == 'channels_first' else -1
  pool = getattr(keras.layers, f'GlobalAveragePooling{len(shape) - 2}D')
  # The seed is the initializer's own: a run that goes on makes the same head.
  initializer = keras.initializers.GlorotUniform(seed=seed)
  return keras.Sequential(
    [
      keras.Input(shape[1:]),
      keras.layers.BatchNormalization(axis=axis, momentum=0.9),
      keras.layers.ReLU(),
      pool(data_format=layer.data_format),
      keras.layers.Dense(count, kernel_initializer=initializer),
    ]
  )


class Headed(Instrumented):
  """An `Instrumented` model with a head inside; gives [batch, 2 * classes], the net's logits first.

  Args:
    source, placements: see `Instrumented`.
    path: the layer whose output the head reads.
    head: a Keras model.
  """

  def __init__(self, source, placements, path, head):
    super().__init__(source, placements)
    self.read_path, self.head = path, head

  def call(self, inputs, training=None):
    read = {}

    def observe(node, outputs):
      if node.path == self.read_path:
        read.setdefault(node.path, outputs)

    logits = self.run(inputs, training, observe=observe)
    return keras.ops.concatenate(
      [logits, self.head(read[self.read_path], training=training)], axis=-1
    )
