"""Pocketsize: Keras models made small and fast enough to ship.

model, stack = pocketsize.compress(model, [{'algorithm': 'uniform'}], calibration=batches)
model.compile(...)
model.fit(..., callbacks=[pocketsize.CompressionCallback(stack)])
pocketsize.strip(model).save('final.keras')
pocketsize.export(model, 'exports')
"""

from pocketsize.calibration import calibrate, re_estimate_batch_norm
from pocketsize.compressor import (
  CompressionCallback,
  Compressor,
  Stack,
  Stage,
  discover,
  register,
)
from pocketsize.configure import compress
from pocketsize.conversion import export, verify
from pocketsize.errors import UserError
from pocketsize.freezing import FreezeBatchNorm
from pocketsize.graph import Graph
from pocketsize.instrument import Instrumented, instrument, strip
from pocketsize.packed import read as read_packed
from pocketsize.packed import write as write_packed
from pocketsize.shrink import compact
from pocketsize.targets import Rule
from pocketsize.transform import Grid, Placement, Transform

__all__ = [
  'CompressionCallback',
  'Compressor',
  'FreezeBatchNorm',
  'Graph',
  'Grid',
  'Instrumented',
  'Placement',
  'Rule',
  'Stack',
  'Stage',
  'Transform',
  'UserError',
  'calibrate',
  'compact',
  'compress',
  'export',
  'instrument',
  're_estimate_batch_norm',
  'read_packed',
  'register',
  'strip',
  'verify',
  'write_packed',
]

# What an algorithm registers with Keras must be known before a saved model can be loaded.
discover()
