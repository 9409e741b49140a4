"""Small models of the shapes that exporting has to get right, with weights in realistic ranges."""

import functools

import keras
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from keras import layers

from pocketsize import targets
from pocketsize.graph import Graph
from pocketsize.instrument import instrument
from pocketsize.quantization.devices import DEFAULT
from pocketsize.quantization.placement import quantized_tensors
from pocketsize.quantization.quantizers import ActivationQuantizer, WeightQuantizer
from pocketsize.quantization.shared import SharedActivationQuantizer
from pocketsize.transform import Placement

SIZE = 12


def _image():
  return keras.Input((SIZE, SIZE, 3), name='image')


def block(x, channels, size=3, strides=1, **kwargs):
  x = layers.Conv2D(channels, size, strides, padding='same', use_bias=False, **kwargs)(x)
  return layers.ReLU()(layers.BatchNormalization()(x))


def plain():
  x = inputs = _image()
  x = block(block(x, 8), 12)
  x = layers.MaxPooling2D()(x)
  return keras.Model(inputs, layers.Dense(5, name='dense')(layers.Flatten()(x)))


def depthwise():
  inputs = _image()
  x = layers.DepthwiseConv2D(3, padding='same', depth_multiplier=2, use_bias=False)(
    block(inputs, 8)
  )
  x = layers.ReLU(6.0)(layers.BatchNormalization()(x))
  x = layers.DepthwiseConv2D(3, 2, padding='valid', activation='relu')(x)
  return keras.Model(inputs, layers.GlobalAveragePooling2D()(block(x, 8, 1)))


def residual():
  """Both kinds of shortcut, a strided convolution behind ZeroPadding2D, padded channels."""
  inputs = _image()
  x = block(inputs, 8)
  y = layers.BatchNormalization()(layers.Conv2D(8, 3, padding='same')(block(x, 8)))
  x = layers.ReLU()(layers.Add()([x, y]))
  y = layers.Conv2D(12, 3, 2, use_bias=False)(layers.ZeroPadding2D(1)(x))
  y = layers.ReLU()(layers.BatchNormalization()(y))
  past = keras.ops.pad(layers.MaxPooling2D(1, 2)(x), ((0, 0), (0, 0), (0, 0), (2, 2)))
  x = layers.ReLU()(layers.Add()([past, y]))
  past = layers.BatchNormalization()(layers.Conv2D(16, 1, 2, use_bias=False)(x))
  x = layers.Add()([past, layers.BatchNormalization()(layers.Conv2D(16, 3, 2, padding='same')(x))])
  return keras.Model(inputs, layers.Dense(5)(layers.GlobalAveragePooling2D()(x)))


def concatenation():
  inputs = _image()
  x = layers.Concatenate()(
    [block(inputs, 6), layers.AveragePooling2D(3, 1, padding='same')(block(inputs, 4, 1))]
  )
  return keras.Model(inputs, layers.Dense(5)(layers.Flatten()(layers.AveragePooling2D(2)(x))))


def transposed():
  inputs = _image()
  x = layers.Conv2DTranspose(6, 3, 2, padding='same', use_bias=False)(block(inputs, 8, strides=2))
  x = layers.ReLU()(layers.BatchNormalization()(x))
  return keras.Model(inputs, layers.Conv2D(2, 1)(x))


def nested():
  inner_inputs = keras.Input((SIZE, SIZE, 3))
  base = keras.Model(inner_inputs, block(block(inner_inputs, 8), 8, strides=2), name='base')
  inputs = _image()
  head = keras.Sequential(
    [keras.Input((6, 6, 8)), layers.GlobalAveragePooling2D(), layers.Dense(5)], name='head'
  )
  return keras.Model(inputs, head(base(inputs)))


def own_activations():
  inputs = _image()
  x = layers.Conv2D(6, 3, activation='silu')(inputs)
  x = layers.Conv2D(6, 3, activation=layers.LeakyReLU(0.1))(x)
  return keras.Model(inputs, layers.Dense(5, activation='softmax')(layers.Flatten()(x)))


BUILDERS = {
  build.__name__: build
  for build in (plain, depthwise, residual, concatenation, transposed, nested, own_activations)
}


def samples(count=32):
  return np.random.default_rng(7).normal(size=(count, SIZE, SIZE, 3)).astype(np.float32)


def randomized(model, seed=0):
  """Gives batch norms and biases trained values; some gammas are negative, one is zero."""
  rng = np.random.default_rng(seed)
  for layer in Graph(model).layers.values():
    if isinstance(layer, layers.BatchNormalization):
      channels = layer.gamma.shape[0]
      gamma = rng.uniform(0.5, 1.5, channels) * np.where(rng.random(channels) < 0.3, -1.0, 1.0)
      gamma[0] = 0.0
      layer.gamma.assign(gamma)
      layer.beta.assign(rng.normal(size=channels) * 0.3)
      layer.moving_mean.assign(rng.normal(size=channels) * 0.3)
      layer.moving_variance.assign(rng.uniform(0.5, 2.0, channels))
    elif getattr(layer, 'bias', None) is not None:
      layer.bias.assign(rng.normal(size=layer.bias.shape) * 0.2)
  return model


def quantized(
  model,
  bits=8,
  activation_bits=8,
  granularity='channel',
  masks=(),
  weights=WeightQuantizer,
  activations=ActivationQuantizer,
  device=DEFAULT,
):
  """Instruments a model with fitted quantizers.

  Args:
    bits: of the weights; None for float.
    activation_bits: None for float.
    granularity: of the weights.
    masks: further placements.
    weights, activations: the quantizers' classes.
    device: the activations are where it wants them.
  """
  graph = Graph(model)
  placements = list(masks)
  mask_by_place = {(mask.path, mask.point): mask.transform for mask in masks}
  for path, layer in graph.layers.items() if bits else ():
    for point in targets.weight_points(layer):
      kernel = np.array(getattr(layer, point))
      if (path, point) in mask_by_place:
        kernel = np.array(mask_by_place[path, point](kernel))
      quantizer = weights(bits, granularity, targets.channel_axes(layer, point), bucket_size=7)
      quantizer.build(kernel.shape)
      quantizer.fit(kernel)
      placements.append(Placement(path, point, quantizer))
  tensors = quantized_tensors(graph, device) if activation_bits else []
  members = {tensor.group: [] for tensor in tensors}
  for tensor in tensors:
    members[tensor.group].append(tensor)
  for group in members.values():
    nonnegative = all(tensor.nonnegative for tensor in group)
    calls = sum(tensor.calls for tensor in group)
    kind = activations
    if activations is ActivationQuantizer and calls > 1:
      kind = functools.partial(SharedActivationQuantizer, calls=calls)
    quantizer = kind(activation_bits, nonnegative=nonnegative)
    placements += [Placement(tensor.path, tensor.point, quantizer) for tensor in group]
  model = instrument(model, placements)
  observe(model)
  return model


def observe(model):
  """Fills the activation ranges from the samples, batch norms as in inference."""

  def activate(transform, x):
    transform.observe(x)
    return transform(x)

  model.run(samples(), training=False, activate=activate)


def output_step(model):
  """Returns the step of the last activation quantizer of a model."""
  low, high = [transform for transform in model.transforms if hasattr(transform, 'range')][
    -1
  ].range()
  return (high - low) / 255.0


def tflite_operations(path):
  """Returns the names of the operations of a .tflite file, in order."""
  model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
  names = {number: name for name, number in vars(schema.BuiltinOperator).items()}
  codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]
  return [names[codes[op.opcodeIndex]] for op in model.subgraphs[0].operators]
