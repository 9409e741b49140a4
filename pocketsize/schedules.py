"""Schedules: pure functions of the step, with nothing to save."""

import math

from pocketsize.errors import UserError


def polynomial(step, begin, end, initial, final, exponent=3.0):
  """Returns the value at `step` on a polynomial from `initial` to `final` (Zhu & Gupta 2017,
  equation 1).

  final + (initial - final) * (1 - p)^exponent with p = (step - begin) / (end - begin), clipped to
  [0, 1]. With end <= begin the value jumps from initial to final at `begin`.
  """
  return final + (initial - final) * (1.0 - _progress(step, begin, end)) ** exponent


def cosine(step, steps, initial, final=0.0):
  """Returns the value at `step` of half a cosine from `initial` at 0 to `final` at `steps`."""
  progress = min(max(step / max(steps, 1), 0.0), 1.0)
  return final + (initial - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def baseline(step, begin, initial, final):
  """Returns `initial` before step `begin` and `final` from it on (NNCF's `baseline`)."""
  return initial if step < begin else final


def exponential(step, begin, end, initial, final):
  """Returns the ratio at `step` whose density falls exponentially (NNCF's `exponential`).

  1 - (1 - initial) * ((1 - final) / (1 - initial))^p with p = (step - begin) / (end - begin),
  clipped to [0, 1]: each step keeps the same share of what the step before it kept.

  Args:
    step: the step.
    begin, end: where the ratio leaves `initial` and reaches `final`; with end <= begin it jumps.
    initial, final: in [0, 1).
  """
  progress = _progress(step, begin, end)
  return 1.0 - (1.0 - initial) ** (1.0 - progress) * (1.0 - final) ** progress


def exponential_with_bias(step, begin, end, initial, final):
  """Returns a e^(-k p) + b, most of whose way is made early (NNCF's `exponential_with_bias`).

  p = (step - begin) / (end - begin), clipped to [0, 1]. a, b and k are such that the value is
  `initial` at p = 0, three quarters of `final` at p = 1/8 and `final` at p = 1. With end <= begin
  it jumps.

  Raises:
    UserError: `initial` is above 0 and not below three quarters of `final`: no such curve is.
  """
  progress = _progress(step, begin, end)
  if progress in (0.0, 1.0) or initial == final:
    return final if progress else initial
  share = (0.75 * final - initial) / (final - initial)
  if share < 1e-9:
    raise UserError(
      "Schedule 'exponential_with_bias' needs an initial ratio below three quarters of the final "
      f'one. Received: {initial} and {final}.'
    )
  # With r = e^(-k/8) the three conditions are (1 - r) / (1 - r^8) = share, which is
  # 1 + r + ... + r^7 = 1 / share: the left grows with r.
  low, high = 0.0, 1.0 / share
  for _ in range(100):
    middle = 0.5 * (low + high)
    if sum(middle**power for power in range(8)) < 1.0 / share:
      low = middle
    else:
      high = middle
  whole = 1.0 - high**8
  # r = 1 is the limit k = 0, a line.
  done = progress if abs(whole) < 1e-9 else (1.0 - high ** (8.0 * progress)) / whole
  return initial + (final - initial) * done


def _progress(step, begin, end):
  """Returns how far `step` is on the way from `begin` to `end`, in [0, 1]."""
  if step < begin:
    return 0.0
  return 1.0 if end <= begin else min((step - begin) / (end - begin), 1.0)
