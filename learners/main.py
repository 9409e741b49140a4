"""The entry of every run script: flags, learner; a mistake of the user ends with exit code 2."""

import difflib
import errno
import importlib
import os
import pkgutil
import re
import select
import signal
import sys

import keras
import tensorflow as tf

import learners
from learners import flags, runtime
from learners.config import RunConfig
from learners.learner import Learner
from learners.training import Stopped
from pocketsize.errors import UserError

WORKER_LOST = 1
USER_ERROR = 2


class Interrupted(BaseException):
  """A signal came where nothing is left to save: before training, or while files are written."""

  def __init__(self, number):
    super().__init__(
      f'stopped by {signal.Signals(number).name}; the same command goes on from the last checkpoint'
    )
    self.signal_number = number


def discover():
  """Returns {--learner value: class} of every learner, found by walking the package."""
  for module in pkgutil.iter_modules(learners.__path__, 'learners.'):
    importlib.import_module(module.name)
  return {cls.name: cls for cls in sorted(_named(Learner), key=lambda cls: cls.name)}


def _named(cls):
  """Yields the subclasses of a class, at any depth, that are a value of --learner."""
  for subclass in cls.__subclasses__():
    if hasattr(subclass, 'name'):
      yield subclass
    yield from _named(subclass)


def find(name):
  """Returns the class for a --learner value; UserError with the nearest name."""
  found = discover()
  if name not in found:
    near = difflib.get_close_matches(name, found, n=1, cutoff=0.0)
    raise UserError(
      f'--learner must be one of {", ".join(found)}. Received: {name!r}; did you mean {near[0]!r}?'
    )
  return found[name]


def make_learner(helper_class, argv):
  """Returns the learner that a command line asks for.

  Args:
    helper_class: the net's `ModelHelper` class.
    argv: the program's name and its flags.

  Raises:
    UserError: see `flags.parse`, and what the learner finds wrong.
  """
  found = discover()
  values = flags.parse(
    argv,
    {
      'run': RunConfig,
      f'net {helper_class.name}': helper_class.Config,
      **{f'learner {name}': cls.Config for name, cls in found.items()},
    },
  )
  run = flags.make(values, RunConfig)
  learner_class = find(run.learner)
  for name, other in found.items():
    if other is not learner_class:
      flags.refuse(
        values, other.Config, learner_class.Config, f'--learner={name}', f'--learner={run.learner}'
      )
  config = flags.make(values, learner_class.Config)
  helper = helper_class(flags.make(values, helper_class.Config))
  keras.utils.set_random_seed(run.seed)
  tf.config.experimental.enable_op_determinism()
  return learner_class(helper, run, config, runtime.create(run.enbl_multi_gpu), ' '.join(argv))


def run(helper_class):
  """Runs the learner that the command line asks for and ends the process.

  Exit codes: 0 done; 1 another worker failed; 2 a mistake of the user, in one sentence; 128 + n
  stopped by signal n, or, with that of a broken pipe, because nobody reads the output any more.
  """

  def interrupt(number, frame):
    raise Interrupted(number)

  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, interrupt)
  sys.exit(run_with(helper_class, sys.argv))


def run_with(helper_class, argv):
  """Runs the learner for `argv` and returns the exit code."""
  debug = any(argument.lower() in ('--debug', '--debug=true') for argument in argv)
  try:
    learner = make_learner(helper_class, argv)
    debug = learner.run.debug
    learner.execute()
  except UserError as error:
    if debug:
      raise
    return _complain(str(error), USER_ERROR)
  except (Stopped, Interrupted) as stopped:
    return _complain(str(stopped), 128 + stopped.signal_number)
  except BrokenPipeError:
    if not _is_output_closed():
      raise
    # Who read the output wants no more of it, as `head`; Python would complain when it ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE
  except (OSError, RuntimeError, tf.errors.OpError) as error:
    if _is_disk_full(error):
      return _complain(
        f'The disk is full: {error}. Make room and start the same command again.', USER_ERROR
      )
    mistake = _mistake_in(error)
    if mistake and not debug:
      return _complain(mistake, USER_ERROR)
    if not runtime.is_worker_lost(error):
      raise
    return _complain(
      'another worker failed; the same command goes on from the last checkpoint', WORKER_LOST
    )
  return 0


def _mistake_in(error):
  """The message of a UserError that a tf.data pipeline raised, or None: it comes out as text."""
  found = re.search(rf'\b{UserError.__name__}: (.*)', str(error))
  return found and found[1]


def _is_output_closed():
  # Errors are always reported: on a pipe, that nobody can read it any more.
  output = select.poll()
  output.register(sys.stdout.fileno(), 0)
  return any(event & select.POLLERR for _, event in output.poll(0))


def _is_disk_full(error):
  return getattr(error, 'errno', None) in (errno.ENOSPC, errno.EDQUOT) or any(
    text in str(error) for text in ('No space left', 'Disk quota exceeded')
  )


def _complain(message, code):
  # Every worker says it: it may be the only one that knows. The launcher shows equal lines once.
  print(message, file=sys.stderr)
  return code
