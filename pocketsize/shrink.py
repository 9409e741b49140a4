"""Dropping channels: `mask` makes them zero, `shrink` makes them go; both compute the same.

`compact` makes those go that are zero already.
"""

import keras
import numpy as np

from pocketsize.channel_graph import ChannelGraph
from pocketsize.copies import copied
from pocketsize.dropped_constants import folded_constants
from pocketsize.errors import UserError
from pocketsize.graph import Graph, functional
from pocketsize.instrument import Instrumented
from pocketsize.pruning import filters


def mask(model, keep, keep_shift=False):
  """Returns a copy of `model` in which dropped channels are zero (see `channel_graph`).

  Args:
    model: a built Functional or Sequential model.
    keep: {name of a group of its `ChannelGraph`: [channels] bool}; other groups stay whole.
    keep_shift: whether normalizations keep their shift where readers can take it up.

  Raises:
    UserError: see `ChannelGraph` and its `dropped`.
  """
  return _masked(ChannelGraph(model, keep_shift), keep)


def _masked(channels, keep):
  is_dropped, copy = channels.dropped(keep), copied(channels.graph.model)
  copies = Graph(copy).layers
  for part in channels.slices:
    gone = is_dropped(part.ids) & zeroed(channels, part)
    if not gone.any():
      continue
    for path, layer in channels.graph.layers.items():
      if layer is part.layer:
        weight = getattr(copies[path], part.weight)
        weight.assign(np.where(_along(gone, part.axis), 0.0, weight))
  return copy


def zeroed(channels, part):
  """Returns for each channel of a `Slice` whether dropping it makes the weight zero there.

  Args:
    channels: the `ChannelGraph`.
    part: one of its slices.
  """
  if part.role not in ('out', 'shift'):
    return np.zeros(len(part.ids), bool)
  if part.role == 'shift' or part.weight == 'gamma':
    return channels.must_be_zero(part.ids)
  return np.ones(len(part.ids), bool)


def compact(model, keep_shift=None):
  """Returns an ordinary smaller model without the channels that are exactly zero.

  They are zero as `mask` and filter pruning make them, in all layers that make or scale them. The
  smaller model computes what the model computes.

  Args:
    model: a built Functional or Sequential model, such as `strip` returns.
    keep_shift: whether normalizations kept their shift, see `mask`; None for whichever finds more
      channels to drop.

  Raises:
    UserError: an instrumented model; see `ChannelGraph` also.
  """
  if isinstance(model, Instrumented):
    raise UserError(
      '`compact` takes an ordinary model: give it what `strip` returns. '
      f'Received: instrumented model {model.name!r}.'
    )
  found = {}
  for kept_shift in (False, True) if keep_shift is None else (keep_shift,):
    channels = ChannelGraph(model, kept_shift)
    found[kept_shift] = _nonzero(channels)
  kept_shift = min(found, key=lambda each: sum(kept.sum() for kept in found[each].values()))
  return shrink(model, found[kept_shift], kept_shift)


def _nonzero(channels):
  """Returns the `keep` with which masking the model would change nothing."""
  keep = {group.name: np.zeros(group.size, bool) for group in channels.groups}
  for part in channels.slices:
    weight = np.moveaxis(np.array(getattr(part.layer, part.weight)), part.axis, 0)
    alive = weight.reshape(len(weight), -1).any(axis=1) & zeroed(channels, part)
    for name, places in channels.places(part.ids).items():
      keep[name][places[alive & (places >= 0)]] = True
  scores = {name: kept.astype(float) for name, kept in keep.items()}
  return filters.without_empty_tensors(channels, scores, keep)


def _along(values, axis):
  """Returns a vector shaped so that it lies along a negative `axis` of what it broadcasts to."""
  return np.reshape(values, (-1,) + (1,) * (-1 - axis))


def shrink(model, keep, keep_shift=False, selected=None):
  """Returns an ordinary smaller model with the outputs that `mask` has.

  Its layers have the names of the model's; those of nested models, which are inlined, the names of
  their models before them.

  Args:
    selected: {path of a convolution: [inputs] bool}, the channels that it reads. Where others are
      kept for other layers, a channel sampler (`keras.ops.take`) goes before the convolution.

  Other args and errors: see `mask`.
  """
  channels, selected = ChannelGraph(model, keep_shift), selected or {}
  is_dropped = channels.dropped(keep)

  def kept(ids):
    return int(np.sum(~is_dropped(ids)))

  constants = {}
  readers = {
    layer: is_dropped(ids) for layer, ids in channels.folds.items() if is_dropped(ids).any()
  }
  if readers:
    constants = folded_constants(channels.graph, Graph(_masked(channels, keep)), readers)
  layers, names = {}, _Names()
  reads = {
    path: ~is_dropped(part.ids)
    for path, layer in channels.graph.layers.items()
    for part in channels.slices
    if path in selected and part.layer is layer and part.role == 'in'
  }
  for path, layer in channels.graph.layers.items():
    if id(layer) not in layers:
      changed = channels.changes.get(layer, lambda kept: {})(kept)
      if layer in constants:
        changed['use_bias'] = True
      layers[id(layer)] = _changed(layer, changed, names.unused(path))
  top = functional(model)
  inputs = [
    keras.Input(batch_shape=symbol.shape, dtype=symbol.dtype, name=symbol._keras_history[0].name)
    for symbol in top.inputs
  ]

  def call(node, args, kwargs):
    if node.is_input:
      return args[0]
    kwargs = {name: value for name, value in kwargs.items() if (name, value) != ('training', None)}
    changed = channels.changes.get(node, lambda kept: {})(kept)
    if type(node.operation).__name__ == 'GetItem':
      return args[0][_shifted(args[1], len(args[0].shape), changed) if changed else args[1]]
    if type(node.operation).__name__ == 'Take' and changed:
      return keras.ops.take(args[0], changed['indices'], axis=node.operation.axis)
    if id(node.operation) in layers and not changed:
      if node.path in selected:
        args = (_sampled(args[0], node.operation, reads[node.path], selected[node.path]), *args[1:])
      return layers[id(node.operation)](*args, **kwargs)
    # Operators, and layers without weights that change in another way at each of their calls.
    return _changed(node.operation, changed, names.unused(node.path))(*args, **kwargs)

  outputs = channels.graph.run(inputs, call)
  smaller = keras.Model(
    keras.tree.pack_sequence_as(top._inputs_struct, inputs),
    keras.tree.pack_sequence_as(top._outputs_struct, outputs),
    name=model.name,
  )
  for layer in {id(layer): layer for layer in channels.graph.layers.values()}.values():
    _set_weights(channels, layer, layers[id(layer)], is_dropped, constants.get(layer), selected)
  return smaller


def _sampled(x, layer, present, selected):
  """Returns the channels of `x` that `layer` reads, out of those `present` in it.

  Args:
    present, selected: [channels before shrinking] bools.
  """
  places = np.flatnonzero(selected[present])
  if len(places) == present.sum():
    return x
  axis = 1 if getattr(layer, 'data_format', None) == 'channels_first' else -1
  return keras.ops.take(x, places.tolist(), axis=axis)


class _Names:
  """Names for the layers and operators of a model, each once."""

  def __init__(self):
    self._used = set()

  def unused(self, path):
    """Returns the name for what lies at `path`, with a number if it is taken."""
    name = base = path.replace('/', '_')
    number = 1
    while name in self._used:
      name, number = f'{base}_{number}', number + 1
    self._used.add(name)
    return name


def _changed(operation, changed, name):
  """Returns a layer or operator like another with other arguments and name, and no weights yet."""
  return type(operation).from_config({**operation.get_config(), **changed, 'name': name})


def _shifted(key, rank, changed):
  """Returns the key of `x[key]` with the slice along one axis changed."""
  key = list(key if isinstance(key, tuple) else (key,))
  places = [place for place, part in enumerate(key) if part is Ellipsis]
  if places:
    named = sum(part is not None and part is not Ellipsis for part in key)
    key[places[0] : places[0] + 1] = [slice(None)] * (rank - named)
  taken = [index for index, part in enumerate(key) if part is not None]
  key[taken[changed['axis']]] = slice(changed['start'], changed['stop'])
  return tuple(key)


def _set_weights(channels, layer, smaller, is_dropped, constants, selected):
  read = next((selected[path] for path in channels.graph.paths(layer) if path in selected), None)
  values = {id(weight): np.array(weight) for weight in layer.weights}
  if constants is not None:
    values['bias'] = constants + (0.0 if layer.bias is None else values[id(layer.bias)])
  for part in channels.slices:
    if part.layer is not layer:
      continue
    key = 'bias' if constants is not None and part.weight == 'bias' else None
    key = key or id(getattr(layer, part.weight))
    kept = ~is_dropped(part.ids)
    if part.role == 'in' and read is not None:
      kept &= read
    kept = np.flatnonzero(kept)
    values[key] = np.take(values[key], kept, axis=part.axis)
  if constants is None:
    smaller.set_weights([values[id(weight)] for weight in layer.weights])
    if isinstance(smaller, keras.layers.Normalization):
      smaller.finalize_state()
    return
  if layer.bias is None:
    made = next(s for s in channels.slices if s.layer is layer and s.role == 'out')
    values['bias'] = values['bias'][~is_dropped(made.ids)]
  smaller.kernel.assign(values[id(layer.kernel)])
  smaller.bias.assign(values['bias'])
