"""The networks of an actor-critic: blocks of dense, layer norm and ReLU (Plappert et al. 2018,
arXiv:1706.01905), as functions of their weights.
"""

import keras
import numpy as np
import tensorflow as tf


def make_actor(state_size, low, high, depth, width, rng):
  """Returns the network from states [n, state_size] to actions [n, actions] between the bounds.

  Args:
    state_size: numbers in a state.
    low, high: [actions] bounds; a sigmoid goes from one to the other.
    depth, width: hidden blocks, and the units of each.
    rng: `np.random.Generator` of the first weights.
  """

  def bounded(x):
    return low.astype(np.float32) + (high - low).astype(np.float32) * keras.ops.sigmoid(x)

  states = x = keras.Input((state_size,), name='states')
  for index in range(depth):
    x = _block(x, width, index, rng)
  return keras.Model(states, _last_layer(len(low), rng, bounded)(x), name='actor')


def make_critic(state_size, action_size, depth, width, rng):
  """Returns the network from states [n, state_size] and actions [n, action_size] to values [n, 1].

  Args:
    state_size, action_size: numbers in a state and in an action.
    depth, width: blocks behind the one that sees the state alone, and the units of each.
    rng: `np.random.Generator` of the first weights.
  """
  states = keras.Input((state_size,), name='states')
  actions = keras.Input((action_size,), name='actions')
  x = keras.layers.Concatenate(name='join')([_block(states, width, 0, rng), actions])
  for index in range(1, depth + 1):
    x = _block(x, width, index, rng)
  return keras.Model([states, actions], _last_layer(1, rng)(x), name='critic')


def values(network):
  """Returns the tensors of a network's weights, a list like `network.weights`."""
  return [weight.value for weight in network.weights]


def compute(network, weights, inputs):
  """Returns what a network computes with other weights, a list like `network.weights`."""
  return network.stateless_call(weights, [], inputs)[0]


def perturbed(network, std, rng):
  """Returns a network's weights with noise N(0, std^2) on all but those of layer norms.

  Layer norms bring the noise of all layers to one scale (Plappert et al. 2018, section 3).

  Returns:
    list of float32 tensors, like `network.weights`.
  """
  is_norm = [
    isinstance(layer, keras.layers.LayerNormalization)
    for layer in network.layers
    for _ in layer.weights
  ]
  return [
    tf.constant(weight if is_kept else weight + rng.normal(0.0, std, weight.shape), tf.float32)
    for weight, is_kept in zip(network.get_weights(), is_norm, strict=True)
  ]


def kernel_decay(network):
  """Returns half the sum of a network's squared kernels, a scalar tensor."""
  return sum(tf.nn.l2_loss(weight.value) for weight in network.weights if weight.name == 'kernel')


# Names and seeds are given everywhere: Keras would else take them from counters and random numbers
# that it shares with the rest of the program.
def _block(x, width, index, rng):
  glorot = keras.initializers.GlorotUniform(seed=int(rng.integers(2**31)))
  x = keras.layers.Dense(width, kernel_initializer=glorot, name=f'dense{index}')(x)
  x = keras.layers.LayerNormalization(name=f'norm{index}')(x)
  return keras.layers.ReLU(name=f'relu{index}')(x)


def _last_layer(units, rng, activation=None):
  # Lillicrap et al. 2016, section 7: first actions and values do not depend on the state.
  near_zero = keras.initializers.RandomUniform(-3e-3, 3e-3, seed=int(rng.integers(2**31)))
  return keras.layers.Dense(units, activation, kernel_initializer=near_zero, name='last')
