"""One of two workers of a run in which the loss of rank 1 alone becomes infinite at step 3."""

import sys

from learners import main, training
from nets.convnet_at_digits import ModelHelper

original = training._Loop.on_train_batch_end


def diverging(loop, batch, logs):
  infinite = loop.runtime.rank == 1 and loop.step == 2
  original(loop, batch, {**logs, 'loss': float('inf')} if infinite else logs)


training._Loop.on_train_batch_end = diverging
sys.exit(main.run_with(ModelHelper, ['diverging', *sys.argv[1:], '--enbl_multi_gpu']))
