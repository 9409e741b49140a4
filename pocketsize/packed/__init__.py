"""Packed files: the deployed weights of a model at exactly their bits, for storage and transport.

The layout is described in docs/packed.md. `reader` needs NumPy only; it can be used without the
rest of the library.
"""

from pocketsize.packed.naming import variables
from pocketsize.packed.reader import Packed, PackedError, Weight, load, read
from pocketsize.packed.verification import verify
from pocketsize.packed.writer import assemble, has_codes, write

__all__ = [
  'Packed',
  'PackedError',
  'Weight',
  'assemble',
  'has_codes',
  'load',
  'read',
  'variables',
  'verify',
  'write',
]
