"""The quantizer of kernels of TensorFlow's quantization-aware training: the range is the last one.

Jacob et al. 2018, arXiv:1712.05877, section 3.1: the range of a kernel is that of its values, made
symmetric and narrow.
"""

import keras
import numpy as np

from pocketsize import ste
from pocketsize.quantization.quantizers import SymmetricQuantizer, highest_code, quantize_symmetric


@keras.saving.register_keras_serializable(package='pocketsize')
class LastValueQuantizer(SymmetricQuantizer):
  """Symmetric quantizer of a kernel on the levels of TensorFlow's narrow fake quantizer.

  Its two ends are weights of the shape in which TensorFlow's operation takes them, [channels] or
  (), so that a training step of tfmot can set them; `fit` sets them to the largest magnitude.
  """

  def build_rows(self):
    shape = (self.groups.count,) if self.granularity == 'channel' else ()
    self.low = self.add_weight(name='low', shape=shape, initializer='zeros', trainable=False)
    self.high = self.add_weight(name='high', shape=shape, initializer='zeros', trainable=False)

  def fit(self, kernel):
    largest = self.groups.fit(kernel, lambda rows: np.abs(rows).max(axis=1))
    self.low.assign(-largest.reshape(self.low.shape))
    self.high.assign(largest.reshape(self.high.shape))

  def scales(self):
    steps = (self.high.value - self.low.value) / (2.0 * highest_code(self.bits))
    return keras.ops.reshape(steps, self.groups.broadcast)

  def call(self, kernel, training=None):
    return ste.replace(kernel, quantize_symmetric(kernel, self.scales(), self.bits))
