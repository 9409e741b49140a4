"""The agent: its parts against numbers on paper, its random numbers, and tasks that it learns."""

import collections
import dataclasses
import random

import gymnasium
import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketsize.errors import UserError
from pocketsize.rl.ddpg import Agent, DdpgConfig, adapted, bellman_targets, soft_update
from pocketsize.rl.networks import kernel_decay, make_actor, make_critic, perturbed
from pocketsize.rl.replay import Replay

SMALL = {
  'actor_depth': 1,
  'actor_width': 8,
  'critic_depth': 1,
  'critic_width': 8,
  'batch_size': 4,
}
STATE = np.array([0.5, -1.0, 2.0])
# A transition each, of three numbers of state and two of action.
FIRST = ([STATE], [[0.1, 0.2]], [1.0], [0], [STATE + 1.0])


def small_agent(buffer_size=1, rollouts=4, seed=0, **settings):
  return Agent(
    3, [-1.0, 0.0], [1.0, 6.0], rollouts, buffer_size, DdpgConfig(**SMALL | settings), seed
  )


def ready_agent(transition=FIRST, **settings):
  """An agent whose buffer has one transition, of which every batch is made."""
  agent = small_agent(**settings)
  agent.record(*transition)
  return agent


def first_networks(seed=0):
  """The networks that `small_agent` begins with, made again."""
  rng = np.random.default_rng(seed)
  low, high = np.array([-1.0, 0.0]), np.array([1.0, 6.0])
  return make_actor(3, low, high, 1, 8, rng), make_critic(3, 2, 1, 8, rng)


# Settings.

WRONG = {
  'actor_depth': 0,
  'actor_width': 0,
  'critic_depth': 0,
  'critic_width': 0,
  'tau': 0.0,
  'gamma': 1.01,
  'lrn_rate': 0.0,
  'loss_w_dcy': -0.1,
  'record_step': 0,
  'batch_size': 0,
  'enbl_bsln_func': 1,
  'bsln_decy_rate': 1.0,
  'noise_type': 'weights',
  'noise_prtl': 'linear',
  'noise_std_init': 0.0,
  'noise_dst_finl': 0.0,
  'noise_adpt_rat': 1.0,
  'noise_std_finl': 0.0,
}


@pytest.mark.parametrize('name', WRONG)
def test_a_setting_out_of_its_range_is_named(name):
  with pytest.raises(UserError, match=rf'^--{name} must be .*\. Received: .*\.$'):
    DdpgConfig(**{name: WRONG[name]})


def test_every_setting_has_a_range_and_a_meaning():
  fields = {field.name: field for field in dataclasses.fields(DdpgConfig)}
  assert fields.keys() == WRONG.keys()
  assert all(field.metadata['help'] for field in fields.values())


def test_noise_on_actions_does_not_adapt():
  with pytest.raises(UserError, match=r'^--noise_prtl=adapt needs --noise_type=param: .* Received'):
    DdpgConfig(noise_type='action', noise_prtl='adapt')


def test_noise_that_decays_does_not_end_above_where_it_begins():
  with pytest.raises(
    UserError, match=r'^--noise_std_finl must not be .* Received: 0\.02 and 0\.01'
  ):
    DdpgConfig(noise_std_init=0.01)
  DdpgConfig(noise_std_init=0.02)
  DdpgConfig(noise_std_init=0.01, noise_prtl='adapt')


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'state_size': 0}, '^`state_size`, `rollouts` and `buffer_size` must be at least 1'),
    ({'rollouts': 0}, 'must be at least 1. Received: 3, 0 and 1'),
    ({'buffer_size': 0}, 'must be at least 1. Received: 3, 2 and 0'),
    ({'action_low': [0.0, 1.0]}, '^`action_low` and `action_high` must be finite'),
    ({'action_low': 0.0, 'action_high': 1.0}, 'for each dimension, low below high'),
    ({'action_low': [1.0]}, r'low below high\. Received: \[1\.0\] and \[1\.0\]'),
    ({'action_high': [float('inf')]}, 'must be finite'),
    ({'action_low': [float('nan')]}, 'must be finite'),
  ],
)
def test_an_agent_that_cannot_be_is_refused(changes, message):
  legal = {
    'state_size': 3,
    'action_low': [0.0],
    'action_high': [1.0],
    'rollouts': 2,
    'buffer_size': 1,
  }
  with pytest.raises(UserError, match=message):
    Agent(**legal | changes)


# Equations.


def test_targets_end_at_terminal_states():
  targets = bellman_targets(
    np.array([1.0, 2.0, -1.0]), np.array([0.0, 1.0, 0.0]), np.array([10.0, 20.0, 30.0]), 0.9
  )
  np.testing.assert_allclose(targets, [1.0 + 9.0, 2.0, -1.0 + 27.0])


def test_targets_go_their_share_of_the_way():
  targets = [tf.Variable([1.0, 2.0]), tf.Variable(4.0)]
  soft_update(targets, [tf.constant([3.0, 2.0]), tf.constant(0.0)], 0.25)
  np.testing.assert_allclose(targets[0], [1.5, 2.0])
  np.testing.assert_allclose(targets[1], 3.0)


def test_noise_adapts_in_both_directions():
  assert adapted(0.5, distance=0.02, wanted=0.01, ratio=1.25) == pytest.approx(0.4)
  assert adapted(0.5, distance=0.005, wanted=0.01, ratio=1.25) == pytest.approx(0.625)
  assert adapted(0.5, distance=0.01, wanted=0.01, ratio=1.25) == pytest.approx(0.625)


@pytest.mark.parametrize(('terminal', 'subtracts', 'reward'), [(0, True, -1.0), (1, False, 1.0)])
def test_the_losses_of_the_first_step(terminal, subtracts, reward):
  actor, critic = first_networks()
  state, action, following = (tf.constant(FIRST[index], tf.float32) for index in (0, 1, 4))
  reached = critic([following, actor(following)]).numpy().item()
  wanted = reward + (1 - terminal) * 0.9 * reached
  value = critic([state, action]).numpy().item()
  agent = ready_agent((*FIRST[:3], [terminal], FIRST[4]), enbl_bsln_func=subtracts)
  agent.end_rollout(2.0)
  losses = agent.train()
  assert losses.critic == pytest.approx((value - wanted) ** 2 / 2, rel=1e-4)
  # Not quite: the critic has taken its step before the actor's.
  assert losses.actor == pytest.approx(-critic([state, actor(state)]).numpy().item(), abs=0.1)
  assert losses.noise_std == DdpgConfig().noise_std_init


def test_weight_decay_is_half_the_squares_of_the_kernels():
  kernels = [weight.numpy() for weight in first_networks()[1].weights if weight.name == 'kernel']
  assert len(kernels) == 3
  expected = sum(np.sum(kernel**2) for kernel in kernels) / 2
  assert float(kernel_decay(first_networks()[1])) == pytest.approx(expected, rel=1e-5)
  plain, decayed = (ready_agent(loss_w_dcy=factor).train() for factor in (0.0, 0.1))
  assert decayed.critic - plain.critic == pytest.approx(0.1 * expected, rel=1e-4)
  actor_decay = float(kernel_decay(first_networks()[0]))
  assert decayed.actor - plain.actor == pytest.approx(0.1 * actor_decay, rel=0.02)


def test_the_critic_and_the_actor_come_to_the_best_of_a_bandit():
  # One state, terminal: Q(s, a) = -(a - 0.7)^2, which is known for 200 actions.
  rng = np.random.default_rng(0)
  actions = rng.uniform(size=(200, 1))
  rewards = -((actions[:, 0] - 0.7) ** 2)
  zeros = np.zeros((200, 1))
  agent = Agent(1, [0.0], [1.0], 1, 200, DdpgConfig(lrn_rate=0.003))
  agent.record(zeros, actions, rewards, np.ones(200), zeros)
  losses = [agent.train() for _ in range(300)]
  assert agent.act([0.0], noisy=False) == pytest.approx(0.7, abs=0.1)
  assert losses[-1].critic < 0.05 * losses[0].critic
  assert losses[-1].actor == pytest.approx(0.0, abs=0.03)


# Baseline.


def test_the_baseline_is_a_moving_average_that_begins_with_the_first():
  agent = small_agent(bsln_decy_rate=0.75)
  assert agent.baseline == 0.0
  agent.end_rollout(2.0)
  assert agent.baseline == 2.0
  agent.end_rollout(4.0)
  assert agent.baseline == pytest.approx(2.5)
  agent.end_rollout(0.5)
  assert agent.baseline == pytest.approx(2.0)


# Replay buffer.


@settings(max_examples=50)
@given(st.integers(1, 7), st.lists(st.integers(0, 9), max_size=6))
def test_the_ring_keeps_the_latest(size, chunks):
  replay, oracle = Replay(size, 1, 1), collections.deque(maxlen=size)
  number = 0
  for count in chunks:
    numbers = np.arange(number, number + count, dtype=np.float32)
    number += count
    rows = numbers[:, np.newaxis]
    replay.add(rows, rows, numbers, np.zeros(count), rows)
    oracle.extend(numbers)
  assert replay.is_full == (len(oracle) == size)
  if replay.is_full:
    assert sorted(replay.columns[2]) == list(oracle)
    states, actions, rewards, terminals, following = replay.sample(np.random.default_rng(0), 50)
    np.testing.assert_array_equal(states[:, 0], rewards)
    np.testing.assert_array_equal(actions, following)
    assert set(rewards) <= set(oracle) and not terminals.any()


def test_the_oldest_are_replaced_in_order():
  replay = Replay(3, 1, 1)
  for numbers in ([1.0, 2.0], [3.0, 4.0], [5.0]):
    rows = np.array(numbers)[:, np.newaxis]
    replay.add(rows, rows, numbers, np.zeros(len(numbers)), rows)
  assert replay.columns[2].tolist() == [4.0, 5.0, 3.0]


def test_transitions_are_drawn_with_replacement_and_evenly():
  replay = Replay(4, 1, 1)
  rows = np.arange(4.0)[:, np.newaxis]
  replay.add(rows, rows, np.arange(4.0), np.zeros(4), rows)
  rewards = replay.sample(np.random.default_rng(0), 4000)[2]
  counts = np.bincount(rewards.astype(int), minlength=4)
  # Four standard deviations of a count.
  assert np.abs(counts - 1000).max() < 4 * np.sqrt(4000 * 0.25 * 0.75)


@pytest.mark.parametrize('chunk', [1, 2, 5])
def test_one_of_so_many_transitions_is_kept(chunk):
  agent = small_agent(buffer_size=4, record_step=3)
  for begin in range(0, 10, chunk):
    assert not agent.is_ready
    numbers = np.arange(begin, begin + chunk)
    states = np.tile(numbers[:, np.newaxis], 3)
    agent.record(states, states[:, :2], numbers, np.zeros(chunk), states)
  assert agent.is_ready
  assert agent._replay.columns[2].tolist() == [0.0, 3.0, 6.0, 9.0]


def test_one_reward_is_every_step_s():
  agent = small_agent(buffer_size=3)
  states = np.ones((3, 3))
  agent.record(states, states[:, :2], 0.75, [False, False, True], 0 * states)
  assert agent._replay.columns[2].tolist() == [0.75, 0.75, 0.75]
  assert agent._replay.columns[3].tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize(
  ('place', 'value', 'message'),
  [
    (1, [[0.1]], r'^`actions` must be finite numbers of shape \(1, 2\)\. Received: .* \(1, 1\)'),
    (2, [1.0, 2.0], r'^`rewards` must be finite numbers of shape \(1,\)'),
    (2, float('nan'), '^`rewards` must be finite'),
    (3, [[0]], '^`terminals` must be finite'),
    (4, [[1.0, float('inf'), 0.0]], '^`next_states` must be finite'),
  ],
)
def test_what_is_no_transition_is_refused(place, value, message):
  agent = small_agent()
  with pytest.raises(UserError, match=message):
    agent.record(*FIRST[:place], value, *FIRST[place + 1 :])
  assert not agent.is_ready


def test_training_waits_for_a_full_buffer():
  agent = small_agent(buffer_size=2)
  agent.record(*FIRST)
  assert not agent.is_ready
  with pytest.raises(UserError, match='until the replay buffer is full'):
    agent.train()
  agent.record(*FIRST)
  assert agent.is_ready


# Noise.


def test_noise_decays_from_the_first_training_step_on():
  agent = ready_agent(rollouts=4, noise_std_init=0.8, noise_std_finl=0.05)
  for _ in range(3):
    agent.begin_rollout()
    assert agent.noise_std == 0.8
  for expected in (0.4, 0.2, 0.1, 0.05):
    assert agent.train().noise_std == pytest.approx(2 * expected)
    agent.train()
    agent.begin_rollout()
    assert agent.noise_std == pytest.approx(expected)


@pytest.mark.parametrize(('first', 'grows'), [(1e-4, True), (3.0, False)])
def test_noise_adapts_with_every_training_step_and_not_with_roll_outs(first, grows):
  agent = ready_agent(noise_prtl='adapt', noise_std_init=first, noise_adpt_rat=1.25)
  for step in range(1, 4):
    agent.begin_rollout()
    expected = first * 1.25 ** (step if grows else -step)
    assert agent.train().noise_std == pytest.approx(expected)


def test_noise_leaves_layer_norms_alone():
  actor = make_actor(30, np.zeros(2), np.ones(2), 2, 64, np.random.default_rng(0))
  noisy = perturbed(actor, 0.5, np.random.default_rng(1))
  noise = []
  for weight, value in zip(actor.weights, noisy, strict=True):
    difference = value.numpy() - weight.numpy()
    if weight.name in ('gamma', 'beta'):
      assert not difference.any()
    else:
      assert weight.name in ('kernel', 'bias') and difference.all()
      noise.append(difference.ravel())
  noise = np.concatenate(noise)
  assert len(noise) == 30 * 64 + 64 + 64 * 64 + 64 + 64 * 2 + 2
  assert noise.std() == pytest.approx(0.5, rel=0.05) and abs(noise.mean()) < 0.03


def test_noisy_parameters_are_those_of_a_roll_out():
  agent = ready_agent()
  with pytest.raises(UserError, match=r'`begin_rollout\(\)` must be called before'):
    agent.act(STATE)
  best = agent.act(STATE, noisy=False)
  agent.begin_rollout()
  action = agent.act(STATE)
  assert np.any(action != best)
  np.testing.assert_array_equal(agent.act(STATE), action)
  agent.train()
  np.testing.assert_array_equal(agent.act(STATE), action)
  assert np.any(agent.act(STATE, noisy=False) != best)
  agent.begin_rollout()
  assert np.any(agent.act(STATE) != action)


def test_noisy_actions_are_other_ones_at_each_step():
  agent = small_agent(noise_type='action', noise_std_init=0.1)
  best = agent.act(STATE, noisy=False)
  noise = np.array([agent.act(STATE) - best for _ in range(300)])
  np.testing.assert_allclose(noise.std(axis=0), 0.1, rtol=0.2)
  np.testing.assert_allclose(noise.mean(axis=0), 0.0, atol=0.025)
  np.testing.assert_array_equal(agent.act(STATE, noisy=False), best)


# Actions.


bounds = st.tuples(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3)).map(
  lambda pair: (pair[0], pair[0] + pair[1])
)


@settings(max_examples=15)
@given(
  st.lists(bounds, min_size=1, max_size=3),
  st.sampled_from(['param', 'action']),
  st.sampled_from([1e-3, 1.0, 1e3]),
  st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=2),
)
def test_actions_are_within_their_bounds(pairs, noise_type, std, state):
  low, high = (np.array(ends) for ends in zip(*pairs, strict=True))
  config = DdpgConfig(**SMALL, noise_type=noise_type, noise_std_init=std, noise_std_finl=1e-3)
  agent = Agent(2, low, high, 1, 1, config)
  for _ in range(3):
    agent.begin_rollout()
    for noisy in (True, False):
      action = agent.act(state, noisy)
      assert action.shape == low.shape
      assert np.all((low <= action) & (action <= high))


def test_each_dimension_has_its_bounds():
  low, high = np.array([-1.0, 0.0, 10.0]), np.array([1.0, 6.0, 10.5])
  agent = Agent(3, low, high, 1, 1)
  np.testing.assert_allclose((agent.act(STATE, noisy=False) - low) / (high - low), 0.5, atol=0.05)
  actor = make_actor(3, low, high, 1, 4, np.random.default_rng(0))
  for shift, share in ((-50.0, 0.0), (np.log(3.0), 0.75), (50.0, 1.0)):
    actor.layers[-1].set_weights([np.zeros((4, 3)), np.full(3, shift)])
    np.testing.assert_allclose(actor(STATE[None])[0], low + share * (high - low), atol=1e-5)


# Random numbers.


def history(seed, **settings):
  """What an agent does and computes in three roll-outs."""
  agent = small_agent(buffer_size=6, seed=seed, **settings)
  rng = np.random.default_rng(7)
  seen = []
  for _ in range(3):
    agent.begin_rollout()
    states = rng.normal(size=(5, 3))
    actions = np.array([agent.act(state) for state in states[:4]])
    agent.record(states[:4], actions, rng.normal(size=4), [0, 0, 0, 1], states[1:])
    if agent.is_ready:
      seen += [*agent.train(), *agent.train()]
    agent.end_rollout(rng.normal())
    seen += [*actions.ravel(), *agent.act(states[0], noisy=False)]
  return np.array(seen)


@pytest.mark.parametrize('settings', [{'noise_type': 'action'}, {'noise_prtl': 'adapt'}], ids=str)
def test_the_seed_decides_everything(settings):
  keras.utils.set_random_seed(1)
  once = history(3, **settings)
  keras.utils.set_random_seed(2)
  np.testing.assert_array_equal(history(3, **settings), once)
  assert np.all(np.isfinite(once))
  first, other = (small_agent(seed=seed) for seed in (3, 4))
  for agent in (first, other):
    agent.begin_rollout()
  assert np.all(first.act(STATE) != other.act(STATE))
  assert np.all(first.act(STATE, noisy=False) != other.act(STATE, noisy=False))


def test_an_agent_leaves_the_random_numbers_and_names_of_others_alone():
  def draw():
    return [
      random.random(),
      np.random.random(),
      float(tf.random.normal([])),
      float(keras.random.normal([])),
      float(keras.layers.Dense(1, name='one')(np.ones((1, 4)))[0, 0]),
    ]

  keras.layers.Dense(1)
  number = int(keras.layers.Dense(1).name.rpartition('_')[2])
  keras.utils.set_random_seed(5)
  expected = draw()
  keras.utils.set_random_seed(5)
  history(0, noise_prtl='adapt')
  assert draw() == expected
  assert keras.layers.Dense(1).name == f'dense_{number + 1}'


# Tasks.


class Target:
  """A point in a square that is to move to the middle; its reward is minus the distance."""

  low, high, state_size = np.array([-0.3, -0.2]), np.array([0.2, 0.3]), 2

  def reset(self, seed):
    self.place = np.random.default_rng(seed).uniform(-1.0, 1.0, 2)
    self.steps = 0
    return self.place

  def step(self, action):
    self.place = np.clip(self.place + action, -1.0, 1.0)
    self.steps += 1
    return self.place, -np.linalg.norm(self.place), False, self.steps == 10


class Pendulum:
  """Gymnasium's pendulum for 60 steps, from up to a radian off the top; rewards in tenths."""

  low, high, state_size = np.array([-2.0]), np.array([2.0]), 3

  def __init__(self):
    self.environment = gymnasium.make('Pendulum-v1', max_episode_steps=60)

  def reset(self, seed):
    return self.environment.reset(seed=seed, options={'x_init': 1.0, 'y_init': 0.5})[0]

  def step(self, action):
    state, reward, terminal, is_cut, _ = self.environment.step(action.astype(np.float32))
    return state, reward / 10.0, terminal, terminal or is_cut


def roll_out(task, policy, seed, record=lambda *transition: None):
  """Returns the mean reward of a policy from one start."""
  state, rewards, is_over = task.reset(seed), [], False
  while not is_over:
    action = policy(state)
    following, reward, terminal, is_over = task.step(action)
    record([state], [action], [reward], [terminal], [following])
    rewards.append(reward)
    state = following
  return np.mean(rewards)


def learn(task, config, rollouts, buffer_size, every, seed):
  """Returns an agent that trained at one of `every` steps once its buffer was full."""
  agent = Agent(task.state_size, task.low, task.high, rollouts, buffer_size, config, seed)
  steps = 0

  def record(*transition):
    nonlocal steps
    agent.record(*transition)
    steps += 1
    if agent.is_ready and steps % every == 0:
      agent.train()

  for index in range(rollouts):
    agent.begin_rollout()
    agent.end_rollout(roll_out(task, agent.act, 1000 * seed + index, record))
  return agent


def compared(task, agent):
  """Returns the mean rewards of the agent without noise and of random actions, ten starts each."""
  rng = np.random.default_rng(0)
  starts = range(10_000, 10_010)
  learned = [roll_out(task, lambda state: agent.act(state, noisy=False), seed) for seed in starts]
  by_chance = [roll_out(task, lambda _: rng.uniform(task.low, task.high), seed) for seed in starts]
  return np.mean(learned), np.mean(by_chance)


@pytest.mark.slow
@pytest.mark.parametrize('seed', [0, 1, 2])
@pytest.mark.parametrize(
  ('task', 'config', 'rollouts', 'buffer_size', 'every', 'margin'),
  [
    (
      Target,
      DdpgConfig(tau=0.05, lrn_rate=0.002, noise_std_init=0.3, noise_std_finl=0.02),
      60,
      200,
      1,
      0.3,
    ),
    (
      Pendulum,
      DdpgConfig(tau=0.02, gamma=0.95, lrn_rate=0.002, noise_std_init=0.3, noise_std_finl=0.02),
      30,
      300,
      1,
      0.08,
    ),
  ],
  ids=['target', 'pendulum'],
)
def test_it_learns_a_task(task, config, rollouts, buffer_size, every, margin, seed):
  task = task()
  learned, by_chance = compared(task, learn(task, config, rollouts, buffer_size, every, seed))
  assert learned > by_chance + margin
