"""What is set from data before training or shipping: scales, ranges of activations."""

import keras

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
