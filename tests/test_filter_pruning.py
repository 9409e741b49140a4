"""Filter pruning in training: what is masked and when, and the smaller model."""

import channels as topologies
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from toys import compile_for_logits, images, labels

import pocketsize
from pocketsize import cost
from pocketsize.channel_graph import ChannelGraph
from pocketsize.compressor import CompressionCallback
from pocketsize.errors import UserError
from pocketsize.graph import Graph
from pocketsize.pruning import filters, taylor
from pocketsize.pruning.channel_mask import ChannelMask
from pocketsize.pruning.filter_pruning import FilterConfig
from pocketsize.shrink import mask, shrink

EVERYWHERE = {'prune_first_conv': True, 'prune_downsample_convs': True}
SCHEDULES = ['once', 'exponential', 'exponential_with_bias', 'baseline', 'polynomial']


def conv(x, count, name, norm=layers.BatchNormalization, **arguments):
  x = layers.Conv2D(count, 3, padding='same', name=name, **arguments)(x)
  return layers.ReLU()(norm()(x)) if norm else x


def residual(x):
  x = conv(x, 8, 'stem', use_bias=False)
  y = conv(conv(x, 6, 'inner', strides=2), 8, 'outer', layers.BatchNormalization)
  return y + layers.Conv2D(8, 1, 2, name='shortcut')(x)


def depthwise(x):
  x = conv(x, 6, 'a')
  x = layers.DepthwiseConv2D(3, depth_multiplier=2, name='depth')(x)
  return layers.SeparableConv2D(8, 3, name='separable')(layers.BatchNormalization()(x))


def grouped(x):
  x = conv(x, 8, 'a', lambda: layers.GroupNormalization(4))
  return layers.Conv2D(4, 3, groups=2, name='grouped')(x)


def constants(x):
  """Sigmoid(0) is taken up by the next layer, and so are shifts."""
  x = layers.Conv2D(8, 3, activation='sigmoid', name='a')(x)
  return layers.BatchNormalization(scale=False)(layers.Conv2D(6, 3, name='b')(x))


def joined(x):
  x = layers.Concatenate()([conv(x, 4, 'a'), layers.BatchNormalization()(conv(x, 6, 'b', None))])
  return layers.Conv2DTranspose(6, 2, strides=2, name='up')(x)


def shared(x):
  block = keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(3, 1, name='conv')], name='block')
  return conv(block(layers.ReLU()(block(x))), 4, 'last')


BODIES = [residual, depthwise, grouped, constants, joined, shared]
each_body = pytest.mark.parametrize('body', BODIES)


def net(body):
  keras.utils.set_random_seed(8)
  inputs = keras.Input((8, 8, 3), name='images')
  x = layers.GlobalAveragePooling2D()(body(inputs))
  return topologies.randomized(keras.Model(inputs, layers.Dense(4, name='head')(x)))


def wide(units=100, norm=False):
  keras.utils.set_random_seed(9)
  x = inputs = keras.Input((5,))
  x = layers.Dense(units, name='wide')(x)
  if norm:
    x = layers.BatchNormalization(name='norm')(x)
  return keras.Model(inputs, layers.Dense(4, name='head')(layers.ReLU()(x)))


def pruned(model, *entries, **config):
  """Returns (instrumented model, its `FilterPruning`)."""
  listed = [{'algorithm': 'filters', **EVERYWHERE, **entry} for entry in entries or [config]]
  model, stack = pocketsize.compress(model, listed)
  return model, stack.compressors[0]


def train(model, steps, x=None):
  x = images(8 * steps, seed=3) if x is None else x
  compile_for_logits(model)
  callbacks = [CompressionCallback(model.stack)]
  model.fit(x, labels(len(x)), batch_size=8, shuffle=False, verbose=0, callbacks=callbacks)


def sizes(keep):
  return {name: int(kept.sum()) for name, kept in keep.items()}


@each_body
@pytest.mark.parametrize('prune_batch_norms', [True, False])
def test_what_is_masked_is_what_mask_zeroes(body, prune_batch_norms):
  model, compressor = pruned(net(body), ratio=0.5, prune_batch_norms=prune_batch_norms)
  keep = compressor.keep()
  assert any(not kept.all() for kept in keep.values())
  expected = mask(net(body), keep, keep_shift=not prune_batch_norms)
  for one, other in zip(expected.weights, pocketsize.strip(model).weights, strict=True):
    np.testing.assert_array_equal(other, one, err_msg=one.path)


@each_body
@pytest.mark.parametrize('prune_batch_norms', [True, False])
def test_after_training_the_compact_model_computes_the_same(body, prune_batch_norms):
  model, compressor = pruned(net(body), ratio=0.5, prune_batch_norms=prune_batch_norms)
  train(model, 4)
  stripped = pocketsize.strip(model)
  smaller = pocketsize.compact(stripped)
  np.testing.assert_allclose(smaller(images()), model(images()), rtol=1e-5, atol=1e-5)
  expected = shrink(stripped, compressor.keep(), not prune_batch_norms)
  shapes = [[weight.shape for weight in each.weights] for each in (smaller, expected)]
  assert shapes[0] == shapes[1]
  assert smaller.count_params() < model.source.count_params()


def test_compact_with_a_given_treatment_of_shifts():
  """Shifts that were kept cannot be told from living channels if they should be zero."""
  model, _ = pruned(net(residual), ratio=0.5, prune_batch_norms=False)
  stripped = pocketsize.strip(model)
  counts = [pocketsize.compact(stripped, kept).count_params() for kept in (False, True, None)]
  assert counts[0] > counts[1] == counts[2]
  np.testing.assert_allclose(
    pocketsize.compact(stripped, False)(images()), stripped(images()), rtol=1e-5, atol=1e-5
  )


def test_compact_of_an_instrumented_model_is_refused():
  with pytest.raises(UserError, match='give it what `strip` returns'):
    pocketsize.compact(pruned(wide(), ratio=0.5)[0])


def test_compact_leaves_what_is_not_zero_and_one_channel_where_all_are():
  model = net(residual)
  assert pocketsize.compact(model).count_params() == model.count_params()
  model = wide()
  model.get_layer('wide').set_weights([np.zeros((5, 100)), np.zeros(100)])
  smaller = pocketsize.compact(model)
  assert smaller.get_layer('wide').units == 1
  x = np.random.default_rng(0).normal(size=(3, 5))
  np.testing.assert_allclose(smaller(x), model(x), atol=1e-6)


# Of 100 channels: what is left at the steps 0, 2, 4, 6, 8 and 10 of a way from 2 to 10.
LEFT = {
  'once': [100, 50, 50, 50, 50, 50],
  'baseline': [100, 50, 50, 50, 50, 50],
  # 0.5^(1/4) = 0.84..., 0.5^(1/2) = 0.70..., 0.5^(3/4) = 0.59...
  'exponential': [100, 100, 85, 71, 60, 50],
  # With e^(-k/8) = 1/4 a quarter of the way is 15/16 done: 0.46875; then 0.498, 0.4999.
  'exponential_with_bias': [100, 100, 54, 51, 51, 50],
  # (1 - p)^3 of 0.5 is left to drop: 27/64, 1/8, 1/64.
  'polynomial': [100, 100, 72, 57, 51, 50],
}


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_schedules_by_hand(schedule):
  model, compressor = pruned(
    wide(), ratio=0.5, schedule=schedule, begin_step=2, end_step=10, update_every=2
  )
  left, stages = [], []
  for step in range(11):
    compressor.update(step)
    left.append(sizes(compressor.keep())['wide'])
    stages.append(compressor.stage(step))
  assert left[::2] == LEFT[schedule]
  assert left[::2][:-1] == left[1::2]  # nothing changes between two updates
  last = 2 if schedule == 'once' else 10
  assert stages == [pocketsize.Stage.PARTIAL] * last + [pocketsize.Stage.FULL] * (11 - last)
  assert compressor.statistics()['channels_dropped'] == pytest.approx(0.5)
  np.testing.assert_allclose(compressor.statistics()['macs_left'], 0.5)


@pytest.mark.parametrize('schedule', SCHEDULES[1:])
def test_the_initial_ratio_holds_from_the_first_step(schedule):
  _, compressor = pruned(
    wide(), ratio=0.5, schedule=schedule, initial_ratio=0.1, begin_step=5, end_step=9
  )
  assert sizes(compressor.keep()) == {'wide': 90}
  compressor.update(9)
  assert sizes(compressor.keep()) == {'wide': 50}


def test_a_masked_channel_comes_back_when_its_latent_weights_grow():
  model, compressor = pruned(wide(), ratio=0.5, schedule='baseline', end_step=4, update_every=2)
  gone = int(np.flatnonzero(~compressor.keep()['wide'])[0])
  kernel = model.source.get_layer('wide').kernel
  kernel.assign(np.where(np.arange(100) == gone, 100.0, kernel))
  compressor.update(1)
  assert not compressor.keep()['wide'][gone]
  compressor.update(2)
  assert compressor.keep()['wide'][gone] and compressor.keep()['wide'].sum() == 50


def test_a_ratio_that_is_reached_stays_when_training_goes_on():
  _, compressor = pruned(wide(), ratio=0.5, schedule='polynomial', end_step=4, update_every=3)
  for step in range(0, 30, 5):
    compressor.update(step)
  assert sizes(compressor.keep()) == {'wide': 100}  # step 4 was never asked for
  compressor.update(4)
  compressor.update(1000)
  assert sizes(compressor.keep()) == {'wide': 50}


@pytest.mark.parametrize('scope', ['group', 'network'])
@pytest.mark.parametrize('schedule', SCHEDULES)
def test_a_target_of_macs_is_met_at_the_end_of_the_schedule(scope, schedule):
  source = net(depthwise)
  model, compressor = pruned(
    source, macs=0.5, scope=scope, schedule=schedule, end_step=4, update_every=1
  )
  for step in range(5):
    compressor.update(step)
  smaller = pocketsize.compact(pocketsize.strip(model))
  share = cost.macs(Graph(smaller)) / cost.macs(Graph(source))
  assert 0.3 < share <= 0.5
  assert compressor.statistics()['macs_left'] == pytest.approx(share)


@pytest.mark.parametrize('scope', ['group', 'network'])
@pytest.mark.parametrize('amount', [{'ratio': 0.5}, {'macs': 0.5}], ids=str)
def test_masks_of_an_earlier_step_are_not_taken_for_the_last(amount, scope):
  _, compressor = pruned(
    net(depthwise), scope=scope, schedule='polynomial', end_step=9, update_every=1, **amount
  )
  compressor.update(1)
  assert compressor.stage(9) is pocketsize.Stage.PARTIAL
  compressor.update(9)
  assert compressor.stage(9) is pocketsize.Stage.FULL


@each_body
@pytest.mark.parametrize('scope', ['group', 'network'])
def test_the_last_masks_are_complete_though_a_channel_stays_in_every_tensor(body, scope):
  _, compressor = pruned(net(body), ratio=0.97, scope=scope)
  assert compressor.stage(0) is pocketsize.Stage.FULL


@pytest.mark.parametrize('scope', ['group', 'network'])
def test_widths_are_multiples(scope):
  _, compressor = pruned(net(residual), ratio=0.6, scope=scope, multiple=4)
  assert all(kept.sum() % 4 == 0 or kept.all() for kept in compressor.keep().values())
  assert sizes(compressor.keep())['inner'] in (4, 6)
  assert min(sizes(compressor.keep()).values()) == 4


def test_first_and_downsampling_convolutions_stay_with_their_groups():
  source = net(residual)
  entry = {'algorithm': 'filters', 'ratio': 0.5}
  _, stack = pocketsize.compress(source, [entry])
  assert stack.skipped == {
    'stem': 'first convolution',
    'inner': 'downsampling convolution',
    'outer': "its channels go with those of 'shortcut': downsampling convolution",
    'shortcut': 'downsampling convolution',
    'head': 'frozen: they are an output of the model',
  }
  assert not stack.compressors[0].keep()['stem'].sum() < 8
  _, stack = pocketsize.compress(source, [{**entry, 'prune_first_conv': True}])
  assert sizes(stack.compressors[0].keep()) == {'stem': 4, 'inner': 6, 'outer': 8}
  assert 'stem' not in stack.skipped
  _, stack = pocketsize.compress(source, [{**entry, 'prune_downsample_convs': True}])
  assert sizes(stack.compressors[0].keep()) == {'stem': 8, 'inner': 3, 'outer': 4}
  assert set(stack.skipped) == {'stem', 'head'}


def test_a_depthwise_convolution_with_strides_keeps_what_passes_it():
  x = inputs = keras.Input((8, 8, 3))
  x = layers.DepthwiseConv2D(3, 2, name='depth')(conv(conv(x, 4, 'a'), 4, 'b'))
  model = keras.Model(inputs, layers.Dense(2, name='head')(layers.Flatten()(x)))
  _, stack = pocketsize.compress(model, [{'algorithm': 'filters', 'ratio': 0.5}])
  assert stack.skipped['depth'] == 'downsampling convolution'
  assert stack.skipped['b'].startswith("its channels go with those of 'depth'")


def test_a_group_is_pruned_if_all_that_make_it_are_chosen():
  _, compressor = pruned(net(residual), {'ratio': 0.5}, {'op_names': ['shortcut'], 'exclude': True})
  assert sizes(compressor.keep()) == {'stem': 4, 'inner': 3, 'outer': 8}
  assert compressor.skipped == {
    'shortcut': 'excluded',
    'outer': "its channels go with those of 'shortcut': excluded",
    'head': 'frozen: they are an output of the model',
  }
  _, compressor = pruned(net(residual), {'ratio': 0.5, 'op_names': ['{re}in.*']})
  assert sizes(compressor.keep()) == {'stem': 8, 'inner': 3, 'outer': 8}
  assert compressor.skipped['stem'] == 'no rule names it'


def test_each_group_has_the_configuration_of_the_layer_it_is_named_after():
  _, compressor = pruned(
    net(residual),
    {'ratio': 0.25},
    {'ratio': 0.5, 'op_names': ['inner'], 'begin_step': 3},
    {'ratio': 0.75, 'op_names': ['outer']},
  )
  assert sizes(compressor.keep()) == {'stem': 6, 'inner': 6, 'outer': 2}
  compressor.update(3)
  assert sizes(compressor.keep()) == {'stem': 6, 'inner': 3, 'outer': 2}
  assert compressor.stage(2) is pocketsize.Stage.PARTIAL


@pytest.mark.parametrize('criterion', ['l1', 'l2', 'geometric_median', 'bn_scale', 'random'])
def test_the_least_by_the_criterion_go(criterion):
  model = topologies.randomized(wide(norm=True))
  _, compressor = pruned(model, ratio=0.3, criterion=criterion, seed=4)
  scores = filters.scores(ChannelGraph(model), criterion, seed=4)['wide']
  expected = np.ones(100, bool)
  expected[np.argsort(scores, kind='stable')[:30]] = False
  np.testing.assert_array_equal(compressor.keep()['wide'], expected)


def test_scales_are_needed_of_pruned_groups_only():
  x = inputs = keras.Input((8, 8, 3))
  x = conv(conv(conv(x, 4, 'a', None), 4, 'b'), 4, 'c', None)
  model = keras.Model(inputs, layers.Dense(2, name='head')(layers.Flatten()(x)))
  _, compressor = pruned(model, ratio=0.5, criterion='bn_scale', op_names=['b'])
  assert sizes(compressor.keep()) == {'a': 4, 'b': 2, 'c': 4}
  with pytest.raises(UserError, match='needs a batch norm .* none behind a, c'):
    pruned(model, ratio=0.5, criterion='bn_scale')


def test_masks_and_quantizers_meet_at_a_kernel():
  model, _ = pocketsize.compress(
    net(residual),
    [{'algorithm': 'filters', 'ratio': 0.5, **EVERYWHERE}, {'algorithm': 'uniform'}],
    calibration=[images()],
  )
  train(model, 2)
  smaller = pocketsize.compact(pocketsize.strip(model))
  expected = model.run(images(), activate=lambda transform, x: x)
  np.testing.assert_allclose(smaller(images()), expected, rtol=1e-5, atol=1e-5)
  assert smaller.get_layer('inner').filters == 3


# Taylor importances.

TAYLOR = {'ratio': 0.5, 'criterion': 'taylor', 'begin_step': 4}


def cross_entropy(y, outputs):
  return keras.losses.sparse_categorical_crossentropy(y, outputs, from_logits=True)


def slow_importances(model, batches, parts_by_layer, training):
  """Returns the mean over batches of sum over layers of (sum of gradient * weight)^2, in loops."""
  total = 0.0
  for x, y in batches:
    with tf.GradientTape() as tape:
      loss = tf.reduce_mean(cross_entropy(y, model(x, training=training)))
    weights = {weight.path: weight for weight in model.trainable_weights}
    gradients = dict(
      zip(weights, tape.gradient(loss, [weight.value for weight in weights.values()]), strict=True)
    )
    for paths in parts_by_layer:
      sums = 0.0
      for path in paths:
        products = np.array(gradients[path]) * np.array(weights[path])
        sums = sums + np.array(
          [products[..., channel].sum() for channel in range(products.shape[-1])]
        )
      total = total + sums**2
  return total / len(batches)


CHAIN = [['a/kernel', 'a/bias'], ['norm/gamma', 'norm/beta']]


def chain():
  x = inputs = keras.Input((8, 8, 3))
  x = layers.Conv2D(6, 3, name='a')(x)
  x = layers.ReLU()(layers.BatchNormalization(name='norm')(x))
  x = layers.GlobalAveragePooling2D()(x)
  return topologies.randomized(keras.Model(inputs, layers.Dense(4, name='head')(x)))


def batches_of(count):
  return [(images(seed=index), labels(seed=index)) for index in range(count)]


def test_taylor_scores_against_the_slow_loop():
  model = chain()
  before = [np.array(weight) for weight in model.weights]
  found = taylor.taylor_scores(model, ChannelGraph(model), batches_of(3), cross_entropy)
  expected = slow_importances(model, batches_of(3), CHAIN, training=False)
  np.testing.assert_allclose(found['a'], expected, rtol=1e-4)
  for old, weight in zip(before, model.weights, strict=True):
    np.testing.assert_array_equal(weight, old)


def test_taylor_scores_of_a_layer_that_is_called_twice_against_differences():
  """The loss when what a layer has of a channel grows and shrinks by 1 %, at both calls at once."""
  x = inputs = keras.Input((5,))
  layer = layers.Dense(6, activation='tanh', name='twice')
  y = layers.Dense(6, activation='tanh', name='first')(x)
  model = topologies.randomized(keras.Model(inputs, layers.Dense(4)(layer(y) + layer(layer(y)))))
  channels = ChannelGraph(model)
  ((group, size),) = [(group.name, group.size) for group in channels.groups]
  batch = np.random.default_rng(5).normal(size=(8, 5)).astype('float32'), labels()
  found = taylor.taylor_scores(model, channels, [batch], cross_entropy)[group]

  def loss():
    return float(tf.reduce_mean(cross_entropy(batch[1], model(batch[0]))))

  expected = np.zeros(size)
  for name in ('first', 'twice'):
    own = [np.array(weight) for weight in model.get_layer(name).weights]
    for channel in range(size):
      values = []
      for factor in (1.01, 0.99):
        scale = np.where(np.arange(size) == channel, factor, 1.0)
        model.get_layer(name).set_weights([weight * scale for weight in own])
        values.append(loss())
      expected[channel] += ((values[0] - values[1]) / 0.02) ** 2
    model.get_layer(name).set_weights(own)
  np.testing.assert_allclose(found, expected, rtol=0.02, atol=1e-6)


@pytest.mark.parametrize('prune_batch_norms', [True, False])
def test_importances_seen_in_training_against_the_slow_loop(prune_batch_norms):
  """Without steps of an optimizer, so that each batch meets the same weights."""
  model, compressor = pruned(chain(), **TAYLOR, prune_batch_norms=prune_batch_norms)
  for step, (x, y) in enumerate(batches_of(3)):
    compressor.update(step)
    compressor.update(step)
    with tf.GradientTape() as tape:
      loss = tf.reduce_mean(cross_entropy(y, model(x, training=True)))
    tape.gradient(loss, [weight.value for weight in model.trainable_weights])
  compressor.update(3)
  expected = slow_importances(chain(), batches_of(3), CHAIN, training=True)
  found = compressor.scores(compressor.configs['a'])['a']
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-9)
  compressor.update(4)
  kept = np.flatnonzero(compressor.keep()['a'])
  np.testing.assert_array_equal(kept, np.sort(np.argsort(expected)[3:]))
  # Masks that only watch zero nothing.
  masked = mask(model.source, compressor.keep(), keep_shift=not prune_batch_norms)
  for one, other in zip(masked.weights, pocketsize.strip(model).weights, strict=True):
    np.testing.assert_array_equal(other, one, err_msg=one.path)


def test_a_layer_called_twice_is_squared_once():
  """Its two calls give two gradients a batch, which are summed before they are squared."""

  def twice():
    layer = layers.Dense(5, activation='relu', name='twice')
    x = inputs = keras.Input((3,))
    y = layers.Dense(5, name='first')(x)
    return topologies.randomized(keras.Model(inputs, layers.Dense(4)(layer(layer(y)))))

  model, compressor = pruned(twice(), **TAYLOR, op_types=['Dense'])
  x, y = np.random.default_rng(0).normal(size=(8, 3)).astype('float32'), labels()
  with tf.GradientTape() as tape:
    loss = tf.reduce_mean(cross_entropy(y, model(x, training=True)))
  tape.gradient(loss, [weight.value for weight in model.trainable_weights])
  compressor.update(1)
  parts = [[f'{name}/kernel', f'{name}/bias'] for name in ('first', 'twice')]
  expected = slow_importances(twice(), [(x, y)], parts, training=True)
  ((name, config),) = compressor.configs.items()
  np.testing.assert_allclose(compressor.scores(config)[name], expected, rtol=1e-4)


def test_a_masked_channel_is_judged_by_its_latent_weights():
  """Behind tanh, whose slope at zero is one, masked channels have a gradient like the others."""
  x = inputs = keras.Input((5,))
  x = layers.Dense(6, activation='tanh', use_bias=False, name='first')(x)
  model, compressor = pruned(
    topologies.randomized(keras.Model(inputs, layers.Dense(4, name='head')(x))), **TAYLOR
  )
  for transform in model.transforms:
    transform.mask.assign(np.float32([0, 1, 0, 1, 1, 1]))
  x, y = np.random.default_rng(0).normal(size=(8, 5)).astype('float32'), labels()
  with tf.GradientTape() as tape:
    loss = tf.reduce_mean(cross_entropy(y, model(x, training=True)))
  kernel = model.source.get_layer('first').kernel
  gradient = np.array(tape.gradient(loss, kernel.value))
  assert not gradient[:, 0].any() and gradient[:, 1].all()
  compressor.update(1)
  scores = compressor.scores(compressor.configs['first'])['first']
  assert scores.min() > 1e-6
  expected = (gradient[:, 1] * np.array(kernel)[:, 1]).sum() ** 2
  np.testing.assert_allclose(scores[1], expected, rtol=1e-4)


def test_watching_gradients_does_not_change_training(deterministic):
  """Before the first mask the weights are those of masks that do not watch, bit for bit."""
  trained = []
  for criterion in ('taylor', 'l2'):
    model, _ = pruned(chain(), ratio=0.5, criterion=criterion, begin_step=100)
    with pytest.warns(UserWarning, match='on its way'):
      train(model, 5)
    trained.append(model)
  for one, other in zip(trained[0].source.weights, trained[1].source.weights, strict=True):
    np.testing.assert_array_equal(one, other)
  assert all(
    float(transform.batches) == 5 and np.abs(transform.importance).max() > 0.0
    for transform in trained[0].transforms
    if transform.observes
  )


@pytest.mark.filterwarnings('ignore:After')
def test_twenty_and_twenty_steps_are_forty_with_taylor(deterministic, tmp_path):
  config = {
    'ratio': 0.5,
    'criterion': 'taylor',
    'schedule': 'polynomial',
    'end_step': 36,
    'update_every': 6,
  }
  x, y = images(320, seed=6), labels(320)

  def fit(model, begin, end):
    steps = slice(8 * begin, 8 * end)
    callbacks = [CompressionCallback(model.stack, begin)]
    model.fit(x[steps], y[steps], batch_size=8, shuffle=False, verbose=0, callbacks=callbacks)

  whole = compile_for_logits(pruned(chain(), **config)[0])
  fit(whole, 0, 40)
  half = compile_for_logits(pruned(chain(), **config)[0])
  fit(half, 0, 20)
  half.save(tmp_path / 'half.keras')
  rest = keras.models.load_model(tmp_path / 'half.keras')
  stack = half.stack
  stack.bind(rest)
  fit(rest, 20, 40)
  for one, other in zip(whole.weights, rest.weights, strict=True):
    np.testing.assert_array_equal(one, other, err_msg=one.path)
  assert sizes(stack.compressors[0].keep()) == {'a': 3}


@pytest.mark.parametrize(
  'config',
  [
    {},
    {'schedule': 'exponential'},
    {'schedule': 'baseline', 'end_step': 5},
    {'schedule': 'polynomial', 'begin_step': 3, 'initial_ratio': 0.1},
  ],
)
def test_taylor_at_step_0_is_refused(config):
  with pytest.raises(UserError, match='no gradient at step 0: give `begin_step` .*taylor_scores'):
    pruned(chain(), ratio=0.5, criterion='taylor', **config)


def test_taylor_without_data_is_refused():
  model, compressor = pruned(chain(), ratio=0.5, criterion='taylor', begin_step=1)
  with pytest.raises(UserError, match=r'seen no gradient: train .* Received: begin_step=1'):
    compressor.update(1)
  with pytest.raises(UserError, match='at least one. Received none'):
    taylor.taylor_scores(model, ChannelGraph(model.source), [], cross_entropy)


def test_a_mask_comes_back_from_its_configuration():
  made = ChannelMask.from_config(ChannelMask(-2, observes=True).get_config())
  assert (made.axis, made.observes, made.order) == (-2, True, 10)


@pytest.mark.parametrize(
  ('config', 'message'),
  [
    ({}, r'needs `ratio`, .* Received: None and None'),
    ({'ratio': 0.5, 'macs': 0.5}, 'not both. Received: 0.5 and 0.5'),
    ({'ratio': 1.0}, r'must be in \[0, 1\). Received: 1.0'),
    ({'macs': 0.0}, r'must be in \(0, 1\]. Received: 0.0'),
    ({'ratio': 0.5, 'criterion': 'l3'}, "one of l1, .*random. Received: 'l3'"),
    ({'ratio': 0.5, 'scope': 'layer'}, "one of group, network. Received: 'layer'"),
    ({'ratio': 0.5, 'schedule': 'linear'}, "one of once, .* Received: 'linear'"),
    ({'ratio': 0.5, 'begin_step': -1}, '`begin_step` must be at least 0. Received: -1'),
    ({'ratio': 0.5, 'update_every': 0}, '`update_every` must be at least 1. Received: 0'),
    ({'ratio': 0.5, 'multiple': 0}, '`multiple` must be at least 1. Received: 0'),
    ({'ratio': 0.5, 'exponent': 0.0}, 'positive. Received: 0.0'),
    ({'ratio': 0.5, 'initial_ratio': 0.1}, "0 with schedule 'once'. Received: 0.1"),
    (
      {'ratio': 0.5, 'initial_ratio': 0.6, 'schedule': 'baseline'},
      'not above `ratio`.* Received: 0.6',
    ),
    (
      {'ratio': 0.5, 'initial_ratio': 0.4, 'schedule': 'exponential_with_bias', 'end_step': 9},
      'below three quarters .* Received: 0.4 and 0.5',
    ),
  ],
)
def test_configurations_that_make_no_sense(config, message):
  with pytest.raises(UserError, match=message):
    FilterConfig(**config)


def test_entries_that_do_not_go_together():
  with pytest.raises(UserError, match='the same in every entry .* True and False'):
    pruned(wide(), {'ratio': 0.5}, {'ratio': 0.5, 'prune_batch_norms': False})
  entries = {'ratio': 0.5, 'scope': 'network'}, {'ratio': 0.6, 'op_names': ['inner']}
  with pytest.raises(UserError, match='must have the same configuration'):
    pruned(net(residual), *entries)
  with pytest.raises(UserError, match='cannot be met: with 8 channels'):
    pruned(net(residual), macs=0.1, multiple=8)
