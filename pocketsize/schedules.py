"""Schedules: pure functions of the step, with nothing to save."""

import math


def polynomial(step, begin, end, initial, final, exponent=3.0):
  """Returns the value at `step` on a polynomial from `initial` to `final` (Zhu & Gupta 2017,
  equation 1).

  final + (initial - final) * (1 - p)^exponent with p = (step - begin) / (end - begin), clipped to
  [0, 1]. With end <= begin the value jumps from initial to final at `begin`.
  """
  if step < begin:
    return initial
  progress = 1.0 if end <= begin else min((step - begin) / (end - begin), 1.0)
  return final + (initial - final) * (1.0 - progress) ** exponent


def cosine(step, steps, initial, final=0.0):
  """Returns the value at `step` of half a cosine from `initial` at 0 to `final` at `steps`."""
  progress = min(max(step / max(steps, 1), 0.0), 1.0)
  return final + (initial - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
