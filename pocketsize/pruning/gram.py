"""Gram matrices of what a layer reads and should write, at sampled places: all that solvers need.

A layer's kernel is a matrix W, [weights of an output, outputs]; its rows are ordered by kernel
position first and input channel second, as Keras' kernels are. With X, [rows, weights of an
output], the patches that the pruned model's layer reads and Y, [rows, outputs], what the original
layer writes, X'X and X'Y give every least-squares and LASSO problem in them exactly, however many
rows there are.

Memory: (k c)^2 + k c m numbers of 8 bytes for k kernel positions, c inputs and m outputs, and
`CHUNK` numbers of 4 bytes while a batch is added. For the widest 3x3 layer of a ResNet-50, 512 to
512 channels, 189 MB.
"""

import itertools

import numpy as np

CHUNK = 2**24


class Problem:
  """A layer's regression: X'X and X'Y, summed batch by batch.

  Args:
    layer: ungrouped convolution or dense layer with the original weights.

  Attributes:
    kernel: [weights of an output, outputs] the original kernel, float64.
    inputs: number of input channels.
    gram: [weights, weights] X'X.     moments: [weights, outputs] X'Y.
    energy: the sum of squares of Y.  rows: how many.
  """

  def __init__(self, layer):
    self.layer = layer
    kernel = np.array(layer.kernel, np.float64)
    self.inputs = kernel.shape[-2]
    self.kernel = kernel.reshape(-1, kernel.shape[-1])
    weights, outputs = self.kernel.shape
    self.gram = np.zeros((weights, weights))
    self.moments = np.zeros((weights, outputs))
    self.energy, self.rows = 0.0, 0

  def add(self, read, original, places, offset=None):
    """Adds a batch.

    Args:
      read: [batch, ..., inputs] what the layer reads in the pruned model, in its own data format.
      original: [batch, ..., inputs] what it reads in the original one.
      places: [batch, places] numbers of output positions; None for all.
      offset: [batch, ..., outputs] to be added to what the original layer writes, or None.
    """
    kernel = self.kernel.astype(np.float32)
    step = max(CHUNK // max(_places_of(self.layer, read, places) * len(kernel), 1), 1)
    for start in range(0, len(read), step):
      part = slice(start, start + step)
      chosen = None if places is None else places[part]
      x = patches(self.layer, read[part], chosen)
      y = patches(self.layer, original[part], chosen) @ kernel
      if offset is not None:
        y = y + at_places(_channels_last(self.layer, offset[part]), chosen)
      self.gram += x.T @ x
      self.moments += x.T @ y
      self.energy += float(np.square(y, dtype=np.float64).sum())
      self.rows += len(x)

  def reduce(self, total):
    """Makes sums over one worker's samples those over all: `total(array)` sums over the workers."""
    self.gram, self.moments = total(self.gram), total(self.moments)
    self.energy = float(total(np.array(self.energy)))
    self.rows = int(total(np.array(self.rows)))

  def contributions(self, kernel=None):
    """Returns (G, g) of min_b ||Y - sum_i b_i X_i W_i||^2 = b'Gb - 2 g'b + ||Y||^2.

    X_i and W_i are the columns and rows of input channel i (He et al. 2017, equation 2).

    Args:
      kernel: W; the original kernel by default.

    Returns:
      G [inputs, inputs], g [inputs].
    """
    kernel = self.kernel if kernel is None else kernel
    products = (self.gram * (kernel @ kernel.T)).reshape(-1, self.inputs, len(kernel))
    products = products.sum(axis=0).reshape(self.inputs, -1, self.inputs).sum(axis=1)
    moments = (self.moments * kernel).sum(axis=1).reshape(-1, self.inputs).sum(axis=0)
    return products, moments

  def rows_of(self, chosen):
    """Returns [weights] bool: the rows of the kernel that read `chosen`, [inputs] bool."""
    return np.tile(chosen, len(self.kernel) // self.inputs)

  def error(self, kernel):
    """Returns ||Y - X kernel||^2, the squared error of a [weights, outputs] kernel."""
    return float(
      self.energy + ((self.gram @ kernel) * kernel).sum() - 2.0 * (self.moments * kernel).sum()
    )


def output_places(layer, shape):
  """Returns the number of positions of an ungrouped layer's output for a [batch, ...] input."""
  return int(np.prod(_geometry(layer, shape)[0]))


def patches(layer, x, places=None):
  """Returns [rows, kernel positions * inputs], what a layer multiplies its kernel with.

  Args:
    layer: Conv1D, Conv2D or Conv3D, not grouped, or Dense.
    x: [batch, ...] what it reads.
    places: [batch, places] numbers of output positions, in C order; None for all.
  """
  x = _channels_last(layer, np.asarray(x, np.float32))
  sizes, strides, dilations, kernel, pads = _geometry(layer, x.shape, moved=True)
  if any(sum(pad) for pad in pads):
    x = np.pad(x, [(0, 0), *pads, (0, 0)])
  if places is None:
    places = np.broadcast_to(np.arange(int(np.prod(sizes))), (len(x), int(np.prod(sizes))))
  corners = np.unravel_index(places, sizes) if sizes else ()
  samples = np.broadcast_to(np.arange(len(x))[:, None], places.shape)
  columns = [
    x[
      (
        samples,
        *(
          corner * stride + offset * dilation
          for corner, stride, offset, dilation in zip(
            corners, strides, offsets, dilations, strict=True
          )
        ),
      )
    ]
    for offsets in itertools.product(*map(range, kernel))
  ]
  return np.stack(columns, axis=2).reshape(places.size, -1)


def at_places(values, places):
  """Returns [rows, channels] of [batch, ..., channels] at [batch, places] positions; None: all."""
  flat = np.asarray(values).reshape(len(values), -1, np.shape(values)[-1])
  if places is not None:
    flat = np.take_along_axis(flat, places[:, :, None], axis=1)
  return flat.reshape(-1, flat.shape[-1])


def _places_of(layer, x, places):
  return output_places(layer, np.shape(x)) if places is None else places.shape[1]


def _channels_last(layer, x):
  if getattr(layer, 'data_format', 'channels_last') == 'channels_first':
    return np.moveaxis(x, 1, -1)
  return x


def _geometry(layer, shape, moved=False):
  """Returns (output sizes, strides, dilations, kernel sizes, paddings) of the spatial axes."""
  if not hasattr(layer, 'kernel_size'):
    sizes = tuple(shape[1:-1])
    ones = (1,) * len(sizes)
    return sizes, ones, ones, ones, [(0, 0)] * len(sizes)
  first = getattr(layer, 'data_format', 'channels_last') == 'channels_first' and not moved
  spatial = shape[2:] if first else shape[1:-1]
  sizes, pads = [], []
  for size, kernel, stride, dilation in zip(
    spatial, layer.kernel_size, layer.strides, layer.dilation_rate, strict=True
  ):
    reach = (kernel - 1) * dilation + 1
    if layer.padding == 'valid':
      sizes.append((size - reach) // stride + 1)
      pads.append((0, 0))
      continue
    sizes.append(-(-size // stride))
    total = max((sizes[-1] - 1) * stride + reach - size, 0)
    before = reach - 1 if layer.padding == 'causal' else total // 2
    pads.append((before, max(total - before, 0)))
  return tuple(sizes), layer.strides, layer.dilation_rate, layer.kernel_size, pads
