"""A DDPG agent as a searcher: it walks over the variables and chooses one value at each step.

After AMC (He et al. 2018, arXiv:1802.03494) and PocketFlow. The actor's action is cut to what the
budget leaves, and what is learned from is the action that was executed. The reward is known at the
end of a roll-out and is that of all its steps.

Deviation 1 from PocketFlow: steps are chained in the order in which the variables were visited.
Deviation 2: the state knows what was spent and what is left, as its documentation said.
"""

import numpy as np

from pocketsize.errors import UserError
from pocketsize.rl.ddpg import Agent


class AgentSearcher:
  """Proposes levels by an actor with noise, which it trains on the rewards.

  Args:
    problem: a `Problem`.
    rollouts: how many there will be; the noise has decayed at the last one.
    rollouts_min: after so many, which fill the replay buffer, training begins; at most `rollouts`.
    middle: [variables] levels that the action 0.5 stands for, such as those of the uniform choice,
      so that exploration begins around them.
    random_order: visit the variables in an order drawn for each roll-out, not in that of their
      numbers.
    trainings_per_step: training steps for each step of a roll-out, after its reward is known.
    config: a `pocketsize.rl.ddpg.DdpgConfig`, or None for its defaults.
    seed: of all random numbers.

  Raises:
    UserError: `rollouts_min` or `trainings_per_step` is out of its range.
  """

  def __init__(
    self,
    problem,
    rollouts,
    rollouts_min,
    middle,
    *,
    random_order=True,
    trainings_per_step=1,
    config=None,
    seed=0,
  ):
    if not 1 <= rollouts_min <= rollouts:
      raise UserError(
        f'Training of the agent must begin after 1 to {rollouts} roll-outs, which are all there '
        f'will be. Received: {rollouts_min}.'
      )
    if trainings_per_step < 1:
      raise UserError(
        f'There must be at least 1 training step per step. Received: {trainings_per_step}.'
      )
    self._problem = problem
    self._walk = Walk(problem, middle)
    self._trainings = trainings_per_step * len(problem.variables)
    self._rng = np.random.default_rng(seed) if random_order else None
    self._orders = []
    self._rollouts_min, self._told = rollouts_min, 0
    transitions = rollouts_min * len(problem.variables)
    self._agent = Agent(
      self._walk.state_size,
      [0.0],
      [1.0],
      max(1, rollouts - rollouts_min),
      # So that it is full then, however many transitions are left out.
      max(1, transitions // config.record_step) if config else transitions,
      config,
      seed,
    )

  def ask(self):
    """Returns the levels of a walk of its own noise, within the budget: [variables] int."""
    order = self._order()
    self._agent.begin_rollout()
    levels = self._problem.lowest
    for step, place in enumerate(order):
      action = self._agent.act(self._walk.state(levels, order, step))[0]
      levels[place] = min(
        self._walk.level(place, action), self._problem.highest_allowed(levels, place)
      )
    self._orders.append((tuple(levels), order))
    return levels

  def tell(self, levels, reward):
    """Learns from the reward of levels that `ask` returned, in the order of the asks, or of others.

    Others are taken for chosen in the order of their numbers.
    """
    order = np.arange(len(levels))
    if self._orders and self._orders[0][0] == tuple(levels):
      order = self._orders.pop(0)[1]
    states, actions, terminals = self._walk.steps(levels, order)
    self._agent.record(states[:-1], actions, reward, terminals, states[1:])
    self._agent.end_rollout(reward)
    self._told += 1
    if self._told >= self._rollouts_min and self._agent.is_ready:
      for _ in range(self._trainings):
        self._agent.train()

  def _order(self):
    count = len(self._problem.variables)
    return np.arange(count) if self._rng is None else self._rng.permutation(count)


class Walk:
  """States and actions of choosing levels one after the other.

  A state is a one-hot number of the variable, its features (each over its largest absolute value),
  and three costs over the budget (without one, over the dearest cost): what the decisions so far
  take beyond the least, what they leave if all others are at the least, and what these would take
  at the most.

  Args:
    problem: a `Problem`.
    middle: [variables] levels that the action 0.5 stands for.
  """

  def __init__(self, problem, middle):
    self._problem = problem
    self._middle = np.asarray(middle, int)
    features = np.array([variable.features for variable in problem.variables], float)
    self._features = features / np.maximum(np.abs(features).max(0, initial=0.0), 1e-30)
    self._least = problem.cost.of(problem.lowest)
    dearest = problem.cost.of(problem.highest)
    self._limit = problem.budget if np.isfinite(problem.budget) else dearest
    self.state_size = len(features) + features.shape[1] + 3

  def level(self, place, action):
    """Returns the level that an action in [0, 1] stands for: linear from 0 to 0.5 and to 1."""
    level = np.interp(
      action, [0.0, 0.5, 1.0], [0, self._middle[place], self._problem.highest[place]]
    )
    return int(np.rint(level))

  def action(self, place, level):
    """Returns the action that stands for a level; 0.5 for the middle one."""
    middle, highest = self._middle[place], self._problem.highest[place]
    if level <= middle:
      return 0.5 * level / middle if level < middle else 0.5
    return 0.5 + 0.5 * (level - middle) / (highest - middle)

  def state(self, levels, order, step):
    """Returns the state in which `order[step]` is chosen; later ones of the order do not count."""
    lowest, highest = self._problem.lowest, self._problem.highest
    decided = order[:step]
    lowest[decided] = highest[decided] = np.asarray(levels)[decided]
    taken, most = self._problem.cost.of(lowest), self._problem.cost.of(highest)
    costs = np.array([taken - self._least, self._limit - taken, most - taken])
    one_hot = np.arange(len(order)) == order[step]
    return np.concatenate([one_hot, self._features[order[step]], costs / (self._limit or 1.0)])

  def steps(self, levels, order):
    """Returns the whole walk to `levels`: states [n + 1, s], actions [n, 1] and terminals [n].

    The last state, behind the terminal step, is 0.
    """
    states = [self.state(levels, order, step) for step in range(len(order))]
    actions = [[self.action(place, levels[place])] for place in order]
    terminals = np.arange(len(order)) == len(order) - 1
    return np.array([*states, np.zeros(self.state_size)]), np.array(actions), terminals
