"""The search for each layer's share as a phase of a run: its flags, and what it leaves.

What may be chosen is the learner's: a `Problem`, and the kernels that go with each choice. A search
is the first phase of a run and changes no model: what it leaves are the values in allocation.json,
with which the run then goes on as with a list from the user.
"""

import dataclasses
import functools
import json

import numpy as np

from learners.progress import ProgressReport
from pocketsize.allocation import allocators
from pocketsize.allocation.plot import plot
from pocketsize.allocation.scoring import Scorer
from pocketsize.errors import UserError
from pocketsize.files import write_json
from pocketsize.options import check_options, option
from pocketsize.rl.ddpg import DdpgConfig

PREFIX = 'ddpg_'


def _agent_flags():
  """Returns a dataclass with the fields of `DdpgConfig` as flags of the agent."""
  return dataclasses.make_dataclass(
    'AgentFlags',
    [
      (f'{PREFIX}{field.name}', field.type, dataclasses.field(default=field.default, metadata=field.metadata))
      for field in dataclasses.fields(DdpgConfig)
    ],
    frozen=True,
    kw_only=True,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllocationFlags(_agent_flags()):
  """Flags of every learner that can search for what each layer gets."""

  allocation: str | None = option(
    None,
    'how it is decided what each layer gets: by an agent that learns from roll-outs (rl), '
    'second derivatives of the loss (hawq), measured losses of single layers (sensitivity), '
    'tree-structured Parzen estimators (tpe), a Gaussian process (gp), the same for all (uniform) '
    'or less for larger ones (heuristic)',
    choices=allocators.NAMES,
  )
  nb_smpls_score: int = option(
    1000, 'held-out training images by which a choice is scored', lower=1
  )
  nb_smpls_trace: int = option(
    256, 'held-out training images from which second derivatives are estimated', lower=1
  )
  hawq_iterations: int = option(
    50, 'random vectors, at most, of the estimates of second derivatives', lower=1
  )
  hawq_tolerance: float = option(
    0.01, 'relative standard error of the estimates at which no more vectors are drawn', above=0
  )

  def agent(self):
    """Returns the `DdpgConfig`."""
    return DdpgConfig(
      **{field.name: getattr(self, PREFIX + field.name) for field in dataclasses.fields(DdpgConfig)}
    )
