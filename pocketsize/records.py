"""Keras' records of calls: what an operation of a model was given."""

import inspect

import keras

from pocketsize.errors import UserError


def training(node):
  """Returns (whether an operation takes `training`, whether the model's author wrote False there).

  Keras records a call with the default filled in: False at a Dropout means nothing, at a layer or
  nested model whose default is None it was written.
  """
  parameter = inspect.signature(node.operation.call).parameters.get('training')
  if parameter is None:
    return False, False
  return True, node.arguments.kwargs.get('training') is False and parameter.default is not False


def fed(inner, node, path):
  """Returns the symbolic tensors that a call feeds to a nested model, in the order of its inputs.

  Args:
    inner: the `Functional` of the nested model.
    node: Keras' record of the call.
    path: of the nested model.
  """
  (given, *_), _ = with_first_by_position(inner, node.arguments.args, node.arguments.kwargs)
  if len(node.input_tensors) > len(keras.tree.flatten(given)):
    # Keras records the mask that a tensor carries as one more argument.
    raise UserError(
      f'The nested model {path!r} reads a tensor with a mask, which would not reach its '
      'layers in files: put them into the outer model, or mask behind it. '
      f'Received: {len(node.input_tensors)} tensors for {len(inner.inputs)} inputs.'
    )
  return in_order(inner, given)


def input_names(top):
  """Returns the names by which a `Functional` model takes its inputs from a dictionary."""
  struct = top._inputs_struct
  return list(struct) if isinstance(struct, dict) else [symbol.name for symbol in top.inputs]


def in_order(top, given):
  """Returns a list of what is given to a `Functional` model, in the order of its inputs.

  Args:
    top: the model.
    given: one for each input, as the model takes them: alone, in a list, or in a dictionary, of
      which it may read a part.
  """
  if isinstance(given, dict):
    picked = {name: given[name] for name in input_names(top)}
    # Keras sorts a dictionary by its keys, in a model's inputs as in what is flattened here.
    given = picked if isinstance(top._inputs_struct, dict) else list(picked.values())
  return keras.tree.flatten(given)


def with_first_by_position(operation, args, kwargs):
  """Returns args, kwargs of a call, its first argument by position even if it was given by name."""
  name = next(iter(inspect.signature(operation.call).parameters))
  if args or name not in kwargs:
    return args, kwargs
  rest = dict(kwargs)
  return (rest.pop(name),), rest
