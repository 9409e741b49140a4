"""One of two workers of one learner after the other: `learning.py FOLDER LEARNERS.json`.

The file has each learner's flags by a name; a folder of this name gets its work folder, and the
weights of each rank. In the run of the last one the loss of rank 1 alone becomes infinite at step
3, and the process ends as that run does.
"""

import json
import pathlib
import sys

import numpy as np

from learners import main, training
from nets.convnet_at_digits import ModelHelper


def train(folder, flags):
  arguments = ['learning', f'--work_dir={folder / "work"}', *flags, '--enbl_multi_gpu']
  learner = main.make_learner(ModelHelper, arguments)
  trained, kept = learner._compressed_model, []
  learner._compressed_model = lambda float_model: kept.append(trained(float_model)) or kept[0]
  learner.execute()
  bits = [
    getattr(place.transform, 'bits', 0) for place in kept[0].placements if place.point == 'kernel'
  ]
  folder.mkdir(exist_ok=True)
  np.savez(folder / f'rank{learner.runtime.rank}.npz', *kept[0].get_weights(), bits=bits)


original = training._Loop.on_train_batch_end


def diverging(loop, batch, logs):
  infinite = loop.runtime.rank == 1 and loop.step == 2
  original(loop, batch, {**logs, 'loss': float('inf')} if infinite else logs)


folder = pathlib.Path(sys.argv[1])
*learners, (last, last_flags) = json.loads(pathlib.Path(sys.argv[2]).read_text()).items()
for name, flags in learners:
  train(folder / name, flags)
training._Loop.on_train_batch_end = diverging
arguments = ['learning', f'--work_dir={folder / last}', *last_flags, '--enbl_multi_gpu']
sys.exit(main.run_with(ModelHelper, arguments))
