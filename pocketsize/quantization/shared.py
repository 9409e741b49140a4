"""Running averages of a range that several tensors have, such as those that a Concatenate joins."""

import keras
import tensorflow as tf

from pocketsize.quantization.quantizers import ActivationQuantizer, nudged_range, quantize_affine
from pocketsize.quantization.range_quantizer import LEAST_WIDTH


@keras.saving.register_keras_serializable(package='pocketsize')
class SharedActivationQuantizer(ActivationQuantizer):
  """Quantizes several tensors over one range, the hull of a running average for each of them.

  An average of all of them together would cut off the widest. Training must call it on each of
  them in turn, in an order that stays; who is next is a weight.

  Args:
    calls: tensors that have the range, at least 1.
    others: as for `ActivationQuantizer`.
  """

  def __init__(self, *args, calls=1, **kwargs):
    super().__init__(*args, **kwargs)
    self.calls = calls

  def build(self, shape):
    arguments = {'shape': (self.calls,), 'initializer': 'zeros', 'trainable': False}
    self.low = self.add_weight(name='low', **arguments)
    self.high = self.add_weight(name='high', **arguments)
    self.turn = self.add_weight(
      name='turn', shape=(), initializer='zeros', trainable=False, dtype='int32'
    )
    self.built = True

  def _hull(self):
    return tf.reduce_min(self.low.value), tf.reduce_max(self.high.value)

  @property
  def has_range(self):
    low, high = self._hull()
    return float(high) > float(low)

  def range(self):
    low, high = self._hull()
    return nudged_range(float(low), float(high), self.bits)

  def set_range(self, low, high):
    low = 0.0 if self.nonnegative else low
    self.low.assign(tf.fill(self.low.shape, float(low)))
    self.high.assign(tf.fill(self.high.shape, float(max(high, low + LEAST_WIDTH))))

  def observe(self, x):
    least, most = self.ends(tf.stop_gradient(x))
    unseen = tf.equal(self.low.value, self.high.value)
    share = tf.where(unseen, 1.0, 1.0 - self.momentum)
    share *= tf.one_hot(self.turn.value, self.calls)
    self.low.assign(self.low + share * (least - self.low))
    self.high.assign(self.high + share * (most - self.high))
    self.turn.assign((self.turn + 1) % self.calls)

  def call(self, x, training=None):
    if training:
      self.observe(x)
    return quantize_affine(x, *self._hull(), self.bits)

  def get_config(self):
    return {**super().get_config(), 'calls': self.calls}


def running_range(calls, *args, **kwargs):
  """Returns the quantizer with running averages for `calls` tensors, see `ActivationQuantizer`."""
  if calls == 1:
    return ActivationQuantizer(*args, **kwargs)
  return SharedActivationQuantizer(*args, calls=calls, **kwargs)
