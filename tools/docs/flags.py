"""Writes docs/flags.md from the dataclasses: python -m tools.docs.flags [--check]."""

import dataclasses
import importlib
import inspect
import pathlib
import pkgutil
import re
import sys

from absl import flags

import nets
from learners import main as learners_main
from learners.config import RunConfig
from nets import model_helper
from pocketsize import compressor
from pocketsize.options import legal_values, type_of
from tools import command

PAGE = pathlib.Path(__file__).resolve().parents[2] / 'docs' / 'flags.md'
_HEADINGS = ('flag', 'type', 'default', 'legal values', 'meaning')
_INTRODUCTION = """\
# Flags

Written by `python -m tools.docs.flags`; change the dataclass, not this page.

Flags are given as `--name=value`, booleans also as `--name` and `--noname`. `--flagfile=FILE` reads
flags from a file, one a line. `--help` prints the flags of a net's script. The number of workers,
`-n=N`, is an argument of the scripts (`scripts/run_local.sh --help`).

A value outside the legal ones, and a flag of a learner that is not the chosen one, end the run with
exit code 2.
"""
_LIBRARY = """\
# Keys of a config_list

What an entry of `pocketsize.compress(model, config_list)` takes besides `algorithm`, `op_types`,
`op_names` and `exclude` (see [extending.md](extending.md#in-a-training-script-of-your-own)).
"""

_CHECK = flags.DEFINE_bool(
  'check', False, 'write nothing; exit with code 1 if docs/flags.md is stale'
)


def helpers():
  """Returns {'resnet_at_cifar10': ModelHelper class} of every net, found by walking the package."""
  names = [
    module.name
    for module in pkgutil.iter_modules(nets.__path__)
    if '_at_' in module.name and not module.name.endswith('_run')
  ]
  return {name: importlib.import_module(f'nets.{name}').ModelHelper for name in names}


def page():
  """Returns the text of docs/flags.md."""
  parts = [_INTRODUCTION, '## Every run\n', _options(RunConfig)]
  for name, learner in learners_main.discover().items():
    parts += [f'## Learner {name}\n', _options(learner.Config)]
  base = model_helper.ModelHelper.Config
  parts += ['## Every net\n', _options(base)]
  for name, helper in helpers().items():
    parts += [
      f'## Net {name}\n',
      _options(
        helper.Config,
        [field for field in dataclasses.fields(helper.Config) if _differs(field, base)],
        'The flags of every net, with their defaults.\n',
        "What is added to every net's flags, or has another default.\n",
      ),
    ]
  parts.append(_LIBRARY)
  for name, algorithm in compressor.discover().items():
    parts += [f'## Algorithm {name}\n', _keys(algorithm.Config)]
  return '\n'.join(parts)


def _differs(field, base):
  inherited = base.__dataclass_fields__.get(field.name)
  return inherited is None or inherited.default != field.default


def _options(config_type, fields=None, none='It has no flags of its own.\n', some=''):
  fields = dataclasses.fields(config_type) if fields is None else fields
  if not fields:
    return none
  table = _table(
    _HEADINGS,
    [
      (
        f'`{field.name}`',
        _kind(config_type, field),
        _default(field),
        legal_values(config_type, field.name),
        field.metadata['help'],
      )
      for field in fields
    ],
  )
  return f'{some}\n{table}' if some else table


def _keys(config_type):
  meanings = _attributes(config_type)
  return _table(
    ('key', 'type', 'default', 'meaning'),
    [
      (f'`{field.name}`', _kind(config_type, field), _default(field), meanings[field.name])
      for field in dataclasses.fields(config_type)
    ],
  )


def _kind(config_type, field):
  return type_of(config_type, field.name)[0].__name__


def _default(field):
  return 'unset' if field.default is None else f'`{field.default}`'


def _attributes(config_type):
  """Returns {name: meaning} of the 'Attributes:' in the docstrings of a class and its parents."""
  meanings = {}
  for each in reversed(config_type.__mro__[:-1]):
    section = inspect.getdoc(each).partition('Attributes:')[2]
    for names, text in re.findall(r'^  (\w+(?:, \w+)*): (.*(?:\n    .*)*)', section, re.MULTILINE):
      meanings.update(dict.fromkeys(names.split(', '), ' '.join(text.split()).rstrip('.')))
  return meanings


def _table(headings, rows):
  lines = [headings, ['---'] * len(headings), *rows]
  return ''.join(f'| {" | ".join(map(_escaped, line))} |\n' for line in lines)


def _escaped(cell):
  return cell.replace('|', '\\|').replace('<', '&lt;')


def main():
  text = page()
  if not _CHECK.value:
    PAGE.write_text(text)
  elif not PAGE.exists() or PAGE.read_text() != text:
    print('docs/flags.md is stale; write it anew with: python -m tools.docs.flags', file=sys.stderr)
    sys.exit(1)


if __name__ == '__main__':
  command.run(main)
