"""A small convolutional net for 8x8 digits, trained in half a minute on a CPU."""

import dataclasses

from keras import Input, Model, layers

from datasets.digits import Digits
from nets import model_helper
from pocketsize.options import with_default


class ModelHelper(model_helper.ModelHelper):
  """Three 3x3 convolutions of 16, 32, 64 channels with batch norm and ReLU; 24 thousand weights."""

  name = 'convnet'
  dataset_name = 'digits'
  total_epochs = 60
  decay_epochs = (30, 45)

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(model_helper.ModelHelper.Config):
    """Options of the net."""

    batch_size_norm: float = with_default(model_helper.ModelHelper.Config, 'batch_size_norm', 64.0)
    loss_w_dcy: float = with_default(model_helper.ModelHelper.Config, 'loss_w_dcy', 5e-4)
    nb_smpls_val: int = with_default(model_helper.ModelHelper.Config, 'nb_smpls_val', 180)

  def build(self):
    """Returns the model: [batch, 8, 8, 1] in, [batch, 10] logits out."""
    x = inputs = Input((8, 8, 1), name='images')
    for index, (channels, stride) in enumerate(((16, 1), (32, 2), (64, 2))):
      x = layers.Conv2D(
        channels,
        3,
        strides=stride,
        padding='same',
        use_bias=False,
        kernel_initializer='he_normal',
        name=f'conv{index}',
      )(x)
      x = layers.BatchNormalization(epsilon=1e-5, momentum=0.9, name=f'bn{index}')(x)
      x = layers.ReLU(name=f'relu{index}')(x)
    x = layers.GlobalAveragePooling2D(name='pool')(x)
    return Model(inputs, layers.Dense(10, name='dense')(x), name=self.name)

  def dataset(self):
    """Returns Digits, which needs no folder."""
    return Digits(nb_smpls_val=self.config.nb_smpls_val)
