"""Learners that search for what each layer gets, on the digits: the search as a phase of a run."""

import contextlib
import json
import signal
import types

import keras
import numpy as np
import pytest

from learners import allocation, main, progress, roll_outs, weight_sparse
from learners import bits as bits_module
from learners.channels import ChannelLearner
from learners.judge import Judge
from learners.phases import Phases
from learners.training import Diverged
from nets.convnet_at_digits import ModelHelper
from pocketsize.allocation import allocators, direct, search, sensitivity
from pocketsize.allocation.scoring import Scorer
from pocketsize.allocation.variants import sparse
from pocketsize.distillation import distillation_loss
from pocketsize.errors import UserError
from pocketsize.graph import Graph
from pocketsize.latency import LatencyTable
from tests.shortcuts import until_training
from tests.test_learners import Killed, assert_same_bits, kill_at, run, weights

__all__ = ['kill_at']  # the fixture

SHORT = ['--learner=uniform', '--uql_quant_epochs=1']
UNIFORM = [*SHORT, '--uql_quantize_all_layers']
EIGHT_BITS = '--uql_activation_bits=8'
SIZES = {'conv0': 144, 'conv1': 4608, 'conv2': 18432, 'dense': 640}
# Few roll-outs, and few vectors for second derivatives.
BITS_BY = {
  'rl': ['--allocation=rl', '--uql_nb_rlouts=6', '--ddpg_batch_size=8'],
  'tpe': [
    '--allocation=tpe',
    '--uql_nb_rlouts=6',
    '--score_by=metric',
    '--nb_smpls_score=100000',
    '--nb_smpls_score_bn=0',
  ],
  'gp': ['--allocation=gp', '--uql_nb_rlouts=6', '--search_start=sensitivity'],
  'hawq': ['--allocation=hawq', '--hawq_iterations=4', '--nb_smpls_trace=64'],
  'sensitivity': ['--allocation=sensitivity'],
  'uniform': ['--allocation=uniform'],
  'heuristic': ['--allocation=heuristic'],
}
TUNED = [
  '--allocation=tpe',
  '--uql_nb_rlouts=2',
  '--uql_enbl_rl_layerwise_tune',
  '--uql_tune_layerwise_steps=2',
  '--uql_enbl_rl_global_tune',
  '--uql_tune_global_steps=2',
]
SPARSE = ['--learner=weight-sparse', '--ws_nb_rlouts=6', '--ws_mask_update_step=3']
SPARSE_BY_AGENT = [*SPARSE, '--ws_nb_rlouts_min=5']
CHANNEL = ['--learner=channel', '--cp_nb_rlouts=6', '--cp_nb_batches=1']
CHANNEL_BY_AGENT = [*CHANNEL, '--cp_nb_rlouts_min=5']
MEAN = '--uql_equivalent_bits=3.5'
SEARCHES = {
  'rl': [*UNIFORM, *BITS_BY['rl'], MEAN],
  'sensitivity': [*UNIFORM, *BITS_BY['sensitivity'], MEAN],
  'tuned': [*UNIFORM, EIGHT_BITS, *TUNED],
  'sparse': SPARSE_BY_AGENT,
  'channel': CHANNEL_BY_AGENT,
}


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory, float_file):
  """Returns the folder of a run that nothing stopped, by its arguments.

  The weights with which its compression began are kept beside it, as begun.npz. Of the runs by all
  allocations only those of `SEARCHES` are trained.
  """
  kept, trained = {}, [tuple(arguments) for arguments in SEARCHES.values()]
  fit, course = Phases._fit, ChannelLearner.course

  def get(*arguments):
    if arguments in kept:
      return kept[arguments]
    folder = tmp_path_factory.mktemp('undisturbed')

    def fitted(self, phase, model, *rest, **options):
      if not isinstance(self, ChannelLearner):
        np.savez(folder / 'begun.npz', *model.source.get_weights())
      if arguments in trained:
        fit(self, phase, model, *rest, **options)

    def pruned(self, model, *rest):
      np.savez(folder / 'begun.npz', *model.get_weights())
      return course(self, model, *rest)

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(Phases, '_fit', fitted)
      patch.setattr(ChannelLearner, 'course', pruned)
      assert run(folder, *arguments, f'--pretrained={float_file}') == 0
    kept[arguments] = folder
    return folder

  return get


@contextlib.contextmanager
def interrupted(written):
  """Makes a signal come once so many scores are in the search's file."""
  with pytest.MonkeyPatch.context() as patch:
    for module in (search, sensitivity):
      patch.setattr(module, 'write_json', _dying(module.write_json, written))
    yield


def _dying(write_json, written):
  done = []

  def write(*arguments):
    write_json(*arguments)
    done.append(None)
    if len(done) == written:
      raise main.Interrupted(signal.SIGTERM)

  return write


@contextlib.contextmanager
def no_search():
  """Makes a search fail."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(allocators, 'allocate', lambda *arguments: pytest.fail('searched'))
    yield


def read(folder, name):
  return json.loads((folder / name).read_text())


def values_of(folder):
  return read(folder, 'allocation.json')['values']


def records_of(folder):
  """Returns the roll-outs of search.json without their seconds."""
  return [record | {'seconds': 0} for record in read(folder, 'search.json')['records']]


def mean_bits(values):
  total = sum(SIZES[path] for path in values)
  return sum(SIZES[path] * bits for path, bits in values.items()) / total


def assert_bits(folder, values):
  """The bits that were found are those of the plan and of the report."""
  planned = {
    place['path']: place['config']['bits']
    for place in read(folder, 'plan.json')['placements']
    if place['point'] == 'kernel'
  }
  reported = {
    entry['name']: entry['weight_bits']
    for entry in read(folder, 'report.json')['layers']
    if entry['name'] in SIZES
  }
  assert planned == reported
  assert {path: planned[path] for path in values} == values
  assert set(planned.values()) - set(values.values()) <= {8}


def assert_pictured(folder):
  assert (folder / 'search.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('name', BITS_BY)
def test_bits_are_searched_for_and_trained_with(undisturbed, name):
  folder = undisturbed(*UNIFORM, *BITS_BY[name], MEAN)
  found = read(folder, 'allocation.json')
  values = found['values']
  assert list(values) == list(SIZES) and set(values.values()) <= set(range(2, 9))
  assert_bits(folder, values)
  assert found['allocation'] == name
  assert found['rollouts'] == (6 if name in ('rl', 'tpe', 'gp') else 1)
  assert found['cost']['budget'] == 3.5
  assert found['cost']['value'] == pytest.approx(mean_bits(values)) and mean_bits(values) <= 3.5
  assert_pictured(folder)
  if name in ('rl', 'tpe', 'gp'):
    content = read(folder, 'search.json')
    assert content['about'] == {'allocation': name, 'seed': 0}
    assert content['best']['values'] == values and len(content['records']) == 6
    for record in content['records']:
      assert set(record['score']) == {'accuracy', 'loss'}
      expected = record['score']['accuracy'] if name == 'tpe' else -record['score']['loss']
      assert record['reward'] == expected
  assert (folder / 'search.json').exists() == (name in ('rl', 'tpe', 'gp'))
  # gp begins with what that finds.
  assert (folder / 'losses.json').exists() == (name in ('sensitivity', 'gp'))
  assert (folder / 'traces.json').exists() == (name == 'hawq')
  assert 'allocation' in read(folder, 'report.json')['seconds']


def test_the_direct_allocations_are_what_they_say(undisturbed):
  uniform, heuristic = (
    values_of(undisturbed(*UNIFORM, *BITS_BY[name], MEAN)) for name in ('uniform', 'heuristic')
  )
  assert set(uniform.values()) == {3}
  assert heuristic['conv0'] > heuristic['conv1'] >= heuristic['conv2']


def test_what_was_found_is_as_good_as_a_list_of_the_users(tmp_path, undisturbed, float_file):
  """So it begins from the float weights, though models were tuned for the search."""
  folder = undisturbed(*SEARCHES['tuned'])
  listed = ','.join(str(values_of(folder)[path]) for path in SIZES)
  arguments = [*UNIFORM, EIGHT_BITS, f'--uql_weight_bits_list={listed}']
  assert run(tmp_path, *arguments, f'--pretrained={float_file}') == 0
  assert_same_bits(weights(folder), weights(tmp_path))


@pytest.mark.parametrize('name', SEARCHES)
def test_the_final_model_begins_from_the_float_weights(undisturbed, float_file, name):
  """PocketFlow's defect #258: it went on from the weights of the last roll-out."""
  with np.load(undisturbed(*SEARCHES[name]) / 'begun.npz') as begun:
    found = [begun[key] for key in begun.files]
  assert_same_bits(found, keras.models.load_model(float_file, compile=False).get_weights())


@pytest.mark.parametrize(('name', 'written'), [('sensitivity', 2), ('tuned', 1), ('channel', 2)])
def test_a_search_that_was_stopped_goes_on_and_ends_the_same(
  tmp_path, undisturbed, float_file, capfd, name, written
):
  arguments = [*SEARCHES[name], f'--pretrained={float_file}']
  with interrupted(written):
    assert run(tmp_path, *arguments) == 128 + signal.SIGTERM
  assert 'Traceback' not in capfd.readouterr().err
  assert not (tmp_path / 'allocation.json').exists()
  partial = read(tmp_path, 'losses.json' if name == 'sensitivity' else 'search.json')
  assert len(partial.get('records', partial.get('losses'))) == written
  assert run(tmp_path, *arguments) == 0
  assert_same_end(tmp_path, undisturbed(*SEARCHES[name]))


def assert_same_end(folder, whole):
  assert read(folder, 'allocation.json') == read(whole, 'allocation.json')
  if (whole / 'search.json').exists():
    assert records_of(folder) == records_of(whole)
  assert_same_bits(weights(folder), weights(whole))


def test_a_run_stopped_twice_refuses_other_flags_and_searches_once(
  tmp_path, kill_at, undisturbed, float_file, capfd
):
  """In the middle of its search, which goes on; then behind it, where it is not repeated."""
  arguments = [*SEARCHES['rl'], f'--pretrained={float_file}']
  with interrupted(3):
    assert run(tmp_path, *arguments) == 128 + signal.SIGTERM
  # Whatever else is gone, the roll-outs belong to their flags.
  (tmp_path / 'float.keras').unlink()
  before = (tmp_path / 'search.json').read_bytes()
  capfd.readouterr()
  assert run(tmp_path, *arguments, '--uql_equivalent_bits=3') == 2
  said = capfd.readouterr().err
  assert '--uql_equivalent_bits is 3.5 there and 3.0 here' in said and 'Traceback' not in said
  assert (tmp_path / 'search.json').read_bytes() == before
  revive = kill_at('compressed', 8)
  with pytest.raises(Killed):
    run(tmp_path, *arguments)
  revive()
  assert len(records_of(tmp_path)) == 6
  with no_search():
    assert run(tmp_path, *arguments) == 0
  assert_same_end(tmp_path, undisturbed(*SEARCHES['rl']))


def test_evaluation_never_searches(undisturbed, float_file):
  folder = undisturbed(*SEARCHES['rl'])
  (folder / 'allocation.json').rename(folder / 'hidden')
  before = {path: path.read_bytes() for path in folder.glob('*.json')}
  with no_search():
    assert run(folder, *SEARCHES['rl'], f'--pretrained={float_file}', '--exec_mode=eval') == 0
  assert before == {path: path.read_bytes() for path in folder.glob('*.json')}
  (folder / 'hidden').rename(folder / 'allocation.json')


def test_a_damaged_allocation_is_one_sentence(tmp_path, float_file, capfd):
  (tmp_path / 'allocation.json').write_text('{')
  assert run(tmp_path, *SEARCHES['rl'], f'--pretrained={float_file}') == 2
  said = capfd.readouterr().err
  assert 'allocation.json is damaged' in said and len(said.strip().splitlines()) == 1


def test_centres_by_the_agent(tmp_path, float_file):
  arguments = ['--learner=non-uniform', '--nuql_enbl_rl_agent', '--nuql_nb_rlouts=5']
  arguments += ['--nuql_equivalent_bits=3', '--nuql_w_bit_max=5', '--nuql_quant_epochs=1']
  assert run(tmp_path, *arguments, f'--pretrained={float_file}') == 0
  values = values_of(tmp_path)
  assert list(values) == ['conv1', 'conv2'] and set(values.values()) <= {2, 3, 4, 5}
  assert mean_bits(values) <= 3
  assert_bits(tmp_path, values)
  assert read(tmp_path, 'allocation.json')['rollouts'] == 5
  assert_pictured(tmp_path)
  final = keras.models.load_model(tmp_path / 'final.keras', compile=False)
  for path, bits in values.items():
    assert len(np.unique(np.array(final.get_layer(path).kernel))) <= 2**bits * 64


MACS = {'conv0': 9216, 'conv1': 73728, 'conv2': 73728, 'dense': 640}


@pytest.mark.parametrize('budget', ['bytes', 'bit_operations'])
def test_a_budget_of_the_whole_model(tmp_path, float_file, monkeypatch, budget):
  """The first and the last layer count with 8 bits, and read 8 bits too."""
  # Biases and batch norms, of four numbers a channel, are float.
  floats = 4 * (10 + 4 * (16 + 32 + 64))
  if budget == 'bytes':
    value = floats + SIZES['conv0'] + SIZES['dense'] + 3.2 * (4608 + 18432) / 8
  else:
    value = (MACS['conv0'] + MACS['dense']) * 64 + 3.2 * 2 * MACS['conv1'] * 4
  arguments = [*SHORT, '--uql_activation_bits=4']
  arguments += ['--allocation=heuristic', f'--budget={budget}', f'--budget_value={value}']
  monkeypatch.setattr(Phases, '_fit', lambda *arguments, **options: None)
  assert run(tmp_path, *arguments, f'--pretrained={float_file}') == 0
  values, cost = values_of(tmp_path), read(tmp_path, 'allocation.json')['cost']
  assert_bits(tmp_path, values)
  assert values['conv0'] == values['dense'] == 8 and values['conv1'] + values['conv2'] > 4
  if budget == 'bytes':
    spent = floats + sum(SIZES[path] * bits for path, bits in values.items()) / 8
  else:
    reads = {'conv0': 8, 'conv1': 4, 'conv2': 4, 'dense': 8}
    spent = sum(MACS[path] * bits * reads[path] for path, bits in values.items())
  assert cost['value'] == pytest.approx(spent) and spent <= value == cost['budget']


def test_what_two_layers_read_counts_with_the_bits_that_it_has():
  """An end asks for 8 bits of the input, so the layer beside it reads 8 bits as well."""
  x = keras.Input((8, 8, 3))
  joined = keras.layers.Add()(
    [keras.layers.Conv2D(4, 3, use_bias=False, name=name)(x) for name in ('end', 'beside')]
  )
  inner = keras.layers.Conv2D(4, 3, use_bias=False, name='inner')(joined)
  graph = Graph(keras.Model(x, keras.layers.Dense(3, name='last')(keras.layers.Flatten()(inner))))
  arguments = ['--uql_activation_bits=4', '--allocation=uniform', '--budget=bit_operations']
  learner = main.make_learner(ModelHelper, ['run.py', *SHORT, *arguments, '--budget_value=1e9'])
  cost = learner._bit_operations(graph, learner.variables(graph))
  macs = {'end': 36 * 27 * 4, 'beside': 36 * 27 * 4, 'inner': 16 * 36 * 4, 'last': 64 * 3}
  weights, reads = {'end': 8, 'last': 8}, {'inner': 4}
  assert cost.of([0] * 4) == sum(
    macs[path] * weights.get(path, 2) * reads.get(path, 8) for path in macs
  )


TIMED = [
  *UNIFORM,
  EIGHT_BITS,
  '--allocation=heuristic',
  '--uql_w_bit_min=8',
  '--uql_w_bit_max=9',
  '--budget=latency',
]


@pytest.fixture
def timer(monkeypatch):
  """Layers take 1 ms in integers, in float 2; returns the list of what was timed."""
  timed = []

  def table(format, path=None, is_complete=False):
    def timer(layer, shape):
      timed.append((format, type(layer).__name__))
      return 1.0 if 'int8' in format else 2.0

    return LatencyTable(format, path, timer=timer, is_complete=is_complete)

  monkeypatch.setattr(bits_module, 'LatencyTable', table)
  return timed


def test_a_budget_of_milliseconds(tmp_path, float_file, timer, capfd):
  """Four layers: 5 ms are enough for one of 9 bits, which computes in float."""
  arguments = ['--budget_value=5', '--budget_format=tflite']
  one = tmp_path / 'one'
  with until_training():
    run(one, *TIMED, *arguments, f'--pretrained={float_file}')
  assert len(timer) == 8 and {format for format, _ in timer} == {'tflite', 'tflite_int8'}
  values = values_of(one)
  assert sorted(values.values()) == [8, 8, 8, 9] and values['conv0'] == 9
  assert read(one, 'allocation.json')['cost'] == {'name': 'ms of layers', 'value': 5, 'budget': 5}
  tables = {path: read(one, path.name) for path in one.glob('latency_*.json')}
  assert len(tables) == 2
  # Given to another run, they are read and no layer is timed.
  timer.clear()
  arguments += [f'--budget_tables={one}', '--budget_value=4.5', f'--pretrained={float_file}']
  with until_training():
    run(tmp_path / 'two', *TIMED, *arguments)
  assert timer == [] and set(values_of(tmp_path / 'two').values()) == {8}
  assert not list((tmp_path / 'two').glob('latency_*'))
  # Those of another net.
  for path, content in tables.items():
    path.write_text(json.dumps(content | {'milliseconds': {}}))
  capfd.readouterr()
  assert run(tmp_path / 'three', *TIMED, *arguments) == 2
  said = capfd.readouterr().err
  assert "is of another net: it has no layer like 'conv0'" in said
  assert len(said.strip().splitlines()) == 1 and not (tmp_path / 'three').exists()


def test_a_budget_of_milliseconds_that_no_choice_meets(tmp_path, float_file, timer, capfd):
  """Known once the layers were timed; what was done till then is kept."""
  arguments = [*TIMED, '--budget_value=3', f'--pretrained={float_file}']
  assert run(tmp_path, *arguments) == 2
  said = capfd.readouterr().err
  assert 'the cheapest has 4 ms of layers. Received: at most 3.' in said
  assert len(said.strip().splitlines()) == 1
  assert not (tmp_path / 'allocation.json').exists()


def held_out(*arguments):
  learner = main.make_learner(ModelHelper, ['run.py', *SEARCHES['rl'], *arguments])
  return lambda samples, batch: learner.held_out(samples, batch), learner.dataset


def test_held_out_images_are_spread_and_none_of_those_that_are_for_the_result():
  images, dataset = held_out()
  whole = np.concatenate([x for x, _ in dataset.load('val', batch=60).as_numpy_iterator()])
  np.testing.assert_array_equal(np.concatenate([x for x, _ in images(60, 25)]), whole[::3][:60])
  np.testing.assert_array_equal(np.concatenate([x for x, _ in images(999, 25)]), whole)
  # Three of four images, and the last of them are not left out.
  spread = images(135, 25)
  assert [len(y) for _, y in spread] == [25, 25, 25, 25, 25, 10]
  np.testing.assert_array_equal(
    np.concatenate([x for x, _ in spread]), np.delete(whole, np.arange(3, len(whole), 4), axis=0)
  )
  images, dataset = held_out('--eval_split=val')
  fitted = np.concatenate([x for x, _ in dataset.load('fit', batch=60).as_numpy_iterator()])
  np.testing.assert_array_equal(np.concatenate([x for x, _ in images(9999, 100)]), fitted)


@pytest.mark.parametrize(('side', 'batch'), [(8, 32), (224, 8), (4000, 1), (None, 32)])
def test_second_derivatives_are_of_the_loss_of_the_training_in_batches_that_fit(
  monkeypatch, side, batch
):
  """Of images as the data set has them; only how many go with a model of so many pixels counts."""
  taken = []

  def traces(model, loss, batches, paths, **options):
    taken.append((loss, batches, paths, options))

  monkeypatch.setattr(allocation, 'traces', traces)
  learner = main.make_learner(
    ModelHelper, ['run.py', *UNIFORM, *BITS_BY['hawq'], '--enbl_dst', '--loss_w_dst=2']
  )
  model = learner.helper.build()
  judge, shown = learner._judge(model), progress.SearchReport('hawq', 1, quiet=True)
  task = types.SimpleNamespace(layers=[('conv0', 'conv1'), ('conv1',)])
  large = types.SimpleNamespace(inputs=[keras.Input((side, side, 3))])
  learner._traces(large, task, judge, 'traces.json', shown.follow)
  ((loss, batches, paths, options),) = taken
  assert {len(x) for x, _ in batches} == {batch} and sum(len(x) for x, _ in batches) == 64
  assert paths == ['conv0', 'conv1']
  assert (options['iterations'], options['follow']) == (4, shown.follow)
  assert options['path'] == 'traces.json'
  x, (labels, wanted) = batches[0]
  np.testing.assert_allclose(wanted, model(x), atol=1e-5)
  task_loss = learner.helper.loss(labels, wanted)
  assert float(loss((labels, wanted), wanted)) == pytest.approx(float(task_loss), abs=1e-5)
  expected = task_loss + 2.0 * (
    distillation_loss(wanted * 0.0, wanted, 4.0) - distillation_loss(wanted, wanted, 4.0)
  )
  # Even outputs have the loss ln 10 for the labels.
  assert float(loss((labels, wanted), wanted * 0.0)) == pytest.approx(
    float(expected - task_loss) + np.log(10.0), rel=1e-4
  )


def test_roll_outs_train_and_are_scored_as_the_run_trains(tmp_path, float_file, monkeypatch):
  """First towards what layers give, then by the loss of the labels and of the teacher."""
  trained, judged, evaluator = [], [], Judge.evaluator

  def train(model, *arguments, **options):
    _, distillation = model.stack.compressors
    trained.append((distillation.config.weight, distillation.config.feature_weight))

  def counted(self):
    judged.append(self)
    return evaluator(self)

  monkeypatch.setattr(roll_outs, 'train', train)
  monkeypatch.setattr(Judge, 'evaluator', counted)
  arguments = [*SEARCHES['tuned'], '--enbl_dst', '--loss_w_dst=2', f'--pretrained={float_file}']
  with until_training():
    run(tmp_path, *arguments)
  assert trained == 2 * [(0.0, 1.0), (2.0, 0.0)]
  # Of the scorer and of two roll-outs, by one teacher.
  assert len(judged) == 3 and len(set(judged)) == 1


def test_a_roll_out_whose_training_diverges_is_scored_without_it(tmp_path, float_file, monkeypatch):
  """The first of two; the second is scored after its training, of no step here."""
  trained = []

  def train(model, *arguments, **options):
    trained.append(model)
    if len(trained) == 1:
      raise Diverged('It grew.')

  monkeypatch.setattr(roll_outs, 'train', train)
  scored = []
  score = Scorer.score
  monkeypatch.setattr(
    Scorer, 'score', lambda *arguments: scored.append(score(*arguments)) or scored[-1]
  )
  with until_training():
    run(tmp_path, *SEARCHES['tuned'], f'--pretrained={float_file}')
  first, second = (record['score'] for record in read(tmp_path, 'search.json')['records'])
  assert len(trained) == 3
  # Of the model itself, for the names of its figures, and of the first choice.
  assert scored[1:] == [first] and second not in scored


@pytest.mark.parametrize('arguments', [SPARSE_BY_AGENT, CHANNEL_BY_AGENT])
def test_an_agent_of_ratios_visits_them_in_a_random_order(
  tmp_path, float_file, monkeypatch, arguments
):
  """Bits have a flag for it."""
  asked = []

  def allocate(name, ground):
    asked.append((name, ground.random_order))
    raise UserError('Enough is known.')

  monkeypatch.setattr(allocators, 'allocate', allocate)
  assert run(tmp_path, *arguments, f'--pretrained={float_file}') == 2
  assert asked == [('rl', True)]


def test_weights_are_dropped_where_they_are_worth_least(undisturbed):
  """The default of weight-sparse."""
  folder = undisturbed(*SPARSE_BY_AGENT)
  found, values = read(folder, 'allocation.json'), values_of(folder)
  assert found['allocation'] == 'rl' and found['rollouts'] == 6 and list(values) == list(SIZES)
  # PocketFlow's bounds for 0.75 of all: 0.25 to 1 - 0.25 / 3.
  assert all(0.25 <= ratio <= 1 - 0.25 / 3 + 1e-9 for ratio in values.values())
  kept = sum(SIZES[path] * (1 - ratio) for path, ratio in values.items()) / sum(SIZES.values())
  assert kept <= 0.25 + 1e-9 and found['cost']['value'] == pytest.approx(kept)
  sparsity = {entry['name']: entry['sparsity'] for entry in read(folder, 'report.json')['layers']}
  for path, ratio in values.items():
    assert sparsity[path] == pytest.approx(ratio, abs=1 / SIZES[path])
  assert_pictured(folder)


@pytest.mark.parametrize(
  ('flag', 'rows'),
  [
    ('--ws_nb_rlouts=51', 10 * 1024),
    ('--ws_nb_smpls_refit=65', 10 * 128),
    ('--ws_nb_smpls_refit=0', None),
    ('--ws_nb_iters_rg=1', None),
    ('--allocation=hawq', None),
  ],
)
def test_what_is_left_of_a_layer_is_refitted_in_roll_outs(monkeypatch, flag, rows):
  """To ten positions of each image, in whole batches of 64; second derivatives want it as it is."""
  given = []
  monkeypatch.setattr(weight_sparse, 'refitted', lambda problems: given.append(problems) or 'refit')
  learner = main.make_learner(
    ModelHelper, ['run.py', '--learner=weight-sparse', '--batch_size=64', flag]
  )
  graph = Graph(learner.helper.build())
  assert learner._change(graph) == (sparse if rows is None else 'refit')
  if rows is not None:
    (problems,) = given
    assert list(problems) == list(SIZES) and problems['conv1'].rows == rows


def test_sparse_by_several_objectives_and_tuned_roll_outs(tmp_path, float_file):
  arguments = ['--ws_reward_type=multi-obj', '--ws_nb_iters_rg=2', '--ws_nb_iters_ft=2']
  arguments += ['--ws_nb_rlouts=2', '--allocation=tpe']
  with until_training():
    run(tmp_path, *SPARSE, *arguments, f'--pretrained={float_file}')
  content = read(tmp_path, 'search.json')
  assert content['problem']['budget'] is None and len(content['records']) == 2
  for record in content['records']:
    expected = record['score']['accuracy'] * np.log(2 - record['cost'])
    assert record['reward'] == pytest.approx(expected)
  assert read(tmp_path, 'allocation.json')['cost']['budget'] is None


def planned_channels(folder):
  return {entry['name']: entry['kept'] for entry in read(folder, 'channels.json')}


def test_channels_are_searched_for_under_a_share_of_macs(undisturbed):
  folder = undisturbed(*CHANNEL_BY_AGENT)
  values, counts = values_of(folder), planned_channels(folder)
  # What the first convolution and the last one read stays whole.
  assert list(values) == ['conv0', 'conv2'] and counts['conv1'] == 32
  for path, size in (('conv0', 16), ('conv2', 64)):
    assert counts[path] == max(1, round(size * (1 - values[path])))
    assert 0 <= values[path] <= 1 - 1.5 * np.log10(1.5) + 1e-9
  model = keras.models.load_model(folder / 'final.keras', compile=False)
  assert {path: model.get_layer(path).filters for path in counts} == counts
  macs = read(folder, 'report.json')
  share = macs['compressed']['macs'] / macs['float']['macs']
  assert read(folder, 'allocation.json')['cost']['value'] == pytest.approx(share)
  assert len(read(folder, 'search.json')['records']) == 6
  assert_pictured(folder)


def test_channels_by_accuracy_against_flops(tmp_path, float_file):
  arguments = ['--cp_reward_policy=flops', '--cp_noise_tolerance=0.5', '--allocation=tpe']
  arguments += ['--cp_preserve_ratio=0.25']
  with until_training():
    run(tmp_path, *CHANNEL, *arguments, f'--pretrained={float_file}')
  content = read(tmp_path, 'search.json')
  assert content['problem']['budget'] is None
  # It bounds the ratios all the same, and the search begins with what is nearest to it.
  choices = [variable['choices'] for variable in content['problem']['variables']]
  assert [max(each) for each in choices] == pytest.approx([1 - 1.5 * np.log10(1.25)] * 2, abs=0.07)
  nearest = [int(np.argmin(np.abs(np.array(each) - 0.75))) for each in choices]
  assert content['records'][0]['levels'] == nearest
  flops = 2 * sum(MACS.values())
  for record in content['records']:
    error = max(0.5, 1 - record['score']['accuracy'])
    assert record['reward'] == pytest.approx(-error * np.log(flops * record['cost']))


def test_channels_under_a_share_of_the_latency(tmp_path, float_file, monkeypatch):
  """Layers take as many ms as they have outputs: 16 + 32 + 64 + 10."""

  def timer(layer, shape):
    return float(getattr(layer, 'filters', None) or layer.units)

  monkeypatch.setattr(
    'learners.channel_targets.LatencyTable',
    lambda *arguments, **options: LatencyTable(*arguments, timer=timer, **options),
  )
  arguments = ['--target=latency', '--target_share=0.7', '--allocation=hawq', '--hawq_iterations=2']
  learner = ['--learner=channel', '--cp_nb_batches=1']
  with until_training():
    run(tmp_path, *learner, *arguments, f'--pretrained={float_file}')
  counts, cost = planned_channels(tmp_path), read(tmp_path, 'allocation.json')['cost']
  assert cost['budget'] == pytest.approx(0.7 * 122)
  assert counts['conv0'] + 32 + counts['conv2'] + 10 == pytest.approx(cost['value'])
  assert cost['value'] <= cost['budget']
  assert (tmp_path / 'latency_openvino.json').exists()


def test_channels_that_take_longer_than_more_of_them_are_no_choice(tmp_path, monkeypatch):
  """And nothing else pays for them: the whole model costs what it takes."""

  def timer(layer, shape):
    outputs = getattr(layer, 'filters', None) or layer.units
    return 40.0 if outputs == 8 else float(outputs)

  monkeypatch.setattr(
    'learners.channel_targets.LatencyTable',
    lambda *arguments, **options: LatencyTable(*arguments, timer=timer, **options),
  )
  target = ['--target=latency', '--target_share=0.9', f'--work_dir={tmp_path}']
  learner = main.make_learner(ModelHelper, ['run.py', *CHANNEL_BY_AGENT, *target])
  problem, counts = learner._problem(*learner.plan(learner.structure)[:2])
  assert problem.budget == pytest.approx(0.9 * 122)
  assert problem.cost.of(problem.highest) == pytest.approx(122)
  assert counts['conv0'] == [16] and len(counts['conv2']) == 17


def test_a_share_of_latency_that_no_choice_has_is_told_with_the_least(tmp_path, monkeypatch):
  monkeypatch.setattr(
    'learners.channel_targets.LatencyTable',
    lambda *arguments, **options: LatencyTable(
      *arguments, timer=lambda layer, shape: 1.0, **options
    ),
  )
  target = ['--target=latency', '--target_share=0.9', f'--work_dir={tmp_path}']
  learner = main.make_learner(ModelHelper, ['run.py', *CHANNEL_BY_AGENT, *target])
  with pytest.raises(UserError, match='^--target_share must be at least 1.0: the layers take 4 ms'):
    learner._problem(*learner.plan(learner.structure)[:2])


def test_a_run_finds_the_times_of_its_choices_again_without_the_table_of_other_nets(
  tmp_path, monkeypatch
):
  times = iter(np.linspace(1.0, 2.0, 1000))
  monkeypatch.setattr(
    'learners.channel_targets.LatencyTable',
    lambda *arguments, **options: LatencyTable(
      *arguments, timer=lambda layer, shape: next(times) * shape[-1], **options
    ),
  )
  table = tmp_path / 'all.json'
  target = ['--target=latency', '--target_share=0.9', f'--target_table={table}']
  learner = main.make_learner(
    ModelHelper, ['run.py', *CHANNEL_BY_AGENT, *target, f'--work_dir={tmp_path / "run"}']
  )
  plan = learner.plan(learner.structure)[:2]
  first, _ = learner._problem(*plan)
  table.unlink()
  again, _ = learner._problem(*plan)
  assert again.budget == first.budget and again.cost.of(again.highest) == first.cost.of(
    first.highest
  )
  assert table.exists()


def test_too_few_images_for_a_refit_by_all_workers_are_refused_before_anything_is_trained(
  tmp_path, monkeypatch
):
  arguments = ['run.py', *CHANNEL_BY_AGENT, f'--work_dir={tmp_path}', '--batch_size=400']
  learner = main.make_learner(ModelHelper, arguments)
  monkeypatch.setattr(learner.runtime, 'size', 4)
  with pytest.raises(UserError, match="must fit into the split 'fit' of"):
    learner.check()


def test_no_image_that_is_held_out_is_reconstructed_from(monkeypatch):
  learner = main.make_learner(ModelHelper, ['run.py', *CHANNEL_BY_AGENT])
  model, load, splits = learner.helper.build(), learner.dataset.load, []

  def spied(split, **options):
    splits.append(split)
    return load(split, **options)

  monkeypatch.setattr(learner.dataset, 'load', spied)
  learner._task(model, *learner.plan(model)[:2])
  assert splits == ['fit']
  # The final model is reconstructed from all training images.
  learner.images(1)
  assert splits == ['fit', 'train']


@pytest.mark.parametrize(
  ('arguments', 'steps'),
  [
    ([*UNIFORM, *TUNED], (2, 2)),
    ([*SPARSE_BY_AGENT, '--ws_nb_iters_rg=3', '--ws_nb_iters_ft=5'], (3, 5)),
  ],
)
def test_roll_outs_train_as_long_with_any_number_of_workers(monkeypatch, arguments, steps):
  """Each tunes models of its own: a score does not depend on how many others there are."""
  learner = main.make_learner(ModelHelper, ['run.py', *arguments])
  monkeypatch.setattr(learner.runtime, 'size', 4, raising=False)
  tuning = learner.task(learner.helper.build()).tuning
  assert (tuning.layerwise_steps, tuning.global_steps) == steps


def test_a_search_whose_picture_fails_is_drawn_again_and_scores_nothing(
  tmp_path, float_file, monkeypatch
):
  def fail(*arguments, **options):
    raise OSError('no font')

  arguments = [*UNIFORM, *BITS_BY['rl'], MEAN, f'--pretrained={float_file}']
  with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match='no font'):
    patch.setattr(allocation, 'plot', fail)
    run(tmp_path, *arguments)
  records = records_of(tmp_path)
  scored = []
  score = Scorer.score
  monkeypatch.setattr(Scorer, 'score', lambda *given: scored.append(given) or score(*given))
  with until_training():
    run(tmp_path, *arguments)
  assert records_of(tmp_path) == records and len(scored) == 1
  assert_pictured(tmp_path)


@pytest.mark.parametrize('ratio', [0.8, 0.75])
def test_a_ratio_that_whole_weights_cannot_have_is_common_to_all(ratio):
  """Of 23,824 weights 0.8 would be 19,059.2; by layers it comes to 19,059."""
  arguments = [f'--ws_prune_ratio={ratio}', '--allocation=uniform']
  learner = main.make_learner(
    ModelHelper, ['run.py', '--learner=weight-sparse', '--ws_mask_update_step=3', *arguments]
  )
  problem = learner.problem(Graph(learner.helper.build()))
  assert set(problem.values(direct.uniform(problem)).values()) == {ratio}


def test_the_time_left_of_a_search_that_goes_on_follows_from_what_was_done_since(
  monkeypatch, capsys
):
  """Each roll-out takes 6 s; 101 of 200 were done by the first line."""
  now = [50.0]
  monkeypatch.setattr(progress.time, 'monotonic', lambda: now[0])
  with progress.SearchReport('rl', 200, quiet=False) as shown:
    best = search.Record(0, [1], 0.5, 0.5, 3.0, 6.0)
    for done in range(101, 111):
      shown.track(done, best)
      now[0] += 6.0
  first, last = capsys.readouterr().out.splitlines()
  assert first == 'allotting by rl: 101/200  best 0.5000  cost 3'
  assert last == 'allotting by rl: 110/200  best 0.5000  cost 3  left 0:09:00'
