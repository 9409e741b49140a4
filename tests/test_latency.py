"""Latency tables with timers whose numbers can be worked out by hand; one that is timed."""

import json
from unittest.mock import ANY

import channels as topologies
import keras
import numpy as np
import pytest
from keras import layers
from toys import conv_net

from pocketsize import conversion, latency, targets
from pocketsize.channel_graph import ChannelGraph
from pocketsize.conversion.formats import QUANTIZED_FORMATS
from pocketsize.conversion.inspection import count_ops
from pocketsize.conversion.processor import overflows
from pocketsize.errors import UserError
from pocketsize.graph import Graph
from pocketsize.latency import INTEGER_RUNTIMES, RUNTIMES, LatencyTable, predicted, relative
from pocketsize.layer_timing import LayerTimer
from pocketsize.pruning import filters
from pocketsize.pruning.latency_budget import choose_for_latency, measured
from pocketsize.shrink import shrink


class Timer:
  """inputs ** 2 + outputs ms; `asked` holds (type, shape of the input, outputs)."""

  def __init__(self):
    self.asked = []

  def __call__(self, layer, shape):
    outputs = getattr(layer, 'filters', getattr(layer, 'units', 0))
    self.asked.append((type(layer).__name__, shape, outputs))
    return float(shape[-1] ** 2 + outputs + 100 * getattr(layer, 'groups', 1))


def table_of(timer=None, **arguments):
  return LatencyTable('tflite', timer=timer or Timer(), **arguments)


def mixed():
  """Every kind of layer with weights that has channels."""
  inputs = keras.Input((8, 8, 3))
  x = layers.Conv2D(12, 3, padding='same', activation='relu', name='stem')(inputs)
  x = layers.DepthwiseConv2D(3, padding='same', depth_multiplier=2, name='depth')(x)
  x = layers.SeparableConv2D(10, 3, name='separable')(x)
  x = layers.Conv2D(12, 3, groups=2, use_bias=False, name='grouped')(x)
  x = layers.Conv2DTranspose(9, 2, strides=2, name='transposed')(x)
  x = layers.Dense(7, name='pointwise')(x)
  shared = layers.Conv2D(7, 1, name='shared')
  x = layers.Flatten()(shared(shared(x)))
  return topologies.randomized(keras.Model(inputs, layers.Dense(3, name='head')(x)))


def small():
  inputs = keras.Input((8, 8, 3))
  x = layers.Conv2D(32, 3, padding='same', name='a')(inputs)
  x = layers.Conv2D(32, 3, padding='same', name='b')(layers.ReLU()(x))
  x = layers.GlobalAveragePooling2D()(layers.ReLU()(x))
  return topologies.randomized(keras.Model(inputs, layers.Dense(4, name='head')(x)))


@pytest.mark.parametrize(
  ('inputs', 'outputs', 'expected', 'entries'),
  [
    (16, 24, 256 + 24, 1),
    # Half of 8 ** 2 and of 16 ** 2; half of 16 and of 24.
    (12, 20, (64 + 256) / 2 + 20, 4),
    # Below the grid: 3 lies 2 / 7 of the way from 1 to 8.
    (3, 16, 1 * 5 / 7 + 64 * 2 / 7 + 16, 2),
    # The whole count, 30, is a point: 29 lies 5 / 6 of the way from 24.
    (8, 29, 64 + 29, 2),
    (8, 30, 64 + 30, 1),
    (None, None, 400 + 30, 1),
  ],
)
def test_counts_between_the_points_of_the_grid(inputs, outputs, expected, entries):
  timer = Timer()
  found = table_of(timer).milliseconds(layers.Conv2D(30, 3), (9, 9, 20), inputs, outputs)
  assert found == pytest.approx(expected + 100)
  assert len(timer.asked) == entries


@pytest.mark.parametrize(
  ('outputs', 'entries'),
  [(256, ['16x256']), (1024, ['16x1024']), (960, ['16x960']), (970, ['16x960', '16x1024'])],
)
def test_wide_layers_have_a_wider_grid(outputs, entries):
  """16 steps of 64 to 1024; what is 10 / 64 of the way from 960 on has that part of the time."""
  table = table_of()
  assert table.milliseconds(layers.Dense(1024), (16,), outputs=outputs) == 256 + outputs + 100
  assert list(table._entries.values()) == [dict.fromkeys(entries, ANY)]


def test_groups_and_depthwise_layers():
  timer = Timer()
  # Multiples of 8 and of 6 groups: 24 is the only one up to 42.
  found = table_of(timer).milliseconds(layers.Conv2D(42, 3, groups=6), (9, 9, 42), 12, 24)
  assert [shape[-1] for _, shape, _ in timer.asked] == [6, 24]
  assert found == pytest.approx(36 * 12 / 18 + 576 * 6 / 18 + 24 + 600)
  assert table_of().milliseconds(layers.DepthwiseConv2D(3), (9, 9, 24), 16) == 256 + 100


def test_layers_that_differ_in_nothing_that_takes_time_share_entries():
  timer = Timer()
  table = table_of(timer)
  table.milliseconds(layers.Conv2D(16, 3, activation='relu', name='a'), (9, 9, 24), 8, 8)
  table.milliseconds(layers.Conv2D(32, 3, use_bias=False, name='b'), (9, 9, 16), 8, 8)
  assert len(timer.asked) == 1
  others = [
    (layers.Conv2D(16, 1), (9, 9, 24)),
    (layers.Conv2D(16, 3, strides=2), (9, 9, 24)),
    (layers.Conv2D(16, 3, padding='same'), (9, 9, 24)),
    (layers.Conv2D(16, 3), (9, 8, 24)),
    (layers.Conv2DTranspose(16, 3), (9, 9, 24)),
  ]
  for layer, shape in others:
    table.milliseconds(layer, shape, 8, 8)
  assert len(timer.asked) == 1 + len(others)


def test_a_file_keeps_the_entries(tmp_path):
  timer = Timer()
  path = tmp_path / 'table.json'
  for _ in range(2):
    assert table_of(timer, path=path).milliseconds(layers.Dense(8), (16,)) == 256 + 8 + 100
  assert len(timer.asked) == 1
  content = json.loads(path.read_text())
  assert content['format'] == 'tflite' and content['versions']['keras'] == keras.__version__
  assert list(content['milliseconds'].values()) == [{'16x8': 364.0}]


@pytest.mark.parametrize('key', ['format', 'processor', 'runtime'])
def test_a_foreign_table_is_refused(tmp_path, key):
  path = tmp_path / 'table.json'
  table_of(path=path).milliseconds(layers.Dense(8), (16,))
  path.write_text(json.dumps({**json.loads(path.read_text()), key: 'another'}))
  with pytest.raises(UserError, match=f"holds for one {key} only, .* Received: 'another'"):
    table_of(path=path)


@pytest.mark.parametrize('damage', ['{', '[]', '{"milliseconds": ["a"]}'])
def test_a_damaged_table_is_refused_and_left_as_it_is(tmp_path, damage):
  path = tmp_path / 'table.json'
  table_of(path=path).milliseconds(layers.Dense(8), (16,))
  text = damage
  if 'milliseconds' in damage:
    text = json.dumps({**json.loads(path.read_text()), **json.loads(damage)})
  path.write_text(text)
  for arguments in ({'path': path}, {'path': tmp_path / 'own.json', 'known': path}):
    with pytest.raises(UserError, match='is no table of latencies'):
      table_of(**arguments)
  assert path.read_text() == text and not (tmp_path / 'own.json').exists()


def test_what_another_file_knows_is_kept_here_too_and_it_gets_the_rest(tmp_path):
  own, known = tmp_path / 'own.json', tmp_path / 'known.json'
  wide, narrow = layers.Conv2D(32, 3), layers.Conv2D(16, 3)
  assert table_of(path=known).milliseconds(wide, (8, 8, 16)) == 256 + 32 + 100
  timer = Timer()
  table = table_of(timer, path=own, known=known)
  assert table.milliseconds(wide, (8, 8, 16)) == 256 + 32 + 100
  assert timer.asked == []
  assert table.milliseconds(narrow, (8, 8, 16)) == 256 + 16 + 100
  assert len(timer.asked) == 1
  known.unlink()
  again = table_of(timer, path=own, known=known)
  assert [again.milliseconds(each, (8, 8, 16)) for each in (wide, narrow)] == [388, 372]
  table_of(timer, path=known, known=own)
  assert table_of(timer, path=known).milliseconds(narrow, (8, 8, 16)) == 372
  assert len(timer.asked) == 1


def test_two_processes_may_fill_a_file(tmp_path):
  path = tmp_path / 'table.json'
  tables = [table_of(path=path) for _ in range(2)]
  for table, outputs in zip(tables, (16, 32), strict=True):
    table.milliseconds(layers.Conv2D(outputs, 3), (8, 8, 16))
  timer = Timer()
  found = table_of(timer, path=path)
  assert [found.milliseconds(layers.Conv2D(n, 3), (8, 8, 16)) for n in (16, 32)] == [372, 388]
  assert timer.asked == []


def test_a_complete_table_times_nothing(tmp_path):
  timer, path = Timer(), tmp_path / 'table.json'
  table_of(path=path).milliseconds(layers.Conv2D(8, 3), (9, 9, 16))
  complete = table_of(timer, path=path, is_complete=True)
  assert complete.milliseconds(layers.Conv2D(8, 3, name='other'), (9, 9, 16)) == 256 + 8 + 100
  message = (
    r"table\.json is of another net: it has no layer like 'mine' "
    r'\(Conv2D kernel_size=\(5, 5\) .* positions=9x9, channels 16x8\)'
  )
  with pytest.raises(UserError, match=message):
    complete.milliseconds(layers.Conv2D(8, 5, name='mine'), (9, 9, 16))
  with pytest.raises(UserError, match='channels 8x8'):
    complete.milliseconds(layers.Conv2D(8, 3), (9, 9, 16), 8, 8)
  assert timer.asked == []
  for missing in (tmp_path / 'none.json', None):
    with pytest.raises(UserError, match='must be a file that is there. Received: .*(none|None)'):
      table_of(path=missing, is_complete=True)


def test_integers_have_a_table_of_their_own(tmp_path):
  path = tmp_path / 'table.json'
  table_of(path=path).milliseconds(layers.Dense(8), (16,))
  with pytest.raises(UserError, match="one format only, .* 'tflite_int8'.* Received: 'tflite'"):
    LatencyTable('tflite_int8', path)
  assert set(INTEGER_RUNTIMES) == QUANTIZED_FORMATS
  assert set(INTEGER_RUNTIMES) | set(RUNTIMES) == set(conversion.FORMATS)


def test_tables_that_make_no_sense():
  with pytest.raises(UserError, match="onnx, openvino, tflite_int8, .*. Received: 'tflite_int4'"):
    LatencyTable('tflite_int4')
  with pytest.raises(UserError, match='`multiple` must be at least 1. Received: 0'):
    LatencyTable('onnx', multiple=0)
  model = keras.Sequential([keras.Input((None, None, 3)), layers.Conv2D(4, 3, name='a')])
  with pytest.raises(UserError, match="'a' cannot be timed: .* fixed sizes"):
    predicted(ChannelGraph(model), {}, table_of())


@pytest.mark.parametrize('seed', range(3))
def test_the_prediction_is_the_sum_over_the_smaller_model(seed, monkeypatch):
  # Every count is timed.
  monkeypatch.setattr(latency, '_STEPS', 10**6)
  model, rng = mixed(), np.random.default_rng(seed)
  channels = ChannelGraph(model)
  scores = {group.name: rng.random(group.size) for group in channels.groups}
  keep = filters.choose(channels, scores, ratio=rng.uniform(0.2, 0.7), scope='network')
  graph, timer = Graph(shrink(model, keep)), Timer()
  expected = sum(
    timer(node.operation, graph.shape(node.inputs[0]))
    for node in graph.nodes
    if targets.weight_points(node.operation)
  )
  assert len(timer.asked) == 9 and any(not kept.all() for kept in keep.values())
  assert predicted(channels, keep, table_of(multiple=1)) == pytest.approx(expected)
  whole = predicted(channels, {}, table_of(multiple=1))
  assert relative(channels, table_of(multiple=1))(keep) == pytest.approx(expected / whole)
  assert relative(channels, table_of())({}) == 1.0


@pytest.mark.parametrize('scope', ['group', 'network'])
@pytest.mark.parametrize('seed', range(10))
def test_a_budget_is_never_exceeded_by_a_noisy_table(scope, seed):
  channels, rng = ChannelGraph(small()), np.random.default_rng(seed)

  def timer(layer, shape):
    return shape[-1] * getattr(layer, 'filters', 1) * rng.uniform(0.5, 1.5)

  cost = relative(channels, table_of(timer, multiple=4))
  scores = filters.scores(channels)
  for budget in (0.2, 0.5, 0.8, 1.0):
    keep = filters.choose(
      channels, scores, cost=cost, budget=budget, scope=scope, multiple=int(rng.integers(1, 5))
    )
    assert cost(keep) <= budget


def test_the_least_ratio_that_meets_a_budget():
  channels = ChannelGraph(small())
  scores = filters.scores(channels)

  def share(keep):
    return float(keep['a'].mean())

  for budget in (0.1, 0.33, 0.5, 0.77, 1.0):
    keep = filters.choose(channels, scores, cost=share, budget=budget)
    assert keep['a'].sum() == np.floor(32 * budget)
  with pytest.raises(UserError, match=r'`budget` cannot be met: with 8 .* group 0\.250 are left'):
    filters.choose(channels, scores, cost=share, budget=0.2, multiple=8)
  with pytest.raises(UserError, match='`cost` and `budget` go together'):
    filters.choose(channels, scores, cost=share)
  with pytest.raises(UserError, match='Give either `ratio` or `macs`, or `cost`'):
    filters.choose(channels, scores, ratio=0.5, cost=share, budget=0.5)


class Measure:
  """What files would take: a function of the share of channels that stay in 'a' and 'b'."""

  def __init__(self, share):
    self.share, self.calls = share, []

  def __call__(self, model):
    self.calls.append(self.share(model.get_layer('a').filters / 32))
    return self.calls[-1]


def choice_of(measure, share, **arguments):
  channels = ChannelGraph(small())
  scores = {group.name: np.arange(group.size) for group in channels.groups}
  # Layer 'b' reads and makes all channels; the timer gives the product.
  table = table_of(lambda layer, shape: float(shape[-1] * getattr(layer, 'filters', 0)))
  table_arguments = {'multiple': 1, **arguments}
  return choose_for_latency(channels, scores, share, table, measure=measure, **table_arguments)


def test_a_prediction_that_holds_is_measured_once():
  # 3 c + c ** 2 of c channels, 32 in whole: at 21 it is 504 / 1120 = 0.45.
  measure = Measure(lambda part: (3 * part * 32 + (part * 32) ** 2) / 1120)
  choice = choice_of(measure, 0.46)
  assert measure.calls == [pytest.approx(0.45)] and choice.keep['a'].sum() == 21
  assert choice.predicted == pytest.approx(choice.measured)
  assert choice.model.get_layer('b').filters == 21


@pytest.mark.parametrize(
  'share_of', [lambda part: part, lambda part: 0.3 + 0.7 * part**2, lambda part: part**4]
)
@pytest.mark.parametrize('share', [0.5, 0.7, 0.9])
def test_a_prediction_that_fails_is_corrected(share_of, share):
  measure = Measure(share_of)
  choice = choice_of(measure, share)
  assert len(measure.calls) <= 8 and choice.measured in measure.calls
  # Not needlessly small: one channel more would be too much, or nearly.
  kept = choice.keep['a'].sum()
  assert choice.measured <= share and share_of((kept + 1) / 32) > 0.95 * share


def test_of_choices_that_are_too_small_the_largest_is_taken():
  # Steps of 8 channels: 0.25, 0.5, 0.75 and 1, of which none lies just below 0.7.
  measure = Measure(lambda part: part)
  choice = choice_of(measure, 0.7, multiple=8)
  assert choice.measured == 0.5 and len(set(measure.calls)) == len(measure.calls)


def test_a_share_that_cannot_be_reached():
  measure = Measure(lambda part: 0.6 + 0.4 * part)
  with pytest.raises(UserError, match=r'with 8 channels in every group 0\.700 of the latency'):
    choice_of(measure, 0.65, multiple=8)
  assert len(measure.calls) <= 4
  with pytest.raises(UserError, match=r'must be in \(0, 1\]. Received: 0'):
    choice_of(measure, 0)


def test_a_wider_layer_takes_longer_in_the_runtime():
  timer = LayerTimer('tflite')
  narrow, wide = (timer(layers.Conv2D(count, 3), (32, 32, 32)) for count in (16, 64))
  assert wide > 1.5 * narrow


@pytest.mark.parametrize('format_', ['tflite', 'onnx'])
def test_a_smaller_model_is_faster_in_the_runtime(format_, tmp_path):
  def model(count):
    return keras.Sequential([keras.Input((32, 32, 32)), layers.Conv2D(count, 3)])

  path = conversion.export(model(64), tmp_path, [format_])[0].path
  assert 0.0 < measured(model(8), path, format_, rounds=5) < 0.8


def test_a_whole_net_is_timed():
  assert predicted(ChannelGraph(conv_net()), {}, LatencyTable('tflite')) > 0.0


@pytest.mark.parametrize('format_', ['onnx', 'openvino'])
def test_the_other_runtimes_time_a_layer(format_):
  table = LatencyTable(format_)
  assert table.milliseconds(layers.Conv2D(8, 3), (16, 16, 8)) > 0.0


@pytest.mark.parametrize('format_', INTEGER_RUNTIMES)
def test_what_is_timed_in_integers_computes_in_integers(format_, monkeypatch):
  export, counts = conversion.export, []

  def counted(*arguments):
    (file,) = export(*arguments)
    counts.append(count_ops(file.path)[0])
    return [file]

  monkeypatch.setattr(conversion, 'export', counted)
  assert LatencyTable(format_).milliseconds(layers.Conv2D(16, 3), (16, 16, 8)) > 0.0
  # The model with the layer, and the one without.
  whole, rest = counts
  assert whole > rest > 0


@pytest.mark.skipif(overflows('openvino_int8'), reason='no VNNI, floats are as fast')
def test_integers_of_a_wide_layer_take_less_than_floats():
  layer, shape = layers.Conv2D(64, 3), (32, 32, 64)
  floats, integers = (
    LayerTimer(format_)(layers.Conv2D.from_config(layer.get_config()), shape)
    for format_ in ('tflite', 'tflite_int8')
  )
  assert integers < floats


@pytest.mark.parametrize('format_', ['tflite', 'tflite_int8'])
def test_every_kind_of_layer_is_timed(format_):
  timer = LayerTimer(format_)
  kinds = [
    (layers.Conv1D(4, 3), (8, 6)),
    (layers.Conv1DTranspose(4, 3), (8, 6)),
    (layers.DepthwiseConv1D(3), (8, 6)),
    (layers.SeparableConv1D(4, 3), (8, 6)),
    (layers.Conv2D(4, 3, groups=2), (8, 8, 6)),
    (layers.Conv2DTranspose(4, 3), (8, 8, 6)),
    (layers.DepthwiseConv2D(3), (8, 8, 6)),
    (layers.SeparableConv2D(4, 3), (8, 8, 6)),
    (layers.Conv3D(4, 3), (8, 8, 8, 6)),
    (layers.Conv3DTranspose(4, 3), (4, 4, 4, 6)),
    (layers.Dense(4), (6,)),
    (layers.Dense(4), (8, 6)),
    (layers.EinsumDense('abc,cd->abd', (None, 4)), (8, 6)),
  ]
  assert {type(layer).__name__ for layer, _ in kinds} == set(targets.WEIGHTS_BY_TYPE)
  for layer, shape in kinds:
    assert timer(layer, shape) > 0.0
