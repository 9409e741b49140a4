"""What a net is to the rest: model, data, task loss, evaluator, schedule of float training."""

import abc
import dataclasses

import keras
import numpy as np

from evaluators.classification import Classification
from nets import pretrained
from pocketsize.options import check_options, option


class ModelHelper(abc.ABC):
  """One network on one data set, as its float version is trained.

  A subclass sets the attributes and makes `build` and `dataset`; the rest is that of a classifier
  with logits and a piecewise constant learning rate, to be overridden where the net differs.

  Attributes:
    name: of the network, such as 'lenet'; the model has it as well.
    dataset_name: as in the file names, such as 'cifar10'.
    total_epochs: length of float training at `nb_epochs_rat` = 1.
    decay_epochs: epochs after which the learning rate is a tenth of what it was, ascending, at
      `nb_epochs_rat` = 1.
  """

  name: str
  dataset_name: str
  total_epochs: float
  decay_epochs: tuple

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config:
    """Options that every net has; a net changes defaults and adds its own."""

    lrn_rate_init: float = option(
      0.1, 'learning rate at the start, for a global batch of batch_size_norm', above=0
    )
    batch_size_norm: float = option(
      128.0, 'global batch size that lrn_rate_init is meant for; the rate scales with it', above=0
    )
    momentum: float = option(0.9, 'momentum of stochastic gradient descent', lower=0, below=1)
    loss_w_dcy: float = option(1e-4, 'factor of the L2 weight decay', lower=0)
    nb_epochs_rat: float = option(
      1.0, "factor on the net's training epochs and the epochs of its schedule", above=0
    )
    nb_smpls_val: int = option(5000, "samples of the training set held out as split 'val'", lower=1)
    data_dir_local: str | None = option(
      None,
      'folder of the data set; unset: POCKETSIZE_DATA_DIR_<NAME>, path.conf, or a download',
    )

    def __post_init__(self):
      check_options(self)

  def __init__(self, config):
    """Args: config: a `Config` of this class."""
    self.config = config

  @abc.abstractmethod
  def build(self):
    """Returns a new, randomly initialised keras.Model of stock layers; logits out."""

  @abc.abstractmethod
  def dataset(self):
    """Returns the Dataset, read from the folder that the configuration resolves to."""

  def loss(self, y, outputs):
    """Returns the task loss without weight decay: cross-entropy, mean over the batch, in nats.

    Args:
      y: [batch] integers.   outputs: [batch, classes] logits.
    """
    return keras.ops.mean(
      keras.losses.sparse_categorical_crossentropy(y, outputs, from_logits=True)
    )

  def evaluator(self):
    """Returns a new Evaluator for the model's outputs."""
    return Classification()

  def epochs(self):
    """Returns the epochs of float training, a positive float."""
    return self.total_epochs * self.config.nb_epochs_rat

  def learning_rate(self, epoch):
    """Returns the learning rate of float training for a global batch of `batch_size_norm`.

    Args:
      epoch: finished epochs, a float of at least 0.
    """
    starts = np.multiply(self.decay_epochs, self.config.nb_epochs_rat)
    return self.config.lrn_rate_init * 0.1 ** int(np.searchsorted(starts, epoch, side='right'))

  def pretrained_names(self, model):
    """Returns {weight path: array name} for an .npz file of pretrained weights, in weight order.

    Args:
      model: as `build` makes it.
    """
    return {weight.path: weight.path for weight in model.weights}

  def load(self, path):
    """Returns the net with the weights of a file, or what channel pruning left of it.

    Args:
      path: see `load_pretrained`; or a `.keras` file of this net with fewer channels.

    Raises:
      UserError: the file is missing or unreadable, or fits neither.
    """
    return pretrained.load_or_pruned(self.build(), path, self.pretrained_names)

  def load_pretrained(self, model, path):
    """Copies pretrained weights into `model`: all of them or, on an error, none.

    Args:
      model: as `build` makes it.
      path: a `.keras` or `.weights.h5` file of the same architecture, or an `.npz` file with the
        arrays of `pretrained_names`.

    Raises:
      UserError: the file is missing or unreadable, or does not fit; names the first mismatch.
    """
    pretrained.load(model, path, self.pretrained_names)
