"""One range for several tensors: running averages, calibration, training, resume."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from toys import compile_for_logits, images, labels, shared_net

import pocketsize
from pocketsize.compressor import CompressionCallback
from pocketsize.configure import stack_from
from pocketsize.quantization import ranges
from pocketsize.quantization.learned import LearnedRange, Pact
from pocketsize.quantization.quantizers import ActivationQuantizer
from pocketsize.quantization.shared import SharedActivationQuantizer, running_range


def joining_net():
  """Branches of very different size, joined twice; one of them is read elsewhere too."""
  keras.utils.set_random_seed(5)
  inputs = keras.Input((8, 8, 3), name='images')
  small = layers.Conv2D(3, 1, activation='relu', name='small')(inputs)
  large = layers.Rescaling(10.0, name='scaled')(inputs)
  large = layers.Conv2D(2, 1, activation='relu', name='large')(large)
  x = layers.Concatenate(name='join1')([small, layers.MaxPooling2D(3, 1, 'same')(large)])
  x = layers.Conv2D(2, 3, padding='same', activation='relu', name='conv')(x)
  x = layers.Concatenate(name='join2')([x, small])
  x = layers.GlobalAveragePooling2D(name='pool')(x)
  return keras.Model(inputs, layers.Dense(4, name='head')(x))


def compressed(make=joining_net, calibration=None, **changes):
  entry = {'algorithm': 'uniform', 'momentum': 0.9, **changes}
  model, stack = pocketsize.compress(make(), [entry], calibration=calibration)
  return compile_for_logits(model), stack


def fit(model, stack, begin, end):
  x = np.concatenate([images(seed=step) for step in range(begin, end)])
  y = np.concatenate([labels(seed=step) for step in range(begin, end)])
  callback = CompressionCallback(stack)
  model.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=[callback])


def joined(model):
  """Returns the quantizer of what `join1` and `join2` read."""
  found = {
    id(transform): transform
    for path in ('small', 'large', 'conv')
    for transform in model.transforms_at(path, 'output')
  }
  assert len(found) == 1
  return next(iter(found.values()))


def ends(quantizer):
  return [quantizer.low.numpy().tolist(), quantizer.high.numpy().tolist()]


def test_each_tensor_has_its_average_and_the_range_is_their_hull():
  """Two tensors of extremes (-1, 2) and (0, 8); then (-3, 4) and (-1, 4), which move a quarter."""
  quantizer = SharedActivationQuantizer(8, 0.75, calls=2)
  quantizer.build((None, 2))
  assert not quantizer.has_range
  for values in ([-1.0, 2.0], [0.0, 8.0]):
    quantizer.observe(tf.constant([values]))
  assert ends(quantizer) == [[-1.0, 0.0], [2.0, 8.0]]
  for values in ([-3.0, 4.0], [-1.0, 4.0]):
    quantizer.observe(tf.constant([values]))
  assert ends(quantizer) == [[-1.5, -0.25], [2.5, 7.0]]
  # 255 steps from -1.5 to 7: a step of 1 / 30, and -1.5 is 45 of them.
  assert quantizer.range() == pytest.approx((-1.5, 7.0)) and quantizer.has_range
  assert float(quantizer(tf.constant(6.99))) == pytest.approx(7.0, abs=1e-6)
  assert float(quantizer(tf.constant(1.02))) == pytest.approx(31 / 30, abs=1e-6)


def test_with_one_tensor_it_is_the_ordinary_quantizer():
  one, ordinary = SharedActivationQuantizer(6, 0.9, calls=1), ActivationQuantizer(6, 0.9)
  for seed in range(3):
    x = tf.constant(images(seed=seed))
    np.testing.assert_array_equal(one(x, training=True), ordinary(x, training=True))
  assert one.range() == ordinary.range()
  assert type(running_range(1, 6)) is ActivationQuantizer
  assert running_range(3, 6, nonnegative=True).calls == 3


def test_its_range_is_set_as_a_whole_and_begins_at_zero_behind_relus():
  quantizer = SharedActivationQuantizer(8, nonnegative=True, calls=2)
  quantizer.build((None,))
  quantizer.set_range(-1.0, 5.0)
  assert ends(quantizer) == [[0.0, 0.0], [5.0, 5.0]]
  quantizer.observe(tf.constant([-4.0, 1.0]))
  assert quantizer.low.numpy().max() == quantizer.low.numpy().min() == 0.0


@pytest.mark.parametrize('start', ranges.NAMES)
def test_calibration_sees_joined_tensors_side_by_side(start):
  """As if they were one tensor, whatever rule finds the range."""
  batches = [images(seed=1), 2 * images(seed=2)]
  model, _ = compressed(calibration=batches, range_start=start, weight_bits=32)
  source = model.source
  expected = ranges.initialiser(start)
  names = ('small', 'large', 'conv')
  look = keras.Model(source.input, [source.get_layer(name).output for name in names])
  for batch in batches:
    # In the order in which the model computes them; no sample is mixed with another.
    parts = [np.reshape(part, (8, -1)) for part in look(batch)]
    expected.update(np.concatenate(parts, axis=1))
  assert joined(model).range()[1] == pytest.approx(expected.result()[1], rel=1e-5)


def test_the_first_training_batch_sets_the_range_to_that_of_the_widest_branch():
  model, stack = compressed()
  look = keras.Model(model.source.input, model.source.get_layer('large').output)
  most = float(np.max(look(images(seed=0))))
  fit(model, stack, 0, 1)
  quantizer = joined(model)
  assert quantizer.calls == 3 and int(quantizer.turn) == 0
  assert quantizer.range()[1] == pytest.approx(most, rel=0.02)
  highs = sorted(quantizer.high.numpy())
  assert highs[0] < 0.2 * highs[2]


def test_a_range_that_narrow_branches_have_too_does_not_shrink_to_them():
  model, stack = compressed(calibration=[images(seed=9)])
  before = joined(model).range()[1]
  fit(model, stack, 0, 30)
  assert joined(model).range()[1] > 0.5 * before


def test_a_layer_that_is_called_twice_has_an_average_for_each_call():
  model, stack = compressed(shared_net)
  (quantizer,) = model.transforms_at('tower/pool', 'output')
  fit(model, stack, 0, 2)
  assert quantizer.calls == 2 and quantizer.high.numpy()[0] != quantizer.high.numpy()[1]


def test_resume_is_exact(deterministic):
  whole, stack = compressed(calibration=[images(seed=9)])
  fit(whole, stack, 0, 6)
  half, stack = compressed(calibration=[images(seed=9)])
  fit(half, stack, 0, 3)
  state = [np.array(variable) for variable in half.weights + half.optimizer.variables]
  rest, stack = compressed(calibration=[images(seed=9)])
  rest.optimizer.build(rest.trainable_variables)
  for variable, value in zip(rest.weights + rest.optimizer.variables, state, strict=True):
    variable.assign(value)
  fit(rest, stack, 3, 6)
  for expected, got in zip(whole.weights, rest.weights, strict=True):
    np.testing.assert_array_equal(got, expected, err_msg=expected.path)


def test_save_and_load_keep_the_averages(tmp_path):
  model, stack = compressed()
  fit(model, stack, 0, 2)
  model.save(tmp_path / 'model.keras')
  loaded = keras.models.load_model(tmp_path / 'model.keras')
  assert ends(joined(loaded)) == ends(joined(model))
  np.testing.assert_array_equal(loaded(images()), model(images()))


@pytest.mark.parametrize(('kind', 'expected'), [('learned', LearnedRange), ('pact', Pact)])
def test_a_trained_range_is_one_variable_with_the_gradient_of_all_places(kind, expected):
  # Coarse steps, or the gradient is lost in the digits of a wide range.
  changes = {'activation_range': kind, 'activation_bits': 3, 'end_bits': 0}
  model, stack = compressed(calibration=[images(seed=9)], **changes)
  quantizer = joined(model)
  assert type(quantizer) is expected and len(quantizer.trainable_variables) == 1
  before = float(quantizer.high)
  fit(model, stack, 0, 4)
  assert float(quantizer.high) != before
  if kind == 'pact':
    penalties = [each.penalty() for each in model.transforms if isinstance(each, Pact)]
    assert float(stack.loss(None, None, None)) == pytest.approx(float(sum(penalties)))
    assert penalties and len(penalties) < sum(
      isinstance(place.transform, Pact) for place in model.placements
    )


def test_joined_tensors_have_the_most_bits_that_one_of_their_readers_asks_for():
  rules = [
    {'algorithm': 'uniform', 'activation_bits': 4},
    {'algorithm': 'uniform', 'activation_bits': 6, 'op_names': ['conv']},
  ]
  model, _ = pocketsize.compress(joining_net(), rules)
  # `conv` asks for 6 bits of `small` and `large`; what the head reads has 8, as an end.
  assert joined(model).bits == 8
  stack = stack_from([{**rule, 'end_bits': 0} for rule in rules])
  places = {place.path: place.transform for place in stack.plan(pocketsize.Graph(joining_net()))}
  assert places['small'] is places['large'] is places['conv']
  assert places['small'].bits == 6
