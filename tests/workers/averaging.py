"""One of two workers: trains a small net and writes what rank 0 and rank 1 ended with."""

import pathlib
import sys

import keras
import numpy as np

from learners import runtime as runtime_lib


def build():
  keras.utils.set_random_seed(7)
  return keras.Sequential(
    [
      keras.Input((6,)),
      keras.layers.Dense(5, name='hidden'),
      keras.layers.BatchNormalization(name='norm'),
      keras.layers.ReLU(),
      keras.layers.Dense(3, name='logits'),
    ],
    name='net',
  )


def samples(rank, steps=5, batch=8):
  rng = np.random.default_rng(rank)
  return (rng.normal(size=(steps * batch, 6)).astype('float32'), rng.integers(0, 3, steps * batch))


def linear_step(runtime):
  """One step of SGD with rate 1 on w * x: the gradient is the mean of this rank's x."""
  weight = keras.Variable(np.zeros(2, 'float32'))
  unused = keras.Variable(np.zeros(1, 'float32'))
  moving = keras.Variable(np.float32(10.0 * runtime.rank), trainable=False)
  counter = keras.Variable(runtime.rank, dtype='int32', trainable=False)
  optimizer = runtime.distribute(keras.optimizers.SGD(1.0), [moving, counter])
  optimizer.apply([np.float32([1.0, 4.0]) * (1 + 2 * runtime.rank), None], [weight, unused])
  return {
    'weight': weight.numpy(),
    'moving': moving.numpy(),
    'counter': counter.numpy(),
    'class': type(optimizer).__name__,
  }


def main(folder):
  runtime = runtime_lib.create(True)
  assert runtime.is_chief == (runtime.rank == 0)
  found = {f'linear_{name}': value for name, value in linear_step(runtime).items()}
  found['object'] = runtime.broadcast({'bits': [4, 8]} if runtime.is_chief else None)['bits']
  found['sum'] = runtime.allreduce_sum(np.array([[runtime.rank, 2.5]]))
  found['any'] = runtime.any(runtime.rank == 1, False)

  model = build()
  model.layers[0].bias.assign(np.full(5, 1.0 + runtime.rank))
  runtime.broadcast_variables(model.variables)
  found['bias'] = model.layers[0].bias.numpy()
  optimizer = keras.optimizers.SGD(0.1, momentum=0.9, name='sgd')
  optimizer = runtime.distribute(optimizer, model.non_trainable_variables)
  model.compile(
    optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False
  )
  x, y = samples(runtime.rank)
  model.fit(x, y, batch_size=8, epochs=1, shuffle=False, verbose=0)
  for i, variable in enumerate(model.variables):
    found[f'variable_{i:02d}'] = variable.numpy()
  for variable in optimizer.variables:
    found[f'optimizer_{variable.path}'] = np.array(variable.value)
  np.savez(pathlib.Path(folder) / f'rank{runtime.rank}.npz', **found)
  runtime.barrier()
  if runtime.is_chief:
    print('both wrote', len(list(pathlib.Path(folder).glob('rank*.npz'))))


if __name__ == '__main__':
  main(sys.argv[1])
