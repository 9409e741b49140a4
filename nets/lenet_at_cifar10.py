"""LeNet for CIFAR-10 as in PocketFlow (Tencent 2018), after LeCun et al. 1998.

PocketFlow's net ended in a softmax and its loss took another; here logits come out.
"""

import dataclasses

from keras import Input, Model, layers

from datasets.cifar10 import Cifar10
from datasets.paths import resolve_folder
from nets import model_helper
from pocketsize.options import with_default

_MEAN = (125.3 / 255, 123.0 / 255, 113.9 / 255)
_STD = (63.0 / 255, 62.1 / 255, 66.7 / 255)


class ModelHelper(model_helper.ModelHelper):
  """Two 5x5 convolutions with max pooling, a hidden dense layer of 256; 0.47 million weights."""

  name = 'lenet'
  dataset_name = 'cifar10'
  total_epochs = 250
  decay_epochs = (100, 150, 200)

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(model_helper.ModelHelper.Config):
    """Options of the net."""

    lrn_rate_init: float = with_default(model_helper.ModelHelper.Config, 'lrn_rate_init', 0.01)
    loss_w_dcy: float = with_default(model_helper.ModelHelper.Config, 'loss_w_dcy', 5e-4)

  def build(self):
    """Returns the model: [batch, 32, 32, 3] in, [batch, 10] logits out."""
    x = inputs = Input((32, 32, 3), name='images')
    for index, channels in enumerate((32, 64)):
      x = layers.Conv2D(channels, 5, kernel_initializer='he_normal', name=f'conv{index}')(x)
      x = layers.ReLU(name=f'relu{index}')(x)
      x = layers.MaxPooling2D(name=f'pool{index}')(x)
    x = layers.Flatten(name='flatten')(x)
    x = layers.Dense(256, kernel_initializer='he_normal', name='dense0')(x)
    x = layers.ReLU(name='relu2')(x)
    return Model(inputs, layers.Dense(10, name='dense1')(x), name=self.name)

  def dataset(self):
    """Returns CIFAR-10 with PocketFlow's normalisation."""
    folder = resolve_folder(self.dataset_name, self.config.data_dir_local)
    return Cifar10(folder, _MEAN, _STD, self.config.nb_smpls_val)
