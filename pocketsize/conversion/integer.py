"""Operations in the form in which integer runtimes compute them."""

import keras
import tensorflow as tf


def fake_quantize(x, low_high):
  """Returns x rounded to the 256 levels between the nudged (low, high)."""
  return tf.quantization.fake_quant_with_min_max_args(x, *low_high, num_bits=8)


def is_image_batch_norm(layer, rank):
  """Returns whether `layer` is a batch norm over channels of [batch, height, width, channels]."""
  return type(layer) is keras.layers.BatchNormalization and rank == 4 and layer.axis in (-1, 3)


def is_average(layer):
  """Returns whether `layer` averages windows of [batch, height, width, channels]."""
  return type(layer) is keras.layers.AveragePooling2D and layer.data_format == 'channels_last'


def averages_whole_windows(layer):
  """Returns whether all windows of an average pooling lie in the image, as a convolution."""
  return layer.padding == 'valid' and layer.strides[0] == layer.strides[1]


def depthwise(x, kernel, offset=None, strides=(1, 1)):
  """Returns a depthwise convolution without padding.

  Args:
    x: [batch, height, width, channels].
    kernel: [height, width, channels, 1] array.
    offset: [channels] array, or None.
    strides: (height, width), equal.
  """
  y = tf.nn.depthwise_conv2d(x, tf.constant(kernel, tf.float32), (1, *strides, 1), 'VALID')
  return y if offset is None else tf.nn.bias_add(y, tf.constant(offset, tf.float32))


def call_subsampled(layer, x, call):
  """Returns call(x) of a layer; a 1x1 convolution with strides gets what it reads, and no strides.

  OpenVINO 2026.4 computes one with an int8 kernel as if it had none, where its input is a binary
  activation: wrong numbers, or shapes that do not fit.

  Args:
    layer: the layer that `call` calls.
    x: its input.
    call: function of x.
  """
  if (
    type(layer) is not keras.layers.Conv2D
    or layer.kernel_size != (1, 1)
    or layer.data_format != 'channels_last'
    or layer.strides == (1, 1)
  ):
    return call(x)
  strides, layer.strides = layer.strides, (1, 1)
  try:
    return call(x[:, :: strides[0], :: strides[1]])
  finally:
    layer.strides = strides


def call_weighted(layer, args, kwargs, bias):
  """Calls a conv or dense layer and adds `bias`, [channels] array or None.

  A dense layer on more than [batch, features] is computed on [rows, features]: converters put the
  bias behind a reshape otherwise, out of the integer kernel.
  """
  x, shape = args[0], None
  if isinstance(layer, keras.layers.Dense) and len(x.shape) > 2:
    shape = tf.concat([tf.shape(x)[:-1], [layer.units]], axis=0)
    x = tf.reshape(x, (-1, x.shape[-1]))
  y = layer(x, *args[1:], **kwargs)
  y = y if bias is None else tf.nn.bias_add(y, tf.constant(bias, tf.float32))
  return y if shape is None else tf.reshape(y, shape)
