"""Options of a frozen dataclass: default, help text and legal values in one line.

Flags, the documentation's tables and the error messages are all derived from what `option` keeps.
"""

import dataclasses
import functools
import math
import types
import typing

from pocketsize.errors import UserError

_BOUNDS = {
  'above': ('above', lambda value, bound: value > bound),
  'lower': ('at least', lambda value, bound: value >= bound),
  'below': ('below', lambda value, bound: value < bound),
  'upper': ('at most', lambda value, bound: value <= bound),
}
_KINDS = {
  bool: ('true or false', (bool,)),
  int: ('an integer', (int,)),
  float: ('a finite number', (int, float)),
  str: ('a text', (str,)),
}


def option(default, help, *, lower=None, upper=None, above=None, below=None, choices=None):
  """Returns a dataclass field that carries its help text and legal values.

  Args:
    default: the field's default; `dataclasses.MISSING` makes the option a required one.
    help: one sentence for `--help` and the documentation.
    lower, upper: inclusive bounds.   above, below: exclusive bounds.
    choices: the legal values, in the order in which they are shown.
  """
  bounds = {'lower': lower, 'upper': upper, 'above': above, 'below': below}
  choices = None if choices is None else tuple(choices)
  return dataclasses.field(default=default, metadata={'help': help, 'choices': choices, **bounds})


def with_default(config_class, name, default):
  """Returns the field `name` of `config_class` again, with another default.

  For a subclass whose option has the same meaning and bounds as its parent's.
  """
  field = config_class.__dataclass_fields__[name]
  return dataclasses.field(default=default, metadata=field.metadata)


def type_of(config_class, name):
  """Returns the type of the option `name` without its `None`, and whether it may be None."""
  hint = _hints(config_class)[name]
  if isinstance(hint, types.UnionType):
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return kinds[0], type(None) in typing.get_args(hint)
  return hint, False


def legal_values(config_class, name):
  """Returns in words what the option `name` may be, such as 'a finite number above 0'."""
  field = config_class.__dataclass_fields__[name]
  kind, optional = type_of(config_class, name)
  if field.metadata.get('choices') is not None:
    words = 'one of ' + ', '.join(str(choice) for choice in field.metadata['choices'])
  else:
    bounds = [
      f'{word} {field.metadata[key]}'
      for key, (word, _) in _BOUNDS.items()
      if field.metadata.get(key) is not None
    ]
    words = ' '.join([_KINDS.get(kind, ('of its type',))[0], ' and '.join(bounds)]).strip()
  return words + (' (or unset)' if optional else '')


def check_options(config):
  """Checks every field of a dataclass that `option` made; call it from `__post_init__`.

  Raises:
    UserError: a value is of the wrong type, out of its range or not among its choices; the
      message says `--name must be ... Received: ...`.
  """
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if not _is_legal(value, field.metadata, *type_of(type(config), field.name)):
      raise UserError(
        f'--{field.name} must be {legal_values(type(config), field.name)}. Received: {value!r}.'
      )


def refuse_idle(config, names, without):
  """Raises a UserError for an option that is set and would have no effect.

  Args:
    config: dataclass whose fields `option` made.
    names: of the options that have none.
    without: what they would need, in words.
  """
  for name in names:
    value = getattr(config, name)
    if value != type(config).__dataclass_fields__[name].default:
      raise UserError(f'--{name} has no effect without {without}. Received: --{name}={value}.')


@functools.cache
def _hints(config_class):
  return typing.get_type_hints(config_class)


def _is_legal(value, metadata, kind, optional):
  if value is None:
    return optional
  if kind in _KINDS:
    # A bool is an int to Python; `--bits=True` is a mistake all the same.
    if not isinstance(value, _KINDS[kind][1]) or isinstance(value, bool) != (kind is bool):
      return False
    if kind is float and not math.isfinite(value):
      return False
  if metadata.get('choices') is not None and value not in metadata['choices']:
    return False
  return all(
    holds(value, metadata[key])
    for key, (_, holds) in _BOUNDS.items()
    if metadata.get(key) is not None
  )
