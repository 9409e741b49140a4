"""What a search for bits costs: roll-outs a minute that score random bits, and the seconds of hawq.

python -m tools.benchmark.search --net=resnet_at_cifar10 --pretrained=FILE --data_dir_local=DIR
python -m tools.benchmark.search --net=resnet_at_ilsvrc12 --resnet_size=50 --rollouts=0 \
  --hawq --trace_samples=32 --trace_batch=8 --iterations=10

Without --pretrained the weights are random, and without --data_dir_local so are the images; that
costs the same.
"""

from tools import command  # isort: skip (first: it keeps TensorFlow's start quiet)

import statistics
import time

import numpy as np
from absl import flags

from learners.config import RunConfig
from learners.judge import Judge
from learners.progress import ProgressReport
from pocketsize import targets
from pocketsize.allocation import costs, traces, variants
from pocketsize.allocation.exact import minimise
from pocketsize.allocation.problem import Problem
from pocketsize.allocation.scoring import Scorer
from pocketsize.allocation.sensitivity import hawq_losses
from pocketsize.distillation import Distillation
from pocketsize.graph import Graph
from pocketsize.instrument import instrument
from pocketsize.quantization.uniform import Uniform, UniformConfig
from tools.benchmark import models

BITS = tuple(range(2, 9))

_NET = flags.DEFINE_string('net', 'resnet_at_cifar10', 'a net')
_RESNET_SIZE = flags.DEFINE_integer('resnet_size', None, 'layers with weights, of a ResNet')
_PRETRAINED = flags.DEFINE_string('pretrained', None, 'file of weights; unset: random')
_DATA = flags.DEFINE_string('data_dir_local', None, 'folder of the data set; unset: random images')
_SAMPLES = flags.DEFINE_integer('samples', 1000, 'held-out images of a score', lower_bound=1)
_BATCH = flags.DEFINE_integer('batch', 250, 'images of a forward pass', lower_bound=1)
_BN_SAMPLES = flags.DEFINE_integer(
  'bn_samples', 256, 'images for the statistics of batch norm, in each score', lower_bound=0
)
_ROLLOUTS = flags.DEFINE_integer('rollouts', 20, 'scores of random bits', lower_bound=0)
_HAWQ = flags.DEFINE_bool('hawq', False, 'choose bits by hawq as well')
_MEAN_BITS = flags.DEFINE_float('mean_bits', 4.0, 'their budget, of all layers', lower_bound=2)
_DISTILLED = flags.DEFINE_bool(
  'distilled', False, 'second derivatives of the loss of a run with --enbl_dst'
)
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
  if _HAWQ.value:
    command.print_table(
      (
        *('net', 'layers', 'images', 'rounds', 'traces, s', 'errors, s', 'choice, s', 'all, s'),
        *('standard error', 'of all', 'negative', 'mean bits'),
      ),
      [_hawq(helper, model)],
    )


def _kernels(model):
  """Returns the `Variable`s of the bits of all layers, and the `Variants` of them."""
  graph = Graph(model)
  paths = list(targets.weighted_layers(graph))
  variables = costs.bit_variables(graph, dict.fromkeys(paths, BITS))
  config = dict.fromkeys(paths, UniformConfig())
  return variables, variants.Variants(model, variables, variants.quantized(model, Uniform, config))


def _rollouts(helper, model):
  """Returns the row of scores with random bits of all layers."""
  variables, made = _kernels(model)
  began = time.monotonic()
  for level in range(len(BITS)):
    made.kernels([level] * len(variables))
  kernels = time.monotonic() - began
  batches = _batches(helper, model, 'val', _SAMPLES.value, _BATCH.value)
  training = _batches(helper, model, 'fit', _BN_SAMPLES.value, RunConfig.batch_size)
  began = time.monotonic()
  scorer = Scorer(model, batches, helper.evaluator(), [x for x, _ in training])
  scorer.score({})
  compiling, seconds, rng = time.monotonic() - began, [], np.random.default_rng(0)
  for _ in range(_ROLLOUTS.value):
    began = time.monotonic()
    scorer.score(made.kernels(rng.integers(0, len(BITS), len(variables))))
    seconds.append(time.monotonic() - began)
  rollout = statistics.median(seconds)
  images = sum(len(y) for _, y in batches)
  figures = (f'{kernels:.1f}', f'{compiling:.1f}', f'{rollout:.3f}', f'{60 / rollout:.0f}')
  return model.name, str(len(variables)), str(images), *figures


def _hawq(helper, model):
  """Returns the row of a choice by second derivatives."""
  variables, made = _kernels(model)
  paths = [variable.name for variable in variables]
  graph = Graph(model)
  problem = Problem(variables, costs.mean_bits(graph, variables), _MEAN_BITS.value)
  batches = _batches(helper, model, 'fit', _TRACE_SAMPLES.value, _TRACE_BATCH.value)
  judge = Judge(helper, Distillation(instrument(model)) if _DISTILLED.value else None)
  times = [time.monotonic()]
  found = traces.estimate(
    model,
    judge.loss,
    judge.marked(batches),
    paths,
    iterations=_ITERATIONS.value,
    tolerance=0.0,
    follow=lambda rounds: ProgressReport.over('second derivatives', rounds),
  )
  times.append(time.monotonic())
  losses = hawq_losses(problem, found.means, made)
  times.append(time.monotonic())
  levels = minimise(problem, losses)
  times.append(time.monotonic())
  relative = [found.errors[path] / max(abs(found.means[path]), 1e-30) for path in paths]
  total = sum(error**2 for error in found.errors.values()) ** 0.5 / abs(sum(found.means.values()))
  negative = sum(mean < 0.0 for mean in found.means.values())
  images = sum(len(x) for x, _ in batches)
  return (
    *(model.name, str(len(paths)), str(images), str(found.rounds)),
    *(f'{seconds:.1f}' for seconds in (*np.diff(times), times[-1] - times[0])),
    *(f'{statistics.median(relative):.0%}', f'{total:.0%}', str(negative)),
    f'{problem.cost.of(levels):.3f}',
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
