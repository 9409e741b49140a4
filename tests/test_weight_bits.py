"""Bits of single layers, from a flag: a list, layers with bits, a file."""

import json
import types

import pytest
from toys import conv_net

from learners.quantization import rules
from pocketsize import targets
from pocketsize.errors import UserError
from pocketsize.graph import Graph
from pocketsize.quantization.uniform import Uniform, UniformConfig

DEFAULT = UniformConfig(weight_bits=5)


def bits_by_path(text):
  """Returns {path: bits of its weights} that --uql_weight_bits_list=text gives a toy."""
  graph = Graph(conv_net())
  compressor = Uniform(
    rules(types.SimpleNamespace(uql_weight_bits_list=text), 'uql', DEFAULT, graph)
  )
  compressor.plan(graph)
  return {path: config.weight_bits for path, config in compressor.configs.items()}


def paths():
  return list(targets.weighted_layers(Graph(conv_net())))


def test_without_a_list_the_ends_have_8_bits():
  first, *middle, last = bits_by_path(None).values()
  assert (first, last) == (8, 8)
  assert set(middle) == {5}


def test_one_number_for_each_layer():
  numbers = list(range(2, 2 + len(paths())))
  assert list(bits_by_path(','.join(map(str, numbers))).values()) == numbers


def test_some_layers_by_name_in_any_order(tmp_path):
  first, second, *_, last = paths()
  expected = {**dict.fromkeys(paths(), 5), first: 8, second: 3, last: 2}
  assert bits_by_path(f'{last}:2,{second}:3') == expected
  file = tmp_path / 'bits.json'
  file.write_text(json.dumps({last: 2, second: 3}))
  assert bits_by_path(str(file)) == expected


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('4,x', "must be integers, comma-separated, or layer:integer.* Received: '4,x'"),
    ('4', 'must have one number for each of the'),
    ('conv0:4,3', 'must name every layer, each once, or none'),
    ('conv0:4,conv0:3', 'must name every layer, each once, or none'),
    ('conv9:4', "must name layers with weights: conv0, conv1.*Received: 'conv9'"),
    ('conv0:17', '_bits_list must have bits from 1 to 16, or 32 for float. Received: 17'),
    ('missing.json', 'missing.json cannot be read'),
  ],
)
def test_a_mistake_is_explained(text, message):
  with pytest.raises(UserError, match=message):
    bits_by_path(text)


@pytest.mark.parametrize('content', ['[4, 4]', '{"conv0": "4"}', '{"conv0": true}', '{'])
def test_a_file_of_something_else_is_refused(content, tmp_path):
  file = tmp_path / 'bits.json'
  file.write_text(content)
  with pytest.raises(UserError, match='must hold an object of layers|cannot be read'):
    bits_by_path(str(file))
