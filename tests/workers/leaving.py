"""One of two workers that ends in a way of its own: `leaving.py fail|refuse|signal FOLDER`."""

import os
import pathlib
import signal
import sys
import time

import numpy as np

from learners import runtime as runtime_lib


def fail(runtime, folder):
  """Rank 1 breaks while rank 0 waits for it."""
  del folder
  runtime.barrier()
  if runtime.rank == 1:
    raise ArithmeticError('rank 1 broke')
  try:
    runtime.allreduce_sum(np.ones(3))
  except Exception as error:
    # Before the launcher, which ends the others, can end this one too.
    print('lost a worker:', runtime_lib.is_worker_lost(error), flush=True)
    sys.exit(1)


def refuse(runtime, folder):
  """Both find the same mistake of the user."""
  del runtime, folder
  print('--bits must be from 1 to 16. Received: --bits=17', file=sys.stderr)
  sys.exit(2)


def signalled(runtime, folder):
  """A signal, then saving for longer than horovodrun would wait."""
  stop = []
  signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
  pathlib.Path(folder, f'ready{runtime.rank}').write_text(str(os.getpid()))
  while not runtime.any(bool(stop))[0]:
    time.sleep(0.05)
  time.sleep(6)
  if runtime.is_chief:
    print('saved')
  runtime.barrier()


if __name__ == '__main__':
  ending = {'fail': fail, 'refuse': refuse, 'signal': signalled}[sys.argv[1]]
  ending(runtime_lib.create(True), sys.argv[2])
