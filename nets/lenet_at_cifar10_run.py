"""Trains or compresses LeNet on CIFAR-10; `--help` lists the flags."""

from learners import main
from nets.lenet_at_cifar10 import ModelHelper

main.run(ModelHelper)
