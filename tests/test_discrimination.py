"""Discrimination-aware channel pruning: scores, greedy order, counts, heads, resume, whole runs."""

import json
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from learners import main, training
from learners.channels import ChannelLearner
from learners.dis_chn_pruned import DiscriminationPruned
from nets.convnet_at_digits import ModelHelper
from pocketsize.channel_graph import ChannelGraph
from pocketsize.errors import UserError
from pocketsize.instrument import Instrumented
from pocketsize.pruning import units
from pocketsize.pruning.discrimination import (
  Discrimination,
  DiscriminationAware,
  Diverged,
)
from pocketsize.pruning.heads import block_ends, classes
from pocketsize.pruning.tail import channel_scores
from tests.shortcuts import until_training
from tests.toys import conv_net, images, labels


def cross_entropy(y, logits):
  return keras.ops.mean(keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True))


def residual_net():
  """A stem, a residual block and a projected one, pool and dense: 4 logits of 8x8x3 images."""
  keras.utils.set_random_seed(5)

  def convolve(x, channels, strides, name):
    x = layers.Conv2D(channels, 3, strides, 'same', use_bias=False, name=name)(x)
    return layers.BatchNormalization(momentum=0.9, name=f'{name}_bn')(x)

  x = inputs = keras.Input((8, 8, 3), name='images')
  x = layers.ReLU(name='stem_relu')(convolve(x, 4, 1, 'stem'))
  for name, channels, strides in (('one', 4, 1), ('two', 6, 2)):
    past = x if strides == 1 else convolve(x, channels, strides, f'{name}_past')
    x = layers.ReLU(name=f'{name}_relu1')(convolve(x, channels, strides, f'{name}_conv1'))
    x = layers.Add(name=f'{name}_add')([convolve(x, channels, 1, f'{name}_conv2'), past])
    x = layers.ReLU(name=f'{name}_relu2')(x)
  x = layers.GlobalAveragePooling2D(name='pool')(x)
  return keras.Model(inputs, layers.Dense(4, name='head')(x), name='residual_net')


def batches(count=2):
  return [(images(seed=number), labels(seed=number)) for number in range(count)]


def course_of(model, ratio=0.5, trunk='shared', data=None, **options):
  found, _ = units.units(ChannelGraph(model), trunk)
  counts = units.counts(found, ratio, rounding=np.ceil)
  method = Discrimination(**{'stages': 1, 'rate': 0.01, 'iterations': 2, **options})
  return DiscriminationAware(model, found, counts, method, data or batches(), cross_entropy, seed=3)


def do_all(course):
  for step in course.steps:
    if step not in course.blocks:
      course.do(step)
  return course


def test_blocks_end_where_the_reference_ends_them():
  # ceil((L + 1) / blocks) convolutions each: of 19 with 3 stages 5, 5, 5 and 4.
  paths = [f'conv{number}' for number in range(19)]
  assert block_ends(paths, 3) == ['conv4', 'conv9', 'conv14']
  # Of 5, 2 and 2 and 1 and none: the last block has the dense layer only.
  assert block_ends(paths[:5], 3) == ['conv1', 'conv3', 'conv4']
  # Of 2, 1 and 1 and none and none: no head for a block without convolutions.
  assert block_ends(paths[:2], 3) == ['conv0', 'conv1']
  assert block_ends(paths[:5], 0) == []


def test_scores_against_the_slow_loop():
  gradient = np.random.default_rng(1).normal(size=(3, 2, 4, 5))
  slow = np.zeros(4)
  for row, column, channel, output in np.ndindex(gradient.shape):
    slow[channel] += gradient[row, column, channel, output] ** 2
  np.testing.assert_allclose(channel_scores(gradient), slow)
  np.testing.assert_allclose(channel_scores(gradient[0, 0]), (gradient[0, 0] ** 2).sum(axis=1))


@pytest.mark.parametrize('path', ['conv1', 'head'])
def test_the_gradient_against_finite_differences_of_the_whole_model(path):
  model = conv_net()
  x, y = batches()[0]
  course = course_of(model, data=[(x, y)], stages=0)
  layer = course.model.get_layer(path)
  kernel = np.array(layer.kernel)
  mask = np.array([1, 0, 1, 1], 'float32')
  outputs = keras.Model(course.model.input, [layer.output, course.model.output])
  wanted = keras.Model(model.input, model.get_layer(path).output)(x, training=False)

  def loss(kernel):
    layer.kernel.assign(kernel)
    output, logits = outputs(x, training=False)
    return float(
      0.5 * output.shape[-1] * np.mean(np.square(output - wanted)) + cross_entropy(y, logits)
    )

  found = course._gradient(path)(kernel, mask)
  rng = np.random.default_rng(0)
  for _ in range(4):
    direction = rng.normal(size=kernel.shape).astype('float32')
    masked = kernel * mask[:, None]
    slope = (loss(masked + 5e-4 * direction) - loss(masked - 5e-4 * direction)) / 1e-3
    # Three digits: float32 losses, and a ReLU may have its bend in between.
    assert (found * direction).sum() == pytest.approx(slope, rel=2e-2, abs=2e-3)
  layer.kernel.assign(kernel)


def test_a_head_inside_reads_the_output_of_its_convolution():
  course = course_of(conv_net(), stages=1, data=batches(1))
  assert course.blocks == {'block1': 'conv1', 'block2': None}
  x, y = batches(1)[0]
  model, head = course.model, course._heads['conv1']
  between = keras.Model(model.input, model.get_layer('conv1').output)
  layer = model.get_layer('conv1')

  headed = course.headed('block1')
  assert isinstance(headed, Instrumented)
  outputs = headed(x, training=False)
  assert outputs.shape == (8, 8)
  np.testing.assert_allclose(outputs[:, :4], model(x, training=False), atol=1e-5)
  np.testing.assert_allclose(outputs[:, 4:], head(between(x), training=False), atol=1e-5)
  expected = cross_entropy(y, outputs[:, :4]) + cross_entropy(y, outputs[:, 4:])
  assert float(course.block_loss('block1')(y, outputs)) == pytest.approx(float(expected))

  with tf.GradientTape() as tape:
    # At the original's weights the reconstruction has no error and no gradient.
    loss = cross_entropy(y, head(between(x, training=False), training=False))
  slow = tape.gradient(loss, layer.kernel.value)
  fast = course._gradient('conv1')(np.array(layer.kernel), np.ones(4, 'float32'))
  np.testing.assert_allclose(fast, slow, atol=1e-5)


def informative_net(order):
  """Channels of 'make' are pixels of the image; 'read' uses them with falling weights."""
  inputs = keras.Input((4, 4, 4), name='images')
  make = layers.Conv2D(4, 1, use_bias=False, name='make')
  read = layers.Conv2D(3, 1, use_bias=False, name='read')
  x = layers.GlobalAveragePooling2D(name='pool')(read(make(inputs)))
  model = keras.Model(inputs, layers.Dense(2, name='dense')(x), name='informative')
  make.kernel.assign(np.eye(4).reshape(1, 1, 4, 4))
  strength = np.zeros(4)
  strength[list(order)] = [3.0, 1.0, 0.3, 0.0]
  read.kernel.assign(np.repeat(strength[:, None], 3, axis=1).reshape(1, 1, 4, 3))
  return model


@pytest.mark.parametrize('order', [(2, 0, 3, 1), (1, 3, 0, 2)])
def test_channels_join_in_the_order_of_what_they_give(order, monkeypatch):
  x = images(64, 4, 4)
  course = course_of(informative_net(order), 0.25, data=[(x, labels(64) % 2)], rate=1e-6, stages=0)
  joined = []
  original = DiscriminationAware._best

  def best(self, scores, path, own, chosen):
    found = original(self, scores, path, own, chosen)
    joined.append((path, found[1]))
    return found

  monkeypatch.setattr(DiscriminationAware, '_best', best)
  do_all(course)
  # The gradient of the squared error is the weight that is missing times the power of the input.
  assert [place for path, place in joined if path == 'read'] == list(order[:3])


def test_the_first_choice_is_the_largest_score_of_the_empty_layer():
  course = course_of(conv_net(), stages=0, iterations=1, data=batches(1))
  course.do('survey')
  kernel = np.array(course.model.get_layer('conv1').kernel)
  scores = channel_scores(course._gradient('conv1')(kernel, np.zeros(4, 'float32')))
  course.do('conv1')
  assert course.selected['conv1'][scores.argmax()]


@pytest.mark.parametrize('ratio, kept', [(0.5, 2), (0.3, 3), (0.75, 1)])
def test_counts_are_exact_and_the_rest_is_zero(ratio, kept):
  model = conv_net()
  before = model.get_weights()
  course = do_all(course_of(model, ratio))
  for path in ('conv1', 'head'):
    kernel = np.array(course.model.get_layer(path).kernel)
    used = np.abs(kernel).sum(axis=(*range(kernel.ndim - 2), -1)) > 0
    np.testing.assert_array_equal(used, course.selected[path])
    assert used.sum() == kept
  for one, other in zip(model.get_weights(), before, strict=True):
    np.testing.assert_array_equal(one, other)
  smaller = course.shrunk()
  assert smaller.get_layer('conv0').filters == smaller.get_layer('conv1').filters == kept
  x = images()
  np.testing.assert_allclose(smaller(x), course.model(x), atol=1e-5)
  assert [layer.name for layer in smaller.layers] == [layer.name for layer in model.layers]


def test_tuning_lowers_the_loss_and_channels_keep_their_weights_until_they_join():
  quick = do_all(course_of(conv_net(), iterations=1, rate=1e-9, data=batches(1)))
  for path, selected in quick.selected.items():
    kernel = np.array(quick.model.get_layer(path).kernel)[..., selected, :]
    original = np.array(quick.original.get_layer(path).kernel)[..., selected, :]
    np.testing.assert_allclose(kernel, original, atol=1e-6)
  tuned = do_all(course_of(conv_net(), iterations=30, data=batches(1)))
  assert tuned.losses['conv1'] < quick.losses['conv1']


@pytest.mark.parametrize('trunk', units.TRUNKS)
def test_trunk_modes_on_a_residual_net(trunk):
  course = do_all(course_of(residual_net(), trunk=trunk, iterations=1))
  smaller, x = course.shrunk(), images()
  np.testing.assert_allclose(smaller(x), course.model(x), atol=1e-5)
  assert smaller.get_layer('one_conv1').filters == 2
  assert smaller.get_layer('stem').filters == {'shared': 2, 'whole': 4}.get(
    trunk, smaller.get_layer('stem').filters
  )
  if trunk == 'shared':
    selected = course.selected
    np.testing.assert_array_equal(selected['one_conv1'], selected['two_conv1'])
    assert selected['one_conv1'].sum() == 2


def test_the_survey_sums_relative_squared_gradients_of_all_readers():
  model = residual_net()
  course = course_of(model, data=batches(2))
  unit = next(unit for unit in course._units if 'two_conv1' in unit.readers)
  assert set(unit.readers) == {'one_conv1', 'two_conv1', 'two_past'}
  squares = {path: np.zeros(4) for path in unit.readers}
  for x, y in batches(2):
    with tf.GradientTape(persistent=True) as tape:
      loss = cross_entropy(y, model(x, training=False))
    for path in squares:
      gradient = tape.gradient(loss, model.get_layer(path).kernel.value)
      squares[path] += channel_scores(gradient)
  sums = sum(found / found.sum() for found in squares.values())
  course.do('survey')
  assert set(np.flatnonzero(course.selected['two_past'])) == set(np.argsort(-sums)[:2])


def test_a_loss_that_is_not_finite_names_the_layer():
  course = course_of(conv_net(), rate=1e30, iterations=3)
  with pytest.raises(Diverged, match="Layer 'conv1': the loss or a weight .* a lower `rate`"):
    do_all(course)


def test_a_layer_is_traced_once_however_many_channels_join():
  calls = []
  course = course_of(conv_net(), stages=0, iterations=3)
  course._loss = lambda y, logits: calls.append(1) or cross_entropy(y, logits)
  course.do('survey')
  course.do('conv1')
  assert len(calls) == 1


def test_a_loss_of_the_original_that_is_not_finite_is_found_by_the_survey():
  model = residual_net()
  model.get_layer('stem').kernel.assign(np.full((3, 3, 3, 4), np.nan))
  with pytest.raises(Diverged, match='The original model'):
    course_of(model).do('survey')


def test_a_state_that_was_saved_goes_on_as_if_nothing_had_been():
  whole = do_all(course_of(residual_net()))
  parts = course_of(residual_net())
  steps = [step for step in whole.steps if step not in whole.blocks]
  assert len(steps) > 4
  for step in steps:
    kept = [np.array(variable) for variable in parts.variables]
    parts = course_of(residual_net())
    for variable, value in zip(parts.variables, kept, strict=True):
      variable.assign(value)
    parts.do(step)
  for one, other in zip(whole.variables, parts.variables, strict=True):
    np.testing.assert_array_equal(np.array(one), np.array(other))


@pytest.mark.parametrize('memory', [0, 2**30])
def test_memory_does_not_change_the_result(memory):
  model = conv_net()
  found, _ = units.units(ChannelGraph(model))
  counts = units.counts(found, 0.5)
  course = DiscriminationAware(
    model, found, counts, Discrimination(0, 0.01, 1), batches(3), cross_entropy, memory=memory
  )
  reference = do_all(course_of(model, stages=0, iterations=1, data=batches(3)))
  for one, other in zip(
    do_all(course).model.get_weights(), reference.model.get_weights(), strict=True
  ):
    np.testing.assert_array_equal(one, other)


def test_workers_with_equal_samples_choose_what_one_does():
  model = conv_net()
  found, _ = units.units(ChannelGraph(model))
  course = DiscriminationAware(
    model,
    found,
    units.counts(found, 0.5),
    Discrimination(1, 0.01, 2),
    batches(),
    cross_entropy,
    seed=3,
    total=lambda array: array + array,
  )
  for one, other in zip(do_all(course).variables, do_all(course_of(model)).variables, strict=True):
    np.testing.assert_array_equal(np.array(one), np.array(other))


def test_a_model_that_is_no_classifier_is_refused():
  inputs = keras.Input((8, 8, 3))
  model = keras.Model(inputs, layers.Conv2D(4, 3)(inputs), name='map')
  with pytest.raises(UserError, match=r"classifier with one output.*Received: 'map'"):
    classes(model)


@pytest.mark.parametrize('options', [{'stages': -1}, {'rate': 0.0}, {'iterations': 0}])
def test_nonsense_is_refused(options):
  with pytest.raises(UserError, match='Received'):
    Discrimination(**options)


# Runs of the learner.

SMALL = [
  '--learner=dis-chn-pruned',
  '--dcp_nb_stages=2',
  '--dcp_nb_iters_block=6',
  '--dcp_nb_iters_layer=1',
  '--channel_multiple=8',
  '--nb_epochs_rat=0.02',
  '--batch_size=64',
  '--save_step=2',
  '--export_formats=none',
]


def run(work_dir, *arguments):
  return main.run_with(
    ModelHelper, ['convnet_at_digits_run.py', f'--work_dir={work_dir}', *SMALL, *arguments]
  )


def loaded(work_dir, name):
  return keras.models.load_model(pathlib.Path(work_dir) / name, compile=False)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """Returns the folder of a run that nothing stopped, and its float model."""
  folder = tmp_path_factory.mktemp('finished')
  assert run(folder) == 0
  return folder


def test_a_run_leaves_a_smaller_model_without_heads(finished):
  pruned, whole = loaded(finished, 'pruned.keras'), loaded(finished, 'float.keras')
  assert [layer.name for layer in pruned.layers] == [layer.name for layer in whole.layers]
  assert [pruned.get_layer(f'conv{number}').filters for number in range(3)] == [8, 16, 32]
  report = json.loads((finished / 'report.json').read_text())
  assert report['compressed']['params'] < report['float']['params'] / 2
  assert {'selection', 'block1_training', 'block3_training'} <= set(report['seconds'])


class Killed(BaseException):
  """Stands for a process that ends right after what it did."""


def test_a_run_killed_time_and_again_ends_with_the_same_bits(finished, tmp_path, monkeypatch):
  """In one work folder, at places in the order of the course: in blocks and at layers."""
  places = ['survey', 'block1 training 3', 'block2 training 6', 'conv2']

  def make_deadly(owner, name, place_of):
    original = getattr(owner, name)

    def dying(*arguments, **options):
      original(*arguments, **options)
      if places and place_of(*arguments) == places[0]:
        raise Killed(places.pop(0))

    monkeypatch.setattr(owner, name, dying)

  make_deadly(
    training._Loop, 'on_train_batch_end', lambda loop, *_: f'{loop.schedule.title} {loop.step}'
  )
  make_deadly(ChannelLearner, 'do', lambda learner, course, step: step)
  arguments = [f'--pretrained={finished / "float.keras"}']
  for place in tuple(places):
    with pytest.raises(Killed, match=place):
      run(tmp_path, *arguments)
  assert not (tmp_path / 'pruned.keras').exists()
  with until_training('compressed'):
    run(tmp_path, *arguments)
  for one, other in zip(
    loaded(tmp_path, 'pruned.keras').get_weights(),
    loaded(finished, 'pruned.keras').get_weights(),
    strict=True,
  ):
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
  'flag, sentence',
  [
    ('--dcp_prune_ratio=1', '--dcp_prune_ratio must be a finite number at least 0 and below 1'),
    ('--dcp_nb_stages=-1', '--dcp_nb_stages must be an integer at least 0'),
    ('--dcp_lrn_rate_adam=0', '--dcp_lrn_rate_adam must be a finite number above 0'),
    ('--dcp_nb_iters_block=0', '--dcp_nb_iters_block must be an integer at least 1'),
    ('--dcp_nb_iters_layer=0', '--dcp_nb_iters_layer must be an integer at least 1'),
  ],
)
def test_a_flag_out_of_range_is_one_sentence(tmp_path, capfd, flag, sentence):
  assert run(tmp_path, flag) == 2
  assert sentence in capfd.readouterr().err


def test_a_rate_that_diverges_names_its_flag(finished, tmp_path, capfd):
  arguments = ['--dcp_lrn_rate_adam=1e30', '--dcp_nb_iters_block=1']
  assert run(tmp_path, f'--pretrained={finished / "float.keras"}', *arguments) == 2
  message = capfd.readouterr().err
  assert '--dcp_lrn_rate_adam' in message and 'Traceback' not in message


def test_workers_share_the_iterations():
  learner = DiscriminationPruned.__new__(DiscriminationPruned)
  learner.runtime = type('Runtime', (), {'size': 4})()
  assert [learner._share(count) for count in (500, 3)] == [125, 1]
