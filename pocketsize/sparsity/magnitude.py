"""Gradual magnitude pruning of single weights (Zhu & Gupta 2017, arXiv:1710.01878).

Deviation 1: a mask acts in the forward pass, so pruned weights get no gradient of the task, keep
  their value but for weight decay, and come back when the threshold or their neighbours leave them
  above it. Deviation 2: the optimizer's slots are not reset when a mask changes; momentum of a
  pruned weight decays by itself.
"""

import dataclasses

import keras
import numpy as np

from pocketsize import schedules, targets
from pocketsize.compressor import Compressor, Stage, register
from pocketsize.errors import UserError
from pocketsize.transform import Placement, Transform


def dropped(size, ratio):
  """Returns how many of `size` weights a ratio drops: the nearest whole number of them."""
  return round(ratio * size)


def magnitude_mask(kernel, ratio):
  """Returns a 0/1 float32 mask of the kernel's shape that drops its smallest weights.

  Exactly `dropped(size, ratio)` weights are dropped; among equal magnitudes the first go first.

  Args:
    kernel: float array.
    ratio: share of weights to drop, in [0, 1].
  """
  magnitude = np.abs(np.asarray(kernel)).ravel()
  mask = np.ones(magnitude.size, np.float32)
  mask[np.argsort(magnitude, kind='stable')[: dropped(magnitude.size, ratio)]] = 0.0
  return mask.reshape(np.shape(kernel))


def heuristic_ratios(sizes, ratio):
  """Returns a ratio for each layer that grows with the logarithm of its size (PocketFlow's
  `heurist`).

  r_i = a ln(n_i) with a = r sum(n) / sum(n ln n), so that the overall ratio is `ratio`. A ratio
  that would exceed 0.99 is held there and the others make up for it, as far as they can.

  Args:
    sizes: [layers] numbers of weights, each at least 2.
    ratio: overall share to drop, in [0, 1).
  """
  sizes = np.asarray(sizes, np.float64)
  ratios = np.zeros(len(sizes))
  held = np.zeros(len(sizes), bool)
  while not held.all():
    free = sizes[~held]
    factor = (ratio * sizes.sum() - 0.99 * sizes[held].sum()) / (free * np.log(free)).sum()
    ratios[~held] = factor * np.log(free)
    over = ratios > 0.99
    if not over.any():
      break
    held |= over
    ratios[held] = 0.99
  return ratios


@keras.saving.register_keras_serializable(package='pocketsize')
class Mask(Transform):
  """Multiplies a weight by a mask of zeros and ones, all ones at first."""

  order = 10

  def build(self, shape):
    self.mask = self.add_weight(name='mask', shape=shape, initializer='ones', trainable=False)
    self.built = True

  def call(self, x, training=None):
    return x * self.mask


@dataclasses.dataclass(frozen=True)
class MagnitudeConfig:
  """What to prune and when.

  Attributes:
    ratio: final share of a layer's weights to drop, in [0, 1).
    begin_step: the step at which the ratio begins to grow from 0.
    end_step: the step at which it is reached; not above `begin_step`: at once.
    update_every: steps between two new masks.
    exponent: of the polynomial growth, positive.
  """

  ratio: float = 0.75
  begin_step: int = 0
  end_step: int = 0
  update_every: int = 100
  exponent: float = 3.0

  def __post_init__(self):
    if not 0.0 <= self.ratio < 1.0:
      raise UserError(
        f'`ratio` is the share of weights to drop and must be in [0, 1). Received: {self.ratio}.'
      )
    if self.update_every < 1 or self.exponent <= 0:
      raise UserError(
        '`update_every` must be at least 1 and `exponent` positive. '
        f'Received: {self.update_every}, {self.exponent}.'
      )

  @classmethod
  def neutral(cls):
    """Returns the configuration that changes nothing."""
    return cls(ratio=0.0)

  @property
  def last_step(self):
    """The step at which the last masks are made."""
    return max(self.begin_step, self.end_step)

  def ratio_at(self, step):
    """Returns the ratio that masks made at `step` have."""
    return schedules.polynomial(
      step, self.begin_step, self.end_step, 0.0, self.ratio, self.exponent
    )

  def is_due(self, step):
    """Returns whether new masks are made before optimizer step `step`."""
    return self.begin_step <= step <= self.last_step and (
      (step - self.begin_step) % self.update_every == 0 or step == self.last_step
    )


@register('magnitude')
class Magnitude(Compressor):
  """Drops the smallest weights of each layer, on a polynomial schedule."""

  Config = MagnitudeConfig

  def plan(self, graph):
    configs, self.skipped = targets.resolve(graph, self.rules)
    self._configs = configs
    return [
      Placement(path, point, Mask())
      for path in configs
      for point in targets.weight_points(graph.layers[path])
    ]

  def bind(self, model):
    self._masks = [
      (
        self._configs[placement.path],
        getattr(model.graph.layers[placement.path], placement.point),
        placement.transform,
      )
      for placement in model.placements
      if isinstance(placement.transform, Mask)
    ]

  def update(self, step):
    for config, kernel, transform in self._masks:
      if config.is_due(step):
        transform.mask.assign(magnitude_mask(kernel, config.ratio_at(step)))

  def stage(self, step):
    if any(step < config.last_step for config in self._configs.values()):
      return Stage.PARTIAL
    # Weights that were restored may have brought masks of an earlier step.
    for config, _, transform in self._masks:
      mask = np.array(transform.mask)
      if np.sum(mask == 0.0) < dropped(mask.size, config.ratio_at(config.last_step)):
        return Stage.PARTIAL
    return Stage.FULL

  def statistics(self):
    kept = sum(float(np.sum(transform.mask)) for _, _, transform in self._masks)
    total = sum(int(np.prod(transform.mask.shape)) for _, _, transform in self._masks)
    return {'sparsity': 1.0 - kept / total if total else 0.0}
