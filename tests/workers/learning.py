"""One of two workers of a learner: `learning.py FOLDER FLAGS...`; each rank leaves its weights."""

import pathlib
import sys

import numpy as np

from learners import main
from nets.convnet_at_digits import ModelHelper

folder = pathlib.Path(sys.argv[1])
learner = main.make_learner(ModelHelper, ['learning', *sys.argv[2:], '--enbl_multi_gpu'])
weights = learner._compressed_model(learner._float_model()).get_weights()
np.savez(folder / f'rank{learner.runtime.rank}.npz', *weights)
