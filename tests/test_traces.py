"""Hutchinson's estimates against exact Hessians."""

import contextlib
import functools
import json

import keras
import numpy as np
import pytest
import scipy.linalg
import tensorflow as tf
from keras import layers

from pocketsize import targets
from pocketsize.allocation import traces
from pocketsize.errors import UserError
from pocketsize.graph import Graph
from tests import toys
from tests.test_scoring import randomized
from tests.workers import threads

# At least as many as the weights of a net that is tested with all of Hadamard's rows.
ROWS = 128
BATCHES = 2


def cross_entropy(y, outputs):
  return tf.nn.sparse_softmax_cross_entropy_with_logits(y, outputs)


def exact(model, loss, batches, paths):
  """{path: mean diagonal of the Hessian}, from the Hessian itself."""
  found = {}
  for path in paths:
    layer = Graph(model).layers[path]
    weights = [getattr(layer, point).value for point in targets.weight_points(layer)]
    diagonals = []
    for x, y in batches:
      with tf.GradientTape(persistent=True) as outer:
        outer.watch(weights)
        with tf.GradientTape() as inner:
          inner.watch(weights)
          value = tf.reduce_mean(loss(y, model(x, training=False)))
        gradients = inner.gradient(value, weights)
      hessians = [
        outer.jacobian(gradient, weight)
        for gradient, weight in zip(gradients, weights, strict=True)
      ]
      sizes = [int(np.prod(weight.shape)) for weight in weights]
      diagonals.append(
        np.concatenate(
          [np.diag(np.reshape(each, (n, n))) for each, n in zip(hessians, sizes, strict=True)]
        )
      )
    found[path] = float(np.mean(diagonals))
  return found


def batches(count=2, size=6):
  rng = np.random.default_rng(4)
  return [
    (toys.images(size, seed=seed), rng.integers(0, 4, size)) for seed in range(10, 10 + count)
  ]


def shared_net():
  """A convolution that is called twice, a batch norm that does not fold into it, then a frozen
  separable convolution and a dense layer.
  """
  x = inputs = keras.Input((8, 8, 3), name='images')
  conv = layers.Conv2D(3, 3, padding='same', activation='softplus', name='twice')
  x = layers.BatchNormalization(name='alone')(conv(conv(x)))
  x = layers.SeparableConv2D(3, 3, activation='softplus', name='pair')(x)
  x = layers.GlobalAveragePooling2D()(x)
  model = keras.Model(inputs, layers.Dense(4, name='head')(x))
  model.get_layer('pair').trainable = False
  return model


def hadamard(shapes, seed):
  """In place of random signs: of n vectors the last seed's part counts, each row of Hadamard's
  matrix. Any two places have as often the same sign as another, so that n of them are exact.
  """
  sizes = [shape.num_elements() for shape in shapes]
  matrix = tf.constant(scipy.linalg.hadamard(ROWS)[:, : sum(sizes)], tf.float32)
  parts = tf.split(tf.gather(matrix, seed[1] // BATCHES), sizes)
  return [tf.reshape(part, shape) for part, shape in zip(parts, shapes, strict=True)]


@pytest.mark.parametrize(
  ('make', 'paths'),
  [
    (toys.conv_net, ['conv0', 'head']),
    (toys.nested_net, ['base/stem/conv', 'head']),
    (shared_net, ['twice', 'pair']),
  ],
)
def test_traces_are_those_of_the_exact_hessian(make, paths, monkeypatch):
  monkeypatch.setattr(traces, '_signs', hadamard)
  model, data = randomized(make(), seed=5), batches(BATCHES)
  found = traces.traces(model, cross_entropy, data, paths, iterations=ROWS, tolerance=0.0)
  assert found == pytest.approx(exact(model, cross_entropy, data, paths), rel=1e-3)


def test_random_signs_are_unbiased():
  model = keras.Sequential(
    [
      keras.Input((8,)),
      layers.Dense(6, activation='softplus', name='first'),
      layers.Dense(4, name='second'),
    ]
  )
  randomized(model, seed=6)
  rng = np.random.default_rng(7)
  data = [(rng.normal(size=(256, 8)).astype('float32'), rng.integers(0, 4, 256))]
  found = traces.estimate(
    model, cross_entropy, data, ['first', 'second'], iterations=2000, tolerance=0.0
  )
  for path, trace in exact(model, cross_entropy, data, found.means).items():
    assert abs(found.means[path] - trace) < 4.0 * found.errors[path]
    assert found.means[path] == pytest.approx(trace, rel=0.02)


def test_a_diagonal_hessian_is_exact_with_each_vector():
  """(w'x)^2 / 2 for x = 1, 2, 3 in one place each: the diagonal is 1/3, 4/3, 9/3."""
  model = keras.Sequential(
    [keras.Input((3,)), layers.Dense(1, use_bias=False, name='dense')], name='line'
  )
  data = [(np.diag([1.0, 2.0, 3.0]).astype('float32'), np.zeros((3, 1), 'float32'))]
  shown = []

  def follow(rounds):
    for each in rounds:
      shown.append((each, len(rounds)))
      yield each

  for seed in range(3):
    found = traces.estimate(
      model,
      lambda y, outputs: 0.5 * tf.square(outputs - y),
      data,
      ['dense'],
      seed=seed,
      follow=follow,
    )
    assert found.means['dense'] == pytest.approx(14 / 9, rel=1e-6)
    assert found.errors['dense'] == pytest.approx(0.0, abs=1e-6)
    # The mean stands still three times in a row.
    assert found.rounds == 4
  assert shown == 3 * [(each, 200) for each in range(4)]


def test_the_error_is_worked_out_by_hand_and_the_seed_decides():
  """The mean over the diagonal is 2.5 + 2 or 2.5 - 2."""

  def estimated(**options):
    return traces.estimate(*arguments, **options)

  arguments = line()
  found = estimated(iterations=20, tolerance=0.0, seed=1)
  excess = (found.means['dense'] - 2.5) / 2.0
  assert round(10 * excess) == pytest.approx(10 * excess, abs=1e-5)
  assert abs(excess) < 1.0
  error = 2.0 * np.sqrt((1.0 - excess**2) / 19)
  assert found.errors['dense'] == pytest.approx(error, rel=1e-5)
  assert estimated(iterations=20, tolerance=0.0, seed=1) == found
  assert len({estimated(iterations=5, tolerance=0.0, seed=s).means['dense'] for s in range(4)}) > 1
  assert estimated(iterations=1).errors == {'dense': np.inf}


def test_workers_share_the_batches_and_what_was_kept(tmp_path):
  model, data = randomized(toys.conv_net(), seed=5), batches(3)

  def estimated(iterations=3, **shared):
    return traces.estimate(
      model, cross_entropy, data, ['conv0', 'head'], iterations=iterations, seed=2, **shared
    )

  alone = estimated()
  for each in threads.together(2, estimated):
    assert each.means == pytest.approx(alone.means, rel=1e-5)
    assert each.rounds == alone.rounds
  kept = functools.partial(estimated, path=tmp_path / 'traces.json')
  threads.together(2, functools.partial(kept, 2))
  for each in threads.together(2, kept):
    assert each.means == pytest.approx(alone.means, rel=1e-5)
    assert each.rounds == alone.rounds


def line():
  """Returns the arguments for (w1 + 2 w2)^2 / 2: v'Hv is 5 + 4 or 5 - 4."""
  model = keras.Sequential([keras.Input((2,)), layers.Dense(1, use_bias=False, name='dense')])
  data = [(np.array([[1.0, 2.0]], 'float32'), np.zeros((1, 1), 'float32'))]
  return model, lambda y, outputs: 0.5 * tf.square(outputs - y), data, ['dense']


class Killed(Exception):
  pass


@pytest.mark.parametrize('after', [1, 5, 6])
def test_a_kill_after_a_round_costs_none_of_those_before(after, tmp_path):
  """The last ones before the mean stands still are among them."""
  path, arguments = tmp_path / 'traces.json', line()
  options = {'tolerance': 0.4, 'seed': 0}
  whole = traces.estimate(*arguments, **options)
  assert whole.rounds == 6
  begun = []

  def dying(rounds):
    for each in rounds:
      if each == after:
        raise Killed
      yield each

  def counted(rounds):
    for each in rounds:
      begun.append(each)
      yield each

  # The loop that has all it needs asks for no further round.
  with contextlib.suppress(Killed):
    traces.estimate(*arguments, **options, path=path, follow=dying)
  assert len(json.loads(path.read_text())['rounds']) == after
  assert traces.estimate(*arguments, **options, path=path, follow=counted) == whole
  assert len(begun) == 6 - after
  assert traces.estimate(*arguments, **options, path=path, iterations=6) == whole


def test_kept_rounds_beyond_the_end_do_not_count(tmp_path):
  """Fewer rounds are asked for, or more change is allowed, than when they were computed."""
  path, arguments = tmp_path / 'traces.json', line()
  assert traces.estimate(*arguments, tolerance=0.0, iterations=20, path=path).rounds == 20
  content = path.read_text()
  for options in ({'iterations': 5, 'tolerance': 0.0}, {'tolerance': 0.4}, {'iterations': 1}):
    wanted = traces.estimate(*arguments, **options)
    assert traces.estimate(*arguments, **options, path=path) == wanted
  assert path.read_text() == content


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('{"seed": 0, "batches": 1, "layers": ["dense"], "rou', 'traces.json holds no traces: remove'),
    ('[]', 'holds no traces'),
    ('{"seed": 0, "batches": 1, "layers": ["dense"], "rounds": [[1.0], [1.0, 2.0]]}', 'no traces'),
    (
      '{"seed": 1, "batches": 1, "layers": ["dense"], "rounds": [[1.0]]}',
      "other layers.*'seed': 1",
    ),
    ('{"seed": 0, "batches": 2, "layers": ["dense"], "rounds": [[1.0]]}', 'holds traces of other'),
    ('{"seed": 0, "batches": 1, "layers": ["conv"], "rounds": [[1.0]]}', 'holds traces of other'),
  ],
)
def test_a_file_of_something_else_is_refused(content, message, tmp_path):
  path = tmp_path / 'traces.json'
  path.write_text(content)
  with pytest.raises(UserError, match=message):
    traces.estimate(*line(), path=path)
  assert path.read_text() == content


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'batches': []}, 'Received none'),
    ({'iterations': 0}, 'Received: 0, 0.001'),
    ({'tolerance': -1.0}, 'Received: 200, -1.0'),
  ],
)
def test_nonsense_is_refused(options, message):
  arguments = {'batches': batches(1), **options}
  with pytest.raises(UserError, match=message):
    traces.estimate(toys.conv_net(), cross_entropy, paths=['head'], **arguments)
