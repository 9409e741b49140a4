"""The runtimes that a file is for, by what their integer kernels read and write.

An integer kernel wants its inputs as integers, and most must write integers too. What a runtime
computes in float reads and writes float, and a quantizer there costs accuracy and time for nothing.
"""

import dataclasses

from pocketsize import targets

WEIGHTED = frozenset(targets.WEIGHTS_BY_TYPE)
_POOLING = frozenset(
  f'{name}{size}D' for name in ('AveragePooling', 'GlobalAveragePooling') for size in (1, 2, 3)
)
_TRANSPOSED = frozenset({'Conv1DTranspose', 'Conv2DTranspose', 'Conv3DTranspose'})
_CONCATENATE = frozenset({'Concatenate'})


@dataclasses.dataclass(frozen=True)
class Device:
  """What decides where activations are quantized. Operations are named by their types.

  Attributes:
    readers: operations whose inputs are quantized.
    writers: operations whose outputs are quantized; None: all that compute, and the model's inputs.
    joiners: operations that hand on what they read if it has one range, so their inputs get one and
      their output none of its own. An addition is none: every runtime takes summands of two ranges,
      and with one range the summand that has the smaller values loses bits.
  """

  readers: frozenset
  writers: frozenset | None
  joiners: frozenset


# NNCF's hardware configuration of the CPU: what has an entry there with activations, as far as
# Keras has it. Kernels of oneDNN write float as well as integers.
_OPENVINO = WEIGHTED | _POOLING
_OPENVINO |= {'Add', 'Subtract', 'Multiply', 'Divide', 'TrueDivide', 'Power'}
_OPENVINO |= {'Maximum', 'Minimum', 'Average', 'Mean', 'Sum', 'Dot', 'Matmul'}
_OPENVINO |= {'BatchNormalization', 'LayerNormalization', 'GroupNormalization', 'UnitNormalization'}

# What `onnxruntime.quantization` quantizes for the CPU and a kernel QLinear... exists for. (A batch
# norm becomes a convolution, see `conversion.integer`.) Sigmoid, LeakyRelu and Softmax have kernels
# too, but are tables of 256 values that save little.
_ONNXRUNTIME = WEIGHTED | _POOLING | {'Add', 'Multiply', 'Dot', 'Matmul', 'BatchNormalization'}
# Matrix products of integers that write float exist; transposed convolutions compute in float.
_WRITE_FLOAT = _TRANSPOSED | {'Dense', 'EinsumDense', 'Dot', 'Matmul'}

DEVICES = {
  # The integer kernels of LiteRT read and write integers, whatever they compute; files with
  # quantizers at all these places run in integers elsewhere too.
  'all': Device(frozenset(), None, _CONCATENATE),
  # Its kernels of Maximum and Minimum take one scale, like that of Concatenate.
  'litert': Device(frozenset(), None, _CONCATENATE | {'Maximum', 'Minimum'}),
  'openvino': Device(_OPENVINO, frozenset(), _CONCATENATE),
  'onnxruntime': Device(_ONNXRUNTIME, _ONNXRUNTIME - _WRITE_FLOAT, _CONCATENATE),
}
DEFAULT = 'all'
