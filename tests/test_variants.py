"""Kernels by level and their squared errors."""

import keras
import numpy as np
import pytest
from keras import layers

from pocketsize.allocation import variants
from pocketsize.allocation.problem import Variable
from pocketsize.allocation.variants import Variants
from pocketsize.errors import UserError
from pocketsize.folding import batch_norm_factors
from pocketsize.quantization.non_uniform import NonUniform, NonUniformConfig
from pocketsize.quantization.quantizers import quantize_symmetric, weight_scale
from pocketsize.quantization.uniform import Uniform, UniformConfig
from tests import toys
from tests.test_scoring import randomized


def on_grid(kernel, bits):
  """A kernel on the grid of each output channel, by the arithmetic alone."""
  rows = np.reshape(kernel, (-1, kernel.shape[-1])).T
  return np.asarray(quantize_symmetric(kernel, weight_scale(rows, bits), bits))


def test_quantized_kernels_and_their_errors():
  model = toys.conv_net()
  configs = {'conv1': UniformConfig(), 'head': UniformConfig()}
  variables = [Variable('conv1', (2, 4, 8)), Variable('head', (3, 32))]
  made = Variants(model, variables, variants.quantized(model, Uniform, configs))
  own = {path: model.get_layer(path).kernel.numpy() for path in ('conv1', 'head')}
  for levels in ([0, 0], [1, 1], [2, 0]):
    kernels = made.kernels(np.array(levels))
    assert list(kernels) == ['conv1', 'head']
    for (path, choices), level in zip(variables_of(variables), levels, strict=True):
      bits = choices[level]
      expected = own[path] if bits == 32 else on_grid(own[path], bits)
      # The last layer has the bits that it is asked for, not those of an end.
      np.testing.assert_allclose(kernels[path]['kernel'], expected, atol=1e-6)
  errors = [np.sum((on_grid(own['conv1'], bits) - own['conv1']) ** 2) for bits in (2, 4, 8)]
  np.testing.assert_allclose(made.errors('conv1')['conv1'], errors, rtol=1e-4)
  assert made.errors('head')['head'][1] == 0.0


def variables_of(variables):
  return [variable[:2] for variable in variables]


def test_kernels_are_as_training_begins_with_batch_norm_folded_in():
  model = randomized(toys.conv_net())
  config = UniformConfig(fold_batch_norm=True, granularity='tensor')
  change = variants.quantized(model, Uniform, {'conv1': config})
  kernel = Variants(model, [Variable('conv1', (3,))], change).kernels([0])['conv1']['kernel']
  folded = kernel * batch_norm_factors(model.get_layer('bn1'))[0]
  assert len(np.unique(np.round(folded, 5))) <= 7
  assert len(np.unique(np.round(kernel, 5))) > 7


def test_centres_have_as_many_values_as_the_bits_say():
  model = toys.conv_net()
  change = variants.quantized(model, NonUniform, {'conv1': NonUniformConfig()})
  made = Variants(model, [Variable('conv1', (1, 2))], change)
  assert [len(np.unique(made.kernels([level])['conv1']['kernel'])) for level in (0, 1)] == [2, 4]


def test_bits_that_an_algorithm_has_not_are_refused():
  model = toys.conv_net()
  change = variants.quantized(model, NonUniform, {'conv1': NonUniformConfig()})
  with pytest.raises(UserError, match='`weight_bits` must be .* Received: 12'):
    Variants(model, [Variable('conv1', (12,))], change).kernels([0])


def separable():
  """A separable convolution with 2 and 4 weights that can be worked out by hand."""
  model = keras.Sequential([keras.Input((4, 4, 2)), layers.SeparableConv2D(2, 1, name='pair')])
  model.get_layer('pair').depthwise_kernel.assign(np.reshape([1.0, -3.0], (1, 1, 2, 1)))
  model.get_layer('pair').pointwise_kernel.assign(np.reshape([1.0, 2.0, -4.0, 5.0], (1, 1, 2, 2)))
  return model


def test_the_smallest_weights_of_each_kernel_are_zero():
  """Half of (1, -3) and of (1, 2, -4, 5): 1 + (1 + 4) = 6."""
  model = separable()
  made = Variants(model, [Variable('pair', (1.0, 0.5, 0.0))], variants.sparse)
  kernels = made.kernels([1])['pair']
  assert np.ravel(kernels['depthwise_kernel']).tolist() == [0.0, -3.0]
  assert np.ravel(kernels['pointwise_kernel']).tolist() == [0.0, 0.0, -4.0, 5.0]
  assert made.errors('pair')['pair'].tolist() == [56.0, 6.0, 0.0]


def test_kernels_are_made_once_as_long_as_there_is_memory():
  calls = []

  def change(path, point, kernel, choice):
    calls.append(choice)
    return kernel * np.float32(choice)

  model, choices = separable(), [Variable('pair', (0.0, 1.0))]
  made = Variants(model, choices, change)
  for levels in ([1], [0], [1]):
    assert made.kernels(levels)['pair']['pointwise_kernel'].ravel()[3] == 5.0 * levels[0]
  assert made.errors('pair')['pair'].tolist() == [56.0, 0.0]
  assert len(calls) == 4
  # Six weights of 4 bytes at each level.
  small = Variants(model, choices, change, memory=24)
  small.kernels([0])
  with pytest.warns(UserWarning, match='exceed `memory`'):
    small.kernels([1])
  calls.clear()
  assert small.kernels([1])['pair']['depthwise_kernel'].ravel().tolist() == [1.0, -3.0]
  small.kernels([0])
  assert calls == [1.0, 1.0]
  assert small.errors('pair')['pair'].tolist() == [56.0, 0.0]
