"""The public door: config_list in, model and stack out, and training in both ways."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from toys import compile_for_logits, conv_net, images, labels

import pocketsize
from pocketsize.compressor import CompressionCallback, Compressor, Stack, Stage, find, register
from pocketsize.errors import UserError

BOTH = [
  {'algorithm': 'magnitude', 'ratio': 0.6, 'end_step': 4, 'update_every': 2},
  {'algorithm': 'uniform', 'weight_bits': 4, 'activation_bits': 8, 'scale_every': 3},
]


def test_the_model_shares_its_weights_with_the_users():
  source = conv_net()
  model, stack = pocketsize.compress(source, BOTH)
  assert model.source is source and model.stack is stack
  assert {id(weight) for weight in source.weights} <= {id(weight) for weight in model.weights}


def test_a_fit_of_end_step_steps_reaches_the_ratio_and_a_shorter_one_warns():
  pruning = [{'algorithm': 'magnitude', 'ratio': 0.5, 'end_step': 4, 'update_every': 3}]
  x, y = images(), labels()
  for steps, sparsity in ((4, 0.5), (3, None)):
    model, stack = pocketsize.compress(conv_net(), pruning)
    compile_for_logits(model)
    with warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter('always')
      model.fit(
        x[: 2 * steps],
        y[: 2 * steps],
        batch_size=2,
        verbose=0,
        callbacks=[CompressionCallback(stack)],
      )
    told = any('on its way' in str(warning.message) for warning in caught)
    assert told == (sparsity is None)
    assert sparsity is None or stack.statistics()['sparsity'] == sparsity


def test_entries_of_one_algorithm_are_rules_of_one_compressor():
  _, stack = pocketsize.compress(
    conv_net(),
    [
      {'algorithm': 'magnitude', 'ratio': 0.5},
      {'algorithm': 'uniform'},
      {'algorithm': 'magnitude', 'ratio': 0.25, 'op_types': ['Dense']},
      {'algorithm': 'magnitude', 'op_names': ['conv0'], 'exclude': True},
    ],
  )
  assert [type(compressor).__name__ for compressor in stack.compressors] == ['Magnitude', 'Uniform']
  # conv1 144 at a half, head 16 at a quarter: 76 of 160.
  assert stack.statistics() == {'sparsity': pytest.approx(76 / 160)}


@pytest.mark.parametrize('bits', [1, 2, 4, 8])
@pytest.mark.parametrize('turned', [False, True])
def test_quantizing_what_is_pruned_keeps_the_zeros(bits, turned):
  both = [
    {'algorithm': 'magnitude', 'ratio': 0.5},
    {'algorithm': 'uniform', 'weight_bits': bits, 'end_bits': 0},
  ]
  model, stack = pocketsize.compress(conv_net(), both[::-1] if turned else both)
  masks = {
    place.path: np.array(place.transform.mask)
    for place in model.placements
    if place.transform.order == 10
  }
  stripped = pocketsize.strip(model)
  for path, mask in masks.items():
    kernel = np.array(stripped.get_layer(path).kernel)
    assert mask.mean() == pytest.approx(0.5)
    assert np.all(kernel[mask == 0] == 0)
    assert len(np.unique(np.abs(kernel[..., 0]))) <= 2 ** (bits - 1) + (bits == 1)


def test_the_scales_are_those_of_the_kernels_that_the_masks_leave():
  """The largest magnitude survives the mask, so 8 bits would not notice; the 2-bit search does."""
  model, _ = pocketsize.compress(
    conv_net(),
    [
      {'algorithm': 'magnitude', 'ratio': 0.7},
      {'algorithm': 'uniform', 'weight_bits': 2, 'end_bits': 0},
    ],
  )
  mask, quantizer = model.transforms_at('conv1', 'kernel')
  before = np.array(quantizer.scale)
  quantizer.fit(np.array(model.graph.layers['conv1'].kernel) * mask.mask)
  np.testing.assert_array_equal(quantizer.scale, before)


def test_an_own_loop_gives_what_fit_with_the_callback_gives():
  """The same operations in another tf.function: 1e-5."""
  x, y = images(32), labels(32)
  fitted, stack = pocketsize.compress(conv_net(), BOTH, calibration=[x])
  compile_for_logits(fitted).fit(
    x, y, batch_size=8, epochs=2, shuffle=False, verbose=0, callbacks=[CompressionCallback(stack)]
  )
  looped, stack = pocketsize.compress(conv_net(), BOTH, calibration=[x])
  optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
  cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
  for step in range(8):
    stack.update(step)
    batch = slice(step % 4 * 8, step % 4 * 8 + 8)
    with tf.GradientTape() as tape:
      outputs = looped(x[batch], training=True)
      loss = cross_entropy(y[batch], outputs) + stack.loss(x[batch], y[batch], outputs)
    variables = looped.trainable_variables
    optimizer.apply(tape.gradient(loss, [variable.value for variable in variables]), variables)
  for expected, got in zip(fitted.weights, looped.weights, strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5, err_msg=expected.path)


class Recorder(Compressor):
  """Writes down the steps of its updates; its loss is a constant."""

  def __init__(self, constant=0.0, stage=Stage.FULL):
    super().__init__()
    self.steps, self.constant, self.fixed = [], constant, stage

  def plan(self, graph):
    return []

  def update(self, step):
    self.steps.append(step)

  def loss(self, x, y, outputs):
    return self.constant

  def stage(self, step):
    return self.fixed

  def statistics(self):
    return {f'constant{self.constant}': self.constant}


def attached(*recorders):
  stack = Stack(recorders)
  return compile_for_logits(pocketsize.configure.attach(conv_net(), stack)), stack


def test_the_callback_counts_optimizer_steps_over_epochs_and_fits():
  recorder = Recorder()
  model, stack = attached(recorder)
  callback = CompressionCallback(stack)
  model.fit(images(24), labels(24), batch_size=8, epochs=2, verbose=0, callbacks=[callback])
  # The last update comes after the last step.
  assert recorder.steps == [0, 1, 2, 3, 4, 5, 6]
  model.fit(images(8), labels(8), batch_size=8, verbose=0, callbacks=[CompressionCallback(stack)])
  assert recorder.steps[7:] == [6, 7]
  model.fit(
    images(8), labels(8), batch_size=8, verbose=0, callbacks=[CompressionCallback(stack, step=40)]
  )
  assert recorder.steps[9:] == [40, 41]


def test_several_steps_at_a_time_are_refused():
  model, stack = attached(Recorder())
  model.compile('sgd', 'mse', steps_per_execution=4)
  with pytest.raises(UserError, match=r'steps_per_execution=1\. Received: 4'):
    model.fit(images(), np.zeros((8, 4)), verbose=0, callbacks=[CompressionCallback(stack)])


def test_a_stack_adds_losses_in_training_and_joins_statistics():
  """Constants 2 and 3 add 5 to the training loss and nothing in evaluation."""
  plain, _ = attached(Recorder(0.0))
  model, stack = attached(Recorder(2.0), Recorder(3.0))
  assert stack.statistics() == {'constant2.0': 2.0, 'constant3.0': 3.0}
  tested = [float(np.ravel(each.test_on_batch(images(), labels()))[0]) for each in (plain, model)]
  assert tested[0] == pytest.approx(tested[1], abs=1e-6)
  trained = [float(np.ravel(each.train_on_batch(images(), labels()))[0]) for each in (plain, model)]
  assert trained[1] - trained[0] == pytest.approx(5.0, abs=1e-4)


@pytest.mark.parametrize(
  ('stages', 'together'),
  [
    ((), 'UNCOMPRESSED'),
    (('FULL', 'FULL'), 'FULL'),
    (('FULL', 'PARTIAL'), 'PARTIAL'),
    (('UNCOMPRESSED', 'FULL'), 'PARTIAL'),
    (('UNCOMPRESSED',), 'UNCOMPRESSED'),
  ],
)
def test_a_stack_is_full_only_when_all_are(stages, together):
  assert Stack([Recorder(stage=Stage[stage]) for stage in stages]).stage(0) is Stage[together]


def test_compress_prepares_step_zero():
  model, stack = pocketsize.compress(conv_net(), [{'algorithm': 'magnitude', 'ratio': 0.5}])
  assert stack.statistics()['sparsity'] == pytest.approx(0.5)
  assert np.mean(model.baked('conv0') == 0) == 0.5


def test_weight_scales_are_set_without_calibration_and_the_first_batch_sets_the_ranges():
  model, _ = pocketsize.compress(conv_net(), [{'algorithm': 'uniform'}])
  quantizer = model.transforms_at('images', 'output')[0]
  assert np.all(np.array(model.transforms_at('conv0', 'kernel')[0].scale) > 0)
  assert not quantizer.has_range
  around = keras.Sequential([keras.Input(model.source.input_shape[1:]), model])
  for infer in (model, around, model.predict, tf.function(model, autograph=False)):
    with pytest.raises(UserError, match="quantizers at 'images', 'relu0', .* more never saw data"):
      infer(images())
  model(images(), training=True)
  assert float(quantizer.high) == images().max()
  np.testing.assert_array_equal(around(images()), model(images()))


@pytest.mark.parametrize(
  ('config_list', 'message'),
  [
    ([], r'at least one entry\. Received: \[\]'),
    (
      [{'ratio': 0.5}],
      r"'algorithm', one of binary, filters, magnitude, non-uniform, .*Received: \{'ratio': 0\.5\}",
    ),
    (['magnitude'], r"a dict with a key 'algorithm'.*Received: 'magnitude'"),
    (
      [{'algorithm': 'magic'}],
      r"`algorithm` must be one of binary, filters, magnitude, non-uniform, .*Received: 'magic'",
    ),
    ([{'algorithm': 'magnitude', 'bits': 3}], r"takes the keys algorithm.*ratio.*Received: 'bits'"),
    ([{'algorithm': 'magnitude', 'ratio': 2}], r'`ratio` .* Received: 2'),
    ([{'algorithm': 'magnitude', 'ratio': '0.5'}], r"a value of the wrong type.*'ratio': '0\.5'"),
    ([{'algorithm': 'uniform', 'op_names': 'conv0'}], r"`op_names` must be a list.*'conv0'"),
    ([{'algorithm': 'uniform', 'op_names': ['{re}(']}], r"regular expressions.*'\{re\}\('"),
    (
      [{'algorithm': 'uniform', 'weight_bits': 9.5}],
      r'`weight_bits` must be from 1 to 16, or 32.*Received: 9\.5',
    ),
    (
      [{'algorithm': 'uniform', 'op_names': ['conv9']}],
      r"'conv9', which matches no layer.*Did you mean 'conv",
    ),
    (
      [{'algorithm': 'uniform', 'op_types': ['Conv9D']}],
      r"`op_types` must be among .*Received: 'Conv9D'",
    ),
  ],
)
def test_a_mistake_in_the_config_list_is_explained(config_list, message):
  with pytest.raises(UserError, match=message):
    pocketsize.compress(conv_net(), config_list)


def test_a_subclassed_model_is_refused():
  class Own(keras.Model):
    def call(self, x):
      return x

  with pytest.raises(UserError, match='whose graph cannot be seen'):
    pocketsize.compress(Own(), BOTH)


def test_a_model_is_compressed_once():
  model, _ = pocketsize.compress(conv_net(), [{'algorithm': 'uniform'}], calibration=[images()])
  with pytest.raises(UserError, match=r'`strip\(model\)`.*Received: .*already \(WeightQ'):
    pocketsize.compress(model, BOTH)
  again, _ = pocketsize.compress(pocketsize.strip(model), BOTH, calibration=[images()])
  assert again(images()).shape == model(images()).shape


def test_a_name_is_registered_once():
  with pytest.raises(ValueError, match="registered as 'magnitude'"):
    register('magnitude')(Recorder)
  assert find('magnitude').__name__ == 'Magnitude'


def test_a_mask_quantizer_stack_trains_a_recurrent_model_around_its_dense_layer():
  inputs = keras.Input((5, 3))
  source = keras.Model(inputs, layers.Dense(4, name='head')(layers.GRU(4, name='gru')(inputs)))
  model, stack = pocketsize.compress(source, BOTH)
  assert stack.skipped == {'gru': 'no rule for layers of type GRU'}
  x = np.random.default_rng(0).normal(size=(8, 5, 3)).astype('float32')
  before = np.array(source.get_layer('head').kernel)
  compile_for_logits(model).fit(x, labels(), verbose=0, callbacks=[CompressionCallback(stack)])
  assert np.abs(source.get_layer('head').kernel - before).max() > 1e-4


@pytest.mark.parametrize('turned', [False, True])
def test_ranges_and_scales_are_those_of_the_pruned_net(turned):
  """Calibrating a second time, when the masks are there, finds the same."""
  both = [{'algorithm': 'magnitude', 'ratio': 0.9}, {'algorithm': 'uniform', 'end_bits': 0}]
  model, _ = pocketsize.compress(
    conv_net(), both[::-1] if turned else both, calibration=[images(16)]
  )
  found = [np.array(weight) for transform in model.transforms for weight in transform.weights]
  pocketsize.calibrate(model, [images(16)])
  again = [np.array(weight) for transform in model.transforms for weight in transform.weights]
  for expected, got in zip(again, found, strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_masks_are_made_before_scales_whatever_the_order_of_the_list():
  """One bit: the scale is the mean of what the mask of the same step leaves."""
  pruning = {'algorithm': 'magnitude', 'ratio': 0.9, 'begin_step': 50}
  one_bit = {'algorithm': 'uniform', 'weight_bits': 1, 'end_bits': 0, 'activation_bits': 32}
  baked = []
  for both in ([pruning, one_bit], [one_bit, pruning]):
    model, stack = pocketsize.compress(conv_net(), both)
    stack.update(50)
    baked.append(model.baked('conv1'))
  assert np.mean(baked[0] == 0) > 0.85
  np.testing.assert_array_equal(*baked)


def test_a_second_compile_goes_on_at_the_step_of_the_stack():
  """A new optimizer counts from 0, and the masks of step 0 would drop nothing."""
  pruning = [{'algorithm': 'magnitude', 'ratio': 0.5, 'end_step': 3, 'update_every': 1}]
  model, stack = pocketsize.compress(conv_net(), pruning)
  for _ in range(2):
    compile_for_logits(model)
    callbacks = [CompressionCallback(stack)]
    model.fit(images(24), labels(24), batch_size=8, verbose=0, callbacks=callbacks)
    assert stack.statistics()['sparsity'] == 0.5
  assert stack.step == 6
  with pytest.warns(UserWarning, match='on its way'):
    model.fit(images(8), labels(8), verbose=0, callbacks=[CompressionCallback(stack, step=0)])
  assert stack.step == 1 and stack.statistics()['sparsity'] < 0.5


def test_a_layer_that_could_not_be_stripped_is_refused_before_it_is_trained():
  inputs = keras.Input((3,))
  own = keras.layers.Dense(2, activation=lambda x: keras.ops.relu(x) * 1.5, name='own')
  with pytest.raises(UserError, match="Layer 'own' cannot be made again"):
    pocketsize.compress(keras.Model(inputs, own(inputs)), [{'algorithm': 'uniform'}])
