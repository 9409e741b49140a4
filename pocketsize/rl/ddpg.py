"""DDPG: an actor and a critic for continuous actions (Lillicrap et al. 2016, arXiv:1509.02971),
which explore by noise on the actor's parameters (Plappert et al. 2018, arXiv:1706.01905).

A roll-out is `begin_rollout()`, `act(state)` at each step, `record(...)`, and `end_rollout(mean)`
with its mean reward. `train()` may be called as soon as `is_ready`. Where a reward is known at the
end only, all steps of the roll-out are recorded with it.

Deviation 1 from the papers: training waits until the replay buffer is full, and a moving average of
the roll-outs' mean rewards is subtracted from rewards, as in PocketFlow; noise has no memory.
Deviation 2 from PocketFlow: the critic's loss is a mean over the batch, not a sum. Adam's steps are
the same, and weight decay, of kernels only, means the same at any batch size and in both networks.
Deviation 3 from PocketFlow: last layers begin near 0, as in Lillicrap et al. (section 7), so first
actions are in the middle of their bounds; the actor learns from the critic after the critic's step.
"""

import dataclasses
import functools
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from pocketsize.errors import UserError
from pocketsize.options import check_options, option
from pocketsize.rl.networks import compute, kernel_decay, make_actor, make_critic, perturbed, values
from pocketsize.rl.replay import Replay


@dataclasses.dataclass(frozen=True, kw_only=True)
class DdpgConfig:
  """Settings of an agent; PocketFlow's, whose names began with `ddpg_`."""

  actor_depth: int = option(2, 'hidden blocks of the actor', lower=1)
  actor_width: int = option(64, 'units of each of them', lower=1)
  critic_depth: int = option(2, 'hidden blocks of the critic that see state and action', lower=1)
  critic_width: int = option(64, 'units of each of them, and of the block before', lower=1)
  tau: float = option(0.01, 'share of the way that target networks go per step', above=0, upper=1)
  gamma: float = option(0.9, 'discount of the next reward', lower=0, upper=1)
  lrn_rate: float = option(0.001, 'learning rate of actor and critic (Adam)', above=0)
  loss_w_dcy: float = option(0.0, 'factor of half the sum of squared kernels', lower=0)
  record_step: int = option(1, 'one of so many transitions is kept', lower=1)
  batch_size: int = option(64, 'transitions of a training step', lower=1)
  enbl_bsln_func: bool = option(True, 'subtract the moving average of rewards from rewards')
  bsln_decy_rate: float = option(0.95, 'decay of that average, per roll-out', lower=0, below=1)
  noise_type: str = option(
    'param', "what is noisy: the actor's parameters or its actions", choices=('param', 'action')
  )
  noise_prtl: str = option(
    'tdecy',
    'the noise decays from roll-out to roll-out, or adapts to a distance of actions',
    choices=('tdecy', 'adapt'),
  )
  noise_std_init: float = option(0.2, 'first standard deviation of the noise', above=0)
  noise_dst_finl: float = option(0.01, 'adapt: mean distance of noisy actions', above=0)
  noise_adpt_rat: float = option(1.03, 'adapt: factor of the noise per training step', above=1)
  noise_std_finl: float = option(0.02, 'tdecy: last standard deviation of the noise', above=0)

  def __post_init__(self):
    check_options(self)
    if self.noise_prtl == 'adapt' and self.noise_type != 'param':
      raise UserError(
        '--noise_prtl=adapt needs --noise_type=param: what adapts is the noise of parameters. '
        f'Received: {self.noise_type!r}.'
      )
    if self.noise_prtl == 'tdecy' and self.noise_std_finl > self.noise_std_init:
      raise UserError(
        '--noise_std_finl must not be above --noise_std_init: with tdecy the noise decays. '
        f'Received: {self.noise_std_finl} and {self.noise_std_init}.'
      )


class Losses(NamedTuple):
  """What a training step computed, before its update, and the noise's standard deviation."""

  actor: float
  critic: float
  noise_std: float


def bellman_targets(rewards, terminals, next_values, gamma):
  """Returns y = r + gamma (1 - t) Q'(s', mu'(s')) (Lillicrap et al. 2016, algorithm 1); all [n]."""
  return rewards + gamma * (1.0 - terminals) * next_values


def soft_update(targets, sources, tau):
  """Moves variables a share `tau` of the way to their sources."""
  for target, source in zip(targets, sources, strict=True):
    target.assign((1.0 - tau) * target + tau * source)


def adapted(std, distance, wanted, ratio):
  """Returns the noise divided by `ratio` if it moves actions farther than wanted, else multiplied
  with it (Plappert et al. 2018, section 3).
  """
  return std / ratio if distance > wanted else std * ratio


class Agent:
  """An actor, its critic, and the transitions that they learn from.

  Args:
    state_size: numbers in a state.
    action_low, action_high: [actions] finite bounds of each number of an action, low below high.
    rollouts: over so many roll-outs the noise decays, counted from the one after training began.
    buffer_size: transitions in the replay buffer, which must be full before training.
    config: a `DdpgConfig`, or None for its defaults.
    seed: of all random numbers. Agents that are made and used in the same way are the same, bit for
      bit; no random state of others is read or changed.

  Attributes:
    noise_std: standard deviation of the noise, on parameters or in units of the actions.
    baseline: the moving average of mean rewards; 0 before a roll-out has ended.

  Raises:
    UserError: sizes are not positive, or the bounds are no bounds.
  """

  def __init__(
    self, state_size, action_low, action_high, rollouts, buffer_size, config=None, seed=0
  ):
    if min(state_size, rollouts, buffer_size) < 1:
      raise UserError(
        '`state_size`, `rollouts` and `buffer_size` must be at least 1. '
        f'Received: {state_size}, {rollouts} and {buffer_size}.'
      )
    low, high = (np.asarray(bound, np.float64) for bound in (action_low, action_high))
    are_alike = low.ndim == 1 and low.shape == high.shape
    if not are_alike or not np.all((low < high) & np.isfinite(high - low)):
      raise UserError(
        '`action_low` and `action_high` must be finite numbers for each dimension, low below high. '
        f'Received: {action_low} and {action_high}.'
      )
    self._config = config = config or DdpgConfig()
    self._low, self._high, self._rollouts = low, high, rollouts
    self._rng = rng = np.random.default_rng(seed)
    self._replay = Replay(buffer_size, state_size, len(low))
    self._recorded = 0
    self._actor = make_actor(state_size, low, high, config.actor_depth, config.actor_width, rng)
    self._critic = make_critic(state_size, len(low), config.critic_depth, config.critic_width, rng)
    self._networks = (self._actor, self._critic)
    self._targets = [[tf.Variable(w) for w in network.get_weights()] for network in self._networks]
    self._optimizers = [keras.optimizers.Adam(config.lrn_rate, name='adam') for _ in range(2)]
    for optimizer, network in zip(self._optimizers, self._networks, strict=True):
      # Where the first step makes variables, TensorFlow traces it twice.
      optimizer.build(network.weights)
    self._act = tf.function(functools.partial(compute, self._actor), autograph=False)
    self._step = tf.function(self._train_step, autograph=False)
    self._explorer = None
    self._has_trained = self._has_baseline = False
    self.baseline, self.noise_std = 0.0, config.noise_std_init

  @property
  def is_ready(self):
    """Whether the replay buffer is full, so that `train` may be called."""
    return self._replay.is_full

  def begin_rollout(self):
    """Draws the noise on parameters for a roll-out; `tdecy` lets it decay first, once trained."""
    if self._has_trained and self._config.noise_prtl == 'tdecy':
      ratio = self._config.noise_std_finl / self._config.noise_std_init
      self.noise_std *= ratio ** (1.0 / self._rollouts)
    if self._config.noise_type == 'param':
      self._explorer = perturbed(self._actor, self.noise_std, self._rng)

  def act(self, state, noisy=True):
    """Returns the action in a state, [actions] float64 within the bounds.

    Args:
      state: [state_size] numbers.
      noisy: whether to explore: with the parameters that `begin_rollout` drew, or with noise added
        to the action. Without it, what the actor as trained so far holds for best.
    """
    is_perturbed = noisy and self._config.noise_type == 'param'
    weights = self._explorer if is_perturbed else values(self._actor)
    if weights is None:
      raise UserError('`begin_rollout()` must be called before the first noisy action.')
    state = np.asarray(state, np.float32)[np.newaxis]
    action = self._act(weights, state).numpy()[0].astype(np.float64)
    if noisy and not is_perturbed:
      action += self._rng.normal(0.0, self.noise_std, action.shape)
    return np.clip(action, self._low, self._high)

  def record(self, states, actions, rewards, terminals, next_states):
    """Puts transitions into the replay buffer, one of `record_step` and the first one.

    Args:
      states, next_states: [n, state_size]; what follows a terminal transition does not matter.
      actions: [n, actions], as `act` returned them or as the environment changed them.
      rewards: [n], or one number that all of them get.
      terminals: [n], 1 or True where nothing follows.

    Raises:
      UserError: an array has another shape, or a number in it is not finite.
    """
    rewards = np.broadcast_to(rewards, len(states)) if np.ndim(rewards) == 0 else rewards
    kept = slice(-self._recorded % self._config.record_step, None, self._config.record_step)
    self._recorded += len(states)
    columns = states, actions, rewards, terminals, next_states
    self._replay.add(*(np.asarray(column, np.float32)[kept] for column in columns))

  def train(self):
    """Takes one step of both networks on a batch from the replay buffer, and returns its `Losses`.

    Raises:
      UserError: the replay buffer is not full yet.
    """
    if not self.is_ready:
      raise UserError('`train()` must wait until the replay buffer is full and `is_ready` is true.')
    self._has_trained = True
    config = self._config
    batch = self._replay.sample(self._rng, config.batch_size)
    states, actions, rewards, terminals, next_states = batch
    if config.noise_prtl == 'adapt':
      moved = self._noise_distance(states)
      self.noise_std = adapted(self.noise_std, moved, config.noise_dst_finl, config.noise_adpt_rat)
    if config.enbl_bsln_func:
      rewards = rewards - np.float32(self.baseline)
    losses = self._step(states, actions, rewards, terminals, next_states)
    return Losses(*(float(loss) for loss in losses), self.noise_std)

  def end_rollout(self, mean_reward):
    """Moves the baseline towards the mean reward of the roll-out's steps; the first one sets it."""
    decay = self._config.bsln_decy_rate if self._has_baseline else 0.0
    self.baseline = decay * self.baseline + (1.0 - decay) * float(mean_reward)
    self._has_baseline = True

  def _noise_distance(self, states):
    """Returns how far noise moves actions: mean |mu(s) - mu_noisy(s)|, with noise of its own."""
    noisy = self._act(perturbed(self._actor, self.noise_std, self._rng), states)
    return float(np.mean(np.abs(self._act(values(self._actor), states) - noisy)))

  def _train_step(self, states, actions, rewards, terminals, next_states):
    config = self._config
    next_actions = compute(self._actor, self._targets[0], next_states)
    next_values = compute(self._critic, self._targets[1], [next_states, next_actions])[:, 0]
    targets = bellman_targets(rewards, terminals, next_values, config.gamma)
    with tf.GradientTape() as tape:
      errors = self._critic([states, actions])[:, 0] - targets
      critic_loss = tf.reduce_mean(tf.square(errors)) / 2.0
      critic_loss += config.loss_w_dcy * kernel_decay(self._critic)
    self._descend(1, tape, critic_loss)
    with tf.GradientTape() as tape:
      actor_loss = -tf.reduce_mean(self._critic([states, self._actor(states)]))
      actor_loss += config.loss_w_dcy * kernel_decay(self._actor)
    self._descend(0, tape, actor_loss)
    for network, weights in zip(self._networks, self._targets, strict=True):
      soft_update(weights, values(network), config.tau)
    return actor_loss, critic_loss

  def _descend(self, index, tape, loss):
    network = self._networks[index]
    self._optimizers[index].apply(tape.gradient(loss, values(network)), network.weights)
