"""Options: defaults, legal values, messages."""

import dataclasses

import pytest

from pocketsize.errors import UserError
from pocketsize.options import check_options, legal_values, option, with_default


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  rate: float = option(0.1, 'a rate', above=0, upper=1)
  bits: int = option(8, 'bits', lower=2, upper=8)
  kind: str = option('a', 'a kind', choices=('a', 'b'))
  folder: str | None = option(None, 'a folder')
  enabled: bool = option(True, 'a switch')
  plain: int = 3

  def __post_init__(self):
    check_options(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Child(Config):
  rate: float = with_default(Config, 'rate', 0.5)


@pytest.mark.parametrize(
  'values',
  [
    {},
    {'rate': 1},
    {'rate': 1e-9},
    {'bits': 2},
    {'kind': 'b'},
    {'folder': 'x'},
    {'enabled': False},
  ],
)
def test_legal_values_are_accepted_and_bounds_are_inclusive(values):
  config = Config(**values)
  assert {name: getattr(config, name) for name in values} == values


@pytest.mark.parametrize(
  'values, message',
  [
    ({'rate': 0}, r'--rate must be a finite number above 0 and at most 1\. Received: 0\.$'),
    ({'rate': 1.5}, r'--rate must be .* Received: 1\.5\.$'),
    ({'rate': float('nan')}, r'--rate must be .* Received: nan\.$'),
    ({'rate': '0.1'}, r"--rate must be .* Received: '0\.1'\.$"),
    ({'rate': None}, r'--rate must be .* Received: None\.$'),
    ({'bits': 9}, r'--bits must be an integer at least 2 and at most 8\. Received: 9\.$'),
    ({'bits': 4.0}, r'--bits must be an integer .* Received: 4\.0\.$'),
    ({'bits': True}, r'--bits must be an integer .* Received: True\.$'),
    ({'kind': 'c'}, r"--kind must be one of a, b\. Received: 'c'\.$"),
    ({'folder': 3}, r'--folder must be a text \(or unset\)\. Received: 3\.$'),
    ({'enabled': 1}, r'--enabled must be true or false\. Received: 1\.$'),
  ],
)
def test_everything_else_is_refused_with_the_legal_values(values, message):
  with pytest.raises(UserError, match=message):
    Config(**values)


def test_a_subclass_changes_the_default_and_keeps_help_and_bounds():
  assert Child().rate == 0.5
  assert Child.__dataclass_fields__['rate'].metadata['help'] == 'a rate'
  with pytest.raises(UserError, match='--rate must be'):
    Child(rate=2)


def test_a_float_without_bounds_must_be_finite_too():
  config = dataclasses.make_dataclass('Free', [('x', float, option(0.0, 'x'))])(float('inf'))
  with pytest.raises(UserError, match='--x must be a finite number. Received: inf'):
    check_options(config)


def test_below_is_exclusive():
  config = dataclasses.make_dataclass('Open', [('x', float, option(0.0, 'x', below=1))])
  check_options(config(0.999))
  assert legal_values(config, 'x') == 'a finite number below 1'
  with pytest.raises(UserError, match='below 1'):
    check_options(config(1.0))
