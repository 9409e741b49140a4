"""The optimizers of the training loop, all of them Keras' own."""

import math

import keras


class Muon(keras.optimizers.Muon):
  """Muon (Jordan et al. 2024) for convolutions, which Keras' own leaves to Adam.

  The momentum of a kernel, as a matrix of [inputs at all positions, outputs], is replaced by the
  nearest matrix whose singular values are equal, so that all directions learn alike; its size is
  that of Adam's steps (Liu et al. 2025, arXiv:2502.16982, equation 4). What is a vector, and dense
  layers, the last of which gives the logits, learn by Adam at the same rate. Weight decay is the
  loss's.
  """

  def __init__(self, learning_rate):
    super().__init__(learning_rate, weight_decay=None, adam_weight_decay=None, name='muon')

  def _should_use_adamw(self, variable):
    return len(variable.shape) < 3 or 1 in (math.prod(variable.shape[:-1]), variable.shape[-1])

  def lr_adjust(self, x):
    return keras.ops.reshape(super().lr_adjust(_matrix(x)), x.shape)

  def zeropower_via_newtonschulz5(self, x, steps):
    return keras.ops.reshape(super().zeropower_via_newtonschulz5(_matrix(x), steps), x.shape)


def _matrix(kernel):
  return keras.ops.reshape(kernel, (-1, kernel.shape[-1]))


def optimizer(name, learning_rate, momentum):
  """Returns a new Keras optimizer.

  Args:
    name: 'sgd', 'adam' or 'muon'.
    learning_rate: at the start.
    momentum: of 'sgd'; the others have their papers'.
  """
  if name == 'sgd':
    return keras.optimizers.SGD(learning_rate, momentum=momentum)
  return {'adam': keras.optimizers.Adam, 'muon': Muon}[name](learning_rate)
