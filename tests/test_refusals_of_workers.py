"""What rank 0 finds wrong with its files is told by every worker, and none waits for it."""

import numpy as np
import pytest
from budgets import mean_bits

from pocketsize.allocation.search import search
from pocketsize.allocation.sensitivity import measured_losses
from pocketsize.allocation.traces import estimate
from pocketsize.allocation.workers import on_first
from pocketsize.errors import UserError
from tests.test_traces import line
from tests.workers import threads


def refusals(task):
  """Returns the messages with which `task(rank=, size=, total=)` ends on two workers."""

  def refused(**shared):
    with pytest.raises(UserError) as caught:
      task(**shared)
    return str(caught.value)

  return threads.together(2, refused)


def test_only_the_first_does_it_and_keeps_the_answer():
  def asked(rank, size, total):
    return on_first(lambda: f'rank {rank}', rank, total)

  assert threads.together(3, asked) == ['rank 0', None, None]
  assert on_first(lambda: 7, 0, np.array) == 7


def test_all_of_a_message_arrives():
  def refuse(rank, size, total):
    def task():
      raise UserError('Größe: at most 4. Received: 5.')

    return on_first(task, rank, total)

  assert refusals(refuse) == 2 * ['Größe: at most 4. Received: 5.']


def test_a_damaged_search(tmp_path):
  path = tmp_path / 'search.json'
  path.write_text('{')

  def searched(**shared):
    search(mean_bits((0.5, 0.5), budget=5.0), None, sum, 4, path=path, about={}, **shared)

  one, other = refusals(searched)
  assert one == other and f'{path} is damaged' in one


def test_a_choice_above_the_budget(tmp_path):
  problem, path = mean_bits((0.5, 0.5), budget=5.0), tmp_path / 'search.json'

  def searched(**shared):
    # Both begin without a record.
    options = {'path': path, 'about': {}, 'broadcast': lambda records: records or []}
    search(problem, None, sum, 2, first=[problem.highest] * 2, **options, **shared)

  one, other = refusals(searched)
  assert one == other and 'Roll-out 0 must have at most 5' in one


def test_damaged_losses(tmp_path):
  path = tmp_path / 'losses.json'
  path.write_text('{')
  one, other = refusals(
    lambda **shared: measured_losses(
      mean_bits((0.5, 0.5), budget=5.0), None, None, path=path, **shared
    )
  )
  assert one == other and f'{path} holds no measured losses' in one


def test_damaged_traces(tmp_path):
  path = tmp_path / 'traces.json'
  path.write_text('{')
  one, other = refusals(lambda **shared: estimate(*line(), path=path, **shared))
  assert one == other and f'{path} holds no traces' in one
