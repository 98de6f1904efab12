"""Loops over a Gymnasium environment that need no package besides this one's own; ``peers.py`` has the others.

Those named for a project, here and in the files beside, are written from scratch after its structure, and as fast as that structure
allows: to beat a slow imitation says nothing. Transitions are counted alike by all, so that all make the same number of updates between
the same two steps.
"""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dqn_jax.bench.settings import Setting, epsilon_at, options, require_plain_targets
from dqn_jax.networks import QNetwork
from dqn_jax.presets.dqn import DQN


class HostLoop(NamedTuple):
    """A loop over a Gymnasium environment, ready to go.

    Attributes:
      run: makes all the steps.
      greedy: from an observation to the greedy action.
      updates: the number of updates made so far.
    """

    run: Callable[[], None]
    greedy: Callable[[np.ndarray], int]
    updates: Callable[[], int]


def ours(env: gymnasium.Env, setting: Setting, steps: int, seed: int) -> HostLoop:
    """This package's step-by-step agent."""
    return around(DQN(env, seed=seed, **options(setting)), env, steps, seed)


def around(agent: DQN, env: gymnasium.Env, steps: int, seed: int) -> HostLoop:
    """The loop around an agent of this package."""

    def run() -> None:
        observation, _ = env.reset(seed=seed)
        reward: Any = 0.0
        for _ in range(steps):
            action = agent.act_and_train(observation, reward)
            observation, reward, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                agent.stop_episode_and_train(observation, reward, terminated)
                observation, _ = env.reset()

    return HostLoop(run, agent.act, lambda: int(agent.get_statistics()["n_updates"]))


class Replay:
    """A ring of transitions in NumPy arrays.

    Args:
      setting: of its capacity and its batches.
      seed: of the draws.
    """

    def __init__(self, setting: Setting, seed: int):
        self._capacity, self._batch_size = setting.capacity, setting.batch_size
        self._observations, self._successors = np.zeros((2, setting.capacity, 4), np.float32)
        self._actions = np.zeros(setting.capacity, np.int32)
        self._rewards, self._terminations = np.zeros((2, setting.capacity), np.float32)
        self._draws = np.random.default_rng(seed)
        self.stored = 0

    def add(self, observation: np.ndarray, action: int, reward: float, successor: np.ndarray, terminated: bool) -> None:
        """Stores one transition over the oldest."""
        row = self.stored % self._capacity
        self._observations[row], self._successors[row] = observation, successor
        self._actions[row], self._rewards[row], self._terminations[row] = action, reward, terminated
        self.stored += 1

    def sample(self) -> tuple[np.ndarray, ...]:
        """A uniform batch: observations ``[B, 4]``, actions, rewards ``[B]``, successors ``[B, 4]`` and terminations ``[B]``."""
        rows = self._draws.integers(0, min(self.stored, self._capacity), self._batch_size)
        return self._observations[rows], self._actions[rows], self._rewards[rows], self._successors[rows], self._terminations[rows]


def q_loss(network: Any, gamma: float, params: Any, target_params: Any, batch: tuple[Any, ...]) -> tuple[chex.Array, chex.Array]:
    """The mean squared TD error of a batch ``(observation, action, reward, successor, terminated)``, and the values ``[B]``."""
    observation, action, reward, successor, terminated = batch
    target = reward + gamma * (1.0 - terminated) * jnp.max(network.apply(target_params, successor), axis=-1)  # [B]
    q = network.apply(params, observation)[jnp.arange(action.shape[0]), action]  # [B]
    return jnp.mean(jnp.square(q - target)), q


def numpy_replay(env: gymnasium.Env, setting: Setting, steps: int, seed: int) -> HostLoop:
    """What one would write by hand for this one task: a NumPy replay, the whole choice in one jitted call, the update in another.

    Raises:
      ValueError: on n-step returns or Double DQN.
    """
    require_plain_targets(setting, "numpy-replay")
    replay, rng, network = Replay(setting, seed), random.Random(seed), QNetwork(2, setting.hidden)
    optimizer = optax.adam(setting.learning_rate)
    params = target_params = network.init(jax.random.key(seed), jnp.zeros((1, 4)))
    opt_state = optimizer.init(params)
    act = jax.jit(lambda params, observation: jnp.argmax(network.apply(params, observation[None])[0]))
    updates = 0

    @jax.jit
    def update(params: Any, target_params: Any, opt_state: Any, *batch: Any) -> tuple[Any, Any]:
        grads = jax.grad(lambda params: q_loss(network, setting.gamma, params, target_params, batch)[0])(params)
        changes, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, changes), opt_state

    def run() -> None:
        nonlocal params, target_params, opt_state, updates
        observation, _ = env.reset(seed=seed)
        for step in range(steps):
            action = rng.randrange(2) if rng.random() < epsilon_at(setting, step) else int(act(params, observation))
            successor, reward, terminated, truncated, _ = env.step(action)
            replay.add(observation, action, float(reward), successor, terminated)
            observation = env.reset()[0] if terminated or truncated else successor
            if replay.stored >= setting.warmup and replay.stored % setting.interval == 0:
                params, opt_state = update(params, target_params, opt_state, *replay.sample())
                updates += 1
            if replay.stored % setting.target_interval == 0:
                target_params = params

    return HostLoop(run, lambda observation: int(act(params, observation)), lambda: updates)
