"""Kernels of each layer at each level, and how far they are from the model's own.

Each is computed when it is first asked for and kept, since roll-outs ask for the same again.
"""

import dataclasses
import functools

import keras
import numpy as np

from pocketsize import targets
from pocketsize.allocation.kept import MEMORY, Kept
from pocketsize.graph import Graph
from pocketsize.instrument import instrument
from pocketsize.quantization.placing import FLOAT_BITS
from pocketsize.sparsity.magnitude import magnitude_mask
from pocketsize.sparsity.refit import refit


class Variants:
  """Kernels by level.

  Args:
    model: a built Functional or Sequential model, which does not change from now on.
    variables: list of `problem.Variable`s that are named by the paths of layers.
    change: `change(path, point, kernel, choice)` returns the kernel for a choice; `sparse`, or
      what `refitted` or `quantized` returns.
    memory: bytes for kernels that are kept, see `kept.Kept`.
  """

  def __init__(self, model, variables, change, memory=MEMORY):
    layers = Graph(model).layers
    self._variables = {variable.name: variable for variable in variables}
    self._kernels = {
      path: {
        point: keras.ops.convert_to_numpy(getattr(layers[path], point))
        for point in targets.weight_points(layers[path])
      }
      for path in self._variables
    }
    self._change = change
    self._kept = Kept(memory)
    self._errors = {}

  def kernels(self, levels):
    """Returns {path: {point: float32 array}} for [variables] levels; not to be written to."""
    return {
      path: {point: self._kernel(path, point, level) for point in self._kernels[path]}
      for path, level in zip(self._variables, levels, strict=True)
    }

  def errors(self, path):
    """Returns the squared errors ||Q(W) - W||^2 of a layer's choices, over all of its weights.

    Returns:
      {path: [choices] float64 array, in the order of the levels}, of this one layer.
    """
    if path not in self._errors:
      self._errors[path] = np.array(
        [
          sum(
            np.sum(np.square(self._kernel(path, point, level) - kernel, dtype=np.float64))
            for point, kernel in self._kernels[path].items()
          )
          for level in range(len(self._variables[path].choices))
        ]
      )
    return {path: self._errors[path]}

  def _kernel(self, path, point, level):
    own = self._kernels[path][point]
    return self._kept.get(
      (path, point, int(level)),
      lambda: self._change(path, point, own, self._variables[path].choices[level]),
      own,
    )


def sparse(path, point, kernel, ratio):
  """Returns a kernel with a share `ratio` of its weights, the smallest, at zero; a float32 array.

  Args:
    path, point: where it is; of no influence.
    kernel: float array.
    ratio: share to drop, in [0, 1].
  """
  return np.asarray(kernel, np.float32) * magnitude_mask(kernel, ratio)


def refitted(problems):
  """Returns the `change` of `Variants` that drops the smallest weights and refits the others.

  Layers without a problem are not refitted.

  Args:
    problems: {path: `gram.Problem`}.
  """

  def change(path, point, kernel, ratio):
    problem = problems.get(path)
    if problem is None or not ratio:
      return sparse(path, point, kernel, ratio)
    mask = magnitude_mask(kernel, ratio).reshape(problem.kernel.shape)
    return refit(problem, mask).astype(np.float32).reshape(kernel.shape)

  return change


def quantized(model, compressor, configs):
  """Returns the `change` of `Variants` that quantizes as a compressor does before its first step.

  All that the compressor knows of weights counts: learned scales begin, and batch norm is folded
  in, as in training. Bits of 32 leave a kernel as it is.

  Args:
    model: the model of the `Variants`.
    compressor: class of a `Quantization` compressor.
    configs: {path: its configuration}; their bits of weights and ends do not count.
  """

  @functools.cache
  def overlay(bits):
    rules = [
      targets.Rule(_of_bits(config, bits), op_names=(path,)) for path, config in configs.items()
    ]
    quantization = compressor(rules)
    instrumented = instrument(model, quantization.plan(Graph(model)))
    quantization.bind(instrumented)
    quantization.update(0)
    return instrumented

  def change(path, point, kernel, bits):
    return kernel if bits == FLOAT_BITS else overlay(int(bits)).baked(path, point)

  return change


def _of_bits(config, bits):
  return dataclasses.replace(
    config, weight_bits=bits, activation_bits=FLOAT_BITS, end_bits=0, end_weight_bits=None
  )
