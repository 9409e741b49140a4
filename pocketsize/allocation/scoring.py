"""What a model is worth with other kernels: figures on a fixed set of batches."""

import keras
import numpy as np
import tensorflow as tf

from pocketsize import calibration
from pocketsize.copies import copied
from pocketsize.inference import Inference
from pocketsize.instrument import instrument


class Scorer:
  """Scores kernels in a copy of a model, which is compiled once.

  Kernels of few bits shift what a batch norm sees. With `bn_batches` its statistics are estimated
  anew in each score, as `calibration.re_estimate_batch_norm` does it, and put back afterwards.

  Args:
    model: a built Functional or Sequential model; it is copied, and what happens to it later does
      not matter.
    batches: list of (x, y), NumPy arrays with samples first; all have the same size but perhaps
      the last.
    evaluator: has `reset()`, `update(y, outputs)` and `result()`, which returns {name: float}.
    bn_batches: list of x in batches as large as in training; none: statistics stay.
  """

  def __init__(self, model, batches, evaluator, bn_batches=()):
    self._model = copied(model)
    self._batches = list(batches)
    self._evaluator = evaluator
    self._inference = Inference(self._model)
    self._layers = self._inference.graph.layers
    # {(path, point): the model's own kernel} of those that are another now.
    self._replaced = {}
    self._instrumented = instrument(self._model)
    self._norms = [node.operation for node in calibration.batch_norm_calls(self._instrumented)]
    self._bn_batches = list(bn_batches) if self._norms else []
    self._statistics = tf.function(
      lambda x: calibration.batch_statistics(self._instrumented, x), autograph=False
    )

  def score(self, kernels):
    """Returns the evaluator's {name: float} with other kernels.

    Args:
      kernels: {path: {point: array}} in place of the model's own, for this call; see
        `targets.weight_points`.
    """
    self._place(kernels)
    if not self._bn_batches:
      return self._evaluate()
    own = [(moving, moving.numpy()) for norm in self._norms for moving in _moving(norm)]
    try:
      self._estimate()
      return self._evaluate()
    finally:
      for variable, value in own:
        variable.assign(value)

  def _place(self, kernels):
    given = {(path, point): kernels[path][point] for path in kernels for point in kernels[path]}
    for place in self._replaced.keys() - given.keys():
      self._variable(*place).assign(self._replaced.pop(place))
    for place, kernel in given.items():
      variable = self._variable(*place)
      if place not in self._replaced:
        self._replaced[place] = variable.numpy()
      variable.assign(kernel)

  def _variable(self, path, point):
    return getattr(self._layers[path], point)

  def _evaluate(self):
    self._evaluator.reset()
    for x, y in self._batches:
      outputs = self._inference.compiled(x)
      self._evaluator.update(y, keras.tree.map_structure(keras.ops.convert_to_numpy, outputs))
    return self._evaluator.result()

  def _estimate(self):
    """Sets the moving statistics of batch norms to their means over `bn_batches` and calls."""
    found = {id(norm): [] for norm in self._norms}
    for x in self._bn_batches:
      statistics = self._statistics(keras.tree.map_structure(tf.convert_to_tensor, x))
      for norm, each in zip(self._norms, statistics, strict=True):
        found[id(norm)].append(each.numpy())
    for norm in {id(norm): norm for norm in self._norms}.values():
      for variable, value in zip(_moving(norm), np.mean(found[id(norm)], axis=0), strict=True):
        variable.assign(value)


def _moving(norm):
  return norm.moving_mean, norm.moving_variance
