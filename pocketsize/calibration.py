"""What is set from data before training or shipping: scales, ranges of activations."""

import collections

import keras
import numpy as np

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
    waiting[transform].append(keras.ops.convert_to_numpy(x))
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
