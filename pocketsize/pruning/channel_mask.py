"""A mask of channels: the transform of filter pruning."""

import keras
import tensorflow as tf

from pocketsize.pruning import taylor
from pocketsize.transform import Transform


@keras.saving.register_keras_serializable(package='pocketsize')
class ChannelMask(Transform):
  """Multiplies a weight by zeros and ones along one axis, all ones at first.

  Args:
    axis: of the weight, negative.
    observes: whether each gradient that passes is remembered for Taylor importances.

  Attributes:
    mask: [channels] zeros and ones.
    pending: [channels] sums of gradient * weight since they were last squared.
    importance: [channels] sum of the squares of the channel's whole layer, over all batches.
    batches: how many.
  """

  order = 10

  def __init__(self, axis, observes=False, **kwargs):
    super().__init__(**kwargs)
    self.axis = axis
    self.observes = observes

  def build(self, shape):
    channels = (shape[self.axis],)
    self.mask = self._state('mask', channels, 'ones')
    if self.observes:
      self.pending = self._state('pending', channels)
      self.importance = self._state('importance', channels)
      self.batches = self._state('batches', ())
    self.built = True

  def _state(self, name, shape, initializer='zeros'):
    return self.add_weight(
      name=name, shape=shape, initializer=initializer, dtype='float32', trainable=False
    )

  def call(self, x, training=None):
    mask = keras.ops.reshape(self.mask, (-1,) + (1,) * (-1 - self.axis))
    mask = keras.ops.cast(mask, x.dtype)
    return self._observed(x, mask) if self.observes and training else x * mask

  def _observed(self, x, mask):
    """Returns x * mask, with its gradient; the gradient adds to `pending` when it is computed."""

    @tf.custom_gradient
    def masked(x, mask):
      def gradient(upstream):
        # Of the latent weight, so that a masked channel is judged as well.
        self.pending.assign_add(taylor.contributions(upstream, x, self.axis))
        return upstream * mask, None

      return x * mask, gradient

    # A variable itself would be taken for one that the function reads beside its arguments.
    return masked(tf.convert_to_tensor(x), mask)

  def get_config(self):
    return {**super().get_config(), 'axis': self.axis, 'observes': self.observes}
