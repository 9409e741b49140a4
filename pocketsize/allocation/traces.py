"""How curved the loss is in each layer: the mean diagonal of its Hessian (HAWQ-v2).

Dong et al. 2020, arXiv:1911.03852, by Hutchinson's estimate: tr(H) is the mean of v'Hv over vectors
v of independent random signs. Hv is the gradient of g'v, with g the gradient of the loss, so H is
never there.

One product serves all layers. With signs v_i in layer i, what layer i gets of H v is
sum_j H_ij v_j; times v_i' its mean is tr(H_ii), for v_i' H_ij v_j of two layers has mean zero. So
each layer's estimate is unbiased; the cross terms add to its variance, which the standard error
shows.

Gradients are taken twice backwards. Forwards over backwards computes the same in as much time, and
takes longer to compile.

Deviation 1: NNCF, whose stop rule this is, stops when the mean hardly changed once. That happens by
chance; here it must hold three times in a row.
"""

import json
import pathlib
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from pocketsize import targets
from pocketsize.allocation.workers import on_first
from pocketsize.copies import copied
from pocketsize.errors import UserError
from pocketsize.files import write_json
from pocketsize.inference import Inference

_IN_A_ROW = 3
# What the change of the mean is relative to has this added (NNCF).
_SMALL = 1e-6


class Estimate(NamedTuple):
  """Traces, and how far they can be trusted.

  Attributes:
    means: {path: mean diagonal of the Hessian, over the layer's weights}.
    errors: {path: its standard error}, over the vectors; the images are taken as given.
    rounds: through all batches; an infinite error after only one.
  """

  means: dict
  errors: dict
  rounds: int


def traces(model, loss, batches, paths, **options):
  """Returns {path: mean diagonal of the Hessian}; arguments as for `estimate`."""
  return estimate(model, loss, batches, paths, **options).means


def estimate(
  model,
  loss,
  batches,
  paths,
  *,
  iterations=200,
  tolerance=1e-3,
  seed=0,
  path=None,
  rank=0,
  size=1,
  total=lambda array: array,
  follow=iter,
):
  """Returns the `Estimate` of the mean diagonal of the loss's Hessian for the weights of layers.

  The model is computed as in inference, in float32, batch norm by its moving statistics. It is
  copied; a layer at two paths counts as two. Memory is that of one batch.

  In each round every batch gets a vector of its own; a round's value is the mean over the batches.
  Rounds end when the mean over them, summed over layers, has changed by less than `tolerance` of
  itself in three rounds in a row. A change of c in round n means a standard error of about
  c sqrt(n): at 1e-3 the sum is known to about 1 %; single layers are known worse, see `errors`.

  Args:
    model: a built Functional or Sequential model.
    loss: `loss(y, outputs)`, a tensor of which the mean is taken.
    batches: list of (x, y); a few training images, in batches that fit in memory.
    paths: of layers, see `targets.weight_points`.
    iterations: the most rounds, at least 1.
    tolerance: the least relative change that counts; 0: all rounds.
    seed: integer; the vectors are a function of it, the round and the batch.
    path: of a JSON file that keeps every round; those that it has are not computed again. Of what
      they follow from it knows the seed, the layers and the number of batches: remove it once the
      model, the loss or the images change. Only rank 0 reads and writes it. None: in memory only.
    rank, size: number of this worker, and how many there are. All have the same batches and each
      computes its part; the result is that of one worker.
    total: sums an array over the workers.
    follow: `follow(rounds)` gives them one by one, for a progress bar; the rest may not be asked
      for.

  Raises:
    UserError: there is no batch, `iterations` or `tolerance` is out of range, or the file is of
      other traces.
  """
  batches, paths = list(batches), list(paths)
  if not batches:
    raise UserError('Traces need data: `batches` must give at least one. Received none.')
  if iterations < 1 or not tolerance >= 0.0:
    raise UserError(
      '`iterations` must be at least 1 and `tolerance` at least 0. '
      f'Received: {iterations}, {tolerance}.'
    )
  product = _product(Inference(copied(model)), loss, paths)
  about = {'seed': seed, 'batches': len(batches), 'layers': paths}
  kept = on_first(lambda: _Rounds(about, path), rank, total) or _Rounds(about)
  # What rank 0 has read and the others have not is their sum.
  done = int(total(np.array([len(kept.values)], np.float64))[0])
  values = kept.values if len(kept.values) else np.zeros((done, len(paths)))
  if done:
    values = total(values)
  # Where an undisturbed course would have ended.
  ends = [n for n in range(1, done + 1) if n == iterations or _is_settled(values[:n], tolerance)]
  values = values[: ends[0]] if ends else values
  for _ in follow(range(0 if ends else iterations - done)):
    found = np.zeros((len(batches), len(paths)))
    for number in range(rank, len(batches), size):
      x, y = batches[number]
      found[number] = product(x, y, [seed, len(values) * len(batches) + number])
    values = np.append(values, total(found).mean(axis=0)[None], axis=0)
    kept.write(values)
    if _is_settled(values, tolerance):
      break
  spread = values.std(axis=0, ddof=1) if len(values) > 1 else np.full(len(paths), np.inf)
  return Estimate(
    dict(zip(paths, values.mean(axis=0).tolist(), strict=True)),
    dict(zip(paths, (spread / np.sqrt(len(values))).tolist(), strict=True)),
    len(values),
  )


def _is_settled(values, tolerance):
  """Whether the mean over the rounds [rounds, layers] stood still in the last ones."""
  if len(values) <= _IN_A_ROW:
    return False
  counts = range(len(values) - _IN_A_ROW, len(values) + 1)
  sums = np.array([values[:count].mean(axis=0).sum() for count in counts])
  return bool(np.all(np.abs(np.diff(sums)) < tolerance * (np.abs(sums[:-1]) + _SMALL)))


class _Rounds:
  """The values of rounds, in a file if there is a path.

  Args:
    about: JSON-able dict of what they follow from.
    path: of the file, or None.
  """

  def __init__(self, about, path=None):
    self._path, self._about = path and pathlib.Path(path), about
    self.values = np.zeros((0, len(about['layers'])))
    if self._path and self._path.exists():
      self._read()

  def write(self, values):
    if self._path:
      write_json(self._path, {**self._about, 'rounds': values.tolist()})

  def _read(self):
    try:
      about = json.loads(self._path.read_text())
      self.values = np.array(about.pop('rounds'), np.float64).reshape(-1, len(about['layers']))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise UserError(
        f'{self._path} holds no traces: remove it to compute them anew. Received: {error!r}.'
      ) from error
    if about != self._about:
      raise UserError(
        f'{self._path} holds traces of other layers or batches, or by another seed: give another '
        f'path, or remove it. Received: {about}.'
      )


def _product(inference, loss, paths):
  """Returns a function of x, y and a [2] seed: the [paths] means of v * Hv over each layer."""
  layers = [inference.graph.layers[path] for path in paths]
  kernels = [
    [getattr(layer, point).value for point in targets.weight_points(layer)] for layer in layers
  ]
  flat = [kernel for each in kernels for kernel in each]

  def gradient(x, y):
    with tf.GradientTape(watch_accessed_variables=False) as tape:
      tape.watch(flat)
      value = tf.reduce_mean(loss(y, inference(x)))
    return tape.gradient(value, flat, unconnected_gradients=tf.UnconnectedGradients.ZERO)

  @tf.function(autograph=False, reduce_retracing=True)
  def compute(x, y, seed):
    vectors = _signs([kernel.shape for kernel in flat], seed)
    with tf.GradientTape(watch_accessed_variables=False) as tape:
      tape.watch(flat)
      inner = tf.add_n(
        [tf.reduce_sum(each * v) for each, v in zip(gradient(x, y), vectors, strict=True)]
      )
    curved = tape.gradient(inner, flat, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    sums = iter([tf.reduce_sum(v * each) for v, each in zip(vectors, curved, strict=True)])
    return tf.stack(
      [
        sum(next(sums) for _ in each) / sum(kernel.shape.num_elements() for kernel in each)
        for each in kernels
      ]
    )

  def product(x, y, seed):
    x, y = (keras.tree.map_structure(tf.convert_to_tensor, each) for each in (x, y))
    return compute(x, y, tf.constant(seed)).numpy()

  return product


def _signs(shapes, seed):
  """Returns float32 tensors of -1 and 1, all of them a function of a [2] seed."""
  count = sum(shape.num_elements() for shape in shapes)
  signs = (
    2.0 * tf.cast(tf.random.stateless_uniform([count], seed, 0, 2, tf.int32), tf.float32) - 1.0
  )
  parts = tf.split(signs, [shape.num_elements() for shape in shapes])
  return [tf.reshape(part, shape) for part, shape in zip(parts, shapes, strict=True)]
