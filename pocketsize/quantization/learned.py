"""Scales of kernels and ranges of activations that gradients train.

LSQ (Esser et al. 2020, arXiv:1902.08153), TQT (Jain et al. 2019, arXiv:1903.08066), PACT (Choi et
al. 2018, arXiv:1805.06085). Values and gradients are functions of `learned_gradients`.
"""

import math

import keras
import numpy as np
import tensorflow as tf

from pocketsize.quantization import ranges
from pocketsize.quantization.learned_gradients import (
  LOG2_BOUNDS,
  adjusted_range,
  power_of_two,
  quantize_by_clipping,
  quantize_by_high,
  quantize_by_range,
  quantize_by_scale,
)
from pocketsize.quantization.quantizers import SymmetricQuantizer, highest_code, nudged_range
from pocketsize.quantization.range_quantizer import LEAST_WIDTH, RangeQuantizer

# A row of zeros has this part of the kernel's largest scale: it may come to life.
ZERO_ROW = 0.01
# What log2 of a scale, or of the end of a range, is before it is set.
_UNFITTED = LOG2_BOUNDS[0]


@keras.saving.register_keras_serializable(package='pocketsize')
class LearnedScale(SymmetricQuantizer):
  """Symmetric quantizer of a kernel whose scales are trained, see `quantize_by_scale`.

  `fit` finds where they start. The gradient of a scale is multiplied by the smaller of

    1 / sqrt(n h)   n weights of a row, h the highest code (Esser et al. 2020, section 2.2): a step
                    changes a scale as much, relative to its size, as it changes the weights
    1 / h^2         a step moves the end of the range, h * scale, as it would a weight that is
                    clipped there

  Deviation: the paper has the first only, and a tenth of the learning rate for 8 bits. Where rows
  are short and bits many, as in the first and the last layer, it is too much for the common rate.

  Args:
    log2: log2 of the scale is what is trained (Jain et al. 2019), hence it stays positive. The
      paper leaves the size of the step to Adam; here the relative step is that of LSQ, see
      `power_of_two`.
    others: as for `SymmetricQuantizer`.
  """

  refits = False

  def __init__(self, *args, log2=False, **kwargs):
    super().__init__(*args, **kwargs)
    self.log2 = log2

  def build_rows(self):
    self.scale = self.add_weight(
      name='log2_scale' if self.log2 else 'scale',
      shape=self.groups.broadcast or (self.groups.count, 1),
      initializer=keras.initializers.Constant(_UNFITTED if self.log2 else 0.0),
    )

  @property
  def is_fitted(self):
    return bool(np.any(np.asarray(self.scale) != (_UNFITTED if self.log2 else 0.0)))

  def fit(self, kernel):
    scales = self.fitted_scales(kernel)
    scales = np.where(scales > 0.0, scales, ZERO_ROW * scales.max() or LEAST_WIDTH)
    self.scale.assign(np.log2(scales) if self.log2 else scales)

  def scales(self):
    return power_of_two(self.scale.value) if self.log2 else tf.abs(self.scale.value)

  def call(self, kernel, training=None):
    scales = self.scales()
    members, high = self.groups.size / self.groups.count, highest_code(self.bits)
    factor = min(1.0 / math.sqrt(members * high), 1.0 / high**2)
    # A Keras variable is no tensor to a custom gradient, which would want to know about it.
    kernel = tf.convert_to_tensor(kernel)
    return self.by_rows(kernel, lambda values: quantize_by_scale(values, scales, self.bits, factor))

  def get_config(self):
    return {**super().get_config(), 'log2': self.log2}


@keras.saving.register_keras_serializable(package='pocketsize')
class LearnedRange(RangeQuantizer):
  """Quantizer of an activation whose range is trained.

  `nonnegative`: from 0 to a trained end. Else `quantize_by_range` with both ends trained, or with
  `symmetric` `quantize_by_high`. Gradients are not scaled: an end of a range is in the units of the
  activation, as an offset of batch norm is.

  Deviation: NNCF trains low and the width. What is above the range then moves low as well, and a
  range can leave its data; here the width is high - low.

  Args:
    symmetric: whether a range with two ends is symmetric around 0; needs 2 bits.
    log2: log2 of the end is what is trained (Jain et al. 2019), hence it stays positive; the range
      is symmetric. The paper leaves the size of the step to Adam, and rounds the end up to a power
      of two; here a step changes the end, to first order, as without `log2`, see `power_of_two`.
    others: as for `RangeQuantizer`.
  """

  def __init__(
    self, bits=8, nonnegative=False, start=ranges.AUTO, symmetric=False, log2=False, **kwargs
  ):
    super().__init__(bits, nonnegative, start, **kwargs)
    self.symmetric = symmetric or log2
    self.log2 = log2

  def build(self, shape):
    self.high = self.add_weight(
      name='log2_high' if self.log2 else 'high',
      shape=(),
      initializer=keras.initializers.Constant(_UNFITTED if self.log2 else 0.0),
    )
    self.low = None
    if not (self.nonnegative or self.symmetric):
      self.low = self.add_weight(name='low', shape=(), initializer='zeros')
    self.built = True

  @property
  def has_range(self):
    if self.log2:
      return float(self.high) != _UNFITTED
    return float(self.high) != 0.0 or (self.low is not None and float(self.low) != 0.0)

  def end(self):
    """Returns the end of a range of which one is trained, a scalar tensor, not negative."""
    return power_of_two(self.high.value) if self.log2 else tf.abs(self.high.value)

  def range(self):
    if self.low is not None:
      low, high = adjusted_range(self.low.value, self.high - self.low, self.bits)
    else:
      half, high = 2.0 ** (self.bits - 1), self.end()
      low = 0.0 if self.nonnegative else -high * (half / (half - 1.0))
    return nudged_range(float(low), float(high), self.bits)

  def set_range(self, low, high):
    low = 0.0 if self.nonnegative else low
    self._assign(*self._trained_ends(low, max(high, low + LEAST_WIDTH)))

  def _trained_ends(self, low, high):
    """Returns what the variables get for a range from `low` to `high`."""
    if self.low is not None:
      return low, high
    high = tf.maximum(-low, high)
    return low, keras.ops.log2(high) if self.log2 else high

  def _assign(self, low, high):
    if self.low is not None:
      self.low.assign(low)
    self.high.assign(high)

  def observe(self, x):
    low = 0.0 if self.low is None else self.low.value
    unset = _UNFITTED if self.log2 else low
    # A range that is set stays, also if training took `high` below 0, where its size counts.
    self._assign(
      *tf.cond(
        tf.equal(self.high.value, unset),
        lambda: self._trained_ends(*self.ends(tf.stop_gradient(x))),
        lambda: (tf.convert_to_tensor(low), tf.convert_to_tensor(self.high.value)),
      )
    )

  def call(self, x, training=None):
    if training:
      self.observe(x)
    return self.on_levels(x)

  def on_levels(self, x):
    """Returns x on the levels of the range."""
    if self.low is None:
      return quantize_by_high(x, self.end(), self.bits, signed=not self.nonnegative)
    low = tf.convert_to_tensor(self.low.value)
    return quantize_by_range(x, low, self.high - low, self.bits)

  def get_config(self):
    return {**super().get_config(), 'symmetric': self.symmetric, 'log2': self.log2}


@keras.saving.register_keras_serializable(package='pocketsize')
class Pact(LearnedRange):
  """Clips what is never negative at a trained alpha, `high`, see `quantize_by_clipping`.

  Args:
    decay: factor w of the penalty w/2 alpha^2 (Choi et al. 2018, section 3.2), not negative.
    bits, start: as for `RangeQuantizer`.
  """

  def __init__(self, bits=8, decay=0.0, start=ranges.AUTO, **kwargs):
    super().__init__(bits, True, start, **kwargs)
    self.decay = decay

  def on_levels(self, x):
    return quantize_by_clipping(x, self.end(), self.bits)

  def penalty(self):
    """Returns what is added to the loss, a scalar tensor."""
    return 0.5 * self.decay * tf.square(self.high.value)

  def get_config(self):
    config = {**super().get_config(), 'decay': self.decay}
    del config['nonnegative'], config['symmetric'], config['log2']
    return config
