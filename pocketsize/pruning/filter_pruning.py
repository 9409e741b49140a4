"""Filter pruning in training: whole channels are masked on a schedule (after NNCF 2.4).

What is masked is what `shrink.mask` zeroes, so `compact` makes the stripped model smaller. Scores
are those of the latent weights: a masked channel can come back at a later update.

Deviation 1: NNCF makes masks at the beginning of epochs, this every so many steps. Deviation 2: by
  `scope='network'` NNCF divides a layer's weights by their norm, this its scores by their mean.
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from pocketsize.channel_graph import ChannelGraph
from pocketsize.compressor import Compressor, Stage, register
from pocketsize.errors import UserError
from pocketsize.pruning import filters, selection, taylor
from pocketsize.pruning.channel_mask import ChannelMask
from pocketsize.pruning.filter_config import FilterConfig
from pocketsize.shrink import zeroed
from pocketsize.transform import Placement


class _Place(NamedTuple):
  """One mask: its transform, its `Slice`, its channels' places in groups, and those it may zero."""

  transform: ChannelMask
  part: object
  places: dict
  zeroed: np.ndarray


@register('filters')
class FilterPruning(Compressor):
  """Masks the least important channels of each group that the rules choose.

  With several rules a group takes the configuration of the layer it is named after.

  Attributes:
    configs: {group name: its `FilterConfig`}; filled by `plan`.
  """

  Config = FilterConfig

  def plan(self, graph):
    self._keep_shift = self._one_keep_shift()
    channels = ChannelGraph(graph.model, self._keep_shift)
    self.configs, self.skipped = selection.select(channels, self.rules)
    self._check(channels)
    return [
      Placement(path, part.weight, ChannelMask(part.axis, observes))
      for path, part, observes in self._parts(channels)
    ]

  def _one_keep_shift(self):
    found = {rule.config.prune_batch_norms for rule in self.rules if not rule.exclude}
    if len(found) > 1:
      raise UserError(
        '`prune_batch_norms` must be the same in every entry for filters. Received: True and False.'
      )
    return found == {False}

  def _check(self, channels):
    configs = list(dict.fromkeys(self.configs.values()))
    for config in configs:
      if len(configs) > 1 and (config.macs is not None or config.scope == 'network'):
        raise UserError(
          "With `macs` or scope 'network' all pruned layers must have the same configuration. "
          f'Received: {configs[0]} and {configs[1]}.'
        )
      if config.macs is not None:
        # Whether it can be met does not depend on the scores.
        self._choose(channels, config, filters.scores(channels, 'random'), macs=config.macs)
      if config.criterion == 'bn_scale':
        filters.scores(channels, 'bn_scale', skip=self._skip(channels, config))

  def _parts(self, channels):
    """Yields (path, `Slice`, whether gradients are observed) of every mask."""
    for part in channels.slices:
      places = channels.places(part.ids)
      names = [name for name in places if name in self.configs]
      if part.role not in ('out', 'shift') or not names:
        continue
      pruned = np.any([places[name] >= 0 for name in names], axis=0)
      observes = taylor.is_observed(part) and any(
        self.configs[name].criterion == 'taylor' for name in names
      )
      if observes or (pruned & zeroed(channels, part)).any():
        for path, layer in channels.graph.layers.items():
          if layer is part.layer:
            yield path, part, observes

  def bind(self, model):
    self._channels = ChannelGraph(model.source, self._keep_shift)
    masks = {
      (path, point, transform.axis): transform
      for path, point, transform in model.placements
      if isinstance(transform, ChannelMask)
    }
    self._masks = [
      _Place(
        masks[path, part.weight, part.axis],
        part,
        self._channels.places(part.ids),
        zeroed(self._channels, part),
      )
      for path, part, _ in self._parts(self._channels)
    ]
    self._observed = [mask for mask in self._masks if mask.transform.observes]
    self._sums = taylor.LayerSums(self._channels, [mask.part for mask in self._observed])
    self._square_pending = tf.function(self._squared_pending, autograph=False)

  def _squared_pending(self):
    """Takes the gradients that came since the last call, one batch's, into the importances."""
    transforms = [mask.transform for mask in self._observed]
    pending = [tf.identity(transform.pending.value) for transform in transforms]
    seen = tf.reduce_any([tf.reduce_any(sums != 0.0) for sums in pending])
    squares = self._sums.at_slices(self._sums.squares(pending))
    for transform, square in zip(transforms, squares, strict=True):
      transform.importance.assign_add(square)
      transform.batches.assign_add(tf.cast(seen, tf.float32))
      transform.pending.assign(tf.zeros_like(square))

  def update(self, step):
    if self._observed:
      self._square_pending()
    due = [config for config in dict.fromkeys(self.configs.values()) if config.is_due(step)]
    if not due:
      return
    keep = self.keep()
    scores = {name: np.zeros(len(kept)) for name, kept in keep.items()}
    for config in due:
      chosen, values = self._chosen(config, step)
      for name in chosen:
        if self.configs.get(name) == config:
          keep[name], scores[name] = chosen[name], values[name]
    keep = filters.without_empty_tensors(self._channels, scores, keep)
    for transform, _, places_by_group, may_be_zero in self._masks:
      values = np.ones(len(may_be_zero), np.float32)
      for name, places in places_by_group.items():
        known = (places >= 0) & may_be_zero
        values[known] = keep[name][places[known]]
      transform.mask.assign(values)

  def keep(self):
    """Returns {group name: [channels] bool}, what is not masked, as `shrink` takes it."""
    keep = {group.name: np.ones(group.size, bool) for group in self._channels.groups}
    for transform, _, places_by_group, may_be_zero in self._masks:
      values = np.array(transform.mask) > 0.0
      for name, places in places_by_group.items():
        known = (places >= 0) & may_be_zero
        keep[name][places[known]] = values[known]
    return keep

  def _chosen(self, config, step):
    """Returns (`keep` of every group, its scores) for masks made at `step` with `config`."""
    # Before the ratio has begun to grow there may be no gradient to score with.
    if config.drops_nothing_at(step):
      return [
        {group.name: np.full(group.size, value) for group in self._channels.groups}
        for value in (True, 0.0)
      ]
    scores = self.scores(config)
    if config.macs is None:
      return self._choose(self._channels, config, scores, config.ratio_at(step)), scores
    final = filters.ratio_for(
      self._channels,
      scores,
      config.macs,
      scope=config.scope,
      multiple=config.multiple,
      skip=self._skip(self._channels, config),
    )
    return self._choose(self._channels, config, scores, config.ratio_at(step, final)), scores

  def _choose(self, channels, config, scores, ratio=None, macs=None):
    return filters.choose(
      channels,
      scores,
      ratio=ratio,
      macs=macs,
      scope=config.scope,
      multiple=config.multiple,
      skip=self._skip(channels, config),
    )

  def _skip(self, channels, config):
    return [group.name for group in channels.groups if self.configs.get(group.name) != config]

  def scores(self, config):
    """Returns {group name: [channels] scores} by which the groups with `config` are pruned now.

    Raises:
      UserError: criterion 'taylor' has seen no gradient.
    """
    if config.criterion != 'taylor':
      skip = self._skip(self._channels, config)
      return filters.scores(self._channels, config.criterion, config.seed, skip)
    batches = max(float(mask.transform.batches) for mask in self._observed)
    if not batches:
      raise UserError(
        "Criterion 'taylor' has seen no gradient: train this model before its first masks, "
        'or score with `pocketsize.pruning.taylor.taylor_scores`. '
        f'Received: begin_step={config.begin_step} and no training step.'
      )
    values = self._sums.from_slices([mask.transform.importance for mask in self._observed])
    return self._sums.scores(values / batches)

  def stage(self, step):
    if any(step < config.last_step for config in self.configs.values()):
      return Stage.PARTIAL
    # Weights that were restored may have brought masks of an earlier step.
    keep = self.keep() if self.configs else {}
    reached = [self._is_reached(config, keep) for config in set(self.configs.values())]
    return Stage.FULL if all(reached) else Stage.PARTIAL

  def _is_reached(self, config, keep):
    """Returns whether `keep` drops as much as `config` says in the end."""
    if config.macs is not None:
      return filters.remaining_macs(self._channels, keep) <= config.macs
    kept = [keep[name] for name, other in self.configs.items() if other == config]
    most = filters.most_kept(
      [len(each) for each in kept],
      config.ratio_at(config.last_step),
      config.scope,
      config.multiple,
    )
    # Of a tensor that would lose all the best channel stays.
    return sum(each.sum() for each in kept) <= most + filters.tensors_of_one(self._channels, keep)

  def statistics(self):
    if not self.configs:
      return {'channels_dropped': 0.0, 'macs_left': 1.0}
    keep = self.keep()
    kept = [keep[name].mean() * len(keep[name]) for name in self.configs]
    total = sum(len(keep[name]) for name in self.configs)
    return {
      'channels_dropped': 1.0 - float(sum(kept)) / total,
      'macs_left': float(filters.remaining_macs(self._channels, keep)),
    }
