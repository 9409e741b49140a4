"""The picture of a search: what it shows, and that it is whole or absent."""

import math

import matplotlib.figure
import numpy as np
import pytest
from budgets import mean_bits

from pocketsize.allocation.plot import plot
from pocketsize.allocation.search import Record

PROBLEM = mean_bits((0.5, 0.5), budget=5.0)
RECORDS = [
  Record(number, levels, reward, reward, PROBLEM.cost.of(levels), 1.0)
  for number, (levels, reward) in enumerate([([2, 2], 0.5), ([0, 6], 0.9), ([1, 1], 0.7)])
]


@pytest.fixture
def drawn(monkeypatch):
  """The figures that were saved."""
  figures = []
  save = matplotlib.figure.Figure.savefig

  def saved(figure, *args, **kwargs):
    figures.append(figure)
    return save(figure, *args, **kwargs)

  monkeypatch.setattr(matplotlib.figure.Figure, 'savefig', saved)
  return figures


def test_all_roll_outs_and_the_chosen_values_are_shown(tmp_path, drawn):
  plot(RECORDS, PROBLEM, tmp_path / 'search.png', reward='accuracy', value='bits', title='a net')
  assert (tmp_path / 'search.png').read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
  assert [path.name for path in tmp_path.iterdir()] == ['search.png']
  left, right, bar = drawn[0].axes
  points = left.collections[0]
  np.testing.assert_allclose(points.get_offsets(), [(4.0, 0.5), (5.0, 0.9), (3.0, 0.7)])
  assert points.get_array().tolist() == [0, 1, 2] and bar.get_ylabel() == 'roll-out'
  assert (left.get_xlabel(), left.get_ylabel()) == ('mean weight bits', 'accuracy')
  labels = [text.get_text() for text in left.get_legend().get_texts()]
  assert labels == ['chosen: roll-out 1, 0.9 at 5', 'budget: 5']
  star, budget = left.lines
  assert (star.get_xdata()[0], star.get_ydata()[0]) == (5.0, 0.9)
  assert budget.get_xdata()[0] == 5.0
  assert [patch.get_height() for patch in right.patches] == [2.0, 8.0]
  assert [label.get_text() for label in right.get_xticklabels()] == ['layer0', 'layer1']
  assert right.get_ylabel() == 'bits'


def test_rewards_far_below_the_others_are_drawn_at_the_edge(tmp_path, drawn):
  """Quartiles -4.5 and 2.5, so the edge is 3 * 7 below -4.5; equal quartiles have no edge."""
  rewards = [0.0, -99.0, 1.0, 2.0, -9.0, 3.0, 4.0]
  assert np.percentile(rewards, [25, 75]).tolist() == [-4.5, 2.5]
  records = [RECORDS[0]._replace(number=n, reward=each) for n, each in enumerate(rewards)]
  plot(records, PROBLEM, tmp_path / 'search.png')
  left = drawn[0].axes[0]
  near, far = left.collections[:2]
  assert near.get_offsets()[:, 1].tolist() == [0.0, 1.0, 2.0, -9.0, 3.0, 4.0]
  assert far.get_offsets()[:, 1].tolist() == [-4.5 - 3.0 * 7.0]
  assert far.get_label() == '1 below -25.5, down to -99'
  assert near.get_clim() == far.get_clim() == (0, 6)
  assert -30.0 < left.get_ylim()[0] < -25.5
  same = [record._replace(reward=min(record.reward, 1.0)) for record in records]
  plot([each for each in same if each.reward in (1.0, -9.0)], PROBLEM, tmp_path / 'search.png')
  assert len(drawn[1].axes[0].collections[0].get_offsets()) == 5


def test_one_choice_has_no_bar_of_numbers(tmp_path, drawn):
  plot(RECORDS[:1], PROBLEM, tmp_path / 'search.png')
  assert len(drawn[0].axes) == 2 and drawn[0].axes[0].get_title() == 'the one choice'


def test_without_a_budget_there_is_no_line(tmp_path, drawn):
  problem = mean_bits((0.5, 0.5), budget=None)
  plot(RECORDS, problem, tmp_path / 'search.png')
  assert len(drawn[0].axes[0].lines) == 1


def test_names_of_many_layers_do_not_overlap(tmp_path, drawn):
  problem = mean_bits(np.full(25, 0.04), budget=None)
  record = Record(0, [3] * 25, 0.5, 0.5, 5.0, 1.0)
  plot([record], problem, tmp_path / 'search.png')
  labels = drawn[0].axes[1].get_xticklabels()
  places = [label.get_transform().transform(label.get_position())[0] for label in labels]
  # Turned text of this height needs so much room, in pixels.
  height = labels[0].get_fontsize() * drawn[0].dpi / 72
  assert min(np.diff(places)) > height / math.sin(math.radians(60)) * 1.05


def test_a_picture_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch):
  path = tmp_path / 'search.png'
  path.write_bytes(b'earlier')

  def failing(figure, name, **options):
    name.write_bytes(b'half')
    raise OSError('no space')

  monkeypatch.setattr(matplotlib.figure.Figure, 'savefig', failing)
  with pytest.raises(OSError, match='no space'):
    plot(RECORDS, PROBLEM, path)
  assert path.read_bytes() == b'earlier'
  assert [each.name for each in tmp_path.iterdir()] == ['search.png']
