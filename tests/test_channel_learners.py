"""The learners that prune channels layer by layer, on the digits: resume, flags, reports, files."""

import json
import shutil

import keras
import numpy as np
import prunable
import pytest
from toys import conv_net

from learners import learner as learner_module
from learners import main
from learners.channels import ChannelLearner
from learners.chn_pruned_rmt import ChannelPrunedRemastered
from nets import pretrained
from nets.convnet_at_digits import ModelHelper
from pocketsize import conversion
from pocketsize.distillation import Distillation
from pocketsize.errors import UserError
from pocketsize.shrink import shrink
from tests.shortcuts import Enough, unreported
from tests.test_learners import Killed, assert_same_bits, kill_at, run, weights

__all__ = ['kill_at']  # the fixture

CHANNEL = ['--learner=channel', '--cp_prune_option=uniform', '--cp_nb_batches=1']
REMASTERED = ['--learner=chn-pruned-rmt', '--cpr_nb_smpls=100', '--cpr_lstsq_nb_iters=10']
PROXIMAL = ['--learner=chn-pruned-gpu', '--cpg_nb_iters_layer=20']
LEARNERS = {'channel': CHANNEL, 'chn-pruned-rmt': REMASTERED, 'chn-pruned-gpu': PROXIMAL}
# Kept of conv1 and conv2's inputs, 16 and 32, and of the dense layer's 64. The ends of `channel`
# and chn-pruned-gpu read all, so conv2's inputs stay there.
KEPT = {
  'channel': [('conv0', 16, 10), ('conv1', 32, 32), ('conv2', 64, 38)],
  'chn-pruned-rmt': [('conv0', 16, 8), ('conv1', 32, 16), ('conv2', 64, 32)],
  'chn-pruned-gpu': [('conv0', 16, 8), ('conv1', 32, 32), ('conv2', 64, 32)],
}
each_learner = pytest.mark.parametrize('learner', LEARNERS)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory, float_file):
  """Returns the folder of a run that nothing stopped, by its arguments."""
  kept = {}

  def get(*arguments):
    if arguments not in kept:
      folder = tmp_path_factory.mktemp('undisturbed')
      assert run(folder, *arguments, f'--pretrained={float_file}') == 0
      kept[arguments] = folder
    return kept[arguments]

  return get


@pytest.fixture
def stop_after(monkeypatch):
  """Makes selections end abruptly after so many steps in all (None: never); returns those done."""
  original, done = ChannelLearner.do, []

  def arrange(count):
    def dying(self, course, step):
      if len(done) == count:
        raise Killed
      done.append(step)
      original(self, course, step)

    monkeypatch.setattr(ChannelLearner, 'do', dying)
    return done

  return arrange


def report_of(folder):
  return json.loads((folder / 'report.json').read_text())


@each_learner
def test_the_pruned_model_and_what_is_said_of_it(undisturbed, learner):
  folder = undisturbed(*LEARNERS[learner])
  entries = json.loads((folder / 'channels.json').read_text())
  assert [(e['name'], e['channels'], e['kept']) for e in entries] == KEPT[learner]
  assert [e['readers'] for e in entries] == [['conv1'], ['conv2'], ['dense']]
  kept = {name: count for name, _, count in KEPT[learner]}
  for name in ('pruned.keras', 'final.keras'):
    model = keras.models.load_model(folder / name, compile=False)
    assert {layer: model.get_layer(layer).filters for layer in kept} == kept
  report = report_of(folder)
  channels = {
    entry['name']: (entry['channels_before'], entry['channels_after'])
    for entry in report['layers']
    if entry['name'] in kept
  }
  assert channels == {name: (before, after) for name, before, after in KEPT[learner]}
  assert set(report['pruned']) >= {'metrics', 'params', 'macs'}
  assert report['pruned']['params'] == report['compressed']['params'] < report['float']['params']
  assert report['pruned']['macs'] == report['compressed']['macs'] < report['float']['macs']
  assert {'selection', 'selection_forward'} <= set(report['seconds'])
  # Fine-tuning changed something.
  before, after = weights(folder, 'pruned.keras'), weights(folder)
  assert any((one != other).any() for one, other in zip(before, after, strict=True))


@each_learner
def test_a_selection_killed_twice_goes_on_and_ends_with_the_same_bits(
  tmp_path, stop_after, undisturbed, float_file, learner
):
  arguments = [*LEARNERS[learner], f'--pretrained={float_file}']
  for steps in (1, 3):
    stop_after(steps)
    with pytest.raises(Killed):
      run(tmp_path, *arguments)
    assert not (tmp_path / 'pruned.keras').exists()
  done = stop_after(None)
  with unreported():
    assert run(tmp_path, *arguments) == 0
  assert done == ['survey', 'conv0', 'conv1', 'conv2', 'dense']
  whole = undisturbed(*LEARNERS[learner])
  for name in ('pruned.keras', 'final.keras'):
    assert_same_bits(weights(tmp_path, name), weights(whole, name))


GROUPS = [*CHANNEL, '--cp_list_group=2', '--cp_nb_iters_ft_ratio=0.5']


@pytest.mark.parametrize('how', ['--cp_finetune', '--cp_retrain'])
def test_groups_are_tuned_in_between(undisturbed, how):
  whole = undisturbed(*GROUPS, how)
  seconds = report_of(whole)['seconds']
  # Steps are conv0, conv1, (group1), conv2, dense: none behind the last.
  assert [name for name in seconds if name.startswith('group')] == ['group1_training']
  plain = undisturbed(*CHANNEL)
  assert [(e['name'], e['kept']) for e in json.loads((whole / 'channels.json').read_text())] == [
    (e['name'], e['kept']) for e in json.loads((plain / 'channels.json').read_text())
  ]
  differs = [
    (one != other).any()
    for one, other in zip(
      weights(whole, 'pruned.keras'), weights(plain, 'pruned.keras'), strict=True
    )
  ]
  assert any(differs)


def test_a_group_killed_while_it_is_tuned_ends_with_the_same_bits(
  tmp_path, float_file, undisturbed, kill_at
):
  arguments = [*GROUPS, '--cp_finetune']
  revive = kill_at('group1', 9)
  with pytest.raises(Killed):
    run(tmp_path, *arguments, f'--pretrained={float_file}')
  assert list((tmp_path / 'checkpoints').glob('group1-*'))
  revive()
  with unreported():
    assert run(tmp_path, *arguments, f'--pretrained={float_file}') == 0
  assert_same_bits(weights(tmp_path), weights(undisturbed(*arguments)))


def test_short_tuning_is_a_share_of_the_whole(undisturbed):
  short, long = (
    max(
      int(path.stem.split('-')[1])
      for path in (undisturbed(*GROUPS, how) / 'checkpoints').glob('group1-*')
    )
    for how in ('--cp_finetune', '--cp_retrain')
  )
  assert short == pytest.approx(long / 2, abs=0.6)


def test_tuning_keeps_what_is_not_selected_at_zero(tmp_path, float_file, monkeypatch):
  seen = {}
  original = ChannelLearner.do

  def looking(self, course, step):
    original(self, course, step)
    if step == 'conv2':
      for path, chosen in course.selected.items():
        kernel = np.array(course.model.get_layer(path).kernel)
        seen[path] = (np.abs(kernel[..., ~chosen, :]).sum(), (~chosen).sum())
      raise Enough

  monkeypatch.setattr(ChannelLearner, 'do', looking)
  with pytest.raises(Enough):
    run(tmp_path, *GROUPS, '--cp_finetune', f'--pretrained={float_file}')
  assert seen['conv1'] == (0.0, 6)


def test_a_warm_start_takes_the_pruned_model(tmp_path, undisturbed, float_file, monkeypatch):
  source = undisturbed(*REMASTERED)
  monkeypatch.setattr(ChannelLearner, 'do', lambda *arguments: pytest.fail('chosen again'))
  warm = ['--cpr_warm_start', f'--cpr_save_path_ws={source / "pruned.keras"}']
  with unreported():
    assert run(tmp_path, *REMASTERED, *warm, f'--pretrained={float_file}') == 0
  assert_same_bits(weights(tmp_path), weights(source))


def planned(*arguments, pretrained=None):
  """Returns {unit: channels to keep} of a command line."""
  learner = main.make_learner(ModelHelper, ['run.py', *arguments])
  helper = ModelHelper(ModelHelper.Config())
  channels, found, _ = learner.plan(helper.load(pretrained) if pretrained else helper.build())
  return learner.counts(channels, found)


def test_a_list_is_of_shares_to_keep_or_to_drop(tmp_path):
  path = tmp_path / 'ratio.list'
  path.write_text('1.0, 0.25,\n0.5\n')
  chosen = ['--learner=channel', '--cp_prune_option=list', f'--cp_prune_list_file={path}']
  # The last convolution's is forced to 1, and the dense layer has none.
  assert planned(*chosen) == {'conv0': 4, 'conv1': 32, 'conv2': 64}
  path.write_text('0.5,0.25,0.5')
  chosen = ['--cpg_prune_ratio_type=list', f'--cpg_prune_ratio_file={path}', *PROXIMAL]
  expected = {'conv0': 12, 'conv1': 16, 'conv2': 64}
  assert planned(*chosen, '--nocpg_skip_ht_layers') == expected
  assert planned(*chosen) == {'conv0': 12, 'conv1': 32, 'conv2': 64}


def test_names_to_skip_and_multiples():
  assert planned(*REMASTERED, '--cpr_skip_op_names=onv1') == {'conv0': 16, 'conv1': 16, 'conv2': 32}
  arguments = ['--cpr_skip_last_layer', '--cpr_prune_ratio=0.6', '--channel_multiple=8']
  assert planned(*REMASTERED, *arguments) == {'conv0': 8, 'conv1': 32, 'conv2': 32}
  assert planned(*CHANNEL, '--cp_quadruple') == {'conv0': 12, 'conv1': 32, 'conv2': 40}
  both = ['--cp_quadruple', '--channel_multiple=6']
  assert planned(*CHANNEL, *both) == {'conv0': 12, 'conv1': 32, 'conv2': 48}


def test_a_sampler_may_choose_of_the_images(tmp_path, float_file):
  arguments = ['--channel_trunk=sampler', '--nocpr_skip_frst_layer', *REMASTERED]
  # One channel of the images, and no dense layer.
  assert planned(*arguments) == {'conv0': 1, 'conv1': 8, 'conv2': 16}
  with unreported():
    assert run(tmp_path, *arguments, f'--pretrained={float_file}') == 0
  model = keras.models.load_model(tmp_path / 'final.keras', compile=False)
  assert [model.get_layer(f'conv{index}').filters for index in range(3)] == [8, 16, 64]


@pytest.mark.parametrize(
  ('arguments', 'sentence'),
  [
    ([*CHANNEL, '--cp_finetune', '--cp_retrain'], 'not both'),
    ([*CHANNEL, '--cp_uniform_preserve_ratio=0'], '--cp_uniform_preserve_ratio must be'),
    ([*CHANNEL, '--cpr_prune_ratio=0.3'], '--cpr_prune_ratio belongs to --learner=chn-pruned-rmt'),
    ([*REMASTERED, '--cpg_prune_ratio=0.3'], 'belongs to --learner=chn-pruned-gpu'),
    (['--learner=uniform', '--channel_multiple=8'], '--channel_multiple belongs to --learner='),
    (
      ['--learner=channel', '--cp_prune_option=list', '--cp_prune_list_file=missing.list'],
      '--cp_prune_list_file must be a file. Received: missing.list',
    ),
    ([*PROXIMAL, '--cpg_prune_ratio_type=list'], 'go together. Received: list and None'),
    ([*PROXIMAL, '--cpg_prune_ratio_file=x'], 'go together. Received: uniform and x'),
    (
      [*PROXIMAL, '--cpg_prune_ratio_type=list', '--cpg_prune_ratio_file=/'],
      '--cpg_prune_ratio_file must be a file',
    ),
    (
      [*REMASTERED, '--cpr_skip_op_names=conv1,nothing'],
      "names conv0, conv1, conv2. Received: 'nothing'",
    ),
    ([*REMASTERED, '--cpr_warm_start'], 'go together. Received: True and None'),
    ([*REMASTERED, '--cpr_save_path_ws=x.keras'], 'go together. Received: False and x.keras'),
    ([*REMASTERED, '--cpr_warm_start', '--cpr_save_path_ws=missing.keras'], 'missing.keras'),
    ([*REMASTERED, '--cpr_ista_lrn_rate=100'], '--cpr_ista_lrn_rate must be'),
    ([*CHANNEL, '--channel_trunk=half'], "Received: 'half'"),
    ([*CHANNEL, '--channel_memory=0'], '--channel_memory must be'),
  ],
)
def test_a_mistake_of_the_user_is_one_sentence(tmp_path, capfd, arguments, sentence):
  assert run(tmp_path / 'work', *arguments) == 2
  message = capfd.readouterr().err
  assert sentence in message
  assert 'Traceback' not in message and len(message.strip().splitlines()) == 1
  assert not (tmp_path / 'work' / 'config.json').exists()


@pytest.mark.parametrize(
  ('text', 'sentence'),
  [
    ('0.5,0.5', 'the 3 convolutions conv0, conv1, conv2. Received: 2 numbers'),
    ('0.5,0.5,0.5,0.5', 'Received: 4 numbers'),
    ('0.5,half,0.5', '--cp_prune_list_file must be a file of numbers'),
    ('', '--cp_prune_list_file must be a file of numbers'),
    ('1,0,1', r'must be in [0, 1). Received: 1.0'),
    ('1,1.5,1', r'must be in [0, 1). Received: -0.5'),
    ('1,nan,1', r'must be in [0, 1). Received: nan'),
    ('\xff\xfe', '--cp_prune_list_file must be'),
  ],
)
def test_lists_that_make_no_sense(tmp_path, capfd, text, sentence):
  path = tmp_path / 'ratio.list'
  path.write_bytes(text.encode('latin-1'))
  arguments = ['--learner=channel', '--cp_prune_option=list', f'--cp_prune_list_file={path}']
  assert run(tmp_path / 'work', *arguments) == 2
  message = capfd.readouterr().err
  assert sentence in message and len(message.strip().splitlines()) == 1


@each_learner
def test_each_learner_has_the_shared_flags(tmp_path, capfd, learner):
  """Refused for their value alone, which comes after whether they belong."""
  assert run(tmp_path, *LEARNERS[learner], '--channel_trunk=half') == 2
  assert '--channel_trunk must be one of shared, sampler, whole' in capfd.readouterr().err
  arguments = ['--channel_trunk=whole', '--channel_multiple=2', '--channel_memory=0.1']
  assert run(tmp_path, *LEARNERS[learner], *arguments, '--pretrained=missing.keras') == 2
  assert 'missing.keras' in capfd.readouterr().err


DISTILLED = [*CHANNEL, '--enbl_dst', '--loss_w_dst_features=1', '--dst_features=ReLU']


@pytest.fixture(scope='module')
def distilled(tmp_path_factory, float_file):
  """Returns the folder of a run with a teacher, and the channels of each `Distillation`."""
  seen, folder = [], tmp_path_factory.mktemp('distilled')

  class Recorded(Distillation):
    def __init__(self, teacher, config, channels):
      super().__init__(teacher, config, channels=channels)
      seen.append(channels)

    def bind(self, model):
      super().bind(model)
      assert sorted(self._picks) == ['relu0', 'relu1', 'relu2']

  with pytest.MonkeyPatch.context() as patch, unreported():
    patch.setattr(learner_module, 'Distillation', Recorded)
    assert run(folder, *DISTILLED, f'--pretrained={float_file}') == 0
  return folder, seen


def test_features_are_those_of_the_channels_that_stay(distilled):
  folder, seen = distilled
  kept = json.loads((folder / 'kept.json').read_text())
  counts = {e['name']: e['kept'] for e in json.loads((folder / 'channels.json').read_text())}
  assert {name: len(positions) for name, positions in kept.items()} == counts
  # In the check before the selection nothing is gone.
  assert seen[0] is None
  assert {path: list(places) for path, places in seen[-1].items() if 'relu' in path} == {
    'relu0': kept['conv0'],
    'relu2': kept['conv2'],
  }


@pytest.mark.parametrize('name', ['channels.json', 'kept.json'])
def test_a_record_of_other_channels_is_refused(tmp_path, distilled, float_file, capfd, name):
  folder = shutil.copytree(distilled[0], tmp_path / 'copy')
  text = (folder / name).read_text()
  (folder / name).write_text(text.replace('"conv0"', '"conv9"'))
  assert run(folder, *DISTILLED, f'--pretrained={float_file}') == 2
  said = capfd.readouterr().err
  assert f'{name} must be about the groups of channels conv0, conv1, conv2' in said
  assert 'Received: conv9' in said
  assert 'Traceback' not in said


def test_a_pruned_model_can_be_quantized(tmp_path, undisturbed):
  source = undisturbed(*CHANNEL)
  arguments = ['--learner=uniform', '--uql_weight_bits=8', '--uql_activation_bits=8']
  more = ['--uql_quant_epochs=1', '--export_formats=tflite_int8,onnx_qdq']
  assert run(tmp_path, *arguments, *more, f'--pretrained={source / "final.keras"}') == 0
  shapes = [array.shape for array in weights(source)]
  assert [array.shape for array in weights(tmp_path)] == shapes
  report = report_of(tmp_path)
  assert {entry['format'] for entry in report['files']} == {'tflite_int8', 'onnx_qdq'}
  assert report['compressed']['params'] == report_of(source)['compressed']['params']
  x = np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype('float32')
  for entry in json.loads((tmp_path / 'exports' / 'files.json').read_text()):
    (got,) = conversion.open_file(tmp_path / 'exports' / entry['name'])(x)
    assert got.shape == (3, 10)


def test_a_pruned_model_can_be_the_source_of_another_pruning(undisturbed):
  source = undisturbed(*CHANNEL) / 'final.keras'
  assert planned(*REMASTERED, pretrained=source) == {'conv0': 5, 'conv1': 16, 'conv2': 19}


def _net(*channels, shape=(8, 8, 1), classes=10, names='conv'):
  x = inputs = keras.Input(shape)
  for index, count in enumerate(channels):
    x = keras.layers.Conv2D(count, 3, padding='same', name=f'{names}{index}')(x)
  x = keras.layers.GlobalAveragePooling2D()(x)
  return prunable.randomized(keras.Model(inputs, keras.layers.Dense(classes, name='dense')(x)))


@pytest.mark.parametrize(
  'other',
  [
    _net(6, 10),
    _net(8, 9),
    _net(4, 8, 8),
    _net(4, 8, shape=(8, 8, 3)),
    _net(4, 8, shape=(9, 8, 1)),
    _net(4, 8, classes=9),
    _net(4, 8, names='other'),
    conv_net(),
  ],
  ids=['wider', 'one wider', 'deeper', 'other images', 'larger', 'classes', 'names', 'another'],
)
def test_what_is_no_part_of_the_net_is_no_pruned_model(other):
  assert not pretrained.is_pruned(other, _net(8, 8))


def test_a_part_of_the_net_is_a_pruned_model(tmp_path):
  for saved in (_net(4, 8), _net(8, 8)):
    saved.save(tmp_path / 'model.keras')
    found = _found(_net(8, 8), tmp_path)
    assert_same_bits(found.get_weights(), saved.get_weights())
  with pytest.raises(UserError, match='must exist'):
    _found(_net(8, 8), tmp_path / 'missing')


def _found(model, folder):
  return pretrained.load_or_pruned(model, folder / 'model.keras', names=None)


def test_a_bias_that_holds_what_dropped_channels_gave_is_no_other_net(tmp_path):
  def whole():
    inputs = keras.Input((8, 8, 1))
    x = keras.layers.Conv2D(8, 3, use_bias=False, name='first')(inputs)
    x = keras.layers.ReLU()(keras.layers.BatchNormalization(name='norm')(x))
    x = keras.layers.Conv2D(8, 1, use_bias=False, name='second')(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return prunable.randomized(keras.Model(inputs, keras.layers.Dense(10, name='dense')(x)))

  smaller = shrink(whole(), {'first': np.arange(8) < 5}, keep_shift=True)
  assert smaller.get_layer('second').bias is not None
  smaller.save(tmp_path / 'model.keras')
  found = _found(whole(), tmp_path)
  assert_same_bits(found.get_weights(), smaller.get_weights())


def test_a_nested_model_that_was_shrunk_is_known_by_its_paths(tmp_path):
  model = prunable.nested()
  shrink(model, {'body/a': np.arange(8) < 5}).save(tmp_path / 'model.keras')
  found = _found(prunable.nested(), tmp_path)
  assert found.get_layer('body_a').filters == 5


@pytest.mark.parametrize(
  ('channels', 'sentence'),
  [
    ((8, 9), r'weight conv1/kernel has shape \(3, 3, 8, 9\), the model wants \(3, 3, 8, 8\)'),
    ((8,), r'weight conv1/kernel has shape \(8, 10\), the model wants'),
    ((8, 8, 8), r'weight dense/kernel has shape \(3, 3, 8, 8\), the model wants \(8, 10\)'),
  ],
)
def test_another_net_is_refused_with_the_first_mismatch(tmp_path, monkeypatch, channels, sentence):
  helper = ModelHelper(ModelHelper.Config())
  monkeypatch.setattr(helper, 'build', lambda: _net(8, 8))
  _net(*channels).save(tmp_path / 'model.keras')
  with pytest.raises(UserError, match=sentence):
    helper.load(tmp_path / 'model.keras')


def test_the_learners_name_their_rounding():
  """As PocketFlow: down for ISTA, to the nearest for LASSO, up for the percentile."""
  from learners.channel import ChannelPruned
  from learners.chn_pruned_gpu import ChannelPrunedProximal

  assert [
    float(each.rounding(3.5)) for each in (ChannelPrunedRemastered, ChannelPrunedProximal)
  ] == [3, 4]
  assert [float(ChannelPruned.rounding(value)) for value in (3.4, 3.6)] == [3, 4]


class DenseHelper(ModelHelper):
  """A net without convolutions."""

  def build(self):
    x = inputs = keras.Input((8, 8, 1), name='images')
    x = keras.layers.Flatten(name='flatten')(x)
    for name in ('first', 'second'):
      x = keras.layers.Dense(16, activation='relu', name=name)(x)
    return keras.Model(inputs, keras.layers.Dense(10, name='last')(x), name='dense_net')


@pytest.mark.parametrize(
  ('arguments', 'kept'),
  [
    (['--learner=channel', '--cp_prune_option=uniform'], (10, 10)),
    (['--learner=channel', '--cp_nb_rlouts=2', '--allocation=tpe'], None),
    (['--learner=chn-pruned-rmt'], (8, 8)),
    (['--learner=chn-pruned-gpu'], (8, 8)),
    (['--learner=dis-chn-pruned'], (8, 8)),
  ],
)
def test_a_net_without_convolutions_has_no_ends_that_stay_whole(arguments, kept):
  learner = main.make_learner(DenseHelper, ['run.py', *arguments])
  learner.check()
  channels, found, _ = learner.plan(learner.structure)
  assert [unit.name for unit in found] == ['first', 'second']
  if kept:
    assert tuple(learner.counts(channels, found).values()) == kept
  else:
    assert [variable.name for variable in learner._choices(channels, found)[0]] == [
      'first',
      'second',
    ]
