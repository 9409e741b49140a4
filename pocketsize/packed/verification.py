"""Packed files are believed only after the reader gave the deployed weights back."""

import pathlib

from pocketsize.errors import UserError
from pocketsize.instrument import Instrumented
from pocketsize.packed import reader, writer
from pocketsize.packed.reader import FLOAT_BITS

# Which part of a file a section belongs to.
_KINDS = {
  'codes': 'codes_bytes',
  'zeros': 'codes_bytes',
  'scale': 'codebook_bytes',
  'zero_point': 'codebook_bytes',
  'centres': 'codebook_bytes',
  'factor': 'codebook_bytes',
  'values': 'float_bytes',
}


def verify(path, model):
  """Reads a packed file and compares it with a model, bit for bit (the signs of zeros aside).

  Args:
    path: of the file.
    model: as in `writer.write`: what the file shall hold.

  Returns:
    The report's `packed`: path, bytes, plain_bytes (without entropy coding), codes_bytes,
    codebook_bytes (scales, zero points, centres, factors), float_bytes, bits_per_weight, exact,
    note.

  Raises:
    UserError: the file is damaged or holds other weights.
  """
  try:
    packed = reader.load(path)
  except reader.PackedError as error:
    raise UserError(str(error)) from error
  deployed = writer.deployed(model)
  _compare(pathlib.Path(path).name, packed, deployed)
  kinds = dict.fromkeys(_KINDS.values(), 0)
  for weight in packed.weights.values():
    for part, size in weight.sizes.items():
      kinds[_KINDS[part]] += size
  count = sum(values.size for values in deployed.values())
  return {
    'path': str(path),
    'bytes': packed.size,
    'plain_bytes': len(writer.assemble(model, entropy=False)),
    **kinds,
    'bits_per_weight': round(8 * packed.size / max(count, 1), 4),
    'exact': True,
    'note': _note(model, packed),
  }


def _compare(name, packed, deployed):
  if list(packed.weights) != list(deployed):
    raise UserError(f'Packed file {name!r} holds the weights of another model.')
  for path, wanted in deployed.items():
    if not same_bits(packed.weights[path].values(), wanted):
      raise UserError(
        f'Packed file {name!r} holds another {path!r} than the model does: write it anew.'
      )


def same_bits(one, other):
  """Returns whether two arrays are the same to the last bit, in type and shape too.

  +0 and -0 count as the same.
  """
  # The sum with +0 is +0 for both.
  return (one.dtype, one.shape) == (other.dtype, other.shape) and (
    (one + 0).tobytes() == (other + 0).tobytes()
  )


def _note(model, packed):
  """Returns a sentence about quantized weights that no codes gave exactly, or ''."""
  if not isinstance(model, Instrumented):
    return ''
  stored = [
    name
    for name, transforms in writer.transforms_by_name(model).items()
    if any(hasattr(transform, 'bits') for transform in transforms)
    and packed.weights[name].bits == FLOAT_BITS
  ]
  return f'as float32, for want of exact codes: {", ".join(stored)}' if stored else ''
