"""What the residual nets share: a convolution that pads on both sides alike."""

from keras import layers


def convolve(x, channels, size, stride, name):
  """Returns a convolution of `x` without bias that pads by size // 2 on every side.

  With stride 2 Keras' 'same' pads a 3x3 kernel at the bottom and right only, which would shift
  the features by a pixel; so the padding is a layer of its own there.

  Args:
    x: [batch, height, width, channels in].   channels: outputs.
    size, stride: of the kernel, in pixels.
    name: of the layer; that of the padding has 'padding' for 'conv'.
  """
  if stride > 1 and size > 1:
    x = layers.ZeroPadding2D(size // 2, name=name.replace('conv', 'padding'))(x)
  return layers.Conv2D(
    channels,
    size,
    strides=stride,
    padding='same' if stride == 1 else 'valid',
    use_bias=False,
    kernel_initializer='he_normal',
    name=name,
  )(x)
