"""ResNet for CIFAR-10, post-activation (He et al. 2015, arXiv:1512.03385, section 4.2).

PocketFlow's was pre-activation (v2), where batch norm and ReLU come before the convolution; here
they come after it, so that batch norm folds into the kernel for int8. The network of
akamaster/pytorch_resnet_cifar10 with `shortcut='pad'`, to the last digit.
"""

import dataclasses

import keras
from keras import Input, Model, layers

from datasets.cifar10 import Cifar10
from datasets.paths import resolve_folder
from nets import model_helper
from nets.residual import convolve
from pocketsize.options import option, with_default

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


class ModelHelper(model_helper.ModelHelper):
  """Three stages of 16, 32 and 64 channels with (resnet_size - 2) / 6 blocks each."""

  name = 'resnet'
  dataset_name = 'cifar10'
  total_epochs = 250
  decay_epochs = (100, 150, 200)

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(model_helper.ModelHelper.Config):
    """Options of the net."""

    loss_w_dcy: float = with_default(model_helper.ModelHelper.Config, 'loss_w_dcy', 2e-4)
    resnet_size: int = option(20, 'layers with weights', choices=(20, 32, 44, 56))
    shortcut: str = option(
      'projection',
      'where the shape changes: 1x1 convolution and batch norm, or subsampling and zero channels',
      choices=('projection', 'pad'),
    )

  def __init__(self, config):
    super().__init__(config)
    self.name = f'resnet_{config.resnet_size}'

  def build(self):
    """Returns the model: [batch, 32, 32, 3] in, [batch, 10] logits out."""
    x = inputs = Input((32, 32, 3), name='images')
    x = _normalise(convolve(x, 16, 3, 1, 'conv0'), 'bn0')
    x = layers.ReLU(name='relu0')(x)
    for stage, channels in enumerate((16, 32, 64), start=1):
      for block in range(1, (self.config.resnet_size - 2) // 6 + 1):
        stride = 2 if stage > 1 and block == 1 else 1
        x = _block(x, channels, stride, self.config.shortcut, f'stage{stage}_block{block}')
    x = layers.GlobalAveragePooling2D(name='pool')(x)
    x = layers.Dense(10, kernel_initializer='he_normal', name='dense')(x)
    return Model(inputs, x, name=self.name)

  def dataset(self):
    """Returns CIFAR-10 with the normalisation of the public weights."""
    folder = resolve_folder(self.dataset_name, self.config.data_dir_local)
    return Cifar10(folder, _MEAN, _STD, self.config.nb_smpls_val)

  def pretrained_names(self, model):
    """Returns {weight path: name}, with the names of akamaster/pytorch_resnet_cifar10."""
    return {weight.path: _torch_name(weight.path) for weight in model.weights}


def _normalise(x, name):
  return layers.BatchNormalization(epsilon=1e-5, momentum=0.9, name=name)(x)


def _block(x, channels, stride, shortcut, name):
  """Two 3x3 convolutions and a way past them."""
  past = x
  if stride > 1 and shortcut == 'projection':
    past = convolve(past, channels, 1, stride, f'{name}_shortcut_conv')
    past = _normalise(past, f'{name}_shortcut_bn')
  elif stride > 1:
    # A pool of one pixel is a stock layer that takes every second pixel.
    past = layers.MaxPooling2D(1, strides=stride, name=f'{name}_shortcut_subsample')(past)
    new = (channels - past.shape[-1]) // 2
    past = keras.ops.pad(past, ((0, 0), (0, 0), (0, 0), (new, new)))
  x = _normalise(convolve(x, channels, 3, stride, f'{name}_conv1'), f'{name}_bn1')
  x = layers.ReLU(name=f'{name}_relu1')(x)
  x = _normalise(convolve(x, channels, 3, 1, f'{name}_conv2'), f'{name}_bn2')
  x = layers.Add(name=f'{name}_add')([x, past])
  return layers.ReLU(name=f'{name}_relu2')(x)


_TORCH_LAYERS = {'conv0': 'conv1', 'bn0': 'bn1', 'dense': 'linear'}
_TORCH_SHORTCUT = {'shortcut_conv': 'shortcut.0', 'shortcut_bn': 'shortcut.1'}
_TORCH_WEIGHTS = {
  'kernel': 'weight',
  'gamma': 'weight',
  'bias': 'bias',
  'beta': 'bias',
  'moving_mean': 'running_mean',
  'moving_variance': 'running_var',
}


def _torch_name(path):
  """'stage2_block1_conv1/kernel' -> 'layer2.0.conv1.weight'."""
  layer, weight = path.split('/')
  if layer.startswith('stage'):
    stage, block, inner = layer.split('_', 2)
    place = f'layer{stage[5:]}.{int(block[5:]) - 1}.{_TORCH_SHORTCUT.get(inner, inner)}'
  else:
    place = _TORCH_LAYERS[layer]
  return f'{place}.{_TORCH_WEIGHTS[weight]}'
