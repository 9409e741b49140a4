"""Time and memory of choosing channels and reconstructing all layers of a net:

python -m tools.benchmark.selection --net=resnet_at_cifar10 --pretrained=FILE --data_dir_local=DIR

Drops half the channels of each unit. Without --pretrained the weights are random, and those of
keras.applications are, as are its images; that costs the same.
"""

from tools import command  # isort: skip (first: it keeps TensorFlow's start quiet)

import math
import resource
import time

import keras
import numpy as np
from absl import flags

from pocketsize.channel_graph import ChannelGraph
from pocketsize.pruning import units
from pocketsize.pruning.ista import Ista
from pocketsize.pruning.lasso import Lasso
from pocketsize.pruning.layerwise import Layerwise
from pocketsize.pruning.proximal import Proximal
from tools.benchmark import models

METHODS = {'lasso': Lasso, 'ista': Ista, 'proximal': Proximal}

_NET = flags.DEFINE_string('net', 'resnet_at_cifar10', 'a net, or a model of keras.applications')
_RESNET_SIZE = flags.DEFINE_integer('resnet_size', None, 'layers with weights, of a ResNet')
_PRETRAINED = flags.DEFINE_string('pretrained', None, 'file of weights; unset: random')
_DATA = flags.DEFINE_string('data_dir_local', None, 'folder of the data set')
_METHOD = flags.DEFINE_enum('method', 'lasso', list(METHODS), 'how channels are chosen')
_TRUNK = flags.DEFINE_enum('trunk', 'shared', units.TRUNKS, 'channels that several layers read')
_SAMPLES = flags.DEFINE_integer('samples', 5000, 'images', lower_bound=1)
_POINTS = flags.DEFINE_integer('points', 10, 'output positions of each image', lower_bound=1)
_BATCH = flags.DEFINE_integer('batch', 100, 'images of a forward pass', lower_bound=1)
_MEMORY = flags.DEFINE_float('memory', 2.0, 'GiB for kept activations', lower_bound=0.0)


def main():
  model, batches = _application() or _net()
  found, _ = units.units(ChannelGraph(model), _TRUNK.value)
  before = _peak()
  began = time.monotonic()
  course = Layerwise(
    model,
    found,
    units.counts(found, 0.5),
    METHODS[_METHOD.value](),
    batches,
    points=_POINTS.value,
    memory=int(_MEMORY.value * 2**30),
  )
  for step in course.steps:
    course.do(step)
  total, forward = time.monotonic() - began, course.forward_seconds
  command.print_table(
    ('net', 'layers', 'seconds', 'forward', 'ratio', 'GiB before', 'GiB at the peak'),
    [
      (
        model.name,
        str(len(course.steps) - 1),
        f'{total:.1f}',
        f'{forward:.1f}',
        f'{total / forward:.2f}',
        f'{before:.2f}',
        f'{_peak():.2f}',
      )
    ],
  )


def _application():
  """Returns (model, batches) of keras.applications with random images, or None."""
  make = getattr(keras.applications, _NET.value, None)
  if make is None:
    return None
  model, rng = make(weights=None), np.random.default_rng(0)
  shape = (_BATCH.value, *model.input_shape[1:])
  count = math.ceil(_SAMPLES.value / _BATCH.value)
  return model, [rng.standard_normal(shape, np.float32) for _ in range(count)]


def _net():
  """Returns (model, batches) of one of our nets, with its training images."""
  options = {'data_dir_local': _DATA.value, 'resnet_size': _RESNET_SIZE.value}
  if _NET.value == 'resnet_at_cifar10' and _PRETRAINED.value:
    options['shortcut'] = 'pad'
  helper = models.helper(_NET.value, options, ', or a model of keras.applications')
  model = helper.load(_PRETRAINED.value) if _PRETRAINED.value else helper.build()
  data = helper.dataset().load('train', batch=_BATCH.value, training=True)
  return model, [x.numpy() for x, _ in data.take(math.ceil(_SAMPLES.value / _BATCH.value))]


def _peak():
  """Returns the most memory that this process has had, in GiB."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == '__main__':
  command.run(main)
