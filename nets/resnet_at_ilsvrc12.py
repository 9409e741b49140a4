"""ResNet for ILSVRC-12, post-activation (He et al. 2015, arXiv:1512.03385, section 4.1).

PocketFlow's was pre-activation (v2); here batch norm and ReLU come after the convolution, so that
batch norm folds into the kernel for int8. All else is as there: a projection in the first block of
every stage, the first one too; stride 2 in a bottleneck's 3x3 convolution. So every convolution is
as there, and so are the multiply-accumulates (docs/flops.md).
"""

import dataclasses

from keras import Input, Model, layers

from datasets import ilsvrc12
from datasets.paths import resolve_folder
from nets import model_helper
from nets.residual import convolve
from pocketsize.errors import UserError
from pocketsize.options import option, with_default

_BLOCKS = {
  18: (2, 2, 2, 2),
  34: (3, 4, 6, 3),
  50: (3, 4, 6, 3),
  101: (3, 4, 23, 3),
  152: (3, 8, 36, 3),
  200: (3, 24, 36, 3),
}
_SMALLEST_WITH_BOTTLENECKS = 50


class ModelHelper(model_helper.ModelHelper):
  """Four stages of 64, 128, 256 and 512 channels, four times that out of a bottleneck block."""

  name = 'resnet'
  dataset_name = 'ilsvrc12'
  total_epochs = 100
  decay_epochs = (30, 60, 80, 90)

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(model_helper.ModelHelper.Config):
    """Options of the net."""

    batch_size_norm: float = with_default(model_helper.ModelHelper.Config, 'batch_size_norm', 256.0)
    nb_smpls_val: int = with_default(model_helper.ModelHelper.Config, 'nb_smpls_val', 10000)
    resnet_size: int = option(18, 'layers with weights', choices=tuple(_BLOCKS))
    nb_classes: int | None = option(
      None, 'logits, at least as many as the data set has classes; unset: as many', lower=1
    )

  def __init__(self, config):
    super().__init__(config)
    self.name = f'resnet_{config.resnet_size}'

  def build(self):
    """Returns the model: [batch, 224, 224, 3] in, [batch, classes] logits out.

    Raises:
      UserError: `nb_classes` is unset and there are no data to count the classes of.
    """
    size = self.config.resnet_size
    block = _bottleneck if size >= _SMALLEST_WITH_BOTTLENECKS else _block
    classes = self.config.nb_classes or len(ilsvrc12.class_names(self._folder()))
    x = inputs = Input((ilsvrc12.SIZE, ilsvrc12.SIZE, 3), name='images')
    x = layers.ReLU(name='relu0')(_normalise(convolve(x, 64, 7, 2, 'conv0'), 'bn0'))
    x = layers.MaxPooling2D(3, strides=2, padding='same', name='pool0')(x)
    for stage, blocks in enumerate(_BLOCKS[size], start=1):
      for number in range(1, blocks + 1):
        stride = 2 if stage > 1 and number == 1 else 1
        x = block(x, 32 << stage, stride, number == 1, f'stage{stage}_block{number}')
    x = layers.GlobalAveragePooling2D(name='pool')(x)
    return Model(inputs, layers.Dense(classes, name='dense')(x), name=self.name)

  def dataset(self):
    """Returns ILSVRC-12, or a part of its classes.

    Raises:
      UserError: the data are missing, or have more classes than `nb_classes`.
    """
    data = ilsvrc12.Ilsvrc12(self._folder(), self.config.nb_smpls_val)
    given = self.config.nb_classes
    if given and given < len(data.classes):
      raise UserError(
        f'--nb_classes must be at least the {len(data.classes)} classes of the data set. '
        f'Received: {given}.'
      )
    return data

  def _folder(self):
    return resolve_folder(self.dataset_name, self.config.data_dir_local)


def _normalise(x, name):
  return layers.BatchNormalization(epsilon=1e-5, momentum=0.997, name=name)(x)


def _block(x, channels, stride, projects, name):
  """Two 3x3 convolutions and a way past them."""
  past = _past(x, channels, stride, name) if projects else x
  x = _normalise(convolve(x, channels, 3, stride, f'{name}_conv1'), f'{name}_bn1')
  x = layers.ReLU(name=f'{name}_relu1')(x)
  x = _normalise(convolve(x, channels, 3, 1, f'{name}_conv2'), f'{name}_bn2')
  x = layers.Add(name=f'{name}_add')([x, past])
  return layers.ReLU(name=f'{name}_relu2')(x)


def _bottleneck(x, channels, stride, projects, name):
  """1x1, 3x3 and 1x1 convolutions and a way past them."""
  past = _past(x, 4 * channels, stride, name) if projects else x
  x = _normalise(convolve(x, channels, 1, 1, f'{name}_conv1'), f'{name}_bn1')
  x = layers.ReLU(name=f'{name}_relu1')(x)
  x = _normalise(convolve(x, channels, 3, stride, f'{name}_conv2'), f'{name}_bn2')
  x = layers.ReLU(name=f'{name}_relu2')(x)
  x = _normalise(convolve(x, 4 * channels, 1, 1, f'{name}_conv3'), f'{name}_bn3')
  x = layers.Add(name=f'{name}_add')([x, past])
  return layers.ReLU(name=f'{name}_relu3')(x)


def _past(x, channels, stride, name):
  return _normalise(
    convolve(x, channels, 1, stride, f'{name}_shortcut_conv'), f'{name}_shortcut_bn'
  )
