"""Small nets whose input channels are chosen in tests, one for each topology."""

import keras
from channels import randomized
from keras import layers


def _conv(x, filters, name, size=3, strides=1, act=True, **options):
  x = layers.Conv2D(filters, size, strides, 'same', use_bias=False, name=name, **options)(x)
  x = layers.BatchNormalization(name=f'{name}_bn')(x)
  return layers.ReLU(name=f'{name}_relu')(x) if act else x


def _finished(inputs, x, name, classes=4):
  x = layers.GlobalAveragePooling2D(name='pool')(x)
  return randomized(keras.Model(inputs, layers.Dense(classes, name='head')(x), name=name))


def images():
  return keras.Input((8, 8, 3), name='images')


def chain():
  """Three convolutions, then Flatten and two dense layers."""
  inputs = images()
  x = _conv(inputs, 8, 'a')
  x = _conv(x, 10, 'b', strides=2)
  x = layers.MaxPooling2D(name='max')(layers.Conv2D(6, 3, activation='relu', name='c')(x))
  x = layers.Dense(5, activation='relu', name='hidden')(layers.Flatten(name='flatten')(x))
  return randomized(keras.Model(inputs, layers.Dense(4, name='head')(x), name='chain'))


def residual(shortcut='projection'):
  """A stem and two blocks, the second of which is wider and has a shortcut of its own."""
  inputs = images()
  x = stem = _conv(inputs, 8, 'stem')
  x = _conv(_conv(x, 10, 'one1'), 8, 'one2', act=False)
  x = trunk = layers.ReLU(name='relu1')(layers.Add(name='add1')([x, stem]))
  x = _conv(_conv(x, 12, 'two1', strides=2), 12, 'two2', act=False)
  if shortcut == 'projection':
    trunk = _conv(trunk, 12, 'shortcut', 1, 2, act=False)
  else:
    trunk = layers.AveragePooling2D(1, 2, name='subsample')(trunk)
    trunk = keras.ops.pad(trunk, [[0, 0], [0, 0], [0, 0], [2, 2]])
  x = layers.ReLU(name='relu2')(layers.Add(name='add2')([x, trunk]))
  return _finished(inputs, x, f'residual_{shortcut}')


def padded():
  return residual('pad')


def dense_net():
  """Each convolution reads all before it."""
  inputs = images()
  x = _conv(inputs, 6, 'a')
  x = layers.Concatenate(name='join1')([x, _conv(x, 4, 'b')])
  x = layers.Concatenate(name='join2')([x, _conv(x, 4, 'c')])
  return _finished(inputs, _conv(x, 8, 'last', 1), 'dense_net')


def squeeze():
  """Squeeze and excitation behind the first convolution."""
  inputs = images()
  x = _conv(inputs, 8, 'a')
  gate = layers.GlobalAveragePooling2D(keepdims=True, name='squeeze')(x)
  gate = layers.Dense(4, activation='relu', name='reduce')(gate)
  gate = layers.Dense(8, activation='sigmoid', name='expand')(gate)
  x = layers.Multiply(name='scale')([x, gate])
  return _finished(inputs, _conv(x, 6, 'b'), 'squeeze')


def mobile():
  """Depthwise convolutions between pointwise ones."""
  inputs = images()
  x = _conv(inputs, 6, 'stem')
  for index, channels in enumerate((8, 10)):
    x = layers.DepthwiseConv2D(3, padding='same', use_bias=False, name=f'depth{index}')(x)
    x = layers.ReLU(name=f'depth{index}_relu')(layers.BatchNormalization(name=f'bn{index}')(x))
    x = _conv(x, channels, f'point{index}', 1)
  return _finished(inputs, x, 'mobile')


def nested():
  """A model inside a model."""
  x = inner = keras.Input((8, 8, 6))
  x = _conv(_conv(x, 8, 'a'), 6, 'b', act=False)
  body = keras.Model(
    inner, layers.ReLU(name='relu')(layers.Add(name='add')([x, inner])), name='body'
  )
  inputs = images()
  return _finished(inputs, _conv(body(_conv(inputs, 6, 'stem')), 5, 'last'), 'nested')


def tied():
  """One convolution called twice, one in groups, and a dense layer."""
  inputs = images()
  x = _conv(inputs, 8, 'a')
  conv = layers.Conv2D(8, 3, padding='same', name='twice')
  x = layers.ReLU(name='relu')(conv(conv(x)))
  x = _conv(x, 6, 'plain')
  x = layers.Conv2D(6, 3, groups=2, name='grouped')(x)
  return _finished(inputs, _conv(x, 4, 'last'), 'tied')


NETS = {
  'chain': chain,
  'projection': residual,
  'pad': padded,
  'dense_net': dense_net,
  'squeeze': squeeze,
  'mobile': mobile,
  'nested': nested,
}
