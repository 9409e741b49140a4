"""Which tensors are never negative, by what writes them.

Known is what Keras and TensorFlow bring themselves. Everything else, a layer of the user's and a
function of the same name as one of theirs among it, may write anything.
"""

import numbers

import keras

from pocketsize import targets
from pocketsize.quantization.fusion import MOVING, reads_tensors_only

# Functions and operations that write nothing negative whatever they read; small letters, no '_'.
_BOUNDED = frozenset(
  {
    *('relu', 'relu6', 'sigmoid', 'hardsigmoid', 'softmax', 'softplus', 'exp', 'exponential'),
    *('sparseplus', 'sparsesigmoid', 'sparsemax', 'abs', 'absolute', 'square'),
  }
)
_WITH_ACTIVATION = frozenset({'Activation', *targets.WEIGHTS_BY_TYPE})
# They write nothing negative if they read nothing negative, of tensors only.
_JOINING = frozenset({'Add', 'Multiply', 'Average', 'Minimum', 'Concatenate', 'Stack'})
_POOLING = frozenset(
  f'{prefix}{name}Pooling{size}D'
  for prefix in ('', 'Global', 'Adaptive')
  for name in ('Average', 'Max')
  for size in (1, 2, 3)
)
# The same of the first thing that they read.
_KEEPING = (MOVING | _POOLING) - {'GaussianDropout', 'GaussianNoise', 'AlphaDropout'}
_KEEPING |= {'UpSampling1D', 'UpSampling3D', 'MaxPool', 'AveragePool', 'Max', 'Mean', 'Sum', 'Cast'}
_RESIZING = frozenset({'UpSampling2D', 'Resizing', 'Resize'})
# Others overshoot.
_INTERPOLATIONS = ('nearest', 'bilinear')


def nonnegative_tensors(graph):
  """Returns the numbers of the tensors that are never negative, as a frozenset.

  In training and in inference, whatever the weights and the inputs of the model are, quantized or
  not. Integers are none of them: they overflow.

  Args:
    graph: a `Graph`.
  """
  known = set()
  for node in graph.nodes:
    if not node.is_input and _is_nonnegative(node, known):
      known.update(each for each in node.outputs if graph.dtype(each).startswith('float'))
  return frozenset(known)


def _name(function):
  """Returns the name of a function, or of an operation's class; '' if it is the user's own."""
  named = type(function) if isinstance(function, keras.Operation) else function
  library = (getattr(named, '__module__', None) or '').partition('.')[0]
  return getattr(named, '__name__', '') if library in ('keras', 'tensorflow') else ''


def _is_bounded(function):
  """Returns whether an activation or an operation writes nothing negative whatever it reads."""
  name = _name(function)
  if name in _WITH_ACTIVATION:
    return _is_bounded(getattr(function, 'activation', None))
  if name == 'ReLU':
    return function.negative_slope == 0
  return name.lower().replace('_', '') in _BOUNDED


def _is_nonnegative(node, known):
  """Returns whether a node writes nothing negative where the tensors `known` are not."""
  if _is_bounded(node.operation):
    return True
  name, read = _name(node.operation), [tensor in known for tensor in node.inputs]
  if name == 'Maximum':
    return any(read)
  if name in _JOINING:
    return reads_tensors_only(node) and (all(read) or name == 'Multiply' and _squares(node))
  return _reads_first(node) and read[0] and _keeps(node)


def _squares(node):
  """Returns whether a product is one of a tensor with itself."""
  return len(node.inputs) == 2 and len(set(node.inputs)) == 1


def _reads_first(node):
  """Returns whether the first argument of a call is the first tensor that it reads."""
  first = node.arguments.args[:1]
  return bool(first and node.symbols) and first[0] is node.symbols[0]


def _keeps(node):
  """Returns whether a node writes nothing negative if the first tensor that it reads is not."""
  operation, name = node.operation, _name(node.operation)
  if name == 'Activation':
    return operation.activation is keras.activations.linear
  if name in _RESIZING:
    fills = getattr(operation, 'pad_to_aspect_ratio', False)
    return operation.interpolation in _INTERPOLATIONS and not fills
  if name == 'Pad':
    filled = [*node.arguments.args[1:], *node.arguments.kwargs.values()]
    return all(x is None or isinstance(x, numbers.Real) and x >= 0 for x in filled)
  return name in _KEEPING
