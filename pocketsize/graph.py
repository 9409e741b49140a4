"""The flat view of a Keras model: every call of every layer in order, nested models inlined.

This is the only module that reads Keras' own record of a functional model (`_nodes_by_depth`).
"""

import dataclasses

import keras
from keras.src.models.functional import Functional

from pocketsize import records
from pocketsize.errors import UserError

# Class names of layers that hand on what they read when a model is not trained.
IDENTITIES = (
  'Identity',
  'Dropout',
  'SpatialDropout1D',
  'SpatialDropout2D',
  'SpatialDropout3D',
  'GaussianDropout',
  'GaussianNoise',
  'AlphaDropout',
  'ActivityRegularization',
)


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
  """One call of one operation.

  Attributes:
    path: name of the operation, behind the names of the nested models around it: 'base/conv1'.
    operation: a Keras layer, or an operator such as `x + y`.
    inputs: numbers of the tensors that it reads.
    outputs: numbers of the tensors that it writes.
    symbols: the symbolic tensors of `inputs`, as the arguments hold them.
    arguments: Keras' record of the call.
    takes_training: whether the operation has an argument `training`.
    inference_only: whether the model's author wrote `training=False` at this call or around it (at
      layers whose default is False, such as Dropout, Keras keeps no record of that).
  """

  path: str
  operation: keras.Operation
  inputs: tuple
  outputs: tuple
  symbols: tuple = ()
  arguments: object = None
  takes_training: bool = False
  inference_only: bool = False

  @property
  def is_input(self):
    return self.arguments is None


def functional(model):
  """Returns the functional model inside `model`.

  Raises:
    UserError: `model` is subclassed, or a Sequential model without input shape.
  """
  if isinstance(model, keras.Sequential):
    if not model.built:
      raise UserError(
        f'Sequential model {model.name!r} has no shapes yet: put a keras.Input in front '
        'or call it once on data.'
      )
    return model._functional
  if isinstance(model, Functional) and type(model).call is Functional.call:
    return model
  raise UserError(
    f'Model {getattr(model, "name", model)!r} is a subclass of keras.Model with a `call` of its '
    'own, whose graph cannot be seen. Build it with the functional API, for example '
    '`keras.Model(inputs, outputs)` around the layers that `call` uses, or keras.Sequential. '
    f'Received: {type(model).__name__}.'
  )


def inlined(values):
  """Returns {path: value} of a model's layers, also by the names that they have once it was pruned.

  Pruning makes 'base_conv' of 'base/conv', a layer of a nested model.
  """
  return {path.replace('/', '_'): value for path, value in values.items()} | values


def is_nested(operation):
  """Returns whether `operation` is a model whose graph can be seen."""
  return isinstance(operation, keras.Sequential) or (
    isinstance(operation, Functional) and type(operation).call is Functional.call
  )


class Graph:
  """Nodes of a model in execution order. Tensors are numbers.

  Args:
    model: a built Functional or Sequential model; nested ones are inlined.

  Raises:
    UserError: a subclassed or unbuilt model, or a nested one that reads a masked tensor.
  """

  def __init__(self, model):
    self.model = model
    self.nodes = []
    self.layers = {}
    self._symbols = []
    self._producers = {}
    self._consumers = {}
    top = functional(model)
    numbers = {}
    for symbol in top.inputs:
      layer = symbol._keras_history.operation
      numbers[id(symbol)] = self._add(layer.name, layer, (), (symbol,))[0]
    self.inputs = tuple(numbers[id(symbol)] for symbol in top.inputs)
    self._walk(top, '', numbers, inference_only=False)
    self.outputs = tuple(numbers[id(symbol)] for symbol in top.outputs)
    # Tensor number: position of the last node that reads it.
    self.last_readers = {
      number: position for position, node in enumerate(self.nodes) for number in node.inputs
    }

  def _add(self, path, operation, inputs, outputs, **fields):
    numbers = tuple(range(len(self._symbols), len(self._symbols) + len(outputs)))
    self._symbols.extend(outputs)
    node = Node(path, operation, tuple(inputs), numbers, **fields)
    self.nodes.append(node)
    for number in numbers:
      self._producers[number] = node
    for number in dict.fromkeys(inputs):
      self._consumers.setdefault(number, []).append(node)
    if isinstance(operation, keras.Layer):
      self.layers.setdefault(path, operation)
    return numbers

  def _walk(self, model, prefix, numbers, inference_only):
    for _, nodes in sorted(model._nodes_by_depth.items(), reverse=True):
      for node in nodes:
        if node.is_input or not node.operation:
          continue
        path = prefix + node.operation.name
        takes_training, says_inference = records.training(node)
        fixed = inference_only or says_inference
        if is_nested(node.operation):
          inner = functional(node.operation)
          fed = records.fed(inner, node, path)
          local = {
            id(symbol): self._cast(numbers[id(outer)], symbol, path)
            for symbol, outer in zip(inner.inputs, fed, strict=True)
          }
          self._walk(inner, path + '/', local, fixed)
          outputs = [local[id(symbol)] for symbol in inner.outputs]
        else:
          outputs = self._add(
            path,
            node.operation,
            tuple(numbers[id(symbol)] for symbol in node.input_tensors),
            node.output_tensors,
            symbols=tuple(node.input_tensors),
            arguments=node.arguments,
            takes_training=takes_training,
            inference_only=fixed,
          )
        numbers.update(
          {id(symbol): number for symbol, number in zip(node.output_tensors, outputs, strict=True)}
        )

  def _cast(self, tensor, symbol, path):
    """Returns the number of `tensor` cast to `symbol`, an input of the nested model at `path`."""
    if self.dtype(tensor) == keras.backend.standardize_dtype(symbol.dtype):
      return tensor
    outer = self._symbols[tensor]
    inner = keras.ops.cast(outer, symbol.dtype)
    operation = inner._keras_history.operation
    return self._add(
      f'{path}/{symbol._keras_history.operation.name}',
      operation,
      (tensor,),
      (inner,),
      symbols=(outer,),
      arguments=operation._inbound_nodes[-1].arguments,
    )[0]

  def consumers(self, tensor):
    """Returns the nodes that read tensor number `tensor`."""
    return self._consumers.get(tensor, [])

  def producer(self, tensor):
    """Returns the node that writes tensor number `tensor`."""
    return self._producers[tensor]

  def paths(self, layer):
    """Returns the paths of a layer: several if models that are called twice hold it."""
    return [path for path, other in self.layers.items() if other is layer]

  def shape(self, tensor):
    """Returns the symbolic shape of tensor number `tensor`; the batch is None."""
    return tuple(self._symbols[tensor].shape)

  def dtype(self, tensor):
    """Returns the name of the dtype of tensor number `tensor`."""
    return keras.backend.standardize_dtype(self._symbols[tensor].dtype)

  def run(self, inputs, call=None, training=None):
    """Computes the model's outputs.

    Args:
      inputs: tensors, as many as the model has inputs, in their order.
      call: `call(node, args, kwargs)` computes a node in place of its operation. InputLayers come
        too, with the fed tensor as only argument.
      training: passed to the operations that take it, unless the model says `training=False` there.

    Returns:
      The list of output tensors.
    """
    values = dict(zip(self.inputs, inputs, strict=True))
    for position, node in enumerate(self.nodes):
      self.step(node, values, call, training)
      # What nobody reads any more goes, so that a big batch does not need the memory of all layers.
      for number in set(node.inputs) - set(self.outputs):
        if self.last_readers[number] == position:
          del values[number]
    return [values[number] for number in self.outputs]

  def step(self, node, values, call=None, training=None):
    """Computes one node: reads {number: tensor} and adds what the node writes.

    Args:
      node: of this graph.
      values: has the node's inputs; an InputLayer's fed tensor is there as its output.
      call, training: see `run`.
    """
    call = call or (
      lambda node, args, kwargs: args[0] if node.is_input else node.operation(*args, **kwargs)
    )
    if node.is_input:
      outputs = call(node, (values[node.outputs[0]],), {})
    else:
      known = {
        id(symbol): values[number] for symbol, number in zip(node.symbols, node.inputs, strict=True)
      }
      args, kwargs = records.with_first_by_position(node.operation, *node.arguments.fill_in(known))
      if node.takes_training:
        kwargs['training'] = False if node.inference_only else training
      outputs = call(node, args, kwargs)
    values.update(zip(node.outputs, keras.tree.flatten(outputs), strict=True))
