"""How batch norm computes: by TensorFlow's fused kernel, for stock Keras layers, and frozen.

Keras 3 computes a BatchNormalization layer on TensorFlow by moments and element-wise operations,
which doubles the training step of a ResNet-20 on a CPU. This computes the same from the same
weights.
"""

import keras
import tensorflow as tf

from pocketsize.transform import Transform

# Where a `StatisticsSwitch` is placed.
SWITCH_POINT = 'moving_mean'


@keras.saving.register_keras_serializable(package='pocketsize')
class StatisticsSwitch(Transform):
  """Says whether a batch norm is frozen: its moving statistics are used in training, and stay.

  As a transform of the moving mean it changes nothing.
  """

  def build(self, shape):
    self.frozen = self.add_weight(name='frozen', shape=(), initializer='zeros', trainable=False)
    self.built = True

  def call(self, x, training=None):
    return x

  @property
  def is_frozen(self):
    return float(self.frozen) > 0.0

  def switch(self, is_frozen):
    """Sets whether the batch norm is frozen."""
    if is_frozen != self.is_frozen:
      self.frozen.assign(float(is_frozen))


def is_frozen(transforms):
  """Returns whether a switch among `transforms` says that a batch norm is frozen."""
  return any(each.is_frozen for each in transforms if isinstance(each, StatisticsSwitch))


def unless_frozen(transforms, moving, frozen):
  """Returns `moving()`, or `frozen()` where a switch among `transforms` says so.

  The switch is read when a training step runs, so that one compiled step serves before and after.

  Args:
    transforms: those of the moving mean.
    moving, frozen: functions that compute the layer.
  """
  switches = [each for each in transforms if isinstance(each, StatisticsSwitch)]
  return tf.cond(switches[0].frozen.value > 0.0, frozen, moving) if switches else moving()


def applicable(layer, args, kwargs):
  """Returns whether the fused kernel computes `layer` on `args` exactly."""
  return (
    type(layer) is keras.layers.BatchNormalization
    and len(args) == 1
    and kwargs.get('mask') is None
    and getattr(args[0], '_keras_mask', None) is None
    and len(args[0].shape) == 4
    and args[0].dtype == tf.float32
    and layer.axis in (-1, 3)
    and not layer.synchronized
    and layer.compute_dtype == 'float32'
  )


def batch_norm(layer, x, training, weights=None):
  """Computes stock layer `layer` on x, [batch, height, width, channels] float32.

  In training the layer's moving statistics are updated as the layer itself does: with its momentum
  and the *biased* variance (the fused kernel returns the unbiased one).

  Args:
    weights: {attribute: [channels] tensor} to compute with in place of the layer's own 'gamma',
      'beta', 'moving_mean' or 'moving_variance'.
  """
  own = {'gamma': layer.gamma, 'beta': layer.beta}
  own |= {name: getattr(layer, name) for name in ('moving_mean', 'moving_variance')}
  values = {
    name: tf.convert_to_tensor(value)
    for name, value in (own | (weights or {})).items()
    if value is not None
  }
  gamma = values.get('gamma', tf.ones_like(values['moving_mean']))
  beta = values.get('beta', tf.zeros_like(values['moving_mean']))
  if not (training and layer.trainable):
    return tf.compat.v1.nn.fused_batch_norm(
      x,
      gamma,
      beta,
      values['moving_mean'],
      values['moving_variance'],
      epsilon=layer.epsilon,
      is_training=False,
    )[0]
  y, mean, variance = tf.compat.v1.nn.fused_batch_norm(
    x, gamma, beta, epsilon=layer.epsilon, is_training=True
  )
  count = tf.cast(tf.size(x) // tf.shape(x)[-1], x.dtype)
  biased = variance * ((count - 1.0) / count)
  for name, value in (('moving_mean', mean), ('moving_variance', biased)):
    own[name].assign(values[name] * layer.momentum + value * (1.0 - layer.momentum))
  return y
