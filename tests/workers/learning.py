"""One of two workers of a learner: `learning.py FOLDER FLAGS...`; each rank leaves its weights."""

import pathlib
import sys

import numpy as np

from learners import main
from nets.convnet_at_digits import ModelHelper

folder = pathlib.Path(sys.argv[1])
learner = main.make_learner(ModelHelper, ['learning', *sys.argv[2:], '--enbl_multi_gpu'])
trained, kept = learner._compressed_model, []
learner._compressed_model = lambda float_model: kept.append(trained(float_model)) or kept[0]
learner.execute()
bits = [getattr(placement.transform, 'bits', 0) for placement in kept[0].placements]
np.savez(folder / f'rank{learner.runtime.rank}.npz', *kept[0].get_weights(), bits=bits)
