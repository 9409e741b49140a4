"""The training steps that `step_time.py` times: ours, stock Keras, and tfmot on a tf_keras twin."""

import keras
import numpy as np
import tensorflow as tf

from nets.resnet_at_cifar10 import ModelHelper
from pocketsize.configure import compress
from pocketsize.instrument import instrument
from pocketsize.quantization.non_uniform import NonUniformConfig
from pocketsize.quantization.placing import FLOAT_BITS
from pocketsize.quantization.twin import build_twin
from pocketsize.quantization.uniform import UniformConfig
from pocketsize.sparsity.magnitude import MagnitudeConfig
from tools.benchmark.rounds import Variant

LEARNING_RATE, MOMENTUM = 0.01, 0.9
# Pruning late in the growth of a long run: masks hold the full ratio, and still change.
RATIO, PRUNING_STEPS = 0.75, 100_000


class Bench:
  """What the variants have in common: the net and one batch.

  Args:
    options: `Options`.
  """

  def __init__(self, options):
    self.helper = ModelHelper(ModelHelper.Config(resnet_size=20, shortcut=options.shortcut))
    rng = np.random.default_rng(0)
    self.images = rng.normal(size=(options.batch_size, 32, 32, 3)).astype(np.float32)
    self.labels = rng.integers(0, 10, options.batch_size)

  def net(self):
    return self.helper.build()

  def twin(self):
    return build_twin(self.net()).model

  def keras(self, model, before=lambda number: None, **fields):
    """Returns the variant that trains a Keras 3 model after `before(number)`."""
    model.compile(
      keras.optimizers.SGD(LEARNING_RATE, MOMENTUM),
      keras.losses.SparseCategoricalCrossentropy(from_logits=True),
      jit_compile=False,
    )
    model.make_train_function()
    return self._variant(model.train_function, before, **fields)

  def tf_keras(self, model, before=lambda number: None, **fields):
    """Returns the variant that trains a tf_keras model after `before(number)`."""
    import tf_keras

    model.compile(
      tf_keras.optimizers.SGD(LEARNING_RATE, MOMENTUM),
      tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True),
      jit_compile=False,
    )
    return self._variant(model.make_train_function(), before, **fields)

  def _variant(self, train, before, **fields):
    batches = iter(tf.data.Dataset.from_tensors((self.images, self.labels)).repeat())

    def step(number):
      before(number)
      float(train(batches)['loss'])

    return Variant(step, **fields)

  def compressed(self, update_every, **entry):
    """Returns the variant with one of our algorithms; `entry` is that of a config_list."""
    model, stack = compress(self.net(), [entry], calibration=[self.images])
    return self.keras(model, stack.update, update_every=update_every)


def _magnitude(bench):
  return bench.compressed(
    MagnitudeConfig.update_every, algorithm='magnitude', ratio=RATIO, end_step=PRUNING_STEPS
  )


def _uniform(bench, activation_bits):
  return bench.compressed(
    UniformConfig.scale_every, algorithm='uniform', weight_bits=8, activation_bits=activation_bits
  )


def _learned(bench):
  return bench.compressed(
    None, algorithm='uniform', weight_range='learned', activation_range='learned'
  )


def _non_uniform(bench, mode):
  return bench.compressed(
    NonUniformConfig.refit_every if mode == 'weights' else None,
    algorithm='non-uniform',
    mode=mode,
    weight_bits=4,
    activation_bits=FLOAT_BITS,
  )


def _tfmot_quantize(bench):
  from tensorflow_model_optimization.quantization.keras import quantize_model

  return bench.tf_keras(quantize_model(bench.twin()))


def _tfmot_cluster(bench):
  from tensorflow_model_optimization.clustering import keras as clustering

  return bench.tf_keras(
    clustering.cluster_weights(
      bench.twin(),
      number_of_clusters=16,
      cluster_centroids_init=clustering.CentroidInitialization.KMEANS_PLUS_PLUS,
    )
  )


def _tfmot_prune(bench):
  from tensorflow_model_optimization.sparsity import keras as sparsity

  schedule = sparsity.PolynomialDecay(
    0.0, RATIO, 0, PRUNING_STEPS, frequency=MagnitudeConfig.update_every
  )
  model = sparsity.prune_low_magnitude(bench.twin(), pruning_schedule=schedule)
  callback = sparsity.UpdatePruningStep()
  callback.set_model(model)
  callback.on_train_begin()

  def prepare(number):
    for layer in callback.prunable_layers:
      # The layer counts up before it looks at its schedule.
      layer.pruning_step.assign(number - 1)

  return bench.tf_keras(
    model, callback.on_train_batch_begin, prepare=prepare, update_every=MagnitudeConfig.update_every
  )


# Name -> (function of the Bench, whether it needs tf_keras and tfmot).
VARIANTS = {
  'float': (lambda bench: bench.keras(instrument(bench.net())), False),
  'keras': (lambda bench: bench.keras(bench.net()), False),
  'tf_keras': (lambda bench: bench.tf_keras(bench.twin()), True),
  'uniform-8-8': (lambda bench: _uniform(bench, 8), False),
  'uniform-8-32': (lambda bench: _uniform(bench, 32), False),
  'learned-8-8': (_learned, False),
  'non-uniform-4': (lambda bench: _non_uniform(bench, 'weights'), False),
  'non-uniform-4-both': (lambda bench: _non_uniform(bench, 'both'), False),
  'binary': (lambda bench: bench.compressed(None, algorithm='binary'), False),
  'magnitude-75': (_magnitude, False),
  'tfmot-quantize': (_tfmot_quantize, True),
  'tfmot-cluster-16': (_tfmot_cluster, True),
  'tfmot-prune-75': (_tfmot_prune, True),
}
