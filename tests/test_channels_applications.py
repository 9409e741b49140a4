"""Models of keras.applications: residual, inverted, squeezed, separable."""

import channels
import keras
import numpy as np
import pytest

from pocketsize import cost
from pocketsize.channel_graph import ChannelGraph
from pocketsize.graph import Graph
from pocketsize.shrink import mask, shrink


@pytest.mark.parametrize(
  'name', ['ResNet50V2', 'MobileNetV2', 'MobileNetV3Small', 'EfficientNetV2B0', 'Xception']
)
def test_half_of_the_channels_goes(name):
  keras.utils.set_random_seed(0)
  build = getattr(keras.applications, name)
  model = build(weights=None, input_shape=(96, 96, 3), classes=10)
  rng = np.random.default_rng(0)
  for weight in model.weights:
    if weight.name in ('beta', 'bias', 'moving_mean'):
      weight.assign(rng.normal(size=weight.shape) * 0.3)
  graph = ChannelGraph(model)
  keep = channels.half(graph)
  smaller = shrink(model, keep)
  x = np.random.default_rng(0).uniform(size=(1, 96, 96, 3)).astype('float32')
  np.testing.assert_allclose(mask(model, keep)(x), smaller(x), rtol=1e-5, atol=1e-5)
  assert cost.macs(Graph(smaller)) < 0.36 * cost.macs(Graph(model))
