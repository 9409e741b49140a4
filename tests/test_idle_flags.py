"""Flags that would have no effect are refused; recipes have none of them."""

import pathlib

import pytest

from learners import flags, main
from learners.channel import ChannelPruned
from learners.chn_pruned_gpu import ChannelPrunedProximal
from learners.chn_pruned_rmt import ChannelPrunedRemastered
from learners.config import RunConfig
from learners.dis_chn_pruned import DiscriminationPruned
from learners.filters import FilterLearner
from learners.non_uniform import NonUniformLearner
from learners.uniform import UniformLearner
from nets import resnet_at_cifar10
from nets.convnet_at_digits import ModelHelper
from pocketsize.errors import UserError

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
TARGET = {'target': 'macs', 'target_share': 0.5}
WARM = {'cpr_warm_start': True, 'cpr_save_path_ws': 'pruned.keras'}
LISTED = {'cpg_prune_ratio_type': 'list', 'cpg_prune_ratio_file': 'ratio.list'}
UNIFORM_CHANNELS = {'cp_prune_option': 'uniform'}
LISTED_CHANNELS = {'cp_prune_option': 'list'}
FLOAT = {'uql_weight_bits': 32, 'uql_activation_bits': 8}
FLOAT_CENTRES = {'nuql_weight_bits': 32, 'nuql_activation_bits': 8}


@pytest.mark.parametrize(
  'learner, given, name, value, needed',
  [
    (ChannelPruned, UNIFORM_CHANNELS, 'cp_prune_list_file', 'x', '--cp_prune_option=list'),
    (ChannelPruned, {}, 'cp_prune_list_file', 'x', '--cp_prune_option=list'),
    (
      ChannelPruned,
      LISTED_CHANNELS,
      'cp_uniform_preserve_ratio',
      0.3,
      '--cp_prune_option=uniform',
    ),
    (ChannelPruned, UNIFORM_CHANNELS, 'cp_lrn_rate_ft', 0.1, '--cp_finetune'),
    (ChannelPruned, UNIFORM_CHANNELS, 'cp_nb_iters_ft_ratio', 0.9, '--cp_finetune'),
    (
      ChannelPruned,
      UNIFORM_CHANNELS | TARGET,
      'cp_uniform_preserve_ratio',
      0.3,
      '--target=ratio',
    ),
    (ChannelPrunedRemastered, TARGET, 'cpr_prune_ratio', 0.2, '--target=ratio'),
    (DiscriminationPruned, TARGET, 'dcp_prune_ratio', 0.2, '--target=ratio'),
    (ChannelPrunedProximal, TARGET, 'cpg_prune_ratio', 0.2, '--target=ratio'),
    (ChannelPrunedProximal, LISTED, 'cpg_prune_ratio', 0.2, '--cpg_prune_ratio_type=uniform'),
    (ChannelPrunedRemastered, WARM, 'cpr_prune_ratio', 0.2, '--cpr_warm_start=false'),
    (
      ChannelPrunedRemastered,
      WARM | {'target_share': 0.5},
      'target',
      'macs',
      '--cpr_warm_start=false',
    ),
    (ChannelPrunedRemastered, WARM, 'channel_multiple', 8, '--cpr_warm_start=false'),
    (ChannelPrunedRemastered, WARM, 'cpr_skip_op_names', 'conv', '--cpr_warm_start=false'),
    (FilterLearner, {'fp_ratio': 0.5}, 'fp_iter_ratio_end', 0.9, '--fp_schedule='),
    (FilterLearner, {'fp_ratio': 0.5}, 'fp_mask_update_step', 7, '--fp_schedule='),
    (FilterLearner, {'fp_ratio': 0.5}, 'fp_initial_ratio', 0.2, '--fp_schedule='),
    (
      FilterLearner,
      {'fp_ratio': 0.5, 'fp_schedule': 'baseline'},
      'fp_initial_ratio',
      0.2,
      '--fp_iter_ratio_beg',
    ),
  ],
)
def test_a_flag_that_another_one_leaves_idle_is_refused(learner, given, name, value, needed):
  with pytest.raises(UserError) as caught:
    learner.Config(**given, **{name: value})
  message = str(caught.value)
  assert message.startswith(f'--{name} has no effect without {needed}')
  assert message.endswith(f'. Received: --{name}={value}.')


@pytest.mark.parametrize(
  'learner, given, name, value',
  [
    (UniformLearner, FLOAT, 'uql_use_buckets', True),
    (UniformLearner, FLOAT, 'uql_weight_range', 'learned'),
    (UniformLearner, FLOAT, 'uql_fold_bn', True),
    (NonUniformLearner, FLOAT_CENTRES, 'nuql_init_style', 'quantile'),
    (NonUniformLearner, FLOAT_CENTRES, 'nuql_opt_mode', 'both'),
    (NonUniformLearner, FLOAT_CENTRES, 'nuql_centre_bits', 32),
    (NonUniformLearner, FLOAT_CENTRES, 'nuql_use_buckets', True),
  ],
)
def test_float_weights_have_no_levels(learner, given, name, value):
  prefix = learner.prefix
  sentence = f'--{name} has no effect with --{prefix}_weight_bits=32. Received: --{name}={value}.'
  with pytest.raises(UserError) as caught:
    learner.Config(**given, **{name: value})
  assert str(caught.value) == sentence
  # A list or a search gives layers bits all the same.
  learner.Config(**given, **{name: value, f'{prefix}_weight_bits_list': 'conv:4'})
  learner.Config(**given, **{name: value, 'allocation': 'uniform'})


@pytest.mark.parametrize(
  'learner, given',
  [
    # Of float weights, too, those that are zero stay zero or do not.
    (UniformLearner, FLOAT | {'uql_keep_zeros': False}),
    (NonUniformLearner, FLOAT_CENTRES | {'nuql_keep_zeros': False}),
    (ChannelPruned, UNIFORM_CHANNELS | {'cp_retrain': True, 'cp_nb_iters_ft_ratio': 0.5}),
    (ChannelPruned, UNIFORM_CHANNELS | {'cp_finetune': True, 'cp_nb_iters_ft_ratio': 0.5}),
    # At its default a flag cannot be told from one that was not given.
    (ChannelPruned, UNIFORM_CHANNELS | TARGET | {'cp_uniform_preserve_ratio': 0.6}),
    # A list says which layers stay whole, whatever the target.
    (ChannelPrunedProximal, LISTED | TARGET),
    (FilterLearner, {'fp_ratio': 0.5, 'fp_schedule': 'polynomial', 'fp_initial_ratio': 0.2}),
    # Of how the model was pruned a warm start may repeat the command.
    (ChannelPrunedRemastered, WARM | {'cpr_nb_smpls': 100, 'cpr_lstsq_nb_iters': 10}),
  ],
)
def test_what_has_an_effect_is_accepted(learner, given):
  config = learner.Config(**given)
  assert {name: getattr(config, name) for name in given} == given


def test_a_run_ends_with_one_sentence_before_it_begins(tmp_path, capfd):
  arguments = ['--learner=filters', '--fp_ratio=0.5', '--fp_mask_update_step=7']
  work_dir = tmp_path / 'run'
  assert main.run_with(ModelHelper, ['run.py', f'--work_dir={work_dir}', *arguments]) == 2
  message = capfd.readouterr().err
  assert '--fp_mask_update_step has no effect without' in message
  assert 'Traceback' not in message and len(message.strip().splitlines()) == 1
  assert not work_dir.exists()


@pytest.mark.parametrize('recipe', sorted(path.name for path in REPOSITORY.glob('configs/*.flags')))
def test_no_recipe_has_idle_flags(recipe, monkeypatch):
  # Recipes name others by their path from here.
  monkeypatch.chdir(REPOSITORY)
  found = main.discover()
  configs = {name: learner.Config for name, learner in found.items()}
  configs |= {'run': RunConfig, 'net': resnet_at_cifar10.ModelHelper.Config}
  values = flags.parse(['run.py', f'--flagfile=configs/{recipe}'], configs)
  run = flags.make(values, RunConfig)
  assert isinstance(flags.make(values, configs[run.learner]), configs[run.learner])
