"""Packed files: bytes by hand, round trips against slow loops, damage, and the reader alone."""

import json
import math
import pathlib
import re
import shutil
import subprocess
import sys
import zlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from toys import MODELS, conv_net, images

import pocketsize
from pocketsize import packed
from pocketsize.errors import UserError
from pocketsize.packed import reader, verification, writer
from pocketsize.quantization.groups import Groups
from pocketsize.transform import Codes, Placement, Transform

ROOT = pathlib.Path(__file__).resolve().parent.parent
BITS = st.integers(1, 16)
SHAPES = hnp.array_shapes(min_dims=1, max_dims=4, max_side=5)


class Given(Transform):
  """A transform that gives the same `Codes` whatever it is asked."""

  def __init__(self, codes, **kwargs):
    super().__init__(**kwargs)
    self.given = codes

  def codes(self, kernel):
    return self.given


# Bits.


@pytest.mark.parametrize(
  'bits, codes, content',
  [
    (1, [1, 0, 1, 1, 0, 0, 0, 1, 1], [0b10001101, 0b1]),
    (2, [1, 2, 3, 0, 2], [0b00_11_10_01, 0b10]),
    # 101, 001, 111, 010 from the right: the third begins in the first byte, ends in the second.
    (3, [5, 1, 7, 2], [0b11_001_101, 0b010_1]),
    # 10001, 11110, 00011.
    (5, [17, 30, 3], [0b110_10001, 0b00011_11]),
    (8, [200, 7], [200, 7]),
    (12, [0xABC, 0x123], [0xBC, 0x3A, 0x12]),
    (16, [0xABCD], [0xCD, 0xAB]),
  ],
)
def test_bytes_by_hand(bits, codes, content):
  assert list(writer.pack(np.array(codes), bits)) == content
  assert reader.unpack(bytes(content), len(codes), bits).tolist() == codes


def slow_pack(codes, bits):
  """One bit at a time."""
  content = bytearray(-(-len(codes) * bits // 8))
  for place, code in enumerate(codes):
    for bit in range(bits):
      if int(code) >> bit & 1:
        position = place * bits + bit
        content[position // 8] |= 1 << position % 8
  return bytes(content)


@given(BITS, st.integers(0, 70), st.integers(0, 2**32))
def test_bits_against_a_loop_over_bits(bits, count, seed):
  codes = np.random.default_rng(seed).integers(0, 2**bits, count)
  content = writer.pack(codes, bits)
  assert content == slow_pack(codes, bits)
  unpacked = reader.unpack(content, count, bits)
  assert unpacked.dtype == np.uint16 and unpacked.tolist() == codes.tolist()


def test_runs_that_are_packed_at_a_time_join_without_a_seam(monkeypatch):
  codes = np.random.default_rng(0).integers(0, 2**5, 100)
  whole = writer.pack(codes, 5)
  monkeypatch.setattr(writer, '_RUN', 16)
  monkeypatch.setattr(reader, '_RUN', 24)
  assert writer.pack(codes, 5) == whole
  assert reader.unpack(whole, 100, 5).tolist() == codes.tolist()


# Weights.


@st.composite
def quantized(draw):
  """Draws (`Codes`, the kernel they stand for, by a loop over its weights)."""
  shape, bits = draw(SHAPES), draw(BITS)
  axes = draw(st.lists(st.integers(0, len(shape) - 1), unique=True, max_size=2))
  granularity = draw(st.sampled_from(['tensor', 'channel', 'bucket']))
  groups = Groups(shape, granularity, axes, draw(st.integers(1, 40)))
  rng = np.random.default_rng(draw(st.integers(0, 2**32)))
  by_centres = draw(st.booleans()) and bits <= 6
  levels = draw(st.integers(1, 2**bits)) if by_centres else 2**bits
  integers = rng.integers(0, levels, shape)
  if draw(st.booleans()):
    integers[rng.random(shape) < 0.9] = levels // 2
  scale = zero_point = centres = None
  if by_centres:
    centres = rng.normal(size=(groups.count, levels)).astype(np.float32)
  else:
    scale = rng.uniform(0.0, 2.0, groups.count).astype(np.float32)
    zero_point = np.full(groups.count, (2**bits - 1) / 2, np.float32)
    if draw(st.booleans()):
      zero_point = rng.integers(0, 2**bits, groups.count).astype(np.float32)
  kernel = np.zeros(shape, np.float32)
  # Which row a weight belongs to: `split` moves the weights' places as it moves the weights.
  places = groups.split(np.arange(1, kernel.size + 1).reshape(shape))
  for row, members in enumerate(places):
    for place in members[members > 0] - 1:
      code = int(integers.flat[place])
      kernel.flat[place] = (
        centres[row, code] if by_centres else (np.float32(code) - zero_point[row]) * scale[row]
      )
  codes = Codes(integers.astype(np.int32), bits, groups, scale, zero_point, centres)
  if not draw(st.booleans()):
    return codes, kernel
  factors = [size if draw(st.booleans()) else 1 for size in shape]
  factor = rng.uniform(0.1, 3.0, factors) * rng.choice([-1.0, 1.0], factors)
  codes = codes._replace(factor=factor.astype(np.float32))
  for place in np.ndindex(shape):
    own = tuple(min(index, size - 1) for index, size in zip(place, factors, strict=True))
    kernel[place] = kernel[place] / codes.factor[own]
  return codes, kernel


@given(quantized(), st.booleans())
def test_any_codes_come_back_to_the_last_bit(drawn, entropy):
  codes, kernel = drawn
  weight = writer.weight_of('layer/kernel', kernel, [Given(codes)])
  assert weight.bits == codes.bits and weight.zeros is None
  got = reader.parse(writer.encode('net', [weight], entropy))
  assert got.model == 'net' and list(got.weights) == ['layer/kernel']
  found = got.weights['layer/kernel']
  np.testing.assert_array_equal(found.codes, codes.codes)
  assert verification.same_bits(found.values(), kernel)
  assert found.bits == codes.bits and found.rows == codes.groups.count
  for name in ('scale', 'zero_point', 'centres'):
    wanted = getattr(codes, name)
    if wanted is not None:
      np.testing.assert_array_equal(getattr(found, name), wanted)
  if not entropy:
    assert found.sizes['codes'] == -(-kernel.size * codes.bits // 8)


@given(
  hnp.arrays(
    st.sampled_from([np.float32, np.float64, np.float16, np.int32, np.uint8, np.bool_]),
    hnp.array_shapes(min_dims=0, max_dims=3, max_side=9),
  ),
  st.booleans(),
)
def test_what_has_no_codes_is_stored_as_it_is(array, entropy):
  content = writer.encode('net', [writer.weight_of('a/b', array, [])], entropy)
  found = reader.parse(content).weights['a/b']
  assert found.bits == 32 and found.granularity == '' and found.rows == 0
  assert (found.stored.dtype, found.stored.shape) == (array.dtype, array.shape)
  assert found.values().tobytes() == array.tobytes()


@given(quantized())
def test_entropy_coding_never_makes_a_file_larger(drawn):
  weights = [writer.weight_of('a/kernel', drawn[1], [Given(drawn[0])])]
  assert len(writer.encode('net', weights)) <= len(writer.encode('net', weights, entropy=False))


def of_tensor(integers, bits, scale, zero_point):
  """Returns `Codes` with one row."""
  integers = np.array(integers)
  return Codes(
    integers, bits, Groups(integers.shape, 'tensor'), np.float32([scale]), np.float32([zero_point])
  )


def test_a_weight_that_was_made_zero_later_stays_zero():
  """One bit knows -0.5 and 0.5; the third weight was dropped after it was quantized."""
  codes = of_tensor([0, 1, 0, 1], 1, 1.0, 0.5)
  kernel = np.float32([-0.5, 0.5, 0.0, 0.5])
  weight = writer.weight_of('a/kernel', kernel, [Given(codes)])
  assert weight.bits == 1 and weight.zeros.tolist() == [False, False, True, False]
  found = reader.parse(writer.encode('net', [weight])).weights['a/kernel']
  assert found.values().tolist() == kernel.tolist()
  assert found.sizes['zeros'] == found.sizes['codes'] == 1


@pytest.mark.parametrize(
  'codes',
  [
    of_tensor([0, 1, 2], 2, 0.5, 1.0),  # another value
    of_tensor([0, 1, 4], 2, 1.0, 1.0),  # no code of 2 bits
    of_tensor([-1, 1, 2], 2, 1.0, 1.0),
    Codes(np.array([0, 1, 2]), 2, Groups((3,), 'tensor'), centres=np.float32([[-1, 0]])),
    Codes(np.array([0, 1, 2]), 1, Groups((3,), 'tensor'), centres=np.float32([[-1, 0, 3]])),
  ],
)
def test_codes_that_stand_for_something_else_are_not_used(codes):
  kernel = np.float32([-1.0, 0.0, 3.0])
  weight = writer.weight_of('a/kernel', kernel, [Given(codes)])
  assert weight.bits == 32 and weight.values().tolist() == kernel.tolist()


def test_the_last_transform_that_has_codes_decides():
  kernel = np.float32([-1.0, 0.0, 1.0])
  chain = [
    Given(of_tensor([0, 2, 4], 3, 0.5, 2.0)),
    Given(of_tensor([0, 1, 2], 2, 1.0, 1.0)),
    Given(None),
  ]
  assert writer.weight_of('a/kernel', kernel, chain).bits == 2
  assert writer.weight_of('a/kernel', kernel, chain[:1]).bits == 3
  assert writer.weight_of('a/kernel', kernel, chain[2:]).bits == 32


@pytest.mark.parametrize('bits, zeros', [(2, 0.0), (2, 0.9), (4, 0.9), (8, 0.0), (12, 0.0)])
def test_entropy_coding_comes_near_the_entropy(bits, zeros):
  """Within 30 % of the codes' entropy, and far below `bits` where most codes are the same."""
  rng = np.random.default_rng(0)
  high = 2 ** (bits - 1) - 1
  spread = max(high / 3, 1)
  integers = np.clip(np.round(rng.normal(size=20_000) * spread), -high, high).astype(int) + high
  integers[rng.random(integers.size) < zeros] = high
  codes = of_tensor(integers, bits, 1.0, high)
  weight = writer.weight_of('a/kernel', np.float32(integers - high), [Given(codes)])
  share = np.bincount(integers) / integers.size
  entropy = -np.sum(share[share > 0] * np.log2(share[share > 0])) * integers.size / 8
  content = writer.encode('net', [weight])
  assert reader.parse(content).weights['a/kernel'].codes.tolist() == integers.tolist()
  assert entropy < len(content) < 1.3 * entropy + 200
  assert len(content) < len(writer.encode('net', [weight], entropy=False))


# Models.


def quantized_net(bits=3, granularity='channel', make=conv_net):
  """A net with trained-looking batch norms, its kernels at `bits`, half of 'conv1' pruned."""
  model = make()
  rng = np.random.default_rng(5)
  model.set_weights([rng.normal(size=value.shape) for value in model.get_weights()])
  config = {'algorithm': 'uniform', 'weight_bits': bits, 'granularity': granularity}
  instrumented, stack = pocketsize.compress(
    model, [{'algorithm': 'magnitude', 'ratio': 0.5}, {**config, 'end_bits': 0, 'bucket_size': 37}]
  )
  stack.update(0)
  return instrumented


@pytest.mark.parametrize('granularity', ['tensor', 'channel', 'bucket'])
@pytest.mark.parametrize('bits', [1, 2, 5, 8, 13])
def test_a_model_comes_back_to_the_last_bit(tmp_path, bits, granularity):
  model = quantized_net(bits, granularity)
  for entropy in (False, True):
    packed.write(model, tmp_path / 'net.packed', entropy=entropy)
    values = packed.read(tmp_path / 'net.packed')
    deployed = pocketsize.strip(model)
    assert list(values) == [weight.path for weight in deployed.weights]
    for weight in deployed.weights:
      assert verification.same_bits(values[weight.path], weight.numpy()), weight.path
    if bits > 1:
      assert np.mean(values['conv1/kernel'] == 0.0) >= 0.5
  found = packed.load(tmp_path / 'net.packed').weights
  assert {path: weight.bits for path, weight in found.items() if weight.bits < 32} == {
    'conv0/kernel': bits,
    'conv1/kernel': bits,
    'head/kernel': bits,
  }
  assert found['conv0/kernel'].granularity == granularity
  assert list(tmp_path.iterdir()) == [tmp_path / 'net.packed']


@pytest.mark.parametrize('make', MODELS.values(), ids=MODELS)
def test_every_weight_of_any_model_has_a_path_of_its_own(tmp_path, make):
  model = quantized_net(4, make=make)
  packed.write(model, tmp_path / 'net.packed')
  entry = packed.verify(tmp_path / 'net.packed', model)
  assert entry['exact'] and entry['note'] == ''
  # What was read makes another model of this structure the same.
  other = make()
  values = packed.read(tmp_path / 'net.packed')
  for path, variable in packed.variables(other).items():
    variable.assign(values[path])
  for one, wanted in zip(other.get_weights(), pocketsize.strip(model).get_weights(), strict=True):
    np.testing.assert_array_equal(one, wanted)


def test_a_float_model_is_stored_as_it_is(tmp_path):
  model = conv_net()
  pocketsize.write_packed(model, tmp_path / 'net.packed')
  values = pocketsize.read_packed(tmp_path / 'net.packed')
  for weight in model.weights:
    np.testing.assert_array_equal(values[weight.path], weight)
  assert not packed.has_codes(model) and not packed.has_codes(pocketsize.instrument(model))


def test_layers_inside_layers_and_counters_have_names_and_types(tmp_path):
  inputs = keras.Input((4, 6))
  normal = keras.layers.Normalization(name='normal')
  normal.adapt(np.random.default_rng(0).normal(size=(3, 4, 6)))
  x = normal(inputs)
  x = keras.layers.MultiHeadAttention(2, 3, name='attention')(x, x)
  x = keras.layers.Bidirectional(keras.layers.GRU(2), name='both')(x)
  model = keras.Model(inputs, x)
  packed.write(model, tmp_path / 'net.packed')
  values = packed.read(tmp_path / 'net.packed')
  assert len(values) == len(model.weights)
  assert {'attention/query/kernel', 'attention/key/kernel', 'normal/mean'} <= set(values)
  assert values['normal/count'].dtype == normal.count.numpy().dtype != np.float32
  assert packed.verify(tmp_path / 'net.packed', model)['exact']


class Rounded(Transform):
  """A codebook of four centres for each output channel of a [..., channels] kernel."""

  order = 20
  bits = 2

  def build(self, shape):
    self.centres = self.add_weight(name='centres', shape=(shape[-1], 4), trainable=False)
    self.centres.assign(np.sort(np.random.default_rng(1).normal(size=(shape[-1], 4))))
    self.built = True

  def call(self, kernel, training=None):
    nearest = keras.ops.argmin(keras.ops.abs(kernel[..., None] - self.centres), axis=-1)
    return keras.ops.sum(keras.ops.one_hot(nearest, 4) * self.centres, axis=-1)

  def codes(self, kernel):
    centres = self.centres.numpy()
    return Codes(
      np.argmin(np.abs(kernel[..., None] - centres), axis=-1),
      2,
      Groups(kernel.shape, 'channel'),
      centres=centres,
    )


def test_a_model_with_codebooks(tmp_path):
  model = pocketsize.instrument(conv_net(), [Placement('conv1', 'kernel', Rounded())])
  assert packed.has_codes(model)
  packed.write(model, tmp_path / 'net.packed')
  found = packed.load(tmp_path / 'net.packed').weights['conv1/kernel']
  assert found.bits == 2 and found.centres.shape == (4, 4) and found.scale is None
  np.testing.assert_array_equal(found.values(), model.baked('conv1'))


@pytest.mark.parametrize('granularity', ['tensor', 'channel'])
def test_centres_on_a_grid_are_read_back_as_training_saw_them(granularity, tmp_path):
  model, _ = pocketsize.compress(
    conv_net(),
    [{'algorithm': 'non-uniform', 'weight_bits': 2, 'end_bits': 0, 'granularity': granularity}],
    calibration=[images(8)],
  )
  packed.write(model, tmp_path / 'net.packed')
  for path, layer in model.graph.layers.items():
    if hasattr(layer, 'kernel'):
      weight = packed.load(tmp_path / 'net.packed').weights[f'{path}/kernel']
      trained = tf.function(model.transforms_at(path, 'kernel')[0])(layer.kernel.value)
      assert weight.bits == 2 and weight.granularity == granularity
      np.testing.assert_array_equal(weight.values(), trained)


def test_the_report_of_a_file_adds_up(tmp_path):
  """3 bits for 108 + 144 + 16 kernel weights; 12 scales; 36 other weights."""
  model, path = quantized_net(3), tmp_path / 'net.packed'
  packed.write(model, path, entropy=False)
  entry = packed.verify(path, model)
  assert entry['path'] == str(path)
  assert entry['bytes'] == entry['plain_bytes'] == path.stat().st_size
  assert entry['codes_bytes'] == math.ceil(108 * 3 / 8) + 144 * 3 // 8 + 16 * 3 // 8
  assert (entry['codebook_bytes'], entry['float_bytes']) == (4 * 12, 4 * (2 * 16 + 4))
  assert entry['bits_per_weight'] == pytest.approx(8 * entry['bytes'] / 304, abs=1e-4)


def test_a_quantized_weight_without_exact_codes_is_named(tmp_path):
  class Doubled(Transform):
    order = 30

    def call(self, kernel, training=None):
      return 3.0 * kernel

  model = quantized_net(3)
  placements = [*model.placements, Placement('conv0', 'kernel', Doubled())]
  model = pocketsize.instrument(model.source, placements)
  packed.write(model, tmp_path / 'net.packed')
  note = packed.verify(tmp_path / 'net.packed', model)['note']
  assert note == 'as float32, for want of exact codes: conv0/kernel'


def test_a_file_of_another_model_is_not_believed(tmp_path):
  model, path = quantized_net(3), tmp_path / 'net.packed'
  packed.write(model, path)
  model.source.get_layer('bn0').beta.assign_add(np.float32([0, 1e-7, 0, 0]))
  with pytest.raises(UserError, match="'net.packed' holds another 'bn0/beta' than the model does"):
    packed.verify(path, model)
  with pytest.raises(UserError, match='holds the weights of another model'):
    packed.verify(path, MODELS['sequential']())
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(UserError, match='is cut off'):
    packed.verify(path, model)


@pytest.mark.parametrize(
  'one, other, same',
  [
    (np.float32([0.0, 1.0]), np.float32([-0.0, 1.0]), True),
    (np.float32([1.0]), np.float32([1.0 + 2**-23]), False),
    (np.float32([np.nan]), np.float32([np.nan]), True),
    (np.float32([1.0]), np.float64([1.0]), False),
    (np.float32([[1.0]]), np.float32([1.0]), False),
  ],
)
def test_the_same_bits(one, other, same):
  assert verification.same_bits(one, other) is same


# Damage.


def small_content():
  weights = [
    writer.weight_of('a/kernel', np.float32([-1, 0, 1]), [Given(of_tensor([0, 1, 2], 2, 1, 1))]),
    writer.weight_of('a/bias', np.float32([0.25]), []),
  ]
  return writer.encode('net', weights)


def test_one_changed_byte_anywhere_is_found():
  content = small_content()
  for place in range(len(content)):
    damaged = bytearray(content)
    damaged[place] ^= 0x10
    with pytest.raises(reader.PackedError) as raised:
      reader.parse(bytes(damaged))
    assert str(raised.value).startswith('The content is') and str(raised.value).endswith('.')


def test_a_file_that_was_cut_off_anywhere_says_so():
  content = small_content()
  for size in range(1, len(content)):
    with pytest.raises(reader.PackedError, match=f'is cut off: .*{size} bytes'):
      reader.parse(content[:size])


@pytest.mark.parametrize(
  'content, message',
  [
    (b'', 'is no packed file'),
    (b'PK\x03\x04 a zip file', 'is no packed file: it does not begin with'),
    (small_content() + b'x', 'is too long: it has'),
    (small_content()[:8] + b'\x02\0\0\0' + small_content()[12:], 'of version 2; this reader knows'),
  ],
)
def test_what_is_no_file_of_this_version_says_so(content, message):
  with pytest.raises(reader.PackedError, match=message):
    reader.parse(content)


def with_header(change):
  """Returns the small file with its header changed and a checksum that fits."""
  content = small_content()
  end = reader.START + int.from_bytes(content[12:16], 'little')
  header = json.loads(zlib.decompress(content[reader.START : end]))
  change(header)
  text = zlib.compress(json.dumps(header).encode())
  rest = text + content[end:]
  head = content[:12] + len(text).to_bytes(4, 'little')
  head += (reader.START + len(rest)).to_bytes(8, 'little')
  return head + zlib.crc32(rest, zlib.crc32(head)).to_bytes(4, 'little') + rest


@pytest.mark.parametrize(
  'change',
  [
    lambda header: header.pop('model'),
    lambda header: header['weights'].pop(),
    lambda header: header['weights'][0].update(shape=[3000]),
    lambda header: header['weights'][0].update(shape=[-3]),
    lambda header: header['weights'][0].update(shape='3'),
    lambda header: header['weights'][0].update(bits=17),
    lambda header: header['weights'][0].update(bits='2'),
    lambda header: header['weights'][0].update(axes=[1]),
    lambda header: header['weights'][0].update(bucket=-1),
    lambda header: header['weights'][0].update(centres=1),
    lambda header: header['weights'][0].update(zeros=True),
    lambda header: header['weights'][0].update(coded={'codes': ['planes', 'huffman', 1]}),
    lambda header: header['weights'][0].update(coded={'codes': ['packed', 'lzma', 1]}),
    lambda header: header['weights'][0].update(coded={'codes': ['packed', 'rar', 1]}),
    lambda header: header['weights'][0].update(coded={'scale': ['packed', 'raw', 4]}),
    lambda header: header['weights'][0].update(coded=[]),
    lambda header: header['weights'][1].update(dtype='object'),
    lambda header: header.update(weights=3),
  ],
)
def test_a_header_that_does_not_fit_what_follows_is_one_sentence(change):
  assert reader.parse(with_header(lambda header: None)).model == 'net'
  with pytest.raises(reader.PackedError, match='is a packed file that contradicts itself: .+'):
    reader.parse(with_header(change))


# The reader alone.


def alone(tmp_path, *arguments):
  """Runs a copy of the reader where TensorFlow, Keras and Pocketsize cannot be imported."""
  shutil.copy(reader.__file__, tmp_path / 'alone.py')
  program = (
    'import runpy, sys\n'
    "for name in ('tensorflow', 'keras', 'pocketsize'):\n"
    '  sys.modules[name] = None\n'
    f'sys.argv = {["alone.py", *map(str, arguments)]!r}\n'
    "runpy.run_path('alone.py', run_name='__main__')\n"
  )
  return subprocess.run(
    [sys.executable, '-c', program], cwd=tmp_path, env={}, text=True, capture_output=True
  )


def test_the_reader_works_alone(tmp_path):
  model = quantized_net(3)
  packed.write(model, tmp_path / 'net.packed')
  done = alone(tmp_path, 'net.packed', '--npz', 'net.npz')
  assert (done.returncode, done.stderr) == (0, '')
  lines = done.stdout.splitlines()
  size = (tmp_path / 'net.packed').stat().st_size
  assert lines[0] == f'conv_net: 304 numbers in {size:,} bytes, {8 * size / 304:.3f} bits each'
  row = next(line.split() for line in lines if line.startswith('conv1/kernel'))
  assert row[:6] == ['conv1/kernel', '3x3x4x4', '3', '4', 'by', 'channel']
  with np.load(tmp_path / 'net.npz') as archive:
    for weight in pocketsize.strip(model).weights:
      assert verification.same_bits(archive[weight.path], weight.numpy())


def test_the_command_line_says_what_is_wrong_in_one_sentence(tmp_path):
  (tmp_path / 'net.packed').write_bytes(small_content()[:-1])
  for name, message in [('net.packed', 'is cut off'), ('nothing', 'No such file')]:
    done = alone(tmp_path, name)
    assert done.returncode == 2 and done.stdout == ''
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_programs_of_the_page_run(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  text = (ROOT / 'docs' / 'packed.md').read_text()
  scope = {'model': quantized_net(3), 'same_structure': conv_net()}
  blocks = re.findall(r'^```python\n(.*?)^```$', text, re.MULTILINE | re.DOTALL)
  assert len(blocks) == 3
  for block in blocks:
    exec(block, scope)
  deployed = pocketsize.strip(scope['model'])
  x = images()
  np.testing.assert_array_equal(scope['same_structure'](x), deployed(x))
  np.testing.assert_array_equal(scope['kernel'], deployed.get_layer('conv1').kernel)
