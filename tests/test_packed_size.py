"""Packed files of a ResNet-20 weigh what its bits do, worked out from the shapes of its kernels."""

import math
import re
from typing import NamedTuple

import keras
import pytest

import pocketsize
from nets import resnet_at_cifar10
from pocketsize import packed

BUCKET = 256
ENDS = 'conv0|dense'
PRUNED = {'algorithm': 'magnitude', 'ratio': 0.5}


class Content(NamedTuple):
  """What a packed file has of a kernel.

  Attributes:
    bits: of a weight.
    rows: what has scales or a codebook of its own: 'tensor', 'channel' or 'bucket'.
    floats: float32 numbers of a row; None for a codebook.
    factors: float32 numbers of an output channel.
  """

  bits: int
  rows: str = 'channel'
  floats: int | None = 1
  factors: int = 0

  def bytes(self, shape):
    """Returns the bytes of a kernel, whose output channels are the last axis, in theory."""
    size, channels = math.prod(shape), shape[-1]
    members = {'tensor': size, 'channel': size // channels, 'bucket': BUCKET}[self.rows]
    floats = min(2**self.bits, members, size) if self.floats is None else self.floats
    numbers = math.ceil(size / members) * floats + self.factors * channels
    return size * self.bits / 8 + 4 * numbers


FLOAT = Content(32, floats=0)


def uniform(bits, rows='channel', floats=1, factors=0, zeros=0, **config):
  """Returns a case of uniform levels, the ends at 8 bits: (config_list, {pattern: `Content`}).

  Args:
    zeros: bits of a weight that say whether it is zero.
  """
  config = {'algorithm': 'uniform', 'weight_bits': bits, 'granularity': rows, **config}
  config |= {'bucket_size': BUCKET, 'fold_batch_norm': bool(factors)}
  inner = Content(bits + zeros, rows, floats, factors)
  return [config], {'': inner, ENDS: inner._replace(bits=8), 'dense': Content(8, rows, floats)}


def non_uniform(bits, rows, **config):
  """Returns a case of trained centres."""
  config = {'algorithm': 'non-uniform', 'weight_bits': bits, 'granularity': rows, **config}
  config |= {'bucket_size': BUCKET, 'start': 'quantile', 'mode': 'both'}
  return [config], {'': Content(bits, rows, None), ENDS: Content(8, rows, None)}


def binary(mode, rows):
  """Returns a case of binary weights with float ends and shortcuts."""
  config = {'algorithm': 'binary', 'mode': mode, 'keep_shortcuts': True}
  return [config], {'': Content(1, rows), ENDS: FLOAT, '.*shortcut': FLOAT}


def pruned(configs, contents):
  """Returns a case with half of the weights zero."""
  return [PRUNED, *configs], contents


def mixed():
  """Returns a case of 2 bits in the third stage and 5 before it."""
  configs, contents = uniform(5)
  configs.append({**configs[0], 'weight_bits': 2, 'op_names': ['{re}stage3.*']})
  return configs, {**contents, 'stage3': Content(2)}


CASES = {
  **{f'{bits} bits': uniform(bits) for bits in (1, 2, 3, 4, 8)},
  'a scale a tensor': uniform(2, 'tensor'),
  'a scale a bucket': uniform(4, 'bucket'),
  'zero points': uniform(4, floats=2, weight_range='asymmetric'),
  'dorefa': uniform(3, weight_range='dorefa'),
  'folded': uniform(4, 'tensor', factors=1),
  'mixed': mixed(),
  'centres on a grid, a channel': non_uniform(2, 'channel'),
  'centres on a grid, a tensor': non_uniform(4, 'tensor'),
  'float centres, a channel': non_uniform(2, 'channel', centre_bits=32),
  'float centres, a bucket': non_uniform(4, 'bucket'),
  'xnor': binary('xnor', 'channel'),
  'binary dorefa': binary('dorefa', 'tensor'),
  'pruned, zero a level': pruned(*uniform(4)),
  'pruned, of one bit': pruned(*uniform(1, zeros=1)),
}


@pytest.fixture(scope='module')
def resnet_20():
  keras.utils.set_random_seed(0)
  return resnet_at_cifar10.ModelHelper(resnet_at_cifar10.ModelHelper.Config()).build()


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_a_resnet_20_has_the_size_of_its_bits(case, resnet_20, tmp_path):
  """Bits for kernels, floats for their rows and for all that is no kernel; within 3 % of that.

  What is more is the header: kilobytes beyond would be rows that are stored twice.
  """
  configs, contents = case
  model, _ = pocketsize.compress(resnet_20, configs)
  shapes = {
    layer.name: tuple(layer.kernel.shape)
    for layer in resnet_20.layers
    if isinstance(layer, keras.layers.Conv2D | keras.layers.Dense)
  }
  assert len(shapes) == 22
  wanted = 4 * (resnet_20.count_params() - sum(map(math.prod, shapes.values())))
  for name, shape in shapes.items():
    *_, content = (found for pattern, found in contents.items() if re.match(pattern, name))
    wanted += content.bytes(shape)
  packed.write(model, tmp_path / 'plain.packed', entropy=False)
  size = (tmp_path / 'plain.packed').stat().st_size
  assert wanted <= size < min(1.03 * wanted, wanted + 1000)


@pytest.mark.parametrize('bits', [2, 8])
def test_a_resnet_20_is_smaller_for_entropy_coding(bits, resnet_20, tmp_path):
  model, _ = pocketsize.compress(resnet_20, [{'algorithm': 'uniform', 'weight_bits': bits}])
  for name in ('plain', 'coded'):
    packed.write(model, tmp_path / f'{name}.packed', entropy=name == 'coded')
  plain, coded = ((tmp_path / f'{name}.packed').stat().st_size for name in ('plain', 'coded'))
  assert coded < plain
  entry = packed.verify(tmp_path / 'coded.packed', model)
  assert (entry['bytes'], entry['plain_bytes'], entry['note']) == (coded, plain, '')
