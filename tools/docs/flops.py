"""Writes the table of docs/flops.md: python -m tools.docs.flops [--check].

Counts multiply-accumulates of ResNet-18 after `chn-pruned-rmt` as PocketFlow's published table did:
plain arithmetic on the graph, nothing is pruned.
"""

import pathlib
import sys

import keras
from absl import flags

from nets.resnet_at_ilsvrc12 import ModelHelper
from pocketsize import cost, targets
from pocketsize.files import atomic_path
from pocketsize.graph import Graph
from tools import command

PAGE = pathlib.Path(__file__).parents[2] / 'docs' / 'flops.md'
MARK = '<!-- The table is written by python -m tools.docs.flops -->\n'
# Prune ratio: percent of the FLOPs that stay, as PocketFlow published it for ResNet-18.
PUBLISHED = {0.2: 73.32, 0.3: 61.31, 0.4: 50.70, 0.5: 41.27, 0.6: 32.07, 0.7: 24.28}

_CHECK = flags.DEFINE_bool(
  'check', False, 'write nothing; exit with code 1 if docs/flops.md is stale'
)


def kept_share(graph, ratio, dense_reads):
  """Returns the share of the convolutions' multiply-accumulates that is left, in (0, 1].

  Every convolution but the first keeps int(c * (1 - ratio)) of its c input channels. The output
  channels of a convolution that exactly one layer reads are those which that layer keeps, be it
  through batch norm, ReLU, pooling or sums; all others stay.

  Args:
    graph: `Graph` of a net of convolutions without groups.
    ratio: share of the input channels that are pruned, in [0, 1).
    dense_reads: whether a dense layer counts as a reader, which keeps all its inputs; if not, a
      sum loses channels that the dense layer behind it still needs.
  """
  convolutions = [node for node in graph.nodes if isinstance(node.operation, keras.layers.Conv2D)]
  kept, all_macs = 0, 0
  for node in convolutions:
    inputs, outputs = node.operation.kernel.shape[2:]
    in_kept = _kept(inputs, 0 if node is convolutions[0] else ratio)
    readers = _readers(graph, node.outputs[0])
    if not dense_reads:
      readers = {path: reader for path, reader in readers.items() if reader in convolutions}
    (reader,) = readers.values() if len(readers) == 1 else (None,)
    out_kept = _kept(outputs, ratio) if reader in convolutions else outputs
    macs = cost.node_macs(graph, node)
    all_macs += macs
    kept += macs // (inputs * outputs) * in_kept * out_kept
  return kept / all_macs


def _kept(channels, ratio):
  return int(channels * (1 - ratio))


def _readers(graph, tensor):
  """Returns {path: node} of the layers with kernels that a tensor reaches past all others."""
  found = {}
  for node in graph.consumers(tensor):
    if targets.weight_points(node.operation):
      found[node.path] = node
    else:
      for output in node.outputs:
        found |= _readers(graph, output)
  return found


def table():
  """Returns the lines of the table."""
  graph = Graph(ModelHelper(ModelHelper.Config(resnet_size=18, nb_classes=1000)).build())
  lines = [
    '| prune ratio | published, % | counted, % | difference | can be taken out: left, % |',
    '|---|---|---|---|---|',
  ]
  for ratio, published in PUBLISHED.items():
    counted, possible = (
      100 * kept_share(graph, ratio, dense_reads) for dense_reads in (False, True)
    )
    lines.append(
      f'| {ratio} | {published:.2f} | {counted:.2f} | {abs(counted - published):.2f} | '
      f'{possible:.2f} |'
    )
  return '\n'.join(lines) + '\n'


def main():
  before = PAGE.read_text()
  text = before.partition(MARK)[0] + MARK + '\n' + table()
  if not _CHECK.value:
    with atomic_path(PAGE) as temporary:
      temporary.write_text(text)
  elif before != text:
    print('docs/flops.md is stale; write it anew with: python -m tools.docs.flops', file=sys.stderr)
    sys.exit(1)


if __name__ == '__main__':
  command.run(main)
