"""The processes of a run: one, or several that Horovod (Sergeev and Del Balso 2018) holds together.

The only module that knows Horovod. Workers decide alike because rank 0 decides and broadcasts, and
their weights stay equal because every step applies the same averaged gradients and averages what
the forward pass itself wrote, such as the moving statistics of batch norm. Sums over two workers do
not depend on timing; over more, the order of summation may change the last bit between runs.

If a worker fails, Horovod ends the operations of the others with an error that `is_worker_lost`
knows, and the launcher ends the processes: nobody waits for a worker that is gone.
"""

import os

import numpy as np
import tensorflow as tf

from pocketsize.errors import UserError


class Runtime:
  """One process. Every operation is what several workers do, for one."""

  rank = 0
  size = 1

  @property
  def is_chief(self):
    """Whether this process decides, writes files and talks: rank 0."""
    return self.rank == 0

  def broadcast(self, value):
    """Returns rank 0's object, on every rank; what the others pass is ignored."""
    return value

  def broadcast_variables(self, variables):
    """Gives Keras variables rank 0's values; every rank passes the same list."""

  def distribute(self, optimizer, state=()):
    """Makes an optimizer's `apply` average over the workers first; returns the optimizer.

    The optimizer keeps its class, configuration and variables, so that a checkpoint does not depend
    on the number of workers. Needs `compile(jit_compile=False)`: XLA has no Horovod operations.

    Args:
      optimizer: Keras optimizer, built or not; changed in place.
      state: variables that the forward pass writes. Those of floating point are averaged before
        the step is applied; others are left alone.
    """
    del state
    return optimizer

  def allreduce_sum(self, array):
    """Returns the sum of a numeric array over the ranks: NumPy, same shape and dtype."""
    return np.array(array)

  def any(self, *flags):
    """Returns on every rank whether each of `flags` is true on at least one: a list of bools."""
    return (self.allreduce_sum(np.array([bool(flag) for flag in flags], 'int32')) > 0).tolist()

  def barrier(self):
    """Returns when every rank has come here."""
    self.allreduce_sum(np.zeros(1, 'int32'))


class SilentRuntime(Runtime):
  """A process for itself, one of several or not, that writes no file and shows nothing."""

  @property
  def is_chief(self):
    return False


class HorovodRuntime(Runtime):
  """One of several processes that `horovodrun` started.

  Args:
    horovod: the module `horovod.tensorflow`, initialised.
  """

  def __init__(self, horovod):
    self._horovod = horovod
    self.rank = horovod.rank()
    self.size = horovod.size()

  def broadcast(self, value):
    # The name is that of the tensor on every rank; the default depends on the type of `value`.
    return self._horovod.broadcast_object(value, root_rank=0, name='broadcast')

  def broadcast_variables(self, variables):
    variables = list(variables)
    values = self.broadcast([np.array(v.value) for v in variables] if self.is_chief else None)
    for variable, value in zip(variables, values, strict=True):
      variable.assign(value)

  def distribute(self, optimizer, state=()):
    apply_local = optimizer.apply
    state = [variable for variable in state if tf.as_dtype(variable.dtype).is_floating]

    def apply(grads, trainable_variables=None):
      present = [i for i, gradient in enumerate(grads) if gradient is not None]
      tensors = [tf.convert_to_tensor(grads[i]) for i in present]
      means = self._mean(tensors + [tf.convert_to_tensor(variable.value) for variable in state])
      grads = list(grads)
      for i, mean in zip(present, means, strict=False):
        grads[i] = mean
      for variable, mean in zip(state, means[len(present) :], strict=True):
        variable.assign(mean)
      return apply_local(grads, trainable_variables)

    # On the object, not in a subclass: a saved model names the optimizer's own class.
    optimizer.apply = apply
    return optimizer

  def _mean(self, tensors):
    """The mean of each tensor over the ranks: one operation for each dtype."""
    means = [None] * len(tensors)
    for dtype in sorted({tensor.dtype.name for tensor in tensors}):
      chosen = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
      reduced = self._horovod.grouped_allreduce(
        [tensors[i] for i in chosen], op=self._horovod.Average, name=f'mean_{dtype}'
      )
      for i, mean in zip(chosen, reduced, strict=True):
        means[i] = mean
    return means

  def allreduce_sum(self, array):
    array = np.asarray(array)
    total = self._horovod.allreduce(tf.constant(array), op=self._horovod.Sum, name='sum')
    return total.numpy().astype(array.dtype).reshape(array.shape)


def create(enbl_multi_gpu):
  """Returns the Runtime of this process; call it before TensorFlow's first operation.

  Args:
    enbl_multi_gpu: whether `horovodrun` started this process with others; set by the scripts.

  Raises:
    UserError: Horovod is missing or does not fit TensorFlow, or a host has more workers than GPUs.
  """
  if not enbl_multi_gpu:
    return Runtime()
  # While rank 0 exports and measures, the others wait for longer than the default of a minute.
  os.environ.setdefault('HOROVOD_STALL_CHECK_TIME_SECONDS', '1800')
  try:
    import horovod.tensorflow as horovod
  except (ImportError, tf.errors.NotFoundError) as error:
    raise UserError(
      'Several workers (--enbl_multi_gpu) need Horovod built for this TensorFlow; '
      'install it with scripts/install_horovod.sh. '
      f'Received: {str(error).splitlines()[0]}'
    ) from error
  horovod.init()
  if horovod.size() == 1:
    return Runtime()
  _take_one_gpu(horovod.local_rank())
  return HorovodRuntime(horovod)


def _take_one_gpu(local_rank):
  gpus = tf.config.list_physical_devices('GPU')
  if not gpus:
    return
  if local_rank >= len(gpus):
    raise UserError(
      'Every worker needs a GPU of its own; start at most as many workers as the '
      f'host has GPUs. Received: worker {local_rank + 1}, GPUs: {len(gpus)}.'
    )
  tf.config.set_visible_devices(gpus[local_rank], 'GPU')
  tf.config.experimental.set_memory_growth(gpus[local_rank], True)


def is_worker_lost(error):
  """Returns whether an exception says that another worker failed, rather than this one."""
  return isinstance(error, tf.errors.OpError | RuntimeError) and (
    'Horovod has been shut down' in str(error) or 'gloo' in str(error).lower()
  )
