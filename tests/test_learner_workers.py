"""Learners with two real workers: equal weights, one writer, the same selection."""

import json

import numpy as np
import pytest

from tests.test_runtime import finish, needs_horovod, start

SMALL = ['--export_formats=none', '--batch_size=32']
# Under xdist one process has all tests that start workers.
pytestmark = pytest.mark.xdist_group('horovod')
LEARNERS = {
  'weight-sparse': [
    '--learner=weight-sparse',
    '--allocation=sensitivity',
    '--ws_mask_update_step=3',
    '--enbl_dst',
    '--loss_w_dst_features=1',
    '--dst_features=ReLU',
    '--freeze_bn_delay=2',
  ],
  'filters': [
    '--learner=filters',
    '--fp_ratio=0.5',
    '--fp_criterion=taylor',
    '--fp_schedule=exponential',
    '--fp_iter_ratio_beg=0.2',
    '--fp_prune_first_conv',
    '--fp_prune_downsample_convs',
    '--fp_mask_update_step=3',
  ],
  'dis-chn-pruned': [
    '--learner=dis-chn-pruned',
    '--dcp_nb_stages=1',
    '--dcp_nb_iters_block=8',
    '--dcp_nb_iters_layer=2',
    '--channel_multiple=8',
  ],
  'channel': [
    '--learner=channel',
    '--allocation=tpe',
    '--cp_nb_rlouts=3',
    '--cp_nb_batches=2',
    '--cp_list_group=2',
    '--cp_finetune',
  ],
  # An odd number, so that one worker has nothing to score in the last round.
  'searched': [
    '--learner=uniform',
    '--allocation=rl',
    '--uql_nb_rlouts=5',
    '--uql_quantize_all_layers',
    '--uql_activation_bits=8',
    '--uql_quant_epochs=1',
    '--uql_fold_bn',
    '--nb_batches_bn=2',
    '--uql_enbl_rl_global_tune',
    '--uql_tune_global_steps=4',
  ],
}

ROLL_OUTS = {'channel': 3, 'searched': 5}


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """Returns (folder with one of each learner, exit code, what was said) of a pair of processes.

  It trains them all, as it starts slowly; the float model is that of the first one. In the end
  comes a run whose loss diverges on one worker.
  """
  folder = tmp_path_factory.mktemp('two workers')
  first, *others = LEARNERS
  later = [f'--pretrained={folder / first / "work" / "float.keras"}', '--nb_epochs_rat=0.015']
  flags = {first: [*SMALL, '--nb_epochs_rat=0.03', *LEARNERS[first]]}
  flags |= {name: [*SMALL, *later, *LEARNERS[name]] for name in others}
  flags['diverging'] = [*SMALL, '--nb_epochs_rat=0.03']
  learners = folder / 'learners.json'
  learners.write_text(json.dumps(flags))
  return folder, *finish(start('learning.py', folder, learners), seconds=900)


@needs_horovod
@pytest.mark.parametrize('learner', LEARNERS)
def test_two_workers_end_with_equal_weights(trained, learner):
  folder, *ended = trained
  folder /= learner
  assert (folder / 'work' / 'report.json').exists(), ended
  with np.load(folder / 'rank0.npz') as one, np.load(folder / 'rank1.npz') as other:
    assert one.files == other.files and one.files
    for name in one.files:
      np.testing.assert_array_equal(one[name], other[name])
    bits = one['bits'].tolist()
  config = json.loads((folder / 'work' / 'config.json').read_text())
  assert config['enbl_multi_gpu'] is True
  if learner in ROLL_OUTS:
    values = _searched(folder / 'work', ROLL_OUTS[learner])
    if learner == 'searched':
      assert list(values.values()) == bits
  if learner == 'weight-sparse':
    losses = json.loads((folder / 'work' / 'losses.json').read_text())['losses']
    # The model's own, and eight more of each layer.
    assert len(losses) == 33 and all(loss > 0 for loss in losses.values())


def _searched(folder, rollouts):
  """Returns what was found: all roll-outs are there, each once, and the best was taken."""
  search, allocation = (
    json.loads((folder / name).read_text()) for name in ('search.json', 'allocation.json')
  )
  assert search['workers'] == 2
  assert [each['number'] for each in search['records']] == [*range(rollouts)]
  assert all(record['score']['loss'] > 0 for record in search['records'])
  assert search['best']['values'] == allocation['values']
  return allocation['values']


@needs_horovod
def test_a_loss_that_diverges_on_one_worker_is_told_by_the_run(trained):
  _, code, output, errors = trained
  assert code == 2, output + errors
  assert errors.count('The loss became infinite or not a number at step 3 of') == 1
  assert 'another worker failed' not in errors and 'Traceback' not in errors
