"""What the flags of quantizing learners have in common, most under the learner's own prefix."""

import dataclasses
import json
import pathlib

from pocketsize import targets
from pocketsize.errors import UserError
from pocketsize.options import option
from pocketsize.quantization.devices import DEFAULT, DEVICES
from pocketsize.quantization.placing import FLOAT_BITS

GRANULARITY_BY_TYPE = {'channel': 'channel', 'split': 'bucket'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceFlags:
  """The flag of all learners that give activations ranges."""

  target_device: str = option(
    DEFAULT,
    'runtime that the quantized file is for; it decides which activations are quantized',
    choices=DEVICES,
  )


def check_device(config, prefix):
  """Raises a UserError for a device where no activation is quantized.

  Args:
    config: `DeviceFlags` with <prefix>_activation_bits.
    prefix: of the flags' names, such as 'uql'.
  """
  flag = f'{prefix}_activation_bits'
  if config.target_device != DEFAULT and getattr(config, flag) == FLOAT_BITS:
    raise UserError(
      f'--target_device has no effect with --{flag}={FLOAT_BITS}. '
      f'Received: --target_device={config.target_device}.'
    )


def check_buckets(config, prefix):
  """Raises a UserError for a flag of buckets that has no effect.

  Args:
    config: dataclass with <prefix>_use_buckets, <prefix>_bucket_type and <prefix>_bucket_size.
    prefix: of the flags' names, such as 'uql'.
  """
  use, kind, size = (f'{prefix}_{name}' for name in ('use_buckets', 'bucket_type', 'bucket_size'))
  defaults = {field.name: field.default for field in dataclasses.fields(config)}
  value = {name: getattr(config, name) for name in (use, kind, size)}
  if value[kind] != defaults[kind] and not value[use]:
    raise UserError(f'--{kind} has no effect without --{use}. Received: {value[kind]}.')
  if value[size] != defaults[size] and not (value[use] and value[kind] == 'split'):
    raise UserError(
      f'--{size} has no effect without --{use} and --{kind}=split. '
      f'Received: --{size}={value[size]}.'
    )


def has_float_weights(config, prefix):
  """Returns whether all weights stay float: neither a list nor a search gives any of them bits."""
  return (
    getattr(config, f'{prefix}_weight_bits') == FLOAT_BITS
    and getattr(config, f'{prefix}_weight_bits_list') is None
    and not config.searches
  )


def check_float_weights(config, prefix, names):
  """Raises a UserError for a flag of quantized weights where there are none.

  Args:
    config: dataclass with <prefix>_weight_bits and <prefix>_weight_bits_list that says whether it
      `searches`.
    prefix: of the flags' names, such as 'uql'.
    names: of those flags.
  """
  if not has_float_weights(config, prefix):
    return
  for name in names:
    value = getattr(config, name)
    if value != type(config).__dataclass_fields__[name].default:
      raise UserError(
        f'--{name} has no effect with --{prefix}_weight_bits={FLOAT_BITS}. '
        f'Received: --{name}={value}.'
      )


def granularity(config, prefix):
  """Returns which weights belong together, as a `QuantizationConfig` has it."""
  if not getattr(config, f'{prefix}_use_buckets'):
    return 'tensor'
  return GRANULARITY_BY_TYPE[getattr(config, f'{prefix}_bucket_type')]


def rules(config, prefix, default, graph, bits=None):
  """Returns the rules for the layers of a `Graph`: `default`, with the bits of a list if given.

  Args:
    config: dataclass with <prefix>_weight_bits_list, a text or None.
    prefix: of the flags' names.
    default: the `QuantizationConfig` of a layer.
    graph: of the model.
    bits: {path: bits} in place of the list, or None.

  Raises:
    UserError: the list is not one of integers or of layers with integers, has not one for each
      layer with weights, or is in a file that is not there or holds something else.
  """
  flag = f'{prefix}_weight_bits_list'
  text = getattr(config, flag)
  if bits is None and text is not None:
    paths = list(targets.weighted_layers(graph))
    bits = _bits_by_path(flag, text, paths)
    _check_bits(flag, bits, paths, default.WEIGHT_BITS)
  return [targets.Rule(default)] + [
    targets.Rule(
      dataclasses.replace(default, weight_bits=number, end_weight_bits=0), op_names=(path,)
    )
    for path, number in (bits or {}).items()
  ]


def _bits_by_path(flag, text, paths):
  """Returns {path: bits} of a text: bits in the order of `paths`, layers with bits, or a file."""
  if text.endswith('.json'):
    return _from_file(flag, pathlib.Path(text))
  words = [word.rpartition(':') for word in text.split(',')]
  try:
    bits = [int(number) for _, _, number in words]
  except ValueError as error:
    raise UserError(
      f'--{flag} must be integers, comma-separated, or layer:integer, or a .json file of them. '
      f'Received: {text!r}.'
    ) from error
  named = [path for path, _, _ in words if path]
  if len(set(named)) == len(words):
    return dict(zip(named, bits, strict=True))
  if named:
    raise UserError(f'--{flag} must name every layer, each once, or none. Received: {text!r}.')
  if len(bits) != len(paths):
    raise UserError(
      f'--{flag} must have one number for each of the {len(paths)} layers '
      f'{", ".join(paths)}. Received: {len(bits)} numbers.'
    )
  return dict(zip(paths, bits, strict=True))


def _check_bits(flag, bits, paths, legal):
  """Raises a UserError for a layer that is not among `paths`, or bits that are not `legal`."""
  unknown = [path for path in bits if path not in paths and not path.startswith('{re}')]
  if unknown:
    raise UserError(
      f'--{flag} must name layers with weights: {", ".join(paths)}. Received: {unknown[0]!r}.'
    )
  for path, number in bits.items():
    if number not in (*legal, FLOAT_BITS):
      raise UserError(
        f'--{flag} must have bits from {legal[0]} to {legal[-1]}, or {FLOAT_BITS} for float. '
        f'Received: {number} for {path}.'
      )


def _from_file(flag, path):
  try:
    found = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise UserError(f'--{flag}={path} cannot be read: {error}.') from error
  if not isinstance(found, dict) or not all(type(bits) is int for bits in found.values()):
    raise UserError(
      f'--{flag}={path} must hold an object of layers with integers, such as '
      f'{{"conv1": 8, "dense": 4}}. Received: {str(found)[:100]}.'
    )
  return found
