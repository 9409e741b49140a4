"""Reads packed files: the weights of a network at as many bits as training gave them.

Needs NumPy and Python's standard library only: this file can be copied and used alone. The layout
is described in docs/packed.md.

python reader.py FILE             prints what is in it
python reader.py FILE --npz OUT   writes its weights as float32
"""

import argparse
import json
import lzma
import math
import pathlib
import sys
import zlib
from typing import NamedTuple

import numpy as np

MAGIC = b'\x89POCKET\n'
VERSION = 1
# Where the fixed beginning has its checksum, and where it ends.
CHECKSUM, START = 24, 28
FLOAT_BITS = 32
DTYPES = (
  *('float16', 'float32', 'float64', 'bool'),
  *('int8', 'int16', 'int32', 'int64', 'uint8', 'uint16', 'uint32', 'uint64'),
)
# LZMA for values that are nearly independent of each other: one context for all.
LZMA = {'id': lzma.FILTER_LZMA1, 'dict_size': 1 << 16, 'lc': 0, 'lp': 0, 'pb': 0}
# What a header that does not fit what follows leads to.
_CONTRADICTIONS = (
  *(ArithmeticError, AttributeError, LookupError, TypeError, ValueError),
  *(lzma.LZMAError, zlib.error),
)
# Codes that are unpacked at a time; a multiple of 8, so that each run begins with a byte.
_RUN = 1 << 20


class PackedError(ValueError):
  """The file is no packed file, is damaged, or newer than this reader; the message says which."""


class Weight(NamedTuple):
  """One weight of the network, as the file holds it.

  Its rows are those of `axes` in C order: [rows] arrays hold one number for each. Without axes
  there is one row; with a bucket size, rows are runs of the flat weight, the last may be shorter.

  Attributes:
    path: path of the layer and name of the weight: 'conv1/kernel'.
    shape: in Keras' layout, a tuple.
    bits: of its codes, 1 to 16; 32 for one that is stored as it is.
    axes: axes whose positions have a row each.
    bucket_size: weights in a row, or None.
    stored: array of `shape`, where there are no codes; else None.
    codes: uint16 array of `shape`, or None.
    scale, zero_point: [rows] float32: value = (code - zero_point) * scale; None with `centres`.
    centres: [rows, centres] float32: value = centres[row, code]; or None.
    factor: float32 array that broadcasts against the weight: what the values of the codes are
      divided by; or None.
    zeros: bool array of `shape`: weights that are zero whatever their code says; or None.
    sizes: {part, such as 'codes' or 'scale': bytes in the file}.
  """

  path: str
  shape: tuple
  bits: int
  axes: tuple = ()
  bucket_size: int | None = None
  stored: np.ndarray | None = None
  codes: np.ndarray | None = None
  scale: np.ndarray | None = None
  zero_point: np.ndarray | None = None
  centres: np.ndarray | None = None
  factor: np.ndarray | None = None
  zeros: np.ndarray | None = None
  sizes: dict | None = None

  @property
  def rows(self):
    """How many rows there are; 0 for a weight that is stored as it is."""
    if self.bits == FLOAT_BITS:
      return 0
    if self.bucket_size:
      return -(-math.prod(self.shape) // self.bucket_size)
    return math.prod(self.shape[axis] for axis in self.axes)

  @property
  def granularity(self):
    """What has a row of its own: 'tensor', 'channel', 'bucket', or '' without codes."""
    if self.bits == FLOAT_BITS:
      return ''
    return 'bucket' if self.bucket_size else 'channel' if self.axes else 'tensor'

  def spread(self, numbers):
    """Returns one number for each row, [rows], as an array that broadcasts against the weight."""
    if self.bucket_size:
      return np.repeat(numbers, self.bucket_size)[: self.codes.size].reshape(self.shape)
    axes = range(len(self.shape))
    return np.reshape(numbers, [self.shape[axis] if axis in self.axes else 1 for axis in axes])

  def values(self):
    """Returns the weight, float32 (or what else it is stored as), of its shape."""
    if self.codes is None:
      return self.stored
    if self.centres is not None:
      values = self.centres[self.spread(np.arange(self.rows)), self.codes]
    else:
      values = self.codes.astype(np.float32) - self.spread(self.zero_point)
      values = values * self.spread(self.scale)
    if self.factor is not None:
      values = values / self.factor
    return values if self.zeros is None else np.where(self.zeros, np.float32(0.0), values)


class Packed(NamedTuple):
  """What a packed file holds.

  Attributes:
    model: name of the model.
    weights: {path: `Weight`}, in the order of the model.
    size: bytes of the file.
  """

  model: str
  weights: dict
  size: int


def read(path):
  """Returns {path of a weight: array of the model's shape} of a packed file.

  The arrays are float32, bit for bit the weights as deployed, but for the sign of a zero. A weight
  that is no float32 in the model, such as a counter, has its own type.

  Raises:
    PackedError: see `parse`.
    OSError: the file cannot be opened.
  """
  return {name: weight.values() for name, weight in load(path).weights.items()}


def load(path):
  """Returns a packed file as `Packed`: codes, scales, codebooks; raises what `read` raises."""
  return parse(pathlib.Path(path).read_bytes(), f'File {str(path)!r}')


def parse(content, name='The content'):
  """Returns the `Packed` of a file's content, bytes.

  Args:
    content: bytes.
    name: what a message calls it.

  Raises:
    PackedError: it is no packed file, of a newer version, cut off, longer than it should be,
      damaged, or contradicts itself.
  """
  _check(content, name)
  end = START + int.from_bytes(content[12:16], 'little')
  try:
    header = json.loads(zlib.decompress(content[START:end]))
    sections = _Sections(memoryview(content)[end:])
    weights = {entry['path']: _weight(entry, sections) for entry in header['weights']}
    sections.finish()
    return Packed(header['model'], weights, len(content))
  except _CONTRADICTIONS as error:
    raise PackedError(f'{name} is a packed file that contradicts itself: {error}.') from error


def _check(content, name):
  if content[: len(MAGIC)] != MAGIC[: len(content)] or not content:
    raise PackedError(f'{name} is no packed file: it does not begin with {MAGIC!r}.')
  if len(content) < START:
    raise PackedError(f'{name} is cut off: {len(content)} bytes are less than its beginning.')
  version = int.from_bytes(content[8:12], 'little')
  if version != VERSION:
    raise PackedError(
      f'{name} is a packed file of version {version}; this reader knows version {VERSION} only.'
    )
  size = int.from_bytes(content[16:24], 'little')
  if len(content) != size:
    what = 'cut off' if len(content) < size else 'too long'
    raise PackedError(f'{name} is {what}: it has {len(content)} bytes and should have {size}.')
  checksum = zlib.crc32(content[START:], zlib.crc32(content[:CHECKSUM]))
  if checksum != int.from_bytes(content[CHECKSUM:START], 'little'):
    raise PackedError(f'{name} is damaged: its checksum is not that of its content.')


def unpack(data, count, bits):
  """Returns [count] uint16 codes of `bits` bits each, from bytes.

  Code i has the bits from i * bits on, its lowest first; bit k of the stream is bit k % 8 of byte
  k // 8, where bit 0 is worth 1.

  >>> unpack(bytes([0b00_11_10_01, 0b10]), 5, 2).tolist()
  [1, 2, 3, 0, 2]
  """
  stream, codes = np.frombuffer(data, np.uint8), np.empty(count, np.uint16)
  for first in range(0, count, _RUN):
    run = min(_RUN, count - first)
    part = stream[first * bits // 8 : -(-(first + run) * bits // 8)]
    rows = np.unpackbits(part, count=run * bits, bitorder='little').reshape(run, bits)
    codes[first : first + run] = _joined(np.packbits(rows, axis=1, bitorder='little'))
  return codes


def _joined(planes):
  """Returns [count] uint16 of their bytes, [count, 1 or 2], the lowest first."""
  low = planes[:, 0].astype(np.uint16)
  return low if planes.shape[1] == 1 else low | planes[:, 1].astype(np.uint16) << 8


class _Sections:
  """What follows the header, taken from the front."""

  def __init__(self, data):
    self._data = data
    self.place = 0

  def finish(self):
    if self.place != len(self._data):
      raise ValueError(f'{len(self._data) - self.place} bytes belong to no weight')

  def codes(self, coding, count, bits):
    """Returns [count] uint16."""
    if not coding or coding[0] == 'packed':
      stream = self._stream(coding and coding[1:], -(-count * bits // 8))
      return unpack(stream, count, bits)
    return _joined(self._planes(coding, count, -(-bits // 8)))

  def array(self, coding, count, dtype):
    """Returns [count] of a dtype."""
    if not coding:
      stored = np.frombuffer(self._take(count * dtype.itemsize), dtype)
    else:
      stored = np.ascontiguousarray(self._planes(coding, count, dtype.itemsize)).view(dtype)[:, 0]
    return stored.astype(dtype.newbyteorder('='))

  def _take(self, count):
    if not 0 <= count <= len(self._data) - self.place:
      raise ValueError(f'a section of {count} bytes reaches beyond the end')
    self.place += count
    return self._data[self.place - count : self.place]

  def _planes(self, coding, count, width):
    """Returns [count, width] uint8, of all numbers' first bytes, then all second bytes, ..."""
    if coding[0] != 'planes' or len(coding) != 1 + 2 * width:
      raise ValueError(f'the coding {coding} does not fit numbers of {width} bytes')
    planes = [self._stream(coding[1 + 2 * plane :][:2], count) for plane in range(width)]
    return np.stack([np.frombuffer(plane, np.uint8) for plane in planes], axis=1)

  def _stream(self, coding, count):
    """Returns `count` bytes, decoded as [method, bytes in the file] says; as they are without."""
    if not coding:
      return self._take(count)
    method, size = coding
    data = self._take(size)
    if method == 'huffman':
      data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, count)
    elif method == 'lzma':
      data = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[LZMA]).decompress(data, count)
    elif method != 'raw':
      raise ValueError(f'the method {method!r} is unknown')
    if len(data) != count:
      raise ValueError(f'a section has {len(data)} bytes in place of {count}')
    return data


def _weight(entry, sections):
  """Returns the `Weight` of an entry of the header; takes its sections, in this order."""
  sizes, codings = {}, entry.get('coded', {})

  def take(part, function, *args):
    before = sections.place
    values = function(codings.get(part), *args)
    sizes[part] = sections.place - before
    return values

  weight = Weight(
    entry['path'],
    tuple(entry['shape']),
    entry.get('bits', FLOAT_BITS),
    tuple(entry.get('axes', ())),
    entry.get('bucket'),
    sizes=sizes,
  )
  count, float32 = math.prod(weight.shape), np.dtype('<f4')
  if weight.bits == FLOAT_BITS:
    dtype = entry.get('dtype', 'float32')
    if dtype not in DTYPES:
      raise ValueError(f'the type {dtype!r} is unknown')
    stored = take('values', sections.array, count, np.dtype(dtype).newbyteorder('<'))
    return weight._replace(stored=stored.reshape(weight.shape))
  if weight.bits not in range(1, 17):
    raise ValueError(f'codes have 1 to 16 bits, not {weight.bits}')
  rows = weight.rows
  codes = take('codes', sections.codes, count, weight.bits)
  weight = weight._replace(codes=codes.reshape(weight.shape))
  if 'centres' in entry:
    if codes.max(initial=0) >= entry['centres']:
      raise ValueError(f'a code of {weight.path} has no centre')
    centres = take('centres', sections.array, rows * entry['centres'], float32)
    weight = weight._replace(centres=centres.reshape(rows, entry['centres']))
  else:
    scale, zero_point = take('scale', sections.array, rows, float32), entry.get('zero_point')
    if zero_point is None:
      zero_point = take('zero_point', sections.array, rows, float32)
    else:
      zero_point = np.full(rows, zero_point, np.float32)
    weight = weight._replace(scale=scale, zero_point=zero_point)
  if 'factor' in entry:
    kept = [size if axis in entry['factor'] else 1 for axis, size in enumerate(weight.shape)]
    factor = take('factor', sections.array, math.prod(kept), float32)
    weight = weight._replace(factor=factor.reshape(kept))
  if entry.get('zeros'):
    zeros = take('zeros', sections.codes, count, 1)
    weight = weight._replace(zeros=zeros.reshape(weight.shape).astype(bool))
  return weight


def describe(packed):
  """Returns lines of text: what a `Packed` holds."""
  table = [('weight', 'shape', 'bits', 'rows', 'bytes')]
  for weight in packed.weights.values():
    rows = f'{weight.rows} by {weight.granularity}' if weight.rows else ''
    shape = 'x'.join(map(str, weight.shape)) or '1'
    size = f'{sum(weight.sizes.values()):,}'
    table.append((weight.path, shape, str(weight.bits), rows, size))
  widths = [max(map(len, column)) for column in zip(*table, strict=True)]
  lines = [
    '  '.join(
      cell.rjust(width) if place in (2, 4) else cell.ljust(width)
      for place, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    for row in table
  ]
  count = sum(math.prod(weight.shape) for weight in packed.weights.values())
  mean = 8 * packed.size / max(count, 1)
  total = f'{count:,} numbers in {packed.size:,} bytes, {mean:.3f} bits each'
  return [f'{packed.model}: {total}', '', *lines]


def main(arguments=None):
  """The command line; returns the exit code."""
  parser = argparse.ArgumentParser(description='Prints what a packed file holds.')
  parser.add_argument('file', help='packed file')
  parser.add_argument('--npz', metavar='OUT', help='write the weights as float32 to this .npz file')
  parsed = parser.parse_args(arguments)
  try:
    packed = load(parsed.file)
    if parsed.npz:
      weights = {name: weight.values() for name, weight in packed.weights.items()}
      np.savez(parsed.npz, **weights)
  except (PackedError, OSError) as error:
    print(error, file=sys.stderr)
    return 2
  print('\n'.join(describe(packed)))
  return 0


if __name__ == '__main__':
  sys.exit(main())
