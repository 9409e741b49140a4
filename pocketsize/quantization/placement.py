"""Where activations are quantized: at the tensors that an integer kernel writes.

A convolution or dense layer with its batch norm and ReLU is one kernel, so is an addition with its
ReLU; each writes one tensor. A layer with another activation of its own, such as
`Dense(activation='softmax')`, writes one before it. What only moves values writes its input's scale
and gets no quantizer.
"""

import dataclasses

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


@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
  """A tensor to quantize.

  Attributes:
    path: path of the node that writes it.
    point: 'output', or 'preactivation' for what the node's own activation reads.
    nonnegative: a ReLU writes it.
    readers: paths of the weighted layers that read it, perhaps through nodes without weights.
    reaches_output: whether it reaches an output of the model that way.
  """

  path: str
  point: str
  nonnegative: bool
  readers: tuple
  reaches_output: bool


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


def _activation(node):
  activation = getattr(node.operation, 'activation', None)
  return 'linear' if activation is None else getattr(activation, '__name__', repr(activation))


def _ends_in_relu(node):
  return _activation(node) in ('relu', 'relu6')


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
      and _activation(node) == 'linear'
    )
    if not (folds or (is_relu(follower) and _activation(node) == 'linear' and not is_relu(node))):
      break
    nodes.append(follower)
    node = follower
  return nodes


def _readers(graph, tensor):
  """Returns (paths of the weighted layers that read `tensor`, whether it reaches an output)."""
  readers, reaches, seen, waiting = {}, False, set(), [tensor]
  while waiting:
    tensor = waiting.pop()
    if tensor in seen:
      continue
    seen.add(tensor)
    reaches |= tensor in graph.outputs
    for node in graph.consumers(tensor):
      if has_weights(node):
        readers[node.path] = None
      else:
        waiting.extend(node.outputs)
  return tuple(readers), reaches


def quantized_tensors(graph):
  """Returns the `QuantizedTensor`s of a `Graph`, in the order of execution, each path once."""
  tensors, done = {}, set()
  for node in graph.nodes:
    if id(node) in done or len(node.outputs) != 1 or kind(node) in MOVING | FLOAT_ENDS:
      continue
    if not graph.dtype(node.outputs[0]).startswith('float'):
      continue
    nodes = kernel_nodes(graph, node)
    done.update(map(id, nodes))
    last = nodes[-1]
    points = []
    if has_weights(last) and not (_activation(last) == 'linear' or _ends_in_relu(last)):
      points.append('preactivation')
    if _activation(last) not in _FLOAT_ACTIVATIONS:
      points.append('output')
    readers, reaches = _readers(graph, last.outputs[0])
    for point in points:
      nonnegative = point == 'output' and (is_relu(last) or _ends_in_relu(last))
      tensors.setdefault(
        (last.path, point), QuantizedTensor(last.path, point, nonnegative, readers, reaches)
      )
  return list(tensors.values())
