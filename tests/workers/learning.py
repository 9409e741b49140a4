"""One of two workers of one learner after the other: `learning.py FOLDER LEARNERS.json`.

The file has each learner's flags by a name; a folder of this name gets its work folder, and the
weights of each rank.
"""

import json
import pathlib
import sys

import numpy as np

from learners import main
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


folder = pathlib.Path(sys.argv[1])
for name, flags in json.loads(pathlib.Path(sys.argv[2]).read_text()).items():
  train(folder / name, flags)
