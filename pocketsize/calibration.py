"""What is set from data before training or shipping: scales, ranges of activations."""

import contextlib

import keras
import numpy as np

from pocketsize import fused_bn
from pocketsize.errors import UserError
from pocketsize.quantization.calibrated import Calibrated
from pocketsize.quantization.kernel_quantizer import KernelQuantizer


def calibrate(model, batches):
  """Sets every quantizer of an `Instrumented` model: scales from the kernels, ranges from data.

  A range is found as the quantizer's `start` says, by default the mean of the batches' extremes.
  While ranges are measured no activation is quantized.

  Args:
    model: `Instrumented`.
    batches: iterable of inputs, as the model takes them; a handful of training batches.

  Raises:
    UserError: there are activation quantizers and no batch.
  """
  fit_scales(model)
  found = {
    transform: transform.initialiser()
    for transform in model.transforms
    if isinstance(transform, Calibrated)
  }
  if not found:
    return
  seen = set()

  def observe(transform, x):
    if transform not in found:
      return transform(x)
    found[transform].update(keras.ops.convert_to_numpy(x))
    seen.add(transform)
    return x

  for batch in batches:
    model.run(batch, training=False, activate=observe)
  for transform, initialiser in found.items():
    if transform not in seen:
      raise UserError(
        'Activation ranges need data: `calibration` must give at least one batch. Received none.'
      )
    transform.set_range(*initialiser.result())


def fit_scales(model):
  """Sets the scale of every weight quantizer of an `Instrumented` model from the kernel it gets."""
  for placement in model.placements:
    if isinstance(placement.transform, KernelQuantizer):
      placement.transform.fit(
        model.transformed(placement.path, placement.point, before=placement.transform)
      )


def re_estimate_batch_norm(model, batches, total=lambda array: array):
  """Sets the moving statistics of batch norms to their exact means over training batches.

  The batches go through an `Instrumented` model as deployed: weights and activations quantized,
  ranges as they are, no dropout. Batch norms only compute as in training, with the statistics of
  the batch, so that each one sees what it would then.

  The variance is the mean of the batches' (biased) variances: what the running average estimates,
  and what was divided by in training. (That of all samples would add the variance of the batches'
  means, which no step of the training had.)

  Only batch norms that compute so in training are changed: no frozen ones. One that is called
  several times has the mean over all calls.

  Args:
    model: `Instrumented`.
    batches: iterable of inputs, as the model takes them; augmented as in training, or the
      statistics are those of other images than the weights were trained for.
    total: sums an array over workers, each of which has batches of its own.

  Raises:
    UserError: there is no batch.
  """
  layer_by_node = {
    node: node.operation for node in model.graph.nodes if _has_moving_statistics(model, node)
  }
  layers = {id(layer): layer for layer in layer_by_node.values()}
  # Behind both statistics, how many calls they are of.
  sums = {key: np.zeros(2 * _statistics(layer).shape[1] + 1) for key, layer in layers.items()}

  def observe(node, outputs):
    if node in layer_by_node:
      layer = layer_by_node[node]
      sums[id(layer)] += np.append(_statistics(layer), 1.0)

  with _without_memory(layers.values()):
    for batch in batches:
      model.run(
        batch,
        training=lambda node: node in layer_by_node,
        activate=lambda transform, x: transform(x, training=False),
        observe=observe,
      )
  for key, layer in layers.items():
    *statistics, calls = total(sums[key])
    if not calls:
      raise UserError('Batch norm is estimated anew from at least one batch. Received none.')
    mean, variance = np.reshape(statistics, (2, -1)) / calls
    layer.moving_mean.assign(mean)
    layer.moving_variance.assign(variance)


def _has_moving_statistics(model, node):
  """Returns whether a node is a batch norm whose moving statistics training changes."""
  return (
    isinstance(node.operation, keras.layers.BatchNormalization)
    and node.operation.trainable
    and not node.inference_only
    and not fused_bn.is_frozen(model.transforms_at(node.path, fused_bn.SWITCH_POINT))
  )


def _statistics(layer):
  """Returns the moving mean and variance of a batch norm, [2, channels] float64."""
  moving = (layer.moving_mean, layer.moving_variance)
  return np.stack([keras.ops.convert_to_numpy(each) for each in moving]).astype(np.float64)


@contextlib.contextmanager
def _without_memory(layers):
  """Within it the moving statistics of batch norms are those of the last batch."""
  layers = list(layers)
  momenta = [layer.momentum for layer in layers]
  for layer in layers:
    layer.momentum = 0.0
  try:
    yield
  finally:
    for layer, momentum in zip(layers, momenta, strict=True):
      layer.momentum = momentum


def check_ranges(model):
  """Raises a UserError that names the activation quantizers of `model` without data, if any."""
  unseen = [
    path
    for path, _, transform in model.placements
    if isinstance(transform, Calibrated) and transform.is_on and not transform.has_range
  ]
  if unseen:
    raise UserError(
      f'The activation ranges of {", ".join(unseen)} never saw data: train the model, or give '
      '`calibration` batches, before it is exported.'
    )
