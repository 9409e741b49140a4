"""Batch norm that is frozen from a step on: its moving statistics are used, and stand still.

Late in quantization-aware training the statistics of a batch are noise that the deployed network
has not (Krishnamoorthi 2018, arXiv:1806.08342, section 3.2.2). Factors and shifts go on training.
"""

import keras

from pocketsize.compressor import Compressor
from pocketsize.errors import UserError
from pocketsize.fused_bn import SWITCH_POINT, StatisticsSwitch
from pocketsize.transform import Placement


class FreezeBatchNorm(Compressor):
  """Freezes all batch norms that train; sits in any stack.

  Args:
    begin_step: the first step that computes with frozen statistics, at least 0.
  """

  def __init__(self, begin_step):
    super().__init__()
    if begin_step < 0:
      raise UserError(f'`begin_step` must be at least 0. Received: {begin_step}.')
    self.begin_step = begin_step

  def plan(self, graph):
    return [
      Placement(path, SWITCH_POINT, StatisticsSwitch())
      for path, layer in graph.layers.items()
      if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
    ]

  def bind(self, model):
    self._switches = [each for each in model.transforms if isinstance(each, StatisticsSwitch)]

  def update(self, step):
    for switch in self._switches:
      switch.switch(step >= self.begin_step)

  def statistics(self):
    frozen = sum(switch.is_frozen for switch in self._switches)
    return {'frozen_batch_norms': float(frozen)}
