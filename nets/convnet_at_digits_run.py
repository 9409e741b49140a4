"""Trains or compresses the convolutional net on the digits; `--help` lists the flags."""

from learners import main
from nets.convnet_at_digits import ModelHelper

main.run(ModelHelper)
