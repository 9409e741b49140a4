"""Times the training step of ResNet-20 in PyTorch: float, and quantized by Brevitas.

    python3 -m venv brevitas && brevitas/bin/pip install -r tools/benchmark/brevitas.txt
    brevitas/bin/python tools/benchmark/brevitas_step_time.py --rounds=40

It runs in an environment of its own and needs nothing of this project but `rounds`. The net is that
of `step_time.py` with projection shortcuts, the step is one of SGD with momentum. Weights have a
scale for each output channel, which follows the largest weight, or is trained; the scales of
activations are trained, as always in Brevitas.
"""

import argparse
import functools

import brevitas.nn as qnn

# By its folder: the package of the tools wants TensorFlow, which is not here.
import rounds
import torch
from brevitas.quant import (
  Int8ActPerTensorFloat,
  Int8WeightPerChannelFloat,
  Uint8ActPerTensorFloat,
)
from torch import nn

WIDTHS, BLOCKS, CLASSES = (16, 32, 64), 3, 10
LEARNING_RATE, MOMENTUM = 0.01, 0.9
BASES = ('float',)


class TrainedScale(Int8WeightPerChannelFloat):
  """Weights whose scale begins at the largest weight and is trained."""

  scaling_impl_type = 'parameter_from_stats'


class Block(nn.Module):
  """Two convolutions and what goes by them."""

  def __init__(self, layers, inputs, outputs, stride):
    super().__init__()
    self.conv1, self.relu1 = layers.conv(inputs, outputs, 3, stride), layers.relu()
    self.conv2, self.relu2 = layers.conv(outputs, outputs, 3, 1), layers.relu()
    self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
    # Both summands have the scale that the sum's integers need.
    self.summand = layers.identity()
    self.shortcut = nn.Identity()
    if inputs != outputs:
      self.shortcut = nn.Sequential(
        layers.conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)
      )

  def forward(self, x):
    y = self.relu1(self.norm1(self.conv1(x)))
    y = self.summand(self.norm2(self.conv2(y)))
    return self.relu2(y + self.summand(self.shortcut(x)))


class Layers:
  """Makes the layers of a net.

  Args:
    weight_quant: Brevitas' quantizer of weights; None for a float net.
  """

  def __init__(self, weight_quant=None):
    self.weight_quant = weight_quant

  def conv(self, inputs, outputs, size, stride):
    fields = {'stride': stride, 'padding': size // 2, 'bias': False}
    if self.weight_quant is None:
      return nn.Conv2d(inputs, outputs, size, **fields)
    return qnn.QuantConv2d(inputs, outputs, size, weight_quant=self.weight_quant, **fields)

  def dense(self, inputs, outputs):
    if self.weight_quant is None:
      return nn.Linear(inputs, outputs)
    return qnn.QuantLinear(inputs, outputs, bias=True, weight_quant=self.weight_quant)

  def relu(self):
    return nn.ReLU() if self.weight_quant is None else qnn.QuantReLU(Uint8ActPerTensorFloat)

  def identity(self):
    return nn.Identity() if self.weight_quant is None else qnn.QuantIdentity(Int8ActPerTensorFloat)


def resnet20(layers):
  """Returns the net on images [batch, 3, 32, 32]."""
  modules = [layers.identity(), layers.conv(3, WIDTHS[0], 3, 1), nn.BatchNorm2d(WIDTHS[0])]
  modules.append(layers.relu())
  inputs = WIDTHS[0]
  for stage, width in enumerate(WIDTHS):
    for block in range(BLOCKS):
      modules.append(Block(layers, inputs, width, 2 if stage and not block else 1))
      inputs = width
  modules += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), layers.identity()]
  return nn.Sequential(*modules, layers.dense(inputs, CLASSES), layers.identity())


def variant(weight_quant, images, labels):
  """Returns the `rounds.Variant` that trains the net on one batch."""
  net = resnet20(Layers(weight_quant)).train()
  optimizer = torch.optim.SGD(net.parameters(), LEARNING_RATE, MOMENTUM)
  loss_of = nn.CrossEntropyLoss()

  def step(number):
    optimizer.zero_grad()
    loss = loss_of(net(images), labels)
    loss.backward()
    optimizer.step()
    loss.item()

  return rounds.Variant(step)


VARIANTS = {
  'float': None,
  'brevitas-8-8': Int8WeightPerChannelFloat,
  'brevitas-learned-8-8': TrainedScale,
}


def main():
  """Times the variants and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=40, help='rounds that are timed')
  parser.add_argument('--batch_size', type=int, default=128, help='images in a batch')
  options = parser.parse_args()
  if min(options.rounds, options.batch_size) < 1:
    parser.error('--rounds and --batch_size must be at least 1')
  generator = torch.Generator().manual_seed(0)
  images = torch.randn(options.batch_size, 3, 32, 32, generator=generator)
  labels = torch.randint(CLASSES, (options.batch_size,), generator=generator)
  build = functools.partial(variant, images=images, labels=labels)
  variants = {name: build(weight_quant) for name, weight_quant in VARIANTS.items()}
  for each in variants.values():
    rounds.warm_up(each)
  plain, updating = rounds.measure(variants, options.rounds)
  rows = rounds.summarize(plain, updating, dict.fromkeys(variants), BASES)
  title = f'Training step of ResNet-20 in PyTorch {torch.__version__}'
  rounds.show(rows, f'{title}, batch {options.batch_size}, {options.rounds} rounds', BASES)


if __name__ == '__main__':
  main()
