"""Models of mixed precision on their way into files: computed in float32, as their weights are."""

import contextlib

import keras

_HALVES = ('float16', 'bfloat16')


def widened(dtype):
  """Returns the name of a dtype, float32 for floats of 16 bits."""
  dtype = keras.backend.standardize_dtype(dtype)
  return 'float32' if dtype in _HALVES else dtype


@contextlib.contextmanager
def in_float32(layers):
  """Lets layers that compute in 16 bits with weights of 32, and the layers in them, compute in 32.

  Converters know few operations in 16 bits, and no fake quantizers.

  Args:
    layers: iterable of Keras layers.
  """
  policies = {
    each: each.dtype_policy
    for layer in layers
    for each in layer._flatten_layers()
    if each.compute_dtype in _HALVES and each.variable_dtype == 'float32'
  }
  try:
    for layer in policies:
      # The property's setter would write into a map of policies that layers share.
      layer._dtype_policy = keras.dtype_policies.get('float32')
    yield
  finally:
    for layer, policy in policies.items():
      layer._dtype_policy = policy
