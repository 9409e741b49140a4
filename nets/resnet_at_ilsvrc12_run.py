"""Trains or compresses ResNet on ILSVRC-12; `--help` lists the flags."""

from learners import main
from nets.resnet_at_ilsvrc12 import ModelHelper

main.run(ModelHelper)
