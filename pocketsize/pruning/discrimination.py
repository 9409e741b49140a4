"""Discrimination-aware channel pruning (Zhuang et al. 2018, arXiv:1810.11809).

PocketFlow's `dis-chn-pruned`. The convolutions are cut into blocks. A classifier at the end of each
block, its head, has a loss L_p; that of the last block is the network's own. First all weights are
tuned with the head (`headed`), then each layer of the block adds channels one by one: the one whose
weights have the largest squared gradient of L_M + L_p, where L_M is half the squared error of the
layer's outputs (section 3.2; algorithms 1 and 2). After each, the layer's kernel is tuned.

Deviation 1: a channel joins with the weights that it had, as in the paper; PocketFlow set the
  weights of all but the first channel to zero before they joined.
Deviation 2: the first channel is scored with no channel in the layer, as in the paper; PocketFlow
  scored it with all of them.
Deviation 3: channels that several layers read are chosen before the first block, by the squared
  gradients of the network's loss in the original model. Each reader counts relative to its total.
  Their readers' kernels are tuned like one added channel's.
Deviation 4: dense layers that read chosen channels choose like convolutions.
Deviation 5: while a layer chooses, batch norms use their moving statistics, so that the numbers
  are those of the model that is kept; the samples are a fixed set, in a fixed order.
Deviation 6: L_M is that of the outputs before an activation in the layer, which has no gradient
  where no channel has joined; and the mean over places of the sum over channels. As a mean over
  both it hardly counts beside L_p.
"""

import dataclasses

import numpy as np

from pocketsize.errors import UserError
from pocketsize.instrument import instrument, strip
from pocketsize.pruning import units as units_module
from pocketsize.pruning.heads import Headed, block_ends, classes, make_head
from pocketsize.pruning.ista import adam
from pocketsize.pruning.layerwise import MEMORY, Layerwise
from pocketsize.pruning.tail import Tail, channel_scores, kernel_gradients

# From which the channels of several readers are chosen.
SURVEY_BATCHES = 8


@dataclasses.dataclass(frozen=True)
class Discrimination:
  """How channels are chosen.

  Attributes:
    stages: heads inside the network, not negative.
    rate: of Adam, which tunes a layer's kernel; positive.
    iterations: of Adam for each channel that joins; at least 1.
  """

  stages: int = 3
  rate: float = 1e-3
  iterations: int = 500

  def __post_init__(self):
    if self.stages < 0 or self.rate <= 0 or self.iterations < 1:
      raise UserError(
        '`stages` must be at least 0, `rate` positive and `iterations` at least 1. '
        f'Received: {self.stages}, {self.rate} and {self.iterations}.'
      )


class Diverged(UserError):
  """A loss is not finite."""


class DiscriminationAware(Layerwise):
  """One model's course; see `Layerwise`.

  `do` does all steps but `blocks`: for those train `headed(block)` with `block_loss(block)` on all
  weights, and then `adopt` it. Adam's state begins anew with each layer.

  Args:
    model, units, counts: see `Layerwise`.
    method: `Discrimination`.
    batches: list of (inputs, labels).
    loss: `loss(labels, logits)`, a scalar.
    seed: of the heads' weights.
    total, memory: see `Layerwise`.

  Attributes:
    blocks: {name of a block's step: path of its last convolution, None in the last block}.
    losses: {path: L_M + L_p after the layer's last step}, of this process' steps.
  """

  def __init__(
    self, model, units, counts, method, batches, loss, *, seed=0, total=np.array, memory=MEMORY
  ):
    images, self._labels = [x for x, _ in batches], [y for _, y in batches]
    super().__init__(model, units, counts, method, images, points=None, total=total, memory=memory)
    self._loss, self._classes = loss, classes(model)
    self._workers = float(total(np.ones(1))[0])
    layers = self._original.layers
    convolutions = [
      path for path, layer in layers.items() if type(layer).__name__ in units_module.CONVOLUTIONS
    ]
    ends = block_ends(convolutions, method.stages)
    self.blocks = {f'block{number}': end for number, end in enumerate([*ends, None], start=1)}
    first = {}
    for index, node in enumerate(self._original.nodes):
      first.setdefault(node.path, index)
    self._ends = {end: self._original.nodes[first[end]].outputs[0] for end in ends}
    self._heads = {
      end: make_head(self._original.shape(tensor), layers[end], self._classes, seed)
      for end, tensor in self._ends.items()
    }
    self._ends[None], self._heads[None] = self._original.outputs[0], None
    order = self._sampling.index
    self._block = {
      path: next(
        block for block, end in self.blocks.items() if not end or order[path] <= first[end]
      )
      for path in self.steps[1:]
    }
    chosen = {path for unit in units if counts[unit.name] < unit.size for path in unit.readers}
    self.steps = ['survey']
    for block in self.blocks:
      self.steps += [block, *(p for p, own in self._block.items() if own == block and p in chosen)]
    self.variables += [weight for head in self._heads.values() if head for weight in head.weights]
    self.losses = {}

  def headed(self, block):
    """Returns the masked model with the head of a block, sharing the current model's weights."""
    end = self.blocks[block]
    if end is None:
      return instrument(self.model, self.masks())
    return Headed(self.model, self.masks(), end, self._heads[end])

  def block_loss(self, block):
    """Returns `loss(labels, outputs)` of `headed`: the network's, and the head's if it has one."""
    if self.blocks[block] is None:
      return self._loss
    return lambda y, outputs: (
      self._loss(y, outputs[:, : self._classes]) + self._loss(y, outputs[:, self._classes :])
    )

  def adopt(self, headed):
    """Takes over what the training of a `headed` model came to."""
    self.model.set_weights(strip(headed).get_weights())
    self.restart()

  def _survey(self):
    joint = []
    for unit in self._units:
      if self._counts[unit.name] == unit.size:
        self._chosen[unit.name].assign(np.ones(unit.size, 'float32'))
      elif len(unit.readers) > 1:
        joint.append(unit)
    scores = self._squares({path for unit in joint for path in unit.readers}) if joint else {}
    for unit in joint:
      sums = sum(_by_place(scores[path], unit, path) for path in unit.readers)
      best = np.argsort(-sums, kind='stable')[: self._counts[unit.name]]
      self._chosen[unit.name].assign(np.isin(np.arange(unit.size), best).astype('float32'))

  def _squares(self, paths):
    """Returns {path: [inputs] squared gradients of the loss in the original, summing to 1}."""
    paths = sorted(paths)
    gradients = kernel_gradients(self._original, paths, self._loss)
    squares = dict.fromkeys(paths, 0.0)
    for x, y in list(zip(self._batches, self._labels, strict=True))[:SURVEY_BATCHES]:
      loss, found = gradients(x, y)
      self._check('The original model', self._total(np.array(loss)))
      for path, gradient in zip(paths, found, strict=True):
        squares[path] = squares[path] + channel_scores(gradient)
    squares = {path: self._total(found) for path, found in squares.items()}
    return {path: found / max(found.sum(), np.finfo(float).tiny) for path, found in squares.items()}

  def _prune(self, path):
    """Adds channels to a layer one by one, and tunes its kernel after each."""
    own = [
      unit
      for unit in self._units
      if list(unit.readers) == [path] and self._counts[unit.name] < unit.size
    ]
    chosen = {unit.name: np.zeros(unit.size, bool) for unit in own}
    mask = self.selected.get(path, np.ones(self._sizes[path])).astype('float32')
    for unit in own:
      mask[unit.readers[path] >= 0] = 0.0
    joining = sum(self._counts[unit.name] for unit in own)
    gradient, layer = self._gradient(path), self._current.layers[path]
    kernel = np.array(layer.kernel)
    # It sees the mask as it is at each step; weights outside have no gradient and stay.
    descent = adam(
      lambda kernel: gradient(kernel, mask) * mask[:, None],
      kernel,
      self._method.rate,
      self._method.iterations * max(joining, 1),
    )
    for _ in range(joining):
      unit, place = self._best(channel_scores(gradient(kernel, mask)), path, own, chosen)
      chosen[unit.name][place] = True
      mask[unit.readers[path] == place] = 1.0
      for _ in range(self._method.iterations):
        kernel = next(descent)
    # Where all channels were chosen before, the steps of one are left.
    for tuned in descent:
      kernel = tuned
    self._check(f'Layer {path!r}', kernel)
    layer.kernel.assign(kernel * mask[:, None])
    for name, kept in chosen.items():
      self._chosen[name].assign(kept.astype('float32'))

  def _best(self, scores, path, own, chosen):
    """Returns (unit, place) of the channel that joins next: the best score, among equals the first.

    Args:
      scores: [inputs] of the layer.
      own: the units to choose from.
      chosen: {unit name: [size] bool} that have joined.
    """
    best, found = -1.0, None
    for unit in own:
      if chosen[unit.name].sum() == self._counts[unit.name]:
        continue
      sums = np.where(chosen[unit.name], -1.0, _by_place(scores, unit, path))
      if sums.max() > best:
        best, found = sums.max(), (unit, int(sums.argmax()))
    return found

  def _gradient(self, path):
    """Returns (kernel, mask) -> the gradient of L_M + L_p by kernel * mask, on the next batch."""
    index, end = self._sampling.index[path], self.blocks[self._block[path]]
    head, original = self._heads[end], self._original.layers[path]

    def loss(y, x):
      return self._loss(y, head(x, training=False) if head else x)

    tail = Tail(self._current, index, self._ends[end], original, loss)
    read, batches = self._original.nodes[index].inputs[0], self._rounds(index)

    def gradient(kernel, mask):
      originals, values, labels = next(batches)
      value, slope = tail.gradient(kernel * mask[:, None], values, originals[read], labels)
      sums = self._total(np.append(slope, value)) / self._workers
      self._check(f'Layer {path!r}', sums[-1])
      self.losses[path] = float(sums[-1])
      return sums[:-1].reshape(kernel.shape).astype(kernel.dtype)

    return gradient

  def _rounds(self, index):
    """Yields ({tensor: value} of the original, of the current model, labels) again and again."""
    while True:
      for (original, current), y in zip(self._walk.at(index), self._labels, strict=True):
        yield original, current, y

  def _check(self, what, values):
    if not np.isfinite(values).all():
      raise Diverged(
        f'{what}: the loss or a weight became infinite or not a number while channels were chosen; '
        f'a lower `rate` usually helps. Received: rate={self._method.rate}.'
      )


def _by_place(values, unit, path):
  """Returns [size] sums of a reader's [inputs] values over the channels of a unit."""
  places = unit.readers[path]
  return np.bincount(places[places >= 0], values[places >= 0], unit.size)
