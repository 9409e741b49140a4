"""Classification figures, worked out by hand."""

import numpy as np
import pytest

from evaluators.classification import Classification, cross_entropy


def test_accuracy_and_loss_by_hand():
  evaluator = Classification()
  # Row 1: p = 3/4 of the right class. Row 2: p = 1/4 of the right class, the other one wins.
  logits = np.log([[3.0, 1.0], [3.0, 1.0]])
  evaluator.update(np.array([0, 1]), logits)
  result = evaluator.result()
  assert result['accuracy'] == 0.5
  assert result['loss'] == pytest.approx((np.log(4 / 3) + np.log(4)) / 2, abs=1e-12)


def test_samples_count_and_not_batches():
  rng = np.random.default_rng(1)
  logits, y = rng.normal(size=(10, 4)), rng.integers(0, 4, 10)
  whole, parts = Classification(), Classification()
  whole.update(y, logits)
  for begin, end in ((0, 7), (7, 10)):
    parts.update(y[begin:end], logits[begin:end])
  assert parts.result() == pytest.approx(whole.result(), abs=1e-12)


def test_huge_float32_logits_stay_finite():
  logits = np.array([[3e38, -3e38], [-1e4, 1e4]], np.float32)
  np.testing.assert_allclose(cross_entropy(np.array([0, 0]), logits), [0.0, 2e4])


def test_reset_forgets_and_an_empty_result_is_refused():
  evaluator = Classification()
  evaluator.update(np.array([0]), np.array([[0.0, 1.0]]))
  evaluator.reset()
  with pytest.raises(ValueError, match='at least one sample'):
    evaluator.result()
  evaluator.update(np.array([1]), np.array([[0.0, 1.0]]))
  assert evaluator.result()['accuracy'] == 1.0
