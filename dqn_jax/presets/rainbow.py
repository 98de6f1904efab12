"""Rainbow by its own name: DQN with every piece of Hessel et al. (2018) switched on."""

from typing import Any

from dqn_jax.presets.dqn import DQN, dqn
from dqn_jax.presets.dqn_sets import RAINBOW_PRESETS
from dqn_jax.types import Agent


def rainbow(env_or_spaces: Any, **options: Any) -> Agent:
    """``dqn_jax.dqn`` with the options ``RAINBOW_PRESETS["default"]``, but for those given; arguments and errors as there."""
    return dqn(env_or_spaces, **{**RAINBOW_PRESETS["default"], **options})


class Rainbow(DQN):
    """``dqn_jax.DQN`` with the options ``RAINBOW_PRESETS["default"]``, but for those given; arguments and errors as there.

    The paper's setting for Atari is ``Rainbow(env, **RAINBOW_PRESETS["atari"])``, that of van Hasselt et al. (2019) for few frames
    ``RAINBOW_PRESETS["data_efficient"]``; both are for stacked frames.
    """

    def __init__(self, env_or_spaces: Any, seed: int = 0, **options: Any):
        super().__init__(env_or_spaces, seed, **{**RAINBOW_PRESETS["default"], **options})
