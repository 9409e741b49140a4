"""Flags from dataclass fields: one source for name, type, default, help and legal values."""

import dataclasses
import re

from absl import flags

from pocketsize.errors import UserError
from pocketsize.options import legal_values, type_of

_DEFINE = {
  bool: flags.DEFINE_bool,
  int: flags.DEFINE_integer,
  float: flags.DEFINE_float,
  str: flags.DEFINE_string,
}


def parse(argv, config_types):
  """Returns absl's FlagValues for a command line.

  Args:
    argv: the program's name and its arguments; `--flagfile=FILE` reads more of them from a file.
    config_types: {heading: dataclass type}; field names are flag names. A name that several have
      is one flag and must be the same field in them, inherited from one class.

  Raises:
    UserError: an unknown or malformed flag, or an argument that is no flag.
    SystemExit: after `--help`, with code 0.
  """
  values = flags.FlagValues()
  for config_type in config_types.values():
    for field in dataclasses.fields(config_type):
      if field.name not in values:
        _define(values, config_type, field)
  flags.DEFINE_bool('help', False, 'show the flags', short_name='h', flag_values=values)
  try:
    rest = values(list(argv))
  except flags.IllegalFlagValueError as error:
    # absl tells which flag it was, and then what Python's conversion had to say.
    name, value = re.match(r'flag --(\w+)=(.*?): ', str(error), re.DOTALL).groups()
    owners = [each for each in config_types.values() if name in each.__dataclass_fields__]
    legal = legal_values(owners[0], name) if owners else 'true or false'  # --help is in none
    raise UserError(f'--{name} must be {legal}. Received: {value!r}.') from error
  except flags.Error as error:
    message = str(error).removeprefix('ERROR:: ').rstrip('.')
    raise UserError(f'{message}. --help lists the flags.') from error
  except ValueError as error:  # a value behind --noNAME
    raise UserError(f'{error}. --help lists the flags.') from error
  except OSError as error:
    raise UserError(f'--flagfile names a file that cannot be read: {error}.') from error
  if values.help:
    print(_usage(argv[0], config_types, values))
    raise SystemExit(0)
  if rest[1:]:
    raise UserError(
      f'Every argument must be a flag such as --learner=uniform. Received: {" ".join(rest[1:])!r}.'
    )
  return values


def make(values, config_type):
  """Returns a `config_type` filled from `values`; UserError for what is out of range."""
  return config_type(
    **{field.name: values[field.name].value for field in dataclasses.fields(config_type)}
  )


def refuse(values, config_type, chosen, owner, received):
  """Raises a UserError if the command line sets a flag of `config_type` that `chosen` has not.

  Args:
    owner, received: what has the flag, and what was asked for, in words.
  """
  shared = {field.name for field in dataclasses.fields(chosen)}
  for field in dataclasses.fields(config_type):
    if field.name not in shared and values[field.name].present:
      raise UserError(f'--{field.name} belongs to {owner}. Received: it, and {received}.')


def _define(values, config_type, field):
  kind, _ = type_of(config_type, field.name)
  flag_help = f'{field.metadata["help"]}; {legal_values(config_type, field.name)}'
  _DEFINE[kind](field.name, field.default, flag_help, flag_values=values)


def _usage(program, config_types, values):
  lines = [
    f'Usage: {program} [flags]',
    '',
    '--flagfile=FILE reads flags from a file, one a line.',
    '',
  ]
  for heading, config_type in config_types.items():
    group = [values[field.name] for field in dataclasses.fields(config_type)]
    lines += [
      f'{heading}:',
      *(f'  --{flag.name}: {flag.help} (default: {flag.default})' for flag in group),
      '',
    ]
  return '\n'.join(lines)
