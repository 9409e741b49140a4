"""Runs a `horovodrun` command so that several workers look like one program.

  run_workers.py horovodrun --gloo -np 2 -H localhost:2 python nets/x_run.py ...

`horovodrun` itself kills workers five seconds after the first signal, puts `[rank]<stdout>:` before
every line and ends a failed run with a traceback of its own. Here the first SIGINT or SIGTERM goes
to the workers alone, which take the time they need to save; the second ends them. Rank 0's lines
come as they are, those of other ranks after `[rank]`, and not at all where another rank said the
same. The exit code is that of the worker that failed.
"""

import collections
import ctypes
import re
import signal
import subprocess
import sys
import threading

import psutil

WORKER_LINE = re.compile(r'\[(\d+)\]<(?:stdout|stderr)>:(.*)', re.DOTALL)
EXIT_LINE = re.compile(r'Process \d+ exit with status code (\d+)\.')
LINES_REMEMBERED = 1000
USER_ERROR = 2


class Output:
  """The lines of all workers, and what `horovodrun` prints among them."""

  def __init__(self):
    self.exit_codes = []
    self.own_lines = []  # what horovodrun says itself
    self._said_by = collections.OrderedDict()  # line -> the rank that said it first
    self._lock = threading.Lock()

  def forward(self, source, target):
    """Copies `source` to `target` until it ends; runs in a thread of its own."""
    for line in source:
      worker = WORKER_LINE.match(line)
      if worker:
        rank, text = int(worker[1]), worker[2]
        if self._is_news(rank, text):
          target.write(text if rank == 0 else f'[{rank}] {text}')
          target.flush()
      elif exited := EXIT_LINE.match(line):
        self.exit_codes.append(int(exited[1]))
      else:
        self.own_lines.append(line)

  def _is_news(self, rank, text):
    with self._lock:
      first = self._said_by.setdefault(text, rank)
      if len(self._said_by) > LINES_REMEMBERED:
        self._said_by.popitem(last=False)
    return first == rank or not text.strip()


def workers_below(launcher):
  """The processes that horovodrun started as ranks on this machine, without their children."""

  def is_rank(process):
    try:
      return 'HOROVOD_RANK' in process.environ()
    except psutil.Error:
      return False

  try:
    ranks = [
      process
      for process in psutil.Process(launcher.pid).children(recursive=True)
      if is_rank(process)
    ]
  except psutil.NoSuchProcess:
    return []
  ids = {process.pid for process in ranks}
  return [process for process in ranks if process.ppid() not in ids]


def end_with_parent():
  """Runs in the child: if this program is killed, horovodrun is too, and it ends its workers."""
  if sys.platform == 'linux':
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def main(command):
  # A session of its own: Ctrl-C in the terminal comes to this process only.
  launcher = subprocess.Popen(
    command,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    errors='replace',
    bufsize=1,
    start_new_session=True,
    preexec_fn=end_with_parent,
  )
  received = []

  def pass_on(number, _):
    workers = [] if received else workers_below(launcher)
    received.append(number)
    for worker in workers:
      try:
        worker.send_signal(signal.SIGTERM)
      except psutil.NoSuchProcess:
        pass
    if not workers:
      launcher.terminate()

  signal.signal(signal.SIGINT, pass_on)
  signal.signal(signal.SIGTERM, pass_on)

  output = Output()
  threads = [
    threading.Thread(target=output.forward, args=streams)
    for streams in ((launcher.stdout, sys.stdout), (launcher.stderr, sys.stderr))
  ]
  for thread in threads:
    thread.start()
  exit_code = launcher.wait()
  for thread in threads:
    thread.join()
  if exit_code and not output.exit_codes:  # no worker failed: horovodrun did
    sys.stderr.writelines(output.own_lines)
  if USER_ERROR in output.exit_codes:  # one rank's user error ends the others with code 1
    return USER_ERROR
  if exit_code < 0:  # ended by a signal: the code a shell would give
    exit_code = 128 - exit_code
  return next(iter(output.exit_codes), exit_code)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
