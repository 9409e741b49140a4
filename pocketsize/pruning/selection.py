"""Which groups of channels are pruned, with which configuration, and why the others are not."""

import numpy as np

from pocketsize import targets


def select(channels, rules):
  """Returns ({group name: config}, {path: reason} of the layers left alone).

  A group is pruned if the rules choose all layers that make it, and takes the configuration of the
  one it is named after.

  Args:
    channels: a `ChannelGraph`.
    rules: sequence of `targets.Rule` whose configurations have `prune_first_conv` and
      `prune_downsample_convs`.

  Raises:
    UserError: see `targets.resolve`.
  """
  configs, skipped = targets.resolve(channels.graph, rules)
  first = first_convolutions(channels.graph)
  downsampling = downsampling_convolutions(channels.graph)
  passing = _passing(channels)
  chosen, reasons = {}, {}
  for group in channels.groups:
    left = next((path for path in group.members if path not in configs), None)
    config = configs.get(group.name.split('#')[0])
    reason = None
    if left is not None:
      reason = skipped.get(left, 'no rule names it')
    elif not config.prune_first_conv:
      left = next((path for path in passing[group.name] if path in first), None)
      reason = 'first convolution'
    if left is None and not config.prune_downsample_convs:
      left = next((path for path in passing[group.name] if path in downsampling), None)
      reason = 'downsampling convolution'
    if left is None:
      chosen[group.name] = config
      continue
    for path in passing[group.name]:
      with_it = f'its channels go with those of {left!r}: {reason}'
      reasons.setdefault(path, reason if path == left else with_it)
  pruned = {path for name in chosen for path in passing[name]}
  reasons = {path: f'frozen: {reason}' for path, reason in channels.frozen.items()} | reasons
  other = dict.fromkeys(configs, 'its channels are those of a layer that is left alone')
  return chosen, {
    path: reason for path, reason in (other | reasons | skipped).items() if path not in pruned
  }


def first_convolutions(graph):
  """Returns the paths of the convolutions with no weighted layer between an input and them."""
  reached, found = set(graph.inputs), set()
  for node in graph.nodes:
    if node.is_input or reached.isdisjoint(node.inputs):
      continue
    if not targets.weight_points(node.operation):
      reached.update(node.outputs)
    elif 'Conv' in type(node.operation).__name__:
      found.add(node.path)
  return found


def downsampling_convolutions(graph):
  """Returns the paths of the convolutions with strides above 1; transposed ones sample up."""
  return {
    path
    for path, layer in targets.weighted_layers(graph).items()
    if 'Conv' in type(layer).__name__
    and 'Transpose' not in type(layer).__name__
    and np.max(layer.strides) > 1
  }


def _passing(channels):
  """Returns {group name: paths of the weighted layers that have its channels as outputs}."""
  found = {group.name: list(group.members) for group in channels.groups}
  for part in channels.slices:
    is_output = part.role == 'out' and part.weight in ('kernel', 'pointwise_kernel')
    for name in channels.places(part.ids) if is_output else ():
      for path, layer in channels.graph.layers.items():
        if layer is part.layer and path not in found[name]:
          found[name].append(path)
  return found
