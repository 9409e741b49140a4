"""Where activations are quantized: at the tensors that a device's integer kernels read or write.

A kernel with all that belongs to it (`fusion`) writes one tensor, and nothing is quantized inside.
A layer with another activation of its own, such as `Dense(activation='softmax')`, writes one before
it. What only moves values writes its input's scale and gets no quantizer; what joins values does so
if they have one scale, which they then get.
"""

import dataclasses
import functools

from pocketsize.quantization.devices import DEFAULT, DEVICES
from pocketsize.quantization.fusion import (
  FLOAT_ENDS,
  MOVING,
  ends_in_relu,
  has_weights,
  is_fixed,
  kernel_nodes,
  kind,
  own_activation,
  reads_tensors_only,
)
from pocketsize.quantization.signs import nonnegative_tensors

# They select or join values: output scale = input scale where all inputs have the same.
JOINING = frozenset().union(*(device.joiners for device in DEVICES.values()))


@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
  """A tensor to quantize.

  Attributes:
    path: path of the node that writes it.
    point: 'output', or 'preactivation' for what the node's own activation reads.
    group: a number; tensors of the same group have one range.
    calls: how often the path is called, each time with a tensor of that range.
    nonnegative: it is never negative, whatever the weights and inputs of the model are.
    readers: paths of the weighted layers that read it, perhaps through nodes without weights.
    reaches_output: whether it reaches an output of the model that way.
  """

  path: str
  point: str
  group: int
  calls: int
  nonnegative: bool
  readers: tuple
  reaches_output: bool


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


def _joins(node, device):
  """Returns whether `node` hands on what it reads, if that has one range: no constant among it."""
  return type(node.operation).__name__ in device.joiners and reads_tensors_only(node)


class _Walk:
  """Goes through a graph and collects places, (path, point), some of which have one range.

  Args:
    graph: a `Graph`.
    device: a `Device`.

  Attributes:
    groups: {place: number of its range}.
    writers: function from a tensor to the nodes that wrote it, above what moved and joined it.
  """

  def __init__(self, graph, device):
    self._graph = graph
    self._device = device
    self.groups = {}
    # What is joined over and over, as in a dense block, is walked once.
    self.writers = functools.cache(self._find_writers)
    done = set()
    for node in graph.nodes:
      if id(node) in done or kind(node) in MOVING:
        continue
      nodes = kernel_nodes(graph, node)
      done.update(map(id, nodes))
      self._visit(node, nodes[-1])

  def _visit(self, node, last):
    """Adds what one kernel reads and writes, which begins at `node` and ends with `last`."""
    name, device = type(node.operation).__name__, self._device
    if name in device.readers:
      for tensor in node.inputs:
        self._add_writers(tensor)
    writes = kind(node) not in FLOAT_ENDS if device.writers is None else name in device.writers
    if not writes or len(last.outputs) != 1:
      return
    has_own = has_weights(last) and not (own_activation(last) == 'linear' or ends_in_relu(last))
    if has_own and self._is_float(last):
      self._add([(last.path, 'preactivation')])
    if device.writers is None or not has_own:
      self._add_writers(last.outputs[0])

  def _add_writers(self, tensor):
    self._add([(node.path, 'output') for node in self.writers(tensor) if self._takes_range(node)])

  def _takes_range(self, node):
    """Returns whether a quantizer fits behind `node`."""
    return (
      len(node.outputs) == 1
      and self._is_float(node)
      and not (self._device.writers is None and is_fixed(node))
    )

  def _is_float(self, node):
    return 'float' in self._graph.dtype(node.outputs[0])

  def _find_writers(self, tensor):
    node = self._graph.producer(tensor)
    if kind(node) in MOVING:
      tensors = node.inputs[:1]
    elif _joins(node, self._device):
      tensors = node.inputs
    else:
      return (node,)
    found = tuple(writer for each in tensors for writer in self.writers(each))
    return found if all(map(self._takes_range, found)) else (node,)

  def _add(self, places):
    """Adds places that have one range, with all that have the range of one of them."""
    joined = {self.groups[place] for place in places if place in self.groups}
    number = min(joined, default=len(self.groups))
    for place, other in self.groups.items():
      if other in joined:
        self.groups[place] = number
    self.groups.update(dict.fromkeys(places, number))


def quantized_tensors(graph, device=DEFAULT):
  """Returns the `QuantizedTensor`s of a `Graph`, in the order of execution, each place once.

  Args:
    graph: a `Graph`.
    device: a name in `DEVICES`.
  """
  groups, nonnegative = _Walk(graph, DEVICES[device]).groups, nonnegative_tensors(graph)
  calls = {}
  for node in graph.nodes:
    calls.setdefault(node.path, []).append(node)
  tensors = []
  for path, nodes in calls.items():
    for point in ('preactivation', 'output'):
      if (path, point) in groups:
        read = [_readers(graph, node.outputs[0]) for node in nodes]
        tensors.append(
          QuantizedTensor(
            path,
            point,
            groups[path, point],
            len(nodes),
            point == 'output' and all(node.outputs[0] in nonnegative for node in nodes),
            tuple(dict.fromkeys(reader for readers, _ in read for reader in readers)),
            any(reaches for _, reaches in read),
          )
        )
  return tensors


def sources(graph, device=DEFAULT):
  """Returns {path of a weighted layer: places that wrote what it reads, above what moved it}.

  Args:
    graph: a `Graph`.
    device: a name in `DEVICES`.
  """
  walk, found = _Walk(graph, DEVICES[device]), {}
  for node in graph.nodes:
    if has_weights(node):
      found.setdefault(node.path, set()).update(
        (writer.path, 'output') for tensor in node.inputs for writer in walk.writers(tensor)
      )
  return found
