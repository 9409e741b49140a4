"""Writes packed files: the deployed weights of a model, quantized ones at exactly their bits.

The layout is described in docs/packed.md. What is written is decoded by the reader before it is
believed: codes that do not give the deployed weights to the last bit are not used.
"""

import json
import lzma
import zlib

import numpy as np

from pocketsize.files import atomic_path
from pocketsize.graph import Graph
from pocketsize.instrument import ACTIVATION_POINTS, Instrumented
from pocketsize.packed import reader
from pocketsize.packed.naming import names
from pocketsize.packed.reader import FLOAT_BITS, Weight
from pocketsize.transform import Transform

# What the header's entry of a coded section costs at most, in bytes after its own compression.
_ENTRY_BYTES = 24
# Codes that are packed at a time; a multiple of 8, so that each run ends with a byte.
_RUN = 1 << 20
# Weights repeat by chance only: longer searches for repetitions take time and find nothing.
_LZMA = {
  **reader.LZMA,
  **{'mode': lzma.MODE_NORMAL, 'mf': lzma.MF_HC4, 'nice_len': 64, 'depth': 4},
}


def write(model, path, entropy=True):
  """Writes the weights of a model to a packed file, whole or not at all.

  Args:
    model: `Instrumented`, or a Functional or Sequential model, whose weights are all stored as they
      are.
    path: of the file.
    entropy: also code what becomes smaller by it, with Huffman codes or LZMA.

  Raises:
    UserError: a subclassed or unbuilt model.
  """
  content = assemble(model, entropy)
  with atomic_path(path) as temporary:
    temporary.write_bytes(content)


def assemble(model, entropy=True):
  """Returns the content of a packed file, bytes; see `write`."""
  return encode(model.name, weights(model), entropy)


def has_codes(model):
  """Returns whether a weight of `model` is quantized."""
  return isinstance(model, Instrumented) and any(
    point not in ACTIVATION_POINTS and type(transform).codes is not Transform.codes
    for _, point, transform in model.placements
  )


def weights(model):
  """Returns the `Weight`s of a model as deployed, in order; see `write`."""
  transforms = transforms_by_name(model) if isinstance(model, Instrumented) else {}
  return [
    weight_of(path, values, transforms.get(path, ())) for path, values in deployed(model).items()
  ]


def transforms_by_name(model):
  """Returns {path in a packed file: transforms, in order} of the weights of an `Instrumented`."""
  found = {}
  named = names(model.source)
  for path, point, transform in model.placements:
    if point not in ACTIVATION_POINTS:
      layer = model.graph.layers[path]
      weight = getattr(layer, point)
      index = [id(each) for each in layer.weights].index(id(weight))
      found.setdefault(named[path][index], []).append(transform)
  return found


def deployed(model):
  """Returns {path in a packed file: array} of the weights of a model as deployed.

  They have types of their own, but for bfloat16, which NumPy has not: it becomes float32.
  """
  if isinstance(model, Instrumented):
    source, arrays = model.source, model.deployed()
  else:
    source = model
    arrays = {path: layer.get_weights() for path, layer in Graph(model).layers.items()}
  return {
    name: _known_type(array)
    for path, layer_names in names(source).items()
    for name, array in zip(layer_names, arrays[path], strict=True)
  }


def _known_type(array):
  return array if array.dtype.name in reader.DTYPES else array.astype(np.float32)


def weight_of(path, values, transforms):
  """Returns the `Weight` of one weight.

  Args:
    path: its name in the file.
    values: array, as deployed.
    transforms: those of the place, in order; the last one that has codes decides.

  Returns:
    A `Weight` whose values() equal `values`: with codes where a transform has them and they say the
    same to the last bit, but for weights that are zero; as it is otherwise.
  """
  for transform in reversed(transforms):
    codes = transform.codes(values)
    if codes is not None:
      return _of_codes(path, values, codes) or _stored(path, values)
  return _stored(path, values)


def _stored(path, values):
  return Weight(path, values.shape, FLOAT_BITS, stored=values)


def _of_codes(path, values, codes):
  """Returns the `Weight` of `Codes`, or None if they stand for something else."""
  integers, groups = np.reshape(codes.codes, values.shape), codes.groups
  levels = 2**codes.bits
  if codes.centres is not None:
    levels = min(levels, np.shape(codes.centres)[1])
  if values.dtype != np.float32 or not 0 <= integers.min() <= integers.max() < levels:
    return None
  by_bucket = groups.broadcast is None
  weight = Weight(
    path,
    values.shape,
    int(codes.bits),
    () if by_bucket else tuple(axis for axis, size in enumerate(groups.broadcast) if size > 1),
    groups.split(integers).shape[1] if by_bucket else None,
    codes=integers.astype(np.uint16),
    **{
      name: np.asarray(getattr(codes, name), np.float32)
      for name in ('scale', 'zero_point', 'centres', 'factor')
      if getattr(codes, name) is not None
    },
  )
  differs = weight.values() != values
  if np.any(values[differs] != 0.0):
    return None
  return weight._replace(zeros=differs) if differs.any() else weight


def encode(name, found, entropy=True):
  """Returns the content of a packed file, bytes.

  Args:
    name: of the model.
    found: list of `Weight`s.
    entropy: see `write`. The result is never larger for it.
  """
  plain = _encode(name, found, False)
  return min(plain, _encode(name, found, True), key=len) if entropy else plain


def _encode(name, found, entropy):
  entries, sections = [], []
  for weight in found:
    entry, parts = _described(weight)
    codings = {}
    for part, (numbers, bits) in parts.items():
      section, coding = _section(numbers, bits, entropy)
      sections.append(section)
      if coding:
        codings[part] = coding
    entries.append({**entry, 'coded': codings} if codings else entry)
  text = json.dumps({'model': name, 'weights': entries}, separators=(',', ':'))
  header = zlib.compress(text.encode(), 9)
  rest = b''.join([header, *sections])
  head = reader.MAGIC + b''.join(
    number.to_bytes(size, 'little')
    for number, size in ((reader.VERSION, 4), (len(header), 4), (reader.START + len(rest), 8))
  )
  return head + zlib.crc32(rest, zlib.crc32(head)).to_bytes(4, 'little') + rest


def _described(weight):
  """Returns (entry of the header, {part: (array, bits of its numbers or None)}), parts in order.

  A zero point that all rows have stands in the header.
  """
  entry = {'path': weight.path, 'shape': weight.shape}
  if weight.bits == FLOAT_BITS:
    if weight.stored.dtype != np.float32:
      entry['dtype'] = weight.stored.dtype.name
    return entry, {'values': (weight.stored, None)}
  entry |= {'bits': weight.bits}
  entry |= {'bucket': weight.bucket_size} if weight.bucket_size else {'axes': weight.axes}
  parts = {'codes': (weight.codes, weight.bits)}
  if weight.centres is not None:
    entry['centres'] = weight.centres.shape[1]
    parts['centres'] = weight.centres, None
  else:
    parts['scale'] = weight.scale, None
    if np.all(weight.zero_point == weight.zero_point[:1]):
      entry['zero_point'] = float(weight.zero_point[0])
    else:
      parts['zero_point'] = weight.zero_point, None
  if weight.factor is not None:
    entry['factor'] = [axis for axis, size in enumerate(weight.factor.shape) if size > 1]
    parts['factor'] = weight.factor, None
  if weight.zeros is not None:
    entry['zeros'] = True
    parts['zeros'] = weight.zeros.astype(np.uint16), 1
  return entry, parts


def _section(numbers, bits, entropy):
  """Returns (bytes, how they are coded or None) of numbers with `bits` each; None: as they are."""
  numbers = np.ascontiguousarray(numbers.ravel(), numbers.dtype.newbyteorder('<'))
  width = -(-bits // 8) if bits else numbers.itemsize
  planes = numbers.view(np.uint8).reshape(-1, numbers.itemsize)[:, :width]
  plain = pack(numbers, bits) if bits else numbers.tobytes()
  choices = [(plain, None)]
  if entropy:
    choices.append(_coded('planes', [plane.tobytes() for plane in planes.T]))
    choices += [_coded('packed', [plain])] if bits else []
  return min(choices, key=lambda choice: len(choice[0]) + (_ENTRY_BYTES if choice[1] else 0))


def _coded(arrangement, streams):
  """Returns (bytes, [arrangement, method, bytes, method, bytes, ...]) of streams of bytes."""
  coding, found = [arrangement], []
  for stream in streams:
    huffman = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    choices = {
      'raw': stream,
      'huffman': huffman.compress(stream) + huffman.flush(),
      'lzma': lzma.compress(stream, lzma.FORMAT_RAW, filters=[_LZMA]),
    }
    method = min(choices, key=lambda name: len(choices[name]))
    coding += [method, len(choices[method])]
    found.append(choices[method])
  return b''.join(found), coding


def pack(codes, bits):
  """Returns bytes: codes of `bits` bits each, as `reader.unpack` reads them.

  Args:
    codes: [count] integers from 0 to 2 ** bits - 1.
    bits: 1 to 16.

  >>> pack(np.array([1, 2, 3, 0, 2]), 2) == bytes([0b00_11_10_01, 0b10])
  True
  """
  parts = []
  for first in range(0, len(codes), _RUN):
    pairs = codes[first : first + _RUN].astype('<u2').view(np.uint8).reshape(-1, 2)
    rows = np.unpackbits(pairs, axis=1, bitorder='little')[:, :bits]
    parts.append(np.packbits(rows, bitorder='little').tobytes())
  return b''.join(parts)
