"""Weights and activations of one bit: XNOR-Net (Rastegari et al. 2016, arXiv:1603.05279) and
DoReFa-Net (Zhou et al. 2016, arXiv:1606.06160).

Both are switched on and off by a weight of their own, so that a network can be trained in stages.
Deviation 1: activations become 0 and a learned scale, by learned thresholds; XNOR-Net takes their
  sign and a mean over each window, DoReFa-Net rounds what it clips to [0, 1].
Deviation 2: the gradient goes straight through the sign of a weight, and none to its scale.
"""

import keras
import numpy as np
import tensorflow as tf

from pocketsize import ste
from pocketsize.quantization.calibrated import Calibrated
from pocketsize.quantization.kernel_quantizer import KernelQuantizer
from pocketsize.quantization.range_quantizer import LEAST_WIDTH
from pocketsize.transform import Codes, Grid, Transform

# Which weights share the scale mean |w|: XNOR-Net, equation 6, and DoReFa-Net, section 2.3.
GRANULARITY_BY_MODE = {'xnor': 'channel', 'dorefa': 'tensor'}
MODES = tuple(GRANULARITY_BY_MODE)
# The scale of activations begins where so many of them lie above it, with 'quantile'.
TOP_SHARE = 0.001
_LLOYD_ROUNDS = 20


def binary_kernel(rows):
  """Returns rows of weights as +m where they are above 0 and -m elsewhere, m = mean |w| of the row.

  Args:
    rows: [rows, weights] float tensor.
  """
  scale = tf.reduce_mean(tf.abs(rows), axis=1, keepdims=True)
  return tf.where(rows > 0.0, scale, -scale)


def top_quantile(x, share=TOP_SHARE):
  """Returns the least of the round(share * size) largest values of a tensor, at least one."""
  flat = tf.reshape(x, (-1,))
  count = tf.cast(tf.round(share * tf.cast(tf.size(flat), tf.float32)), tf.int32)
  return tf.math.top_k(flat, tf.maximum(count, 1)).values[-1]


def least_error_scale(x):
  """Returns s for which the squares of x - s [x > s / 2] have their least sum, or nearly so.

  Lloyd's iterations from the `top_quantile`: s becomes the mean of all values above s / 2. Without
  a positive value it is that quantile.
  """
  scale = top_quantile(x)
  for _ in range(_LLOYD_ROUNDS):
    above = tf.cast(x > scale / 2.0, x.dtype)
    count = tf.reduce_sum(above)
    scale = tf.where(scale > 0.0, tf.reduce_sum(x * above) / tf.maximum(count, 1.0), scale)
  return scale


# Where the scale of activations begins, from one batch of them.
SCALE_INITIALISERS = {'quantile': top_quantile, 'mse': least_error_scale}


def step_function(x, scale, threshold):
  """Returns `scale` where x > scale * threshold, and 0 elsewhere; see `binary_activation`."""
  # TFLite's converter would take the factor of a multiplication into the kernel that reads it.
  return tf.where(x > scale * threshold, scale, 0.0)


@tf.custom_gradient
def binary_activation(x, scale, threshold):
  """Returns y = s [x > s t], with gradients for all three.

  dx = g [0 <= x <= s]
  ds = sum of g ([x <= s] (y - x) / s + [x > s])
  dt = -sum of g [0 < x < s], over each channel

  Args:
    x: float tensor.
    scale: s, a positive scalar tensor.
    threshold: t, in (0, 1), of the rank of x: its channels at their axis and 1 everywhere else.
  """
  y = step_function(x, scale, threshold)

  def gradient(upstream):
    zeros = tf.zeros_like(upstream)
    dx = tf.where((x >= 0.0) & (x <= scale), upstream, zeros)
    dscale = tf.reduce_sum(upstream * tf.where(x <= scale, (y - x) / scale, 1.0))
    axes = [axis for axis, size in enumerate(threshold.shape) if size == 1]
    inside = tf.where((x > 0.0) & (x < scale), upstream, zeros)
    return dx, dscale, -tf.reduce_sum(inside, axis=axes, keepdims=True)

  return y, gradient


class Switched(Transform):
  """A transform that leaves its input as it is until it is switched on."""

  order = 20

  def build_switch(self):
    """Makes the weight that says whether it is on; off at first."""
    self.on = self.add_weight(name='on', shape=(), initializer='zeros', trainable=False)

  @property
  def is_on(self):
    return float(self.on) > 0.0

  def switch(self, is_on):
    """Sets whether it is on."""
    if is_on != self.is_on:
      self.on.assign(float(is_on))


@keras.saving.register_keras_serializable(package='pocketsize')
class BinaryKernel(Switched, KernelQuantizer):
  """Binary weights with a scale that is the mean magnitude of the kernel at every call.

  The gradient goes straight to the kernel. A weight of exactly 0 becomes negative.

  Args:
    mode: 'xnor', a scale for each output channel; or 'dorefa', one for the tensor.
    channel_axes: axes of the kernel that count the output channels.
  """

  def __init__(self, mode='xnor', channel_axes=(-1,), **kwargs):
    super().__init__(1, GRANULARITY_BY_MODE[mode], channel_axes, **kwargs)
    self.mode = mode

  def build_rows(self):
    self.build_switch()

  def fit(self, kernel):
    """Does nothing: there is nothing to set, as the scale follows the kernel."""

  def call(self, kernel, training=None):
    def binarized():
      return ste.replace(kernel, self.groups.join(binary_kernel(self.groups.split(kernel))))

    return tf.cond(self.on.value > 0.0, binarized, lambda: tf.identity(kernel))

  def grid(self, kernel):
    if not self.is_on:
      return None
    return Grid(self._scale(kernel).reshape(self.groups.broadcast), 1)

  def codes(self, kernel):
    if not self.is_on:
      return None
    scale = self._scale(kernel)
    codes = (np.asarray(kernel) > 0.0).astype(np.int32)
    return Codes(codes, 1, self.groups, 2.0 * scale, np.full_like(scale, 0.5))

  def _scale(self, kernel):
    """Returns the [rows] float32 scales of a kernel as deployed, whose magnitudes they are."""
    return self.groups.fit(kernel, lambda rows: np.abs(rows).max(axis=1)).astype(np.float32)

  def get_config(self):
    config = super().get_config()
    # What the mode says.
    for name in ('bits', 'granularity', 'bucket_size'):
      del config[name]
    return {**config, 'mode': self.mode}


@keras.saving.register_keras_serializable(package='pocketsize')
class BinaryActivation(Switched, Calibrated):
  """Binary activations, 0 and s, with trained scale and thresholds (see `binary_activation`).

  s = start * exp(p) and t = sigmoid(p') of each channel, with p = p' = 0 at first. `start` is of
  the first training batch that comes while it is on, unless calibration set it. Until then, and
  while it is off, the input is left as it is.

  Args:
    channel_axis: the axis of the input that counts channels.
    scale_init: what `start` is, 'quantile' for `top_quantile` or 'mse' for `least_error_scale`.
  """

  bits = 1

  def __init__(self, channel_axis=-1, scale_init='quantile', **kwargs):
    super().__init__(**kwargs)
    self.channel_axis, self.scale_init = channel_axis, scale_init

  def build(self, shape):
    self.build_switch()
    # Not trained, so that workers can take the mean of what their batches say.
    self.start = self.add_weight(name='start', shape=(), initializer='zeros', trainable=False)
    self.scale_logarithm = self.add_weight(name='scale_logarithm', shape=(), initializer='zeros')
    axis = self.channel_axis % len(shape)
    channels = [size if place == axis else 1 for place, size in enumerate(shape)]
    self.threshold_logits = self.add_weight(
      name='threshold_logits', shape=channels, initializer='zeros'
    )
    self.built = True

  @property
  def has_range(self):
    """Whether it has seen data."""
    return float(self.start) > 0.0

  def switch(self, is_on):
    super().switch(is_on)
    # The data of a network that is trained on before activations become binary say nothing.
    if not is_on and self.has_range:
      self.start.assign(0.0)

  def initialiser(self):
    return _MeanStart(SCALE_INITIALISERS[self.scale_init])

  def set_range(self, start):
    """Sets the scale with which training begins."""
    self.start.assign(max(start, LEAST_WIDTH))

  def call(self, x, training=None):
    is_on, start = self.on.value > 0.0, self.start.value
    if training:
      initial = SCALE_INITIALISERS[self.scale_init]
      start = tf.cond(
        is_on & (start <= 0.0),
        lambda: tf.maximum(initial(tf.stop_gradient(x)), LEAST_WIDTH),
        lambda: tf.identity(self.start.value),
      )
      self.start.assign(start)
    return tf.cond(
      is_on & (start > 0.0),
      lambda: binary_activation(x, *self._scale_and_threshold(start)),
      lambda: tf.identity(x),
    )

  def _scale_and_threshold(self, start):
    return start * tf.exp(self.scale_logarithm.value), tf.sigmoid(self.threshold_logits.value)

  def operations(self):
    scale, threshold = (array.numpy() for array in self._scale_and_threshold(self.start.value))
    return lambda x: step_function(x, scale, threshold)

  def get_config(self):
    config = {'channel_axis': self.channel_axis, 'scale_init': self.scale_init}
    return {**super().get_config(), **config}


class _MeanStart:
  """The mean of where the scale would begin with each batch."""

  def __init__(self, initial):
    self._initial, self._starts = initial, []

  def update(self, batch):
    self._starts.append(float(self._initial(tf.constant(batch))))

  def result(self):
    return (float(np.mean(self._starts)),)
