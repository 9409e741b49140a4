"""Quantization with gradients to the scale or the range, as functions of tensors.

LSQ (Esser et al. 2020, arXiv:1902.08153), TQT (Jain et al. 2019, arXiv:1903.08066), PACT (Choi et
al. 2018, arXiv:1805.06085), and for ranges those of NNCF (Kozlov et al. 2020, arXiv:2002.08679).
"""

import math

import tensorflow as tf

from pocketsize.quantization.quantizers import (
  highest_code,
  quantize_affine,
  quantize_symmetric,
)

# Beyond these log2 counts no more: what it stands for is neither 0 nor infinite in float32.
LOG2_BOUNDS = (-100.0, 100.0)


@tf.custom_gradient
def power_of_two(log2):
  """Returns v = 2^log2, of which log2 is trained (Jain et al. 2019, arXiv:1903.08066).

  The gradient v ln 2 of log2 is divided by (v ln 2)^2: a step of log2 changes v, to first order, as
  it would change a v that is trained itself. It is kept within [-1, 1], or where v is small the
  next step would multiply it by more than float32 holds.

  Args:
    log2: float tensor.
  """
  value = tf.pow(2.0, tf.clip_by_value(log2, *LOG2_BOUNDS))
  return value, lambda upstream: tf.clip_by_value(upstream / (value * math.log(2.0)), -1.0, 1.0)


def quantize_by_scale(x, scale, bits, gradient_scale=1.0):
  """Returns `quantize_symmetric(x, scale, bits)` with a gradient to the scale as well.

  With r = x / scale and h the highest code (Esser et al. 2020, equations 1 to 5):
    to x: 1 where |r| <= h, else 0;
    to the scale: the sum of round(r) - r where |r| <= h, h above, -h below, times
      `gradient_scale`.
  One bit: 1 to x everywhere, the sign of x to the scale.

  Args:
    x: float tensor.
    scale: tensor of the same rank that broadcasts against x, not negative.
    bits: 1 to 16.
    gradient_scale: number, or tensor of the shape of `scale`.
  """
  high = float(highest_code(bits))

  @tf.custom_gradient
  def quantize(x, scale):
    values = quantize_symmetric(x, scale, bits)

    def gradient(upstream):
      ratio = tf.math.divide_no_nan(x, scale)
      inside = tf.abs(ratio) <= high
      by_scale = tf.where(inside, tf.round(ratio) - ratio, high * tf.sign(ratio))
      if bits == 1:
        inside, by_scale = tf.ones_like(inside), tf.sign(x)
      axes = [axis for axis, size in enumerate(scale.shape) if size == 1]
      to_scale = tf.reduce_sum(upstream * by_scale, axis=axes, keepdims=True)
      return tf.where(inside, upstream, 0.0), to_scale * gradient_scale

    return values, gradient

  return quantize(x, scale)


def adjusted_range(low, width, bits):
  """Returns (low, high) moved so that real zero is an integer code; one end stays, none shrinks.

  With n = 2^bits - 1, low' = min(low, 0), high' = max(low + width, 0) and the zero point z =
  round(-low' n / (high' - low')) it is the wider of (low', (z - n) / z low') and (z / (z - n)
  high', high'). Where z is 0 or n only one of them exists, and the shorter side is cut off.

  Args:
    low, width: scalar tensors, width not negative.
    bits: 1 to 16.
  """
  levels = 2.0**bits - 1.0
  low, high = tf.minimum(low, 0.0), tf.maximum(low + width, 0.0)
  zero_point = tf.floor(tf.math.divide_no_nan(-low * levels, high - low) + 0.5)
  far_high = tf.math.divide_no_nan((zero_point - levels) * low, zero_point)
  far_low = tf.math.divide_no_nan(zero_point * high, zero_point - levels)
  keeps_low = tf.where(
    (zero_point > 0.0) & (zero_point < levels), far_high - low >= high - far_low, zero_point > 0.0
  )
  return tf.where(keeps_low, low, far_low), tf.where(keeps_low, far_high, high)


def quantize_by_range(x, low, width, bits):
  """Returns x on 2^bits levels of the `adjusted_range`; gradients to x, low and width.

  Sums over x, with e = (q(x) - x) / (high - low) of the adjusted ends:
    to x: 1 inside, ends included, else 0;  to low: 1 outside;  to width: e inside, 1 above.
  The adjustment itself is passed straight through.

  Args:
    x: float tensor.   low, width: scalar tensors, width not negative.   bits: 1 to 16.
  """

  @tf.custom_gradient
  def quantize(x, low, width):
    ends = adjusted_range(low, width, bits)
    values = quantize_affine(x, *ends, bits)

    def gradient(upstream):
      inside, error, below, above = _parts(upstream, x, values, *ends, bits)
      return inside, below + above, tf.math.divide_no_nan(error, ends[1] - ends[0]) + above

    return values, gradient

  return quantize(x, low, width)


def quantize_by_high(x, high, bits, signed):
  """Returns x on 2^bits levels from 0, or if `signed` from high * lo / hi, to high.

  lo = -2^(bits - 1) and hi = 2^(bits - 1) - 1 are the codes of the ends. Sums over x:
    to x: 1 inside, ends included, else 0;
    to high: (q(x) - x) / high inside, lo / hi below (0 if not signed), 1 above.
  NNCF divides the first by the width, which halves it for signed ranges; this is the derivative.

  Args:
    x: float tensor.   high: scalar tensor, not negative.
    bits: 1 to 16; 2 at least if `signed`.
  """
  ratio = -(2.0 ** (bits - 1)) / (2.0 ** (bits - 1) - 1.0) if signed else 0.0

  @tf.custom_gradient
  def quantize(x, high):
    values = quantize_affine(x, ratio * high, high, bits)

    def gradient(upstream):
      inside, error, below, above = _parts(upstream, x, values, ratio * high, high, bits)
      return inside, tf.math.divide_no_nan(error, high) + ratio * below + above

    return values, gradient

  return quantize(x, high)


def quantize_by_clipping(x, alpha, bits):
  """Returns clip(x, 0, alpha) on 2^bits levels (Choi et al. 2018, equations 1 to 3).

  The gradient is 1 to x where 0 <= x < alpha, and 1 to alpha where x >= alpha, summed.

  Args:
    x: float tensor.   alpha: scalar tensor, not negative.   bits: 1 to 16.
  """

  @tf.custom_gradient
  def quantize(x, alpha):
    def gradient(upstream):
      above = x >= alpha
      passed = tf.where((x >= 0.0) & ~above, upstream, 0.0)
      return passed, tf.reduce_sum(tf.where(above, upstream, 0.0))

    return quantize_affine(x, tf.zeros_like(alpha), alpha, bits), gradient

  return quantize(x, alpha)


def _parts(upstream, x, values, low, high, bits):
  """Returns the gradient by where x lies: (inside, error, below, above).

  Of these `inside` is the gradient where x is inside the range, ends included, else 0; the others
  are sums: of `inside` times (values - x), and of the gradient below and above the range. An end
  may be off by its last bit, as `quantize_affine` rounds it.
  """
  if bits > 1 and not tf.config.list_physical_devices('GPU'):
    # One operation instead of eight passes over x; it has no deterministic GPU kernel.
    inside, below, above = tf.quantization.fake_quant_with_min_max_vars_gradient(
      upstream, x, low, high, num_bits=bits
    )
  else:
    is_below, is_above = x < low, x > high
    inside = tf.where(is_below | is_above, 0.0, upstream)
    below, above = (tf.reduce_sum(tf.where(where, upstream, 0.0)) for where in (is_below, is_above))
  return inside, tf.reduce_sum(inside * (values - x)), below, above
