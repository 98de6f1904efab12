"""The ready-made agents by the names that the command line knows."""

from collections.abc import Callable
from typing import Any, NamedTuple

from dqn_jax.online import OnlineAgent
from dqn_jax.options import schedule
from dqn_jax.presets.dqn import DQN, DQNOptions, complaint, dqn, dqn_options, epsilon_schedule
from dqn_jax.presets.dqn_sets import C51_PRESETS, IQN_PRESETS, PRESETS, QRDQN_PRESETS, RAINBOW_PRESETS
from dqn_jax.presets.ppo import PPO, PPO_PRESETS, PPOOptions, ppo
from dqn_jax.presets.pqn import PQN, PQN_PRESETS, PQNOptions, pqn, pqn_options
from dqn_jax.presets.rainbow import Rainbow, rainbow
from dqn_jax.presets.sac import SAC, SAC_PRESETS, SACOptions, sac
from dqn_jax.types import Agent


class Preset(NamedTuple):
    """One of them.

    Attributes:
      options: the dataclass of its options.
      sets: named sets of options.
      build: ``(env_or_spaces, **options) -> Agent``.
      online: the agent that a loop calls.
      scheduled: ``(steps, options) -> `` what follows a schedule, by name, at that step: for people to look at.
      complaint: ``(metrics) -> `` what they say against the options, or None.
    """

    options: type
    sets: dict[str, dict[str, Any]]
    build: Callable[..., Agent]
    online: type[OnlineAgent]
    scheduled: Callable[[int, dict[str, Any]], dict[str, float]]
    complaint: Callable[[dict[str, float]], str | None] = lambda metrics: None


def _dqn_epsilon(steps: int, options: dict[str, Any]) -> dict[str, float]:
    return {"epsilon": float(epsilon_schedule(dqn_options(**options))(steps))}


def _pqn_epsilon(steps: int, options: dict[str, Any]) -> dict[str, float]:
    return {"epsilon": float(schedule(pqn_options(**options).epsilon)(steps))}


ALGORITHMS: dict[str, Preset] = {
    "dqn": Preset(DQNOptions, PRESETS, dqn, DQN, _dqn_epsilon, complaint),
    "c51": Preset(DQNOptions, C51_PRESETS, dqn, DQN, _dqn_epsilon, complaint),
    "qrdqn": Preset(DQNOptions, QRDQN_PRESETS, dqn, DQN, _dqn_epsilon, complaint),
    "iqn": Preset(DQNOptions, IQN_PRESETS, dqn, DQN, _dqn_epsilon, complaint),
    "rainbow": Preset(DQNOptions, RAINBOW_PRESETS, rainbow, Rainbow, _dqn_epsilon, complaint),
    "ppo": Preset(PPOOptions, PPO_PRESETS, ppo, PPO, lambda steps, options: {}),
    "pqn": Preset(PQNOptions, PQN_PRESETS, pqn, PQN, _pqn_epsilon),
    "sac": Preset(SACOptions, SAC_PRESETS, sac, SAC, lambda steps, options: {}),
}
