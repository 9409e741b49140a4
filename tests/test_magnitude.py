"""Magnitude pruning: exact counts, schedules, ratios."""

import dataclasses

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from toys import compile_for_logits, conv_net, images, labels

import pocketsize
from pocketsize.compressor import CompressionCallback, Stage
from pocketsize.errors import UserError
from pocketsize.sparsity.magnitude import MagnitudeConfig, heuristic_ratios, magnitude_mask


@given(
  hnp.arrays(
    np.float32,
    hnp.array_shapes(max_dims=3, max_side=6),
    elements=st.sampled_from([0.0, 1, -1, 2, -3]),
  ),
  st.floats(0, 1),
)
def test_the_mask_drops_exactly_its_share_and_only_the_smallest_even_with_ties(kernel, ratio):
  mask = magnitude_mask(kernel, ratio)
  assert mask.shape == kernel.shape and mask.dtype == np.float32
  assert np.sum(mask == 0) == round(ratio * kernel.size)
  assert np.sum(mask == 1) == kernel.size - round(ratio * kernel.size)
  dropped, kept = np.abs(kernel[mask == 0]), np.abs(kernel[mask == 1])
  if dropped.size and kept.size:
    assert dropped.max() <= kept.min()


def test_mask_by_hand_ties_go_first_first():
  assert magnitude_mask(np.float32([[1, -3], [-1, 1]]), 0.5).tolist() == [[0, 1], [0, 1]]
  assert magnitude_mask(np.float32([5, -4, 3, -2]), 0.25).tolist() == [1, 1, 1, 0]


def test_heuristic_ratios_by_hand():
  """n = 10, 100: a = 55 / (10 ln 10 + 100 ln 100) = 55 / (210 ln 10), so 55/210 and 110/210."""
  np.testing.assert_allclose(heuristic_ratios([10, 100], 0.5), [55 / 210, 110 / 210])


def test_a_ratio_over_the_cap_is_held_and_the_others_make_up_for_it():
  """a ln n would be 1.2 for the large layer; 0.9 * 20000 - 9900 = 8100 of the other 10,000."""
  ratios = heuristic_ratios([100] * 100 + [10000], 0.9)
  assert ratios[-1] == 0.99
  np.testing.assert_allclose(ratios[:-1], 0.81)


@given(st.lists(st.integers(2, 10**6), min_size=1, max_size=30), st.floats(0, 0.98))
def test_heuristic_ratios_reach_the_overall_ratio_below_the_cap(sizes, ratio):
  ratios = heuristic_ratios(sizes, ratio)
  assert ratios @ np.array(sizes) == pytest.approx(ratio * sum(sizes), rel=1e-9)
  assert np.all(ratios <= 0.99) and np.all(ratios >= 0)
  order = np.argsort(sizes)
  assert np.all(np.diff(ratios[order]) >= -1e-12)


def test_an_overall_ratio_above_the_cap_gives_the_cap_everywhere():
  assert heuristic_ratios([10, 1000], 0.995).tolist() == [0.99, 0.99]


def test_masks_are_due_every_so_many_steps_and_at_the_end():
  config = MagnitudeConfig(ratio=0.5, begin_step=10, end_step=25, update_every=10)
  assert [step for step in range(60) if config.is_due(step)] == [10, 20, 25]
  assert config.ratio_at(10) == 0 and config.ratio_at(25) == 0.5


def test_without_a_duration_one_mask_is_made_at_begin():
  config = MagnitudeConfig(ratio=0.5, begin_step=3, end_step=0)
  assert [step for step in range(9) if config.is_due(step)] == [3]
  assert config.ratio_at(3) == 0.5


@pytest.mark.parametrize(
  'bad', [{'ratio': 1.0}, {'ratio': -0.1}, {'update_every': 0}, {'exponent': 0}]
)
def test_nonsense_is_refused(bad):
  with pytest.raises(UserError, match=f'`{next(iter(bad))}`.*Received: '):
    MagnitudeConfig(**bad)


def test_a_config_is_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    MagnitudeConfig().ratio = 0.5


def test_the_statistic_follows_the_schedule_and_the_stage_ends_after_the_last_mask():
  """108 + 144 + 16 weights; half way 1 - 0.5^3 of 0.8 is 0.7: 76 + 101 + 11 go, then 0.8."""
  model, stack = pocketsize.compress(
    conv_net(),
    [{'algorithm': 'magnitude', 'ratio': 0.8, 'begin_step': 0, 'end_step': 8, 'update_every': 4}],
  )
  assert stack.statistics() == {'sparsity': 0.0}
  stack.update(3)
  assert stack.statistics() == {'sparsity': 0.0}
  stack.update(4)
  assert stack.statistics()['sparsity'] == pytest.approx((76 + 101 + 11) / 268)
  stack.update(8)
  assert stack.statistics()['sparsity'] == pytest.approx((86 + 115 + 13) / 268)
  assert [stack.stage(step) for step in (0, 7, 8)] == [Stage.PARTIAL, Stage.PARTIAL, Stage.FULL]
  assert np.mean(model.baked('conv1') == 0) == pytest.approx(115 / 144)


def test_masks_of_an_earlier_step_are_not_taken_for_the_last():
  """The best weights are those of the first epoch, after steps 0 and 1 of 4."""
  model, stack = pocketsize.compress(
    conv_net(), [{'algorithm': 'magnitude', 'ratio': 0.9, 'end_step': 4, 'update_every': 1}]
  )
  falling = keras.callbacks.LambdaCallback(
    on_epoch_end=lambda epoch, logs: logs.update(score=-epoch)
  )
  best = keras.callbacks.EarlyStopping('score', mode='max', patience=9, restore_best_weights=True)
  with pytest.warns(UserWarning, match='weights of an earlier step were restored'):
    compile_for_logits(model).fit(
      images(16),
      labels(16),
      batch_size=8,
      epochs=4,
      verbose=0,
      callbacks=[falling, best, CompressionCallback(stack)],
    )
  assert stack.step == 8 and stack.statistics()['sparsity'] < 0.6
  assert stack.stage(8) is Stage.PARTIAL
  # What the warning says to do.
  model.fit(
    images(16), labels(16), batch_size=8, verbose=0, callbacks=[CompressionCallback(stack, step=2)]
  )
  assert stack.step == 4 and stack.stage(8) is Stage.FULL


def test_a_pruned_weight_comes_back_when_its_neighbours_shrink():
  model, stack = pocketsize.compress(conv_net(), [{'algorithm': 'magnitude', 'ratio': 0.5}])
  kernel = model.graph.layers['head'].kernel
  dead = model.baked('head') == 0
  kernel.assign(np.where(dead, kernel, kernel * 1e-6))
  stack.update(0)
  np.testing.assert_array_equal(model.baked('head') == 0, ~dead)
