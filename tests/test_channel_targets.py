"""Counts of channels for a target, from the flags to the report, on the digits."""

import json

import numpy as np
import pytest

from learners import channel_targets, main
from learners.channel_targets import ChannelConfig, kept_counts
from learners.channels import ChannelLearner
from nets.convnet_at_digits import ModelHelper
from pocketsize import cost
from pocketsize.channel_graph import ChannelGraph
from pocketsize.errors import UserError
from pocketsize.graph import Graph
from pocketsize.pruning import units
from pocketsize.saving import load_model

SMALL = ['--nb_epochs_rat=0.03', '--export_formats=none', '--summ_step=50']
CHANNEL = ['--learner=channel', '--cp_prune_option=uniform', '--cp_nb_batches=2']
FILTERS = ['--learner=filters', '--fp_prune_first_conv', '--fp_prune_downsample_convs']


def run(work_dir, *arguments):
  return main.run_with(
    ModelHelper, ['convnet_at_digits_run.py', f'--work_dir={work_dir}', *SMALL, *arguments]
  )


@pytest.fixture(scope='module')
def channels():
  return ChannelGraph(ModelHelper(ModelHelper.Config()).build())


def counts_for(channels, tmp_path, ratios=None, **fields):
  config = ChannelConfig(**fields)
  found, _ = units.units(channels, config.channel_trunk)
  ratios = ratios or {unit.name: 0.5 for unit in found}
  return found, kept_counts(
    config, channels, found, ratios, config.channel_multiple, np.floor, tmp_path
  )


@pytest.mark.parametrize('trunk', units.TRUNKS)
@pytest.mark.parametrize('share', [0.75, 0.4])
def test_a_share_of_macs_is_met_closely(channels, tmp_path, trunk, share):
  found, counts = counts_for(
    channels, tmp_path, channel_trunk=trunk, target='macs', target_share=share
  )
  left = cost.macs_share(channels)
  assert share - 0.05 < left(*units.expected(channels, found, counts)) <= share


def test_what_the_learner_leaves_alone_stays_whole(channels, tmp_path):
  found, _ = units.units(channels)
  ratios = {unit.name: 0.0 if number == 0 else 0.5 for number, unit in enumerate(found)}
  _, counts = counts_for(channels, tmp_path, ratios, target='macs', target_share=0.7)
  assert counts[found[0].name] == found[0].size
  assert all(counts[unit.name] < unit.size for unit in found[1:])


@pytest.mark.parametrize('trunk', ['shared', 'sampler'])
def test_a_share_that_cannot_be_reached_says_what_can(channels, tmp_path, trunk):
  with pytest.raises(UserError, match='cannot be met: with 8 channels in every .* left'):
    counts_for(
      channels,
      tmp_path,
      channel_trunk=trunk,
      channel_multiple=8,
      target='macs',
      target_share=0.01,
    )


def test_a_share_of_latency_goes_through_the_table(channels, tmp_path, monkeypatch):
  """Half the channels of each group are what the fake choice keeps."""
  asked = {}

  def fake(channels, scores, share, table, **arguments):
    asked.update(share=share, format=table.format, **arguments)
    keep = {group.name: np.arange(group.size) % 2 == 0 for group in channels.groups}
    return type('Choice', (), {'keep': keep})

  monkeypatch.setattr(channel_targets, 'choose_for_latency', fake)
  found, counts = counts_for(
    channels,
    tmp_path,
    target='latency',
    target_share=0.6,
    target_format='tflite',
    channel_multiple=4,
  )
  assert counts == {unit.name: unit.size // 2 for unit in found}
  assert (asked['share'], asked['format'], asked['multiple']) == (0.6, 'tflite', 4)


@pytest.mark.parametrize(
  'fields, sentence',
  [
    ({'target': 'macs'}, 'go together'),
    ({'target_share': 0.5}, 'go together'),
    ({'target': 'macs', 'target_share': 1.5}, '--target_share must be'),
    (
      {'target': 'latency', 'target_share': 0.5, 'channel_trunk': 'sampler'},
      '--channel_trunk=sampler goes with',
    ),
    ({'target_scope': 'network'}, '--target_scope has no effect without --target=macs or latency'),
    ({'target_format': 'onnx'}, '--target_format has no effect without --target=latency'),
    (
      {'target': 'macs', 'target_share': 0.5, 'target_table': 'x.json'},
      '--target_table has no effect',
    ),
    ({'channel_multiple': 0}, '--channel_multiple must be'),
    ({'channel_trunk': 'none'}, '--channel_trunk must be one of shared, sampler, whole'),
  ],
)
def test_flags_that_make_no_sense_are_refused(fields, sentence):
  with pytest.raises(UserError, match=sentence):
    ChannelConfig(**fields)


def test_a_run_to_a_share_of_macs_ends_below_it(tmp_path, float_file):
  arguments = ['--target=macs', '--target_share=0.5', '--channel_multiple=4']
  assert run(tmp_path, *CHANNEL, *arguments, f'--pretrained={float_file}') == 0
  report = json.loads((tmp_path / 'report.json').read_text())
  assert report['compressed']['macs'] <= 0.5 * report['float']['macs']
  assert report['pruned']['macs'] == report['compressed']['macs']
  assert report['pruned']['params'] == load_model(tmp_path / 'pruned.keras').count_params()
  kept = json.loads((tmp_path / 'channels.json').read_text())
  assert all(unit['kept'] % 4 == 0 for unit in kept)
  after = {layer['name']: layer['channels_after'] for layer in report['layers']}
  assert all(after[unit['name']] == unit['kept'] for unit in kept)
  # What the last convolution reads stays whole.
  assert [unit['kept'] < unit['channels'] for unit in kept] == [True, False, True]


@pytest.mark.parametrize(
  'learner',
  [
    CHANNEL,
    ['--learner=chn-pruned-rmt', '--cpr_nb_smpls=200'],
    ['--learner=chn-pruned-gpu', '--cpg_nb_iters_layer=5'],
    [
      '--learner=dis-chn-pruned',
      '--dcp_nb_stages=1',
      '--dcp_nb_iters_block=2',
      '--dcp_nb_iters_layer=1',
    ],
  ],
  ids=lambda learner: learner[0],
)
def test_every_learner_ranks_the_whole_network(
  tmp_path, monkeypatch, channels, float_file, learner
):
  """Seen before the selection begins, which is the same whatever the counts come from."""

  class Ranked(BaseException):
    """The counts are there."""

  def ranked(self, model, found, counts):
    raise Ranked

  monkeypatch.setattr(ChannelLearner, '_pruned', ranked)
  arguments = ['--target=macs', '--target_share=0.5', '--target_scope=network']
  with pytest.raises(Ranked):
    run(tmp_path, *learner, *arguments, f'--pretrained={float_file}')
  entries = json.loads((tmp_path / 'channels.json').read_text())
  keep = {entry['name']: np.arange(entry['channels']) < entry['kept'] for entry in entries}
  assert 0.4 < cost.macs_share(channels)(keep) <= 0.5
  assert len({entry['kept'] / entry['channels'] for entry in entries}) > 1


def test_a_share_of_latency_is_met_in_the_runtime(tmp_path, float_file):
  arguments = ['--target=latency', '--target_share=0.9', '--target_format=tflite']
  assert run(tmp_path, *CHANNEL, *arguments, f'--pretrained={float_file}') == 0
  assert json.loads((tmp_path / 'latency_tflite.json').read_text())
  report = json.loads((tmp_path / 'report.json').read_text())
  assert report['compressed']['macs'] < report['float']['macs']


def test_damaged_counts_are_one_sentence(tmp_path, float_file, capfd):
  (tmp_path / 'channels.json').write_text('[{"na')
  assert run(tmp_path, *CHANNEL, f'--pretrained={float_file}') == 2
  assert 'channels.json is damaged' in capfd.readouterr().err


@pytest.mark.parametrize(
  'arguments',
  [
    ['--fp_ratio=0.5'],
    ['--fp_macs=0.5', '--fp_scope=network', '--fp_criterion=geometric_median'],
    ['--fp_ratio=0.5', '--fp_schedule=exponential', '--fp_mask_update_step=3', '--enbl_dst'],
    ['--fp_ratio=0.5', '--fp_criterion=taylor', '--fp_iter_ratio_beg=0.3'],
    ['--fp_ratio=0.5', '--nofp_prune_batch_norms'],
  ],
)
def test_filters_leave_a_smaller_model(tmp_path, float_file, arguments):
  assert run(tmp_path, *FILTERS, *arguments, f'--pretrained={float_file}') == 0
  report = json.loads((tmp_path / 'report.json').read_text())
  assert report['compressed']['macs'] <= 0.55 * report['float']['macs']
  final = load_model(tmp_path / 'final.keras')
  assert final.count_params() == report['compressed']['params']
  assert cost.macs(Graph(final)) == report['compressed']['macs']


@pytest.mark.parametrize(
  'arguments, sentence',
  [
    (['--learner=filters'], 'give one of them'),
    ([*FILTERS, '--fp_ratio=0.5', '--fp_macs=0.5'], 'give one of them'),
    (['--learner=filters', '--fp_ratio=0.5'], 'has no filters to drop: conv0: first convolution'),
    ([*FILTERS, '--fp_macs=0.001'], '`macs` cannot be met'),
    ([*FILTERS, '--fp_ratio=0.5', '--fp_criterion=taylor'], 'give --fp_iter_ratio_beg above 0'),
    (
      [*FILTERS, '--fp_ratio=0.5', '--fp_schedule=baseline', '--fp_iter_ratio_beg=0.9'],
      'must not be above --fp_iter_ratio_end',
    ),
  ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(tmp_path, capfd, arguments, sentence):
  folder = tmp_path / 'run'
  assert run(folder, *arguments) == 2
  assert sentence in capfd.readouterr().err
  assert not folder.exists()
