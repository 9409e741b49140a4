"""What is set from data before training or shipping: scales, ranges of activations."""

import keras
import numpy as np

from pocketsize.errors import UserError
from pocketsize.quantization.kernel_quantizer import KernelQuantizer
from pocketsize.quantization.quantizers import LEAST_WIDTH, ActivationQuantizer


def calibrate(model, batches):
  """Sets every quantizer of an `Instrumented` model: scales from the kernels, ranges from data.

  A range is the mean of the batches' extremes. While ranges are measured no activation is
  quantized.

  Args:
    model: `Instrumented`.
    batches: iterable of inputs, as the model takes them; a handful of training batches.

  Raises:
    UserError: there are activation quantizers and no batch.
  """
  fit_scales(model)
  quantizers = [
    transform for transform in model.transforms if isinstance(transform, ActivationQuantizer)
  ]
  if not quantizers:
    return
  extremes = {id(quantizer): [] for quantizer in quantizers}

  def observe(transform, x):
    if not isinstance(transform, ActivationQuantizer):
      return transform(x)
    extremes[id(transform)].append((float(keras.ops.min(x)), float(keras.ops.max(x))))
    return x

  for batch in batches:
    model.run(batch, training=False, activate=observe)
  for quantizer in quantizers:
    if not extremes[id(quantizer)]:
      raise UserError(
        'Activation ranges need data: `calibration` must give at least one batch. Received none.'
      )
    low, high = np.mean(extremes[id(quantizer)], axis=0)
    low = min(low, 0.0)
    quantizer.low.assign(low)
    quantizer.high.assign(max(high, 0.0, low + LEAST_WIDTH))


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
    if isinstance(transform, ActivationQuantizer) and not transform.has_range
  ]
  if unseen:
    raise UserError(
      f'The activation ranges of {", ".join(unseen)} never saw data: train the model, or give '
      '`calibration` batches, before it is exported.'
    )
