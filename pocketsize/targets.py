"""Which layer gets which configuration: rules, last match wins; and why a layer gets none."""

import dataclasses
import difflib
import re
from collections.abc import Sequence

import keras

from pocketsize.errors import UserError

# Layers whose weights are matrices or filters, with the attributes that hold them.
WEIGHTS_BY_TYPE = {
  'Conv1D': ('kernel',),
  'Conv2D': ('kernel',),
  'Conv3D': ('kernel',),
  'Conv1DTranspose': ('kernel',),
  'Conv2DTranspose': ('kernel',),
  'Conv3DTranspose': ('kernel',),
  'DepthwiseConv1D': ('kernel',),
  'DepthwiseConv2D': ('kernel',),
  'SeparableConv1D': ('depthwise_kernel', 'pointwise_kernel'),
  'SeparableConv2D': ('depthwise_kernel', 'pointwise_kernel'),
  'Dense': ('kernel',),
  'EinsumDense': ('kernel',),
}


@dataclasses.dataclass(frozen=True)
class Rule:
  """One line of a configuration: these layers, this configuration.

  Attributes:
    config: the algorithm's frozen configuration.
    op_types: class names such as 'Conv2D'; empty for every type that the algorithm knows.
    op_names: paths such as 'base/conv1', or '{re}pattern' for all paths that a regular expression
      matches wholly; empty for all.
    exclude: leave these layers alone.
  """

  config: object
  op_types: Sequence[str] = ()
  op_names: Sequence[str] = ()
  exclude: bool = False

  def matches(self, path, layer):
    """Returns whether the rule speaks of `layer` at `path`."""
    if self.op_types and type(layer).__name__ not in self.op_types:
      return False
    return not self.op_names or any(name_matches(name, path) for name in self.op_names)


def name_matches(name, path):
  """Returns whether `name`, a path or '{re}pattern', means the layer at `path`."""
  if name.startswith('{re}'):
    return re.fullmatch(name[4:], path) is not None
  return name == path


def weighted_layers(graph):
  """Returns {path: layer} of the layers with weights to compress, in order of execution."""
  return {
    path: layer for path, layer in graph.layers.items() if type(layer).__name__ in WEIGHTS_BY_TYPE
  }


def weight_points(layer):
  """Returns the attributes of `layer` that hold the weights to compress."""
  return WEIGHTS_BY_TYPE.get(type(layer).__name__, ())


def channel_axes(layer, point):
  """Returns the axes of a weight that count output channels."""
  name = type(layer).__name__
  if name.startswith('Depthwise') or point == 'depthwise_kernel':
    return (-2, -1)
  if name.endswith('Transpose'):
    return (-2,)
  if name == 'EinsumDense':
    outputs = layer.equation.split('->')[1]
    return tuple(
      axis
      for axis, letter in enumerate(layer.equation.split('->')[0].split(',')[1])
      if letter in outputs
    )
  return (-1,)


def resolve(graph, rules):
  """Returns ({path: config}, {path: reason it has none}) for the layers that have weights.

  Args:
    graph: a `Graph`.
    rules: sequence of `Rule`; of those that match a layer the last wins.

  Raises:
    UserError: a name that matches no layer with weights, or a type that is none of
      `WEIGHTS_BY_TYPE`.
  """
  candidates = weighted_layers(graph)
  _check(candidates, rules)
  configs, skipped = {}, {}
  for path, layer in candidates.items():
    winners = [rule for rule in rules if rule.matches(path, layer)]
    if not winners:
      skipped[path] = 'no rule names it'
    elif winners[-1].exclude:
      skipped[path] = 'excluded'
    else:
      configs[path] = winners[-1].config
  for path, layer in graph.layers.items():
    if path not in candidates and _has_matrix(layer):
      skipped[path] = f'no rule for layers of type {type(layer).__name__}'
  return configs, skipped


def _has_matrix(layer):
  return not isinstance(layer, keras.layers.Normalization) and any(
    len(weight.shape) > 1 for weight in layer.weights
  )


def _check_pattern(name):
  try:
    name_matches(name, '')
  except re.error as error:
    raise UserError(
      '`op_names` must be paths or regular expressions behind {re}. '
      f'Received: {name!r} ({error}).'
    ) from error


def _check(candidates, rules):
  types = sorted({type(layer).__name__ for layer in candidates.values()})
  for rule in rules:
    for op_type in rule.op_types:
      if op_type not in WEIGHTS_BY_TYPE:
        raise UserError(
          f'`op_types` must be among {", ".join(WEIGHTS_BY_TYPE)}. Received: {op_type!r}.'
        )
    for name in rule.op_names:
      _check_pattern(name)
      if not any(name_matches(name, path) for path in candidates):
        near = difflib.get_close_matches(name, candidates, n=1) or list(candidates)[:1]
        raise UserError(
          f'`op_names` has {name!r}, which matches no layer with weights '
          f'(types {", ".join(types)}). Did you mean {near[0]!r}?'
          if near
          else f'The model has no layer to match {name!r}.'
        )
