"""What dropped channels that are constants, not zero, add to the outputs of their readers."""

import keras
import numpy as np
import tensorflow as tf

from pocketsize.errors import UserError
from pocketsize.graph import functional
from pocketsize.sizes import fitting


def folded_constants(graph, masked, readers):
  """Returns {layer: [outputs] what its dropped inputs add to its outputs}, without zeros.

  Args:
    graph: `Graph` of a model.
    masked: `Graph` of its copy in which dropped channels are constants.
    readers: {layer of the model: [inputs] bool, dropped}; their kernels have one input axis.

  Raises:
    UserError: a constant is not finite, or the inputs' sizes are not fixed and no size will do.
  """
  originals = dict(zip(masked.nodes, graph.nodes, strict=True))
  symbols, failed = functional(masked.model).inputs, None
  shapes, dtypes = [each.shape for each in symbols], [each.dtype for each in symbols]
  for sized in fitting(shapes, dtypes, lambda inputs: masked.run(inputs, training=False)):
    # Any input will do that is large enough.
    inputs = [
      keras.ops.cast(keras.ops.ones(shape), dtype)
      for shape, dtype in zip(sized, dtypes, strict=True)
    ]
    try:
      return _seen(masked, originals, readers, inputs)
    except (ValueError, tf.errors.OpError) as error:
      failed = error
  if isinstance(failed, UserError):
    raise failed
  raise UserError(
    f'What {", ".join(layer.name for layer in readers)} would read of dropped channels cannot be '
    f"found out: give the model's inputs fixed sizes. Received: {shapes}."
  ) from failed


def _seen(masked, originals, readers, inputs):
  """Returns what `folded_constants` does, as `inputs` show it.

  Args:
    originals: {node of `masked`: that of the model}.
  """
  found = {}

  def call(node, args, kwargs):
    layer = originals[node].operation
    if layer in readers:
      gone = readers[layer]
      rows = np.reshape(keras.ops.convert_to_numpy(args[0]), (-1, len(gone)))[:, gone]
      if not len(rows) or not np.isfinite(rows[0]).all():
        raise UserError(
          f'What layer {node.path!r} reads of dropped channels must be finite numbers. Received: '
          f'{rows[:1].tolist()}.'
        )
      kernel = keras.ops.convert_to_numpy(node.operation.kernel)
      kernel = kernel.reshape(-1, *kernel.shape[-2:]).sum(axis=0)[gone]
      if rows[0].any():
        found[layer] = rows[0] @ kernel
    return args[0] if node.is_input else node.operation(*args, **kwargs)

  masked.run(inputs, call, False)
  return found
