"""What bits and ratios of layers cost: variables of the layers of a graph, and tables for them.

A variable has the name of its layer's path. Layers that no variable decides are part of a cost's
constant, as float layers; for a layer that is decided already, give a variable with one choice.
"""

import math
import numbers

import numpy as np

from pocketsize import cost, targets
from pocketsize.allocation.problem import Cost, Term, Variable
from pocketsize.errors import UserError
from pocketsize.quantization.placing import FLOAT_BITS
from pocketsize.sparsity.magnitude import dropped

# The most bits that runtimes compute in integers; more is computed in float.
INTEGER_BITS = 8


def bit_variables(graph, bits):
  """Returns the `Variable`s of weight bits of layers, in the order of execution.

  Args:
    graph: a `Graph`.
    bits: the legal bits, from 1 to 32, of all layers with weights; or {path: bits} of some.

  Raises:
    UserError: an unknown path, or bits out of range.
  """
  return _variables(
    graph, bits, sorted, '`bits` must be integers from 1 to 32', lambda each: each in range(1, 33)
  )


def ratio_variables(graph, ratios):
  """Returns the `Variable`s of ratios of weights to drop, in the order of execution.

  Args:
    graph: a `Graph`.
    ratios: the legal ratios, in [0, 1), of all layers with weights; or {path: ratios} of some.

  Raises:
    UserError: an unknown path, or a ratio out of range.
  """
  return _variables(
    graph,
    ratios,
    lambda values: sorted(values, reverse=True),
    '`ratios` are shares of weights to drop and must be in [0, 1)',
    lambda each: isinstance(each, numbers.Real) and 0.0 <= each < 1.0,
  )


def _variables(graph, choices, ordered, legal, is_legal):
  paths = targets.weighted_layers(graph)
  if not isinstance(choices, dict):
    choices = dict.fromkeys(paths, choices)
  _check_paths(graph, choices)
  for value in [value for values in choices.values() for value in values]:
    if not is_legal(value):
      raise UserError(f'{legal}. Received: {value!r}.')
  found = {path: tuple(ordered(set(choices[path]))) for path in paths if path in choices}
  return described(found, [_features(graph, path) for path in found])


def described(choices, features):
  """Returns `Variable`s with each feature as a share of its largest value.

  Args:
    choices: {name: choices in the order of rising cost}.
    features: [variables] tuples of numbers, none negative.
  """
  if not choices:
    return []
  columns = np.array(features, float).reshape(len(choices), -1)
  columns = columns / np.maximum(columns.max(axis=0, initial=0.0), np.finfo(float).tiny)
  return [
    Variable(name, values, tuple(row))
    for (name, values), row in zip(choices.items(), columns.tolist(), strict=True)
  ]


def _features(graph, path):
  """Returns weights, MACs, outputs, and weights of each output of a layer."""
  layer = graph.layers[path]
  point = targets.weight_points(layer)[-1]
  shape = getattr(layer, point).shape
  outputs = math.prod(shape[axis] for axis in targets.channel_axes(layer, point))
  macs = sum(cost.node_macs(graph, node) for node in graph.nodes if node.path == path)
  return weights(graph, [path])[0], macs, outputs, math.prod(shape) / outputs


def _check_paths(graph, paths):
  known = targets.weighted_layers(graph)
  for path in paths:
    if path not in known:
      raise UserError(
        f'A choice must be for one of the layers with weights, {", ".join(known)}. '
        f'Received: {path!r}.'
      )


def weights(graph, paths):
  """Returns [layers] numbers of the weights that can be compressed, biases not among them.

  Raises:
    UserError: a path of no layer with weights.
  """
  _check_paths(graph, paths)
  return np.array([sum(_kernel_sizes(graph, path)) for path in paths])


def _kernel_sizes(graph, path):
  """Returns how many weights each kernel of a layer has."""
  layer = graph.layers[path]
  return [math.prod(getattr(layer, point).shape) for point in targets.weight_points(layer)]


def _sizes(graph, variables):
  return weights(graph, [variable.name for variable in variables])


def _linear(name, variables, factors, constant=0.0):
  """Returns the `Cost` sum_i factor_i value_i."""
  terms = [
    Term((place,), factor * np.array(variable.choices, float))
    for place, (variable, factor) in enumerate(zip(variables, factors, strict=True))
  ]
  return Cost(name, terms, float(constant))


def mean_bits(graph, variables):
  """Returns the mean bits of the variables' weights: sum_i n_i b_i / sum_i n_i.

  Args:
    graph: a `Graph`.
    variables: of bits, see `bit_variables`.

  Raises:
    UserError: a variable of no layer with weights; so for all costs here.
  """
  sizes = _sizes(graph, variables)
  return _linear('mean weight bits', variables, sizes / sizes.sum())


def model_bytes(graph, variables):
  """Returns the bytes of all parameters: sum_i n_i b_i / 8, and 4 for each of the others.

  The others are biases, batch norm's, and weights of layers without a variable.

  Args: see `mean_bits`.
  """
  sizes = _sizes(graph, variables)
  others = sum(layer.params for layer in cost.layer_costs(graph)) - sizes.sum()
  return _linear('bytes of parameters', variables, sizes / 8, others * FLOAT_BITS / 8)


def bit_operations(graph, variables, activation_bits):
  """Returns the bit-operations of one sample: sum_i macs_i * weight bits_i * activation bits_i.

  Args:
    graph, variables: see `mean_bits`.
    activation_bits: {path: bits of what the layer reads}; 32 for layers that are missing.
  """
  _check_paths(graph, [*activation_bits, *(variable.name for variable in variables)])
  macs = {layer.name: layer.macs for layer in cost.layer_costs(graph)}
  operations = {
    path: macs[path] * activation_bits.get(path, FLOAT_BITS)
    for path in targets.weighted_layers(graph)
  }
  factors = [operations.pop(variable.name) for variable in variables]
  return _linear('bit-operations', variables, factors, sum(operations.values()) * FLOAT_BITS)


def bit_latency(graph, variables, integers, floats):
  """Returns the ms of all layers with weights, of which those of up to 8 bits compute in integers.

  A layer that is slower in integers counts as much in float, so that fewer bits never cost more;
  the latency is then less than its cost.

  Args:
    graph, variables: see `mean_bits`.
    integers, floats: a `LatencyTable` of an integer format and one of a float format.

  Raises:
    UserError: see `LatencyTable.milliseconds` also.
  """
  _check_paths(graph, [variable.name for variable in variables])
  integer, floating = (_times(graph, table) for table in (integers, floats))
  terms = []
  for place, variable in enumerate(variables):
    slow = max(integer[variable.name], floating.pop(variable.name))
    times = [integer[variable.name] if bits <= INTEGER_BITS else slow for bits in variable.choices]
    terms.append(Term((place,), np.array(times)))
  return Cost('ms of layers', terms, float(sum(floating.values())))


def _times(graph, table):
  """Returns {path: ms of all calls of a layer}."""
  times = dict.fromkeys(targets.weighted_layers(graph), 0.0)
  for node in graph.nodes:
    if node.path in times:
      times[node.path] += table.milliseconds(node.operation, graph.shape(node.inputs[0])[1:])
  return times


def density(graph, variables):
  """Returns the share of the variables' weights that is kept, whole weights as masks drop them.

  Args:
    graph: a `Graph`.
    variables: of ratios, see `ratio_variables`.
  """
  total = _sizes(graph, variables).sum()
  terms = []
  for place, variable in enumerate(variables):
    sizes = _kernel_sizes(graph, variable.name)
    kept = [sum(size - dropped(size, ratio) for size in sizes) for ratio in variable.choices]
    terms.append(Term((place,), np.array(kept) / total))
  return Cost('share of weights kept', terms)
