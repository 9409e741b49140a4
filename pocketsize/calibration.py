"""What is set from data before training or shipping: scales, ranges of activations."""

import numpy as np

from pocketsize.errors import UserError
from pocketsize.quantization.kernel_quantizer import KernelQuantizer


def calibrate(model, batches):
  """Sets every quantizer of an `Instrumented` model: scales from the kernels, ranges from data.

  A range is the mean of what its quantizer measures in each batch, such as the extremes. While
  ranges are measured no activation is quantized.

  Args:
    model: `Instrumented`.
    batches: iterable of inputs, as the model takes them; a handful of training batches.

  Raises:
    UserError: there are activation quantizers and no batch.
  """
  fit_scales(model)
  quantizers = [transform for transform in model.transforms if hasattr(transform, 'measure')]
  if not quantizers:
    return
  measures = {id(quantizer): [] for quantizer in quantizers}

  def observe(transform, x):
    if not hasattr(transform, 'measure'):
      return transform(x)
    measures[id(transform)].append(transform.measure(x))
    return x

  for batch in batches:
    model.run(batch, training=False, activate=observe)
  for quantizer in quantizers:
    if not measures[id(quantizer)]:
      raise UserError(
        'Activation ranges need data: `calibration` must give at least one batch. Received none.'
      )
    quantizer.set_range(*np.mean(measures[id(quantizer)], axis=0))


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
    if hasattr(transform, 'measure') and transform.is_on and not transform.has_range
  ]
  if unseen:
    raise UserError(
      f'The activation ranges of {", ".join(unseen)} never saw data: train the model, or give '
      '`calibration` batches, before it is exported.'
    )
