"""A picture of a search: what every roll-out reached at which cost, and what was chosen."""

import math

import numpy as np

from pocketsize.allocation.search import best
from pocketsize.files import atomic_path

_BARS, _CHOSEN = '#4c72b0', '#d62728'
# Rewards so many interquartile ranges below the lower quartile (Tukey's far out) are drawn at the
# edge: a few nets that compute nonsense would press all others into a line.
_FAR = 3.0


def plot(records, problem, path, *, reward='reward', value='value', title=''):
  """Writes a PNG: rewards against costs of all roll-outs, and the values of the chosen one.

  Args:
    records: list of the search's `Record`s.
    problem: its `Problem`.
    path: of the file, which ends with '.png'.
    reward: what the reward is, with its unit, for its axis.
    value: what the values are, with their unit, for the axis of the bars.
    title: above all.
  """
  # Imported here, since few programs plot. Without pyplot a figure is in nobody's state, and is
  # drawn by Agg, which needs no screen.
  from matplotlib.figure import Figure

  chosen = best(records)
  count = len(problem.variables)
  figure = Figure(figsize=(8.0 + max(5.0, 0.36 * count), 5.4), layout='constrained', dpi=110)
  figure.get_layout_engine().set(wspace=0.06)
  if title:
    figure.suptitle(title)
  left, right = figure.subplots(1, 2, width_ratios=[7.0, max(4.0, 0.36 * count)])
  _draw_rollouts(figure, left, records, problem, chosen, reward)
  _draw_values(right, problem, chosen, value)
  with atomic_path(path) as temporary:
    figure.savefig(temporary, format='png')


def _draw_rollouts(figure, axes, records, problem, chosen, reward):
  rewards = np.array([record.reward for record in records])
  costs = np.array([record.cost for record in records])
  numbers = np.array([record.number for record in records])
  floor = _floor(rewards)
  is_far = rewards < floor
  style = {'cmap': 'viridis', 'vmin': 0, 'vmax': numbers.max(), 'alpha': 0.85, 'linewidths': 0}
  near = ~is_far
  points = axes.scatter(costs[near], rewards[near], c=numbers[near], s=26, **style)
  if is_far.any():
    axes.scatter(
      costs[is_far],
      np.full(is_far.sum(), floor),
      c=numbers[is_far],
      s=40,
      marker='v',
      label=f'{is_far.sum()} below {floor:.4g}, down to {rewards.min():.4g}',
      **style,
    )
  if len(records) > 1:
    figure.colorbar(points, ax=axes, label='roll-out', pad=0.01)
  axes.plot(
    chosen.cost,
    chosen.reward,
    marker='*',
    markersize=17,
    linestyle='none',
    markerfacecolor=_CHOSEN,
    markeredgecolor='white',
    label=f'chosen: roll-out {chosen.number}, {chosen.reward:.4g} at {chosen.cost:.4g}',
  )
  if math.isfinite(problem.budget):
    axes.axvline(problem.budget, color='0.4', linestyle='--', label=f'budget: {problem.budget:.4g}')
  axes.set_xlabel(problem.cost.name)
  axes.set_ylabel(reward)
  axes.set_title('all roll-outs' if len(records) > 1 else 'the one choice')
  axes.grid(color='0.9')
  axes.set_axisbelow(True)
  # Below the axes, where it hides no point.
  axes.legend(loc='upper center', bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False)


def _floor(rewards):
  """Returns the least reward that is drawn in its place."""
  low, high = np.percentile(rewards, [25, 75])
  return low - _FAR * (high - low) if high > low else -math.inf


def _draw_values(axes, problem, chosen, value):
  values = problem.values(chosen.levels)
  bars = axes.bar(range(len(values)), values.values(), color=_BARS)
  axes.bar_label(bars, fmt='%.3g', fontsize=8, padding=1)
  turn = {'rotation': 60, 'ha': 'right', 'rotation_mode': 'anchor'}
  axes.set_xticks(range(len(values)), values, **(turn if max(map(len, values)) > 2 else {}))
  axes.tick_params(axis='x', labelsize=8, length=0)
  axes.set_xlim(-0.7, len(values) - 0.3)
  axes.set_ylabel(value)
  axes.set_title(f'values of roll-out {chosen.number}')
  axes.grid(axis='y', color='0.9')
  axes.set_axisbelow(True)
