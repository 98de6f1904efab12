"""Agents in Gymnasium environments: training step by step, so that it can stop after any step and go on, and single greedy episodes."""

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np

from dqn_jax.envs import true_successors


class Play:
    """One environment, stepped for ever.

    Args:
      agent: who plays.
      env: where.
      seed: of the first episode.
      learnt: what the agent learns from, of the reward that was paid.
    """

    def __init__(self, agent: Any, env: gymnasium.Env, seed: int, learnt: Callable[[Any], Any]):
        self.agent, self.env, self._learnt = agent, env, learnt
        self._observation, _ = env.reset(seed=seed)
        self._reward, self._total, self._length = 0.0, 0.0, 0

    def step(self) -> list[tuple[float, int]]:
        """One step of the environment. Returns the return and the length of the episode that it ended, if it did."""
        action = self.agent.act_and_train(self._observation, self._learnt(self._reward))
        self._observation, reward, terminated, truncated, _ = self.env.step(action)
        self._reward = float(reward)
        self._total, self._length = self._total + self._reward, self._length + 1
        if not (terminated or truncated):
            return []
        self.agent.stop_episode_and_train(self._observation, self._learnt(self._reward), terminated=bool(terminated))
        ended = [(self._total, self._length)]
        self._observation, _ = self.env.reset()
        self._reward, self._total, self._length = 0.0, 0.0, 0
        return ended

    def position(self) -> dict[str, Any]:
        """Where it stands, but for the agent and the environment: numbers and arrays, and containers of them."""
        return {"observation": self._observation, "reward": self._reward, "total": self._total, "length": self._length}

    def go_on(self, observation: Any, reward: float, total: float, length: int) -> None:
        """Goes on from a ``position``."""
        self._observation, self._reward, self._total, self._length = observation, reward, total, length


class PlayBatch:
    """As ``Play``, for a vector environment."""

    def __init__(self, agent: Any, env: gymnasium.vector.VectorEnv, seed: int, learnt: Callable[[Any], Any]):
        self.agent, self.env, self._learnt = agent, env, learnt
        self._first, _ = env.reset(seed=seed)
        self._action: np.ndarray | None = None  # Not chosen yet: that would compile.
        self._total, self._length = np.zeros(env.num_envs), np.zeros(env.num_envs, int)

    def step(self) -> list[tuple[float, int]]:
        """One step of each environment. Returns the return and the length of each episode that ended."""
        if self._action is None:
            self._action = self.agent.batch_act_and_train(self._first)
        observation, reward, terminated, truncated, infos = self.env.step(self._action)
        total, length, ended = self._total + reward, self._length + 1, terminated | truncated
        self._total, self._length = np.where(ended, 0.0, total), np.where(ended, 0, length)
        successor = true_successors(observation, infos, ended)
        self._action = self.agent.batch_act_and_train(observation, self._learnt(reward), terminated, truncated, successor)
        return [(float(total[i]), int(length[i])) for i in np.flatnonzero(ended)]

    def position(self) -> dict[str, Any]:
        """Where it stands, but for the agent and the environments."""
        return {"action": self._action, "total": self._total, "length": self._length}

    def go_on(self, action: np.ndarray, total: np.ndarray, length: np.ndarray) -> None:
        """Goes on from a ``position``."""
        self._action, self._total, self._length = action, total, length


def play_greedily(choose: Any, env: gymnasium.Env, seed: int) -> float:
    """Plays one episode with ``choose(observation) -> action``; returns its return."""
    observation, _ = env.reset(seed=seed)
    total, ended = 0.0, False
    while not ended:
        observation, reward, terminated, truncated, _ = env.step(choose(observation))
        total += float(reward)
        ended = terminated or truncated
    return total
