"""Writes the table of docs/channels.md: python -m tools.docs.channels [--models=ResNet50,...].

Every model of keras.applications that has weights of its own is built without downloads, loses half
of each group of channels, and is compared with the masked one. It takes about half an hour.
"""

import inspect
import pathlib

import keras
import numpy as np
from absl import flags

from pocketsize import cost, shrink
from pocketsize.channel_graph import ChannelGraph
from pocketsize.files import atomic_path
from pocketsize.graph import Graph
from tools import command

PAGE = pathlib.Path(__file__).parents[2] / 'docs' / 'channels.md'
MARK = '<!-- The table is written by python -m tools.docs.channels -->\n'
SIZE = 96
_MODELS = flags.DEFINE_list('models', None, 'names out of keras.applications; unset: all')


def models():
  """Returns {name: function that builds the model} of keras.applications."""
  return {
    name: build
    for name, build in vars(keras.applications).items()
    if inspect.isfunction(build) and 'weights' in inspect.signature(build).parameters
  }


def row(name, build):
  """Returns one line of the table, without its end."""
  keras.utils.clear_session()
  keras.utils.set_random_seed(0)
  model = build(weights=None, input_shape=(SIZE, SIZE, 3), classes=10)
  rng = np.random.default_rng(0)
  graph = ChannelGraph(model)
  keep = {
    group.name: np.isin(np.arange(group.size), rng.permutation(group.size)[group.size // 2 :])
    for group in graph.groups
  }
  smaller = shrink.shrink(model, keep)
  x = rng.uniform(size=(1, SIZE, SIZE, 3)).astype('float32')
  expected, found = (np.asarray(each(x)) for each in (shrink.mask(model, keep), smaller))
  difference = float(np.max(np.abs(expected - found)) / np.max(np.abs(expected)))
  before, after = cost.macs(graph.graph), cost.macs(Graph(smaller))
  return (
    f'| {name} | {before / 1e6:,.1f} | {after / 1e6:,.1f} | {after / before:.2f} | '
    f'{len(graph.groups)} | {_frozen(graph)} | {difference:.0e} |'
  )


def _frozen(graph):
  counts = {}
  for reason in graph.frozen.values():
    words = reason.partition("' ")[2] if reason.startswith('layer') else reason
    counts[words] = counts.get(words, 0) + 1
  return '; '.join(f'{count}: {words}' for words, count in counts.items())


def main():
  chosen = _MODELS.value or sorted(models())
  lines = [
    '| model | MACs, millions | after | ratio | groups | frozen layers | difference |',
    '|---|---|---|---|---|---|---|',
  ]
  for name in chosen:
    lines.append(row(name, models()[name]))
    print(lines[-1], flush=True)
  if _MODELS.value:
    return
  text = PAGE.read_text().partition(MARK)[0]
  with atomic_path(PAGE) as temporary:
    temporary.write_text(text + MARK + '\n' + '\n'.join(lines) + '\n')


if __name__ == '__main__':
  command.run(main)
