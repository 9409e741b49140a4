"""What is set from data before training or shipping: scales, ranges of activations."""

import collections
import contextlib

import keras
import numpy as np
import tensorflow as tf

from pocketsize import fused_bn
from pocketsize.errors import UserError
from pocketsize.quantization.calibrated import Calibrated
from pocketsize.quantization.kernel_quantizer import KernelQuantizer


def calibrate(model, batches):
  """Sets every quantizer of an `Instrumented` model: scales from the kernels, ranges from data.

  A range is found as the quantizer's `start` says, by default the mean of the batches' extremes.
  While ranges are measured no activation is quantized. Tensors of one range are seen side by side,
  as one: their extremes are those of all of them.

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
  calls, seen, waiting = _calls(model), set(), collections.defaultdict(list)

  def observe(transform, x):
    if transform not in found:
      return transform(x)
    waiting[transform].append(keras.ops.convert_to_numpy(keras.ops.cast(x, 'float32')))
    if not transform.is_shareable or len(waiting[transform]) == calls[transform]:
      found[transform].update(_side_by_side(waiting.pop(transform)))
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


def _calls(model):
  """Returns {transform of an activation: how often a model calls it}."""
  calls, paths = collections.Counter(), collections.Counter(node.path for node in model.graph.nodes)
  for path, _, transform in model.placements:
    calls[transform] += paths[path]
  return calls


def _side_by_side(arrays):
  """Returns arrays as one, sample by sample if they have the same number of them."""
  if len(arrays) == 1:
    return arrays[0]
  samples = len(arrays[0]) if len({len(array) for array in arrays}) == 1 else 1
  return np.concatenate([np.reshape(array, (samples, -1)) for array in arrays], axis=1)


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
  nodes = batch_norm_calls(model)
  layers = {id(node.operation): node.operation for node in nodes}
  # Behind both statistics, how many calls they are of.
  sums = {key: np.zeros(2 * layer.moving_mean.shape[0] + 1) for key, layer in layers.items()}
  for batch in batches:
    for node, statistics in zip(nodes, batch_statistics(model, batch), strict=True):
      sums[id(node.operation)] += np.append(keras.ops.convert_to_numpy(statistics), 1.0)
  for key, layer in layers.items():
    *statistics, calls = total(sums[key])
    if not calls:
      raise UserError('Batch norm is estimated anew from at least one batch. Received none.')
    mean, variance = np.reshape(statistics, (2, -1)) / calls
    layer.moving_mean.assign(mean)
    layer.moving_variance.assign(variance)


def batch_norm_calls(model):
  """Returns the nodes of an `Instrumented` model that are batch norms with statistics to estimate,
  in order: no frozen ones.
  """
  return [node for node in model.graph.nodes if _has_moving_statistics(model, node)]


def batch_statistics(model, batch):
  """Returns the mean and the (biased) variance that each of `batch_norm_calls` sees of one batch.

  The moving statistics are left at those of the batch. It can be compiled.

  Args:
    model, batch: see `re_estimate_batch_norm`.

  Returns:
    List of [2, channels] tensors.
  """
  nodes, found = batch_norm_calls(model), []

  def observe(node, outputs):
    if node in nodes:
      moving = (node.operation.moving_mean, node.operation.moving_variance)
      found.append(tf.stack([each.value for each in moving]))

  with _without_memory({id(node.operation): node.operation for node in nodes}.values()):
    model.run(
      batch,
      training=lambda node: node in nodes,
      activate=lambda transform, x: transform(x, training=False),
      observe=observe,
    )
  return found


def _has_moving_statistics(model, node):
  """Returns whether a node is a batch norm whose moving statistics training changes."""
  return (
    isinstance(node.operation, keras.layers.BatchNormalization)
    and node.operation.trainable
    and not node.inference_only
    and not fused_bn.is_frozen(model.transforms_at(node.path, fused_bn.SWITCH_POINT))
  )


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
