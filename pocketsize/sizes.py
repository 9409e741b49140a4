"""Sizes for inputs that have none: large enough for what is computed of them."""

import keras

LARGEST = 512
_SIZES = (32, 64, 128, 256, LARGEST)


def fitting(shapes, dtypes, compute, batch=1):
  """Yields lists of shapes in which axes without a size have one, from 32 to 512.

  Where Keras says that a tensor would have nothing in it, the shapes are left out. TensorFlow does
  not always say so: of an input that is too small, convolutions of oneDNN give what lies in memory.

  Args:
    shapes: those of the inputs, with the batch; if all sizes are known they are all that comes.
    dtypes: those of the inputs.
    compute: function of symbols of Keras, one for each input; it may raise a ValueError.
    batch: size of the batch.
  """
  is_free = any(None in shape[1:] for shape in shapes)
  for size in _SIZES if is_free else _SIZES[:1]:
    sized = [(batch, *(known or size for known in shape[1:])) for shape in shapes]
    if is_free:
      try:
        compute([keras.KerasTensor(*each) for each in zip(sized, dtypes, strict=True)])
      except ValueError:
        continue
    yield sized
