"""What a runtime computes with one integer kernel, and what it needs none for.

A convolution or dense layer with its batch norm and ReLU is one kernel, so is an addition with its
ReLU. What only moves values is none.
"""

import keras

from pocketsize import targets
from pocketsize.graph import IDENTITIES

# They move or select values, and zero is the only new one: output scale = input scale.
MOVING = frozenset(
  {
    *IDENTITIES,
    'MaxPooling1D',
    'MaxPooling2D',
    'MaxPooling3D',
    'GlobalMaxPooling1D',
    'GlobalMaxPooling2D',
    'GlobalMaxPooling3D',
    'ZeroPadding1D',
    'ZeroPadding2D',
    'ZeroPadding3D',
    'Cropping1D',
    'Cropping2D',
    'Cropping3D',
    'Reshape',
    'Flatten',
    'Permute',
    'RepeatVector',
    'Pad',
    'GetItem',
    'Transpose',
    'Squeeze',
    'ExpandDims',
    'Take',
  }
)
# No format takes a learned range for them: LiteRT has the fixed step 1/256, the others compute in
# float.
FLOAT_ENDS = frozenset({'Softmax', 'LogSoftmax'})
_FLOAT_ACTIVATIONS = ('softmax', 'log_softmax')


def kind(node):
  """Returns the class name of a node's operation; Activation layers by their function."""
  name = type(node.operation).__name__
  if name == 'Activation':
    return {'relu': 'ReLU', 'linear': 'Identity', 'softmax': 'Softmax', 'relu6': 'Relu6'}.get(
      getattr(node.operation.activation, '__name__', ''), name
    )
  return name


def is_relu(node):
  """Returns whether a node is a ReLU that runtimes fuse into the kernel before it."""
  if type(node.operation) is keras.layers.ReLU:
    return node.operation.negative_slope == 0 and node.operation.threshold == 0
  return kind(node) in ('ReLU', 'Relu', 'Relu6')


def has_weights(node):
  """Returns whether a node's kernel multiplies by weights."""
  return type(node.operation).__name__ in targets.WEIGHTS_BY_TYPE


def reads_tensors_only(node):
  """Returns whether all that a node is called with are tensors of the model, no constant."""
  given = (node.arguments.args, node.arguments.kwargs) if node.inputs else ()
  return len(keras.tree.flatten(given)) == len(node.inputs)


def own_activation(node):
  """Returns the name of the activation inside a layer; 'linear' for none."""
  activation = getattr(node.operation, 'activation', None)
  return 'linear' if activation is None else getattr(activation, '__name__', repr(activation))


def ends_in_relu(node):
  """Returns whether a node is a layer with a ReLU of its own."""
  return own_activation(node) in ('relu', 'relu6')


def kernel_nodes(graph, node):
  """Returns the nodes that one kernel computes, from `node` on: with batch norm and ReLU."""
  nodes = [node]
  while not node.is_input and node.outputs[0] not in graph.outputs:
    consumers = graph.consumers(node.outputs[0])
    if len(consumers) != 1:
      break
    follower = consumers[0]
    folds = (
      isinstance(follower.operation, keras.layers.BatchNormalization)
      and has_weights(node)
      and own_activation(node) == 'linear'
    )
    if not (
      folds or (is_relu(follower) and own_activation(node) == 'linear' and not is_relu(node))
    ):
      break
    nodes.append(follower)
    node = follower
  return nodes


def is_fixed(node):
  """Returns whether a node's output takes no learned range."""
  return kind(node) in FLOAT_ENDS or own_activation(node) in _FLOAT_ACTIVATIONS
