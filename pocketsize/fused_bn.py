"""Batch normalization by TensorFlow's fused kernel, for stock Keras layers.

Keras 3 computes a BatchNormalization layer on TensorFlow by moments and element-wise operations,
which doubles the training step of a ResNet-20 on a CPU. This computes the same from the same
weights.
"""

import keras
import tensorflow as tf


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


def batch_norm(layer, x, training):
  """Computes stock layer `layer` on x, [batch, height, width, channels] float32.

  In training the layer's moving statistics are updated as the layer itself does: with its momentum
  and the *biased* variance (the fused kernel returns the unbiased one).
  """
  gamma = layer.gamma if layer.scale else tf.ones_like(layer.moving_mean)
  beta = layer.beta if layer.center else tf.zeros_like(layer.moving_mean)
  if not (training and layer.trainable):
    return tf.compat.v1.nn.fused_batch_norm(
      x,
      tf.convert_to_tensor(gamma),
      tf.convert_to_tensor(beta),
      tf.convert_to_tensor(layer.moving_mean),
      tf.convert_to_tensor(layer.moving_variance),
      epsilon=layer.epsilon,
      is_training=False,
    )[0]
  y, mean, variance = tf.compat.v1.nn.fused_batch_norm(
    x,
    tf.convert_to_tensor(gamma),
    tf.convert_to_tensor(beta),
    epsilon=layer.epsilon,
    is_training=True,
  )
  count = tf.cast(tf.size(x) // tf.shape(x)[-1], x.dtype)
  biased = variance * ((count - 1.0) / count)
  for moving, value in ((layer.moving_mean, mean), (layer.moving_variance, biased)):
    moving.assign(moving * layer.momentum + value * (1.0 - layer.momentum))
  return y
