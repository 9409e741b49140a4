"""The files of the public ResNet-20 hold the integers of training, in every layer."""

import keras
import pytest
import tensorflow as tf
from trained_integers import (
  assert_activations_are_those_of,
  assert_in,
  export,
  trained_integers,
)

import pocketsize
from nets import resnet_at_cifar10

# What is quantized, and the bits in which files other than TFLite's hold the codes between the
# first and the last layer.
CASES = {
  '8 bits': ({'algorithm': 'uniform'}, 8),
  '4 bits': ({'algorithm': 'uniform', 'weight_bits': 4}, 4),
  '2 bits, learned scales': (
    {'algorithm': 'uniform', 'weight_bits': 2, 'weight_range': 'learned'},
    4,
  ),
  '4 bits, centres': (
    {'algorithm': 'non-uniform', 'weight_bits': 4, 'mode': 'both', 'start': 'quantile'},
    8,
  ),
}


@pytest.fixture(scope='module')
def helper(shared):
  config = resnet_at_cifar10.ModelHelper.Config(shortcut='pad', data_dir_local=str(shared / 'data'))
  return resnet_at_cifar10.ModelHelper(config)


@pytest.fixture(scope='module')
def net(helper):
  return helper.build()


@pytest.fixture(scope='module')
def batches(helper):
  """Three batches of training."""
  return list(helper.dataset().load('train', batch=32, training=True).take(3))


def trained(net, config, helper, batches):
  """Returns the net, instrumented, its ranges from one batch, after a step with each other one."""
  (x, _), *others = batches
  model, stack = pocketsize.compress(net, [config], calibration=[x])
  optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
  for step, (x, y) in enumerate(others):
    stack.update(step)
    with tf.GradientTape() as tape:
      loss = helper.loss(y, model(x, training=True))
    gradients = tape.gradient(loss, model.trainable_variables)
    optimizer.apply(gradients, model.trainable_variables)
  stack.update(len(others))
  return model


@pytest.mark.shared
@pytest.mark.parametrize(('config', 'bits'), CASES.values(), ids=CASES)
def test_files_hold_the_integers_of_training(config, bits, net, helper, batches, shared, tmp_path):
  helper.load_pretrained(net, shared / 'weights' / 'resnet20_cifar10.npz')
  model = trained(net, config, helper, batches)
  kinds = keras.layers.Conv2D | keras.layers.Dense
  names = [layer.name for layer in net.layers if isinstance(layer, kinds)]
  wanted = {name: trained_integers(model, name) for name in names}
  for format_, (_, stored) in export(model, tmp_path).items():
    # Activations: the images, the first ReLU, three a block, the pool, the logits.
    assert (len(stored.kernels), len(stored.activations)) == (len(wanted), 31) == (20, 31)
    for name, (codes, scale) in wanted.items():
      held = 8 if name in ('conv0', 'dense') or format_ == 'tflite_int8' else bits
      assert assert_in(stored, codes, scale, name) == held, (format_, name)
    assert_activations_are_those_of(model, stored, format_)
