"""Which channels of a model go together: the channel graph.

Every channel of every tensor has an identity, a number. A layer that computes new channels makes
new numbers; everything else hands on, joins or repeats those that it reads. Where two numbers must
be kept or dropped together (the two summands of an addition, say) they are tied, and the classes of
tied numbers are what can be pruned. `channel_rules` says what each type of layer does.

What a dropped channel is: its maker's kernel and bias are zero, and so are the factor and shift of
each normalization that it passes. With `keep_shift` normalizations keep their shift where the
layers that read it can take up the constant exactly.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from pocketsize import channel_rules
from pocketsize.errors import UserError
from pocketsize.graph import Graph


class Slice(NamedTuple):
  """One axis of a weight that shrinks with channels.

  Attributes:
    layer: the Keras layer.
    weight: the attribute that holds the weight, such as 'kernel'.
    axis: of the weight, negative.
    ids: [size of that axis] channels.
    role: 'in' for channels that the weight reads; 'out' for those that it makes, and factors of
      those that pass: zero where they are dropped; 'shift' for what a normalization adds; 'other'.
  """

  layer: object
  weight: str
  axis: int
  ids: np.ndarray
  role: str


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
  """Channels that the same layers make; each can be dropped without the others.

  Attributes:
    name: path of the first layer that makes them, with '#2' and so on where it makes several kinds.
    size: number of channels.
    members: {path: [size, n] positions in the output of that layer that go with each channel}.
  """

  name: str
  size: int
  members: dict


class ChannelGraph:
  """The channels of a model.

  Args:
    model: a built Functional or Sequential model.
    keep_shift: see above.

  Attributes:
    graph: its `Graph`.
    groups: the `Group`s that can be pruned, in the order of execution.
    frozen: {path of a layer that makes channels: why they, or some of them, cannot be pruned}.
    slices: list of `Slice`.
    changes: {layer or node: function from `kept`, a function that counts the kept among channels,
      to the arguments that change}.
    refused: nodes whose rule says that the channels around them must stay.
    folds: {layer: channels that it reads and that are constants, not zero, when they are dropped}.

  Raises:
    UserError: a subclassed or unbuilt model.
  """

  def __init__(self, model, keep_shift=False):
    self.graph = Graph(model)
    self.keep_shift = keep_shift
    self.slices, self.changes, self.folds = [], {}, {}
    self._parents, self._reasons, self._zeroed, self._made = [], {}, [], {}
    self._reads = {}
    self.refused = []
    self._labels = {}
    for node in self.graph.nodes:
      outputs = channel_rules.apply(self, node, [self._labels[number] for number in node.inputs])
      self._labels.update(zip(node.outputs, outputs, strict=True))
    self._settle_constants()
    for number in self.graph.outputs:
      self.freeze(self._labels[number].ids, 'they are an output of the model')
    self._collect()

  def _settle_constants(self):
    """A layer's bias takes up the constants of its only call."""
    for layer, reads in self._reads.items():
      if len(reads) == 1 and reads[0].dropped != channel_rules.Dropped.ZERO:
        self.folds[layer] = reads[0].ids
      for labels in reads if len(reads) > 1 else ():
        if labels.dropped == channel_rules.Dropped.SHIFT:
          self.zero(labels.ids)
        elif labels.dropped == channel_rules.Dropped.CONSTANT:
          self.freeze(labels.ids, f'layer {layer.name!r} reads different constants')

  # What rules call.

  def read(self, layer, labels):
    """Says that `layer` reads `labels` and can take up constants exactly, in its bias."""
    self._reads.setdefault(layer, []).append(labels)

  def freeze_layer(self, layer, reason):
    """Freezes all channels that a layer makes or reads at any of its calls."""
    for part in self.slices:
      if part.layer is layer:
        self.freeze(part.ids, reason)
    if id(layer) in self._made:
      self.freeze(self._made[id(layer)][1], reason)

  def make(self, node, count):
    """Returns the `count` channels that a layer makes; the same at each of its calls."""
    if id(node.operation) not in self._made:
      self._made[id(node.operation)] = node.path, self.new(count)
    return self._made[id(node.operation)][1]

  def new(self, count, reason=None):
    """Returns `count` channels that no layer makes, frozen if there is a `reason`."""
    ids = np.arange(len(self._parents), len(self._parents) + count)
    self._parents.extend(ids.tolist())
    if reason:
      self.freeze(ids, reason)
    return ids

  def tie(self, ids, others):
    """Makes each channel go with its partner."""
    for one, other in zip(np.ravel(ids), np.ravel(others), strict=True):
      low, high = sorted((self._root(one), self._root(other)))
      if low != high:
        self._parents[high] = low
        reason = self._reasons.pop(high, None)
        if reason:
          self._reasons.setdefault(low, reason)

  def freeze(self, ids, reason):
    """Keeps channels from being pruned; the first reason stays."""
    for number in np.unique(ids):
      self._reasons.setdefault(self._root(number), reason)

  def are_frozen(self, ids):
    """Returns whether all of `ids` are frozen by now."""
    return all(self._root(number) in self._reasons for number in ids)

  def zero(self, ids):
    """Says that dropped channels of `ids` must be zero, whatever `keep_shift` says."""
    self._zeroed.append(ids)

  def slice(self, layer, weight, axis, ids, role):
    """Says that an axis of a weight has the channels `ids`."""
    if getattr(layer, weight, None) is None:
      return
    for known in self.slices:
      if known.layer is layer and (known.weight, known.axis) == (weight, axis):
        self.tie(known.ids, ids)
        return
    self.slices.append(Slice(layer, weight, axis, np.array(ids), role))

  # What `shrink` asks.

  def roots(self, ids):
    """Returns the numbers that stand for the classes of channels."""
    return self._root_of[np.asarray(ids, int)]

  def dropped(self, keep):
    """Returns `is_dropped(ids)`, a function from channels to bools.

    Args:
      keep: {name of a group: [size] bool}; groups that are missing are kept whole.

    Raises:
      UserError: an unknown group, a wrong size, or nothing kept.
    """
    is_gone = np.zeros(len(self._parents), bool)
    for name, kept in keep.items():
      if name not in self._roots:
        raise UserError(
          f'`keep` must name groups out of {", ".join(self._roots)}. Received: {name!r}.'
        )
      kept = np.asarray(kept, bool)
      if kept.shape != self._roots[name].shape:
        raise UserError(
          f'`keep` must have {len(self._roots[name])} values for group {name!r}. '
          f'Received: shape {kept.shape}.'
        )
      is_gone[self._roots[name][~kept]] = True
    is_gone = is_gone[self._root_of]
    for number, labels in self._labels.items():
      if is_gone[labels.ids].all():
        path = self.graph.producer(number).path
        raise UserError(f'`keep` must leave layer {path!r} at least one channel. Received: none.')
    return lambda ids: is_gone[ids]

  def places(self, ids):
    """Returns {group name: for each of `ids` its place in the group, or -1}."""
    kinds, places = self._where[:, self.roots(ids)]
    return {
      self.groups[kind].name: np.where(kinds == kind, places, -1)
      for kind in dict.fromkeys(kinds[kinds >= 0].tolist())
    }

  def ids(self, tensor):
    """Returns the channels of tensor number `tensor` of the graph."""
    return self._labels[tensor].ids

  @property
  def tensors(self):
    """The channels of every tensor, none of which may lose all."""
    return [labels.ids for labels in self._labels.values()]

  def must_be_zero(self, ids):
    """Returns for each channel whether it must be zero when it is dropped."""
    zeroed = self.roots(np.concatenate([np.zeros(0, int), *self._zeroed]))
    return np.isin(self.roots(ids), zeroed) | (not self.keep_shift)

  def _root(self, number):
    number = int(number)
    while self._parents[number] != number:
      self._parents[number] = self._parents[self._parents[number]]
      number = self._parents[number]
    return number

  def _collect(self):
    self._root_of = np.array([self._root(number) for number in range(len(self._parents))], int)
    makers = {}
    for path, ids in self._made.values():
      for position, root in enumerate(self.roots(ids).tolist()):
        makers.setdefault(root, {}).setdefault(path, []).append(position)
    self.groups, self.frozen, self._roots, by_makers = [], {}, {}, {}
    # For each root the number of its group, or -1, and its place there.
    self._where = np.full((2, len(self._parents)), -1)
    for root, positions in makers.items():
      if root in self._reasons:
        for path in positions:
          self.frozen.setdefault(path, self._reasons[root])
      else:
        key = tuple((path, len(found)) for path, found in positions.items())
        by_makers.setdefault(key, []).append(root)
    for key, roots in by_makers.items():
      first = key[0][0]
      kinds = sum(name.split('#')[0] == first for name in self._roots)
      name = f'{first}#{kinds + 1}' if kinds else first
      members = {path: np.array([makers[root][path] for root in roots]) for path, _ in key}
      self.groups.append(Group(name, len(roots), members))
      self._roots[name] = np.array(roots)
      self._where[0, roots], self._where[1, roots] = len(self.groups) - 1, np.arange(len(roots))
