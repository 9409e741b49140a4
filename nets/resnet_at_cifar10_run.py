"""Trains or compresses ResNet on CIFAR-10; `--help` lists the flags."""

from learners import main
from nets.resnet_at_cifar10 import ModelHelper

main.run(ModelHelper)
