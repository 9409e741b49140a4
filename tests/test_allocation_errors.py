"""What users get wrong with searches: one sentence, found before the work folder is touched."""

import keras
import pytest

from learners import weight_sparse
from nets.convnet_at_digits import ModelHelper
from tests.test_learners import run

BITS = ['--learner=uniform', '--allocation=rl']
CENTRES = ['--learner=non-uniform', '--nuql_enbl_rl_agent']
LATENCY = [*BITS, '--budget=latency', '--budget_value=1']
TIMED = [*LATENCY, '--uql_activation_bits=8', '--uql_w_bit_max=16']
SPARSE = ['--learner=weight-sparse']
CHANNEL = ['--learner=channel']


def assert_refused(folder, capfd, arguments, sentence):
  assert run(folder / 'work', *arguments) == 2
  message = capfd.readouterr().err
  assert sentence in message
  assert 'Traceback' not in message and len(message.strip().splitlines()) == 1
  assert not (folder / 'work').exists()


@pytest.mark.parametrize(
  ('arguments', 'sentence'),
  [
    # Budgets.
    (
      [*BITS, '--budget=bytes', '--budget_value=100'],
      'the cheapest has 8376 bytes of parameters. Received: at most 100.',
    ),
    (
      [*BITS, '--budget=bit_operations', '--budget_value=1000'],
      'bit-operations. Received: at most 1000.',
    ),
    ([*CENTRES, '--budget=bytes', '--budget_value=9'], 'bytes of parameters. Received: at most 9.'),
    ([*BITS, '--budget=bytes'], 'Received: --budget=bytes --budget_value=None.'),
    ([*BITS, '--budget_value=4'], 'Received: --budget=mean_bits --budget_value=4.0.'),
    (
      [*BITS, '--budget=bytes', '--budget_value=20000', '--uql_equivalent_bits=3'],
      '--uql_equivalent_bits has no effect without --budget=mean_bits. Received:',
    ),
    ([*BITS, '--budget_value=0'], '--budget_value must be a finite number above 0 (or unset)'),
    ([*CHANNEL, '--cp_preserve_ratio=0.01'], 'share of MACs. Received: at most 0.01.'),
    # Bounds.
    (
      [*BITS, '--uql_w_bit_min=6', '--uql_w_bit_max=5'],
      '--uql_w_bit_min must not be above --uql_w_bit_max. Received: 6 and 5.',
    ),
    (
      [*BITS, '--uql_w_bit_min=5'],
      '--uql_equivalent_bits must lie between --uql_w_bit_min and --uql_w_bit_max. '
      'Received: 4.0, with 5 and 8.',
    ),
    (
      [*BITS, '--uql_w_bit_min=4', '--uql_w_bit_max=4'],
      'There must be layers with several bits to choose from',
    ),
    ([*CENTRES, '--nuql_equivalent_bits=9'], 'Received: 9.0, with 2 and 8.'),
    ([*CENTRES, '--nuql_w_bit_max=9'], '--nuql_w_bit_max must be one of 1, 2, 3, 4, 5, 6, 7, 8.'),
    ([*BITS, '--uql_nb_rlouts=1'], '--uql_nb_rlouts must be an integer at least 2'),
    # Images.
    (
      [*SPARSE, '--nb_smpls_val=2000'],
      '--nb_smpls_val must leave samples on both sides of the cut: at least 1 and below the 1437',
    ),
    ([*BITS, '--nb_smpls_val=1400'], 'batch'),
    (
      [*SPARSE, '--ws_nb_rlouts=40'],
      '--ws_nb_rlouts_min must be below --ws_nb_rlouts, or the agent proposes nothing that it has '
      'learned. Received: 50 and 40.',
    ),
    (
      [*CHANNEL, '--cp_nb_rlouts_min=200'],
      '--cp_nb_rlouts_min must be below --cp_nb_rlouts, or the agent proposes nothing that it has '
      'learned. Received: 200 and 200.',
    ),
    (
      [*BITS, '--uql_w_bit_min=1', '--uql_fold_bn'],
      '--uql_fold_bn needs --uql_w_bit_min of at least 2. Received: 1.',
    ),
    ([*BITS, '--ddpg_gamma=2'], '--ddpg_gamma must be a finite number at least 0 and at most 1'),
    ([*BITS, '--hawq_iterations=1', '--allocation=hawq'], '--hawq_iterations must be an integer'),
    # Latency.
    (LATENCY, '--uql_activation_bits must be at most 8. Received: 32.'),
    (
      [*LATENCY, '--uql_activation_bits=8'],
      'Received: --uql_w_bit_min=2 and --uql_w_bit_max=8.',
    ),
    ([*TIMED, '--budget_tables=missing'], 'that is complete must be a file that is there'),
    ([*BITS, '--budget_format=onnx'], '--budget_format has no effect without --budget=latency'),
    ([*BITS, '--budget_tables=x'], '--budget_tables has no effect without --budget=latency'),
    # Contradictions.
    (
      [*BITS, '--uql_weight_bits_list=8,4,4,8'],
      'so there is nothing to search for with --allocation or --uql_enbl_rl_agent. Received: both.',
    ),
    (
      ['--learner=uniform', '--uql_enbl_rl_agent', '--allocation=hawq'],
      '--uql_enbl_rl_agent is --allocation=rl: give one of them. Received: --allocation=hawq.',
    ),
    ([*BITS, '--allocation=rI'], '--allocation must be one of rl, hawq, sensitivity, tpe, gp, uni'),
    (
      [*CHANNEL, '--channel_trunk=sampler'],
      '--cp_prune_option=auto goes with --channel_trunk=shared or whole. Received: sampler.',
    ),
    # Without an effect.
    (
      ['--learner=uniform', '--uql_nb_rlouts=9'],
      '--uql_nb_rlouts has no effect without --allocation or --uql_enbl_rl_agent',
    ),
    (['--learner=uniform', '--ddpg_tau=0.1'], '--ddpg_tau has no effect without --allocation or'),
    (['--learner=uniform', '--budget=bytes'], '--budget has no effect without --allocation or'),
    (['--learner=uniform', '--score_by=metric'], '--score_by has no effect without --allocation'),
    (
      [*BITS, '--allocation=hawq', '--uql_nb_rlouts=9'],
      '--uql_nb_rlouts has no effect without --allocation=rl or tpe or gp',
    ),
    (
      [*BITS, '--allocation=hawq', '--uql_enbl_rl_global_tune'],
      '--uql_enbl_rl_global_tune has no effect without --allocation=rl or tpe or gp',
    ),
    (
      [*BITS, '--allocation=tpe', '--nouql_enbl_random_layers'],
      '--uql_enbl_random_layers has no effect without --allocation=rl.',
    ),
    ([*BITS, '--allocation=gp', '--ddpg_tau=0.1'], '--ddpg_tau has no effect without --allocation'),
    (
      [*BITS, '--ddpg_noise_adpt_rat=1.1'],
      '--ddpg_noise_adpt_rat has no effect without --ddpg_noise_prtl=adapt.',
    ),
    (
      [*SPARSE, '--ddpg_noise_prtl=adapt', '--ddpg_noise_std_finl=0.1'],
      '--ddpg_noise_std_finl has no effect without --ddpg_noise_prtl=tdecy.',
    ),
    (
      [*CHANNEL, '--ddpg_enbl_bsln_func=false', '--ddpg_bsln_decy_rate=0.5'],
      '--ddpg_bsln_decy_rate has no effect without --ddpg_enbl_bsln_func.',
    ),
    (
      [*SPARSE, '--ws_prune_ratio_prtl=uniform', '--ws_nb_smpls_refit=9'],
      '--ws_nb_smpls_refit has no effect without --ws_prune_ratio_prtl=optimal.',
    ),
    (
      [*SPARSE, '--ws_nb_iters_ft=9', '--ws_nb_smpls_refit=9'],
      '--ws_nb_smpls_refit has no effect without --ws_nb_iters_rg=0 and --ws_nb_iters_ft=0.',
    ),
    (
      [*SPARSE, '--allocation=hawq', '--ws_nb_smpls_refit=0'],
      '--ws_nb_smpls_refit has no effect without another --allocation than hawq.',
    ),
    (
      [*BITS, '--allocation=hawq', '--search_start=hawq'],
      '--search_start has no effect without --allocation=rl or tpe or gp.',
    ),
    (
      [*SPARSE, '--ws_reward_type=multi-obj', '--search_start=hawq'],
      '--search_start has no effect without --ws_reward_type=single-obj.',
    ),
    (
      [*CHANNEL, '--cp_reward_policy=flops', '--search_start=hawq'],
      '--search_start has no effect without --cp_reward_policy=accuracy.',
    ),
    (
      [*BITS, '--nb_smpls_trace=64'],
      '--nb_smpls_trace has no effect without --allocation=hawq or --search_start=hawq',
    ),
    (
      [*BITS, '--uql_tune_global_steps=9'],
      '--uql_tune_global_steps has no effect without --uql_enbl_rl_global_tune',
    ),
    (
      [*CENTRES, '--nuql_tune_layerwise_steps=9'],
      '--nuql_tune_layerwise_steps has no effect without --nuql_enbl_rl_layerwise_tune',
    ),
    (
      [*BITS, '--uql_quantize_all_layers', '--uql_weight_bits=3'],
      '--uql_weight_bits has no effect without layers whose bits are not searched for',
    ),
    (
      [*SPARSE, '--ws_prune_ratio_prtl=heurist', '--allocation=tpe'],
      '--allocation has no effect without --ws_prune_ratio_prtl=optimal',
    ),
    (
      [*SPARSE, '--allocation=tpe', '--ws_nb_rlouts_min=9'],
      '--ws_nb_rlouts_min has no effect without --allocation=rl.',
    ),
    ([*SPARSE, '--ws_lrn_rate_rg=0.1'], '--ws_lrn_rate_rg has no effect without --ws_nb_iters_rg'),
    (
      [*SPARSE, '--ws_reward_type=multi-obj', '--score_by=metric'],
      '--score_by has no effect without --ws_reward_type=single-obj',
    ),
    (
      [*SPARSE, '--allocation=hawq', '--ws_reward_type=multi-obj'],
      '--ws_reward_type has no effect without --allocation=rl or tpe or gp',
    ),
    (
      [*CHANNEL, '--cp_prune_option=uniform', '--cp_nb_rlouts=9'],
      '--cp_nb_rlouts has no effect without --cp_prune_option=auto',
    ),
    (
      [*CHANNEL, '--cp_uniform_preserve_ratio=0.4'],
      '--cp_uniform_preserve_ratio has no effect without --cp_prune_option=uniform',
    ),
    (
      [*CHANNEL, '--cp_noise_tolerance=0.4'],
      '--cp_noise_tolerance has no effect without --cp_reward_policy=flops',
    ),
    (
      [*CHANNEL, '--target=macs', '--target_share=0.5', '--cp_preserve_ratio=0.4'],
      '--cp_preserve_ratio has no effect without --target=ratio',
    ),
    (['--learner=binary', '--allocation=rl'], '--allocation belongs to --learner='),
  ],
)
def test_a_mistake_is_one_sentence(tmp_path, capfd, arguments, sentence):
  assert_refused(tmp_path, capfd, arguments, sentence)


def two_layers(helper):
  """Returns a net of a convolution and a dense layer."""
  inputs = keras.Input((8, 8, 1), name='images')
  x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3, name='conv')(inputs))
  return keras.Model(inputs, keras.layers.Dense(10, name='dense')(x), name='small')


def test_a_net_of_two_layers_has_none_between_them(tmp_path, capfd, monkeypatch):
  monkeypatch.setattr(ModelHelper, 'build', two_layers)
  sentence = '--uql_w_bit_min=2, --uql_w_bit_max=8 and the layers conv, dense.'
  assert_refused(tmp_path, capfd, BITS, sentence)
  more = ['--uql_quantize_all_layers', '--uql_quant_epochs=1', '--allocation=heuristic']
  assert run(tmp_path / 'work', *BITS, *more) == 0


def test_a_net_whose_channels_all_stay_whole(tmp_path, capfd, monkeypatch):
  """Of two convolutions the second is the last, and reads what the first makes."""

  def build(helper):
    inputs = keras.Input((8, 8, 1), name='images')
    x = keras.layers.Conv2D(4, 3, name='conv0')(inputs)
    x = keras.layers.Conv2D(10, 3, name='conv1')(x)
    return keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(x), name='small')

  monkeypatch.setattr(ModelHelper, 'build', build)
  sentence = 'convolution read stay whole. Received: none but those of conv0.'
  assert_refused(tmp_path, capfd, CHANNEL, sentence)


def test_a_net_whose_ends_are_more_than_what_may_stay(tmp_path, capfd, monkeypatch):
  """They stay whole, being small, with 784 of 23824 weights; 2 % are 477 in whole weights."""
  monkeypatch.setattr(weight_sparse, '_SMALL_ENDS', 0.04)
  sentence = 'share of weights kept. Received: at most 0.0200218.'
  assert_refused(tmp_path, capfd, [*SPARSE, '--ws_prune_ratio=0.98'], sentence)
