"""What one worker does for all of them: files are rank 0's alone."""

import numpy as np

from pocketsize.errors import UserError


def on_first(task, rank, total):
  """Returns what `task()` gives on rank 0, None elsewhere; its UserError is raised on all ranks.

  Without that the others would wait for a worker that has gone, and say so instead of the reason.

  Args:
    task: called on rank 0 only.
    rank: of this worker.
    total: array -> its sum over the ranks; all of them must call this function.
  """
  result, refusal = None, None
  if rank == 0:
    try:
      result = task()
    except UserError as error:
      refusal = error
  message = str(refusal or '').encode()
  size = int(total(np.array([len(message)], np.float64))[0])
  if size:
    text = np.zeros(size)
    text[: len(message)] = list(message)
    told = bytes(total(text).astype(np.uint8)).decode()
    raise refusal or UserError(told)
  return result
