"""What a search for bits costs: roll-outs a minute that score random bits, and seconds of traces:

python -m tools.benchmark.search --net=resnet_at_cifar10 --pretrained=FILE --data_dir_local=DIR
python -m tools.benchmark.search --net=resnet_at_ilsvrc12 --resnet_size=50 --rollouts=0 \
  --traces --trace_samples=32 --trace_batch=8 --iterations=10

Without --pretrained the weights are random, and without --data_dir_local so are the images; that
costs the same.
"""

from tools import command  # isort: skip (first: it keeps TensorFlow's start quiet)

import statistics
import time

import numpy as np
from absl import flags

from pocketsize import targets
from pocketsize.allocation import traces, variants
from pocketsize.allocation.problem import Variable
from pocketsize.allocation.scoring import Scorer
from pocketsize.graph import Graph
from pocketsize.quantization.uniform import Uniform, UniformConfig
from tools.benchmark import models

BITS = tuple(range(2, 9))

_NET = flags.DEFINE_string('net', 'resnet_at_cifar10', 'a net')
_RESNET_SIZE = flags.DEFINE_integer('resnet_size', None, 'layers with weights, of a ResNet')
_PRETRAINED = flags.DEFINE_string('pretrained', None, 'file of weights; unset: random')
_DATA = flags.DEFINE_string('data_dir_local', None, 'folder of the data set; unset: random images')
_SAMPLES = flags.DEFINE_integer('samples', 1000, 'held-out images of a score', lower_bound=1)
_BATCH = flags.DEFINE_integer('batch', 100, 'images of a forward pass', lower_bound=1)
_BN_SAMPLES = flags.DEFINE_integer(
  'bn_samples', 0, 'images for the statistics of batch norm, in each score', lower_bound=0
)
_ROLLOUTS = flags.DEFINE_integer('rollouts', 20, 'scores of random bits', lower_bound=0)
_TRACES = flags.DEFINE_bool('traces', False, 'estimate the Hessian traces of the layers as well')
_TRACE_SAMPLES = flags.DEFINE_integer('trace_samples', 32, 'their images', lower_bound=1)
_TRACE_BATCH = flags.DEFINE_integer('trace_batch', 8, 'images of a product', lower_bound=1)
_ITERATIONS = flags.DEFINE_integer('iterations', 10, 'rounds of products', lower_bound=1)
_CLASSES = 1000


def main():
  options = {'data_dir_local': _DATA.value, 'resnet_size': _RESNET_SIZE.value}
  if _NET.value == 'resnet_at_cifar10' and _PRETRAINED.value:
    options['shortcut'] = 'pad'
  if _NET.value == 'resnet_at_ilsvrc12' and not _DATA.value:
    options['nb_classes'] = _CLASSES
  helper = models.helper(_NET.value, options)
  model = helper.load(_PRETRAINED.value) if _PRETRAINED.value else helper.build()
  if _ROLLOUTS.value:
    command.print_table(
      ('net', 'layers', 'images', 'kernels, s', 'compiling, s', 'roll-out, s', 'a minute'),
      [_rollouts(helper, model)],
    )
  if _TRACES.value:
    command.print_table(
      ('net', 'layers', 'images', 'rounds', 'seconds', 'standard error', 'of all', 'negative'),
      [_traces(helper, model)],
    )


def _rollouts(helper, model):
  """Returns the row of scores with random bits of all layers."""
  paths = list(targets.weighted_layers(Graph(model)))
  variables = [Variable(path, BITS) for path in paths]
  config = dict.fromkeys(paths, UniformConfig())
  made = variants.Variants(model, variables, variants.quantized(model, Uniform, config))
  began = time.monotonic()
  for level in range(len(BITS)):
    made.kernels([level] * len(paths))
  kernels = time.monotonic() - began
  batches = _batches(helper, model, 'val', _SAMPLES.value, _BATCH.value)
  training = _batches(helper, model, 'fit', _BN_SAMPLES.value, _BATCH.value)
  began = time.monotonic()
  scorer = Scorer(model, batches, helper.evaluator(), [x for x, _ in training])
  scorer.score({})
  compiling, seconds, rng = time.monotonic() - began, [], np.random.default_rng(0)
  for _ in range(_ROLLOUTS.value):
    began = time.monotonic()
    scorer.score(made.kernels(rng.integers(0, len(BITS), len(paths))))
    seconds.append(time.monotonic() - began)
  rollout = statistics.median(seconds)
  images = sum(len(y) for _, y in batches)
  figures = (f'{kernels:.1f}', f'{compiling:.1f}', f'{rollout:.3f}', f'{60 / rollout:.0f}')
  return model.name, str(len(paths)), str(images), *figures


def _traces(helper, model):
  """Returns the row of Hessian traces of all layers."""
  paths = list(targets.weighted_layers(Graph(model)))
  batches = _batches(helper, model, 'fit', _TRACE_SAMPLES.value, _TRACE_BATCH.value)
  began = time.monotonic()
  found = traces.estimate(
    model, helper.loss, batches, paths, iterations=_ITERATIONS.value, tolerance=0.0
  )
  seconds = time.monotonic() - began
  relative = [found.errors[path] / max(abs(found.means[path]), 1e-30) for path in paths]
  total = sum(error**2 for error in found.errors.values()) ** 0.5 / abs(sum(found.means.values()))
  negative = sum(mean < 0.0 for mean in found.means.values())
  images = sum(len(y) for _, y in batches)
  return (
    *(model.name, str(len(paths)), str(images), str(found.rounds), f'{seconds:.1f}'),
    *(f'{statistics.median(relative):.0%}', f'{total:.0%}', str(negative)),
  )


def _batches(helper, model, split, samples, batch):
  """Returns (x, y) batches of about so many images, of the data set or random."""
  sizes = [min(batch, samples - start) for start in range(0, samples, batch)]
  if not _DATA.value:
    rng = np.random.default_rng(0)
    return [
      (
        rng.standard_normal((size, *model.input_shape[1:]), np.float32),
        rng.integers(0, model.output_shape[-1], size),
      )
      for size in sizes
    ]
  data = helper.dataset().load(split, batch=batch, training=split == 'fit')
  return [(x.numpy(), y.numpy()) for x, y in data.take(len(sizes))]


if __name__ == '__main__':
  command.run(main)
