"""Atari 2600 games by their ids, ``ALE/Pong-v5``: through ale-py's ``AtariVectorEnv``, which steps and preprocesses them in C++ threads.

Its preprocessing is the usual one: each action for four frames, the last two of them joined by their maximum, grey, 84 x 84, the last four
in a stack along the first axis; up to 29 frames of doing nothing begin an episode, after FIRE where the game has it, and 108,000 frames,
27,000 decisions, end it by truncation. A lost life ends nothing. As ids of version 5 mean, the last action is repeated with
probability 0.25. A stack begins with black frames, and the replay ``frames`` keeps it as it came.

Rewards come as the game pays them, so that returns are scores; ``learnt_reward`` is what an agent learns from.
"""

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper

LARGEST_SEED = 2**31 - 1  # Of one game; further ones do not fit into the int that ale-py keeps them in.
ENLARGED = 4  # Sides of a picture's pixels, so that 84 of them can be seen.
# Arguments of AtariVectorEnv that are no choice, and why.
FIXED = {
    "num_envs": "it is an option of its own",
    "batch_size": "all games step together",
    "autoreset_mode": "the agent needs SAME_STEP",
    "life_loss_info": "ale-py then gives no true successor where a life is lost; episodic_life=true ends the episode, and the game, there",
}


def is_atari(env_id: str) -> bool:
    """Whether ``make`` and ``make_vec`` are for this id."""
    return env_id.startswith("ALE/")


def make(env_id: str, *, render_mode: str | None = None, **env_args: Any) -> "AtariEnv":
    """One game.

    Args:
      env_id: ``ALE/NAME-v5``.
      render_mode: "rgb_array" for pictures of what the agent sees, or None.
      **env_args: as for ``make_vec``.

    Raises:
      ValueError: if it is to be rendered in another way; and as ``make_vec``.
    """
    if render_mode not in (None, "rgb_array"):
        raise ValueError(f"{env_id} cannot be shown in a window, render_mode={render_mode!r}: record what the agent sees, --video FILE")
    return AtariEnv(make_vec(env_id, 1, **env_args), render_mode)


def make_vec(env_id: str, num_envs: int, **env_args: Any) -> VectorEnv:
    """Several games that restart by themselves in the step that ends an episode (SAME_STEP), with rewards as the games pay them.

    Args:
      env_id: ``ALE/NAME-v5``.
      num_envs: N.
      **env_args: arguments of ``AtariVectorEnv`` (``frameskip=4``, ``repeat_action_probability=0.25``, ``noop_max=30``,
        ``max_num_frames_per_episode=108000``, ``full_action_space=False``, ``episodic_life=False``, ``num_threads=0``, ...);
        ``reward_clipping`` is for ``learnt_reward``.

    Returns:
      A vector environment. Hand ``true_successors`` what ended: its infos do not say.

    Raises:
      ModuleNotFoundError: if ale-py is not installed.
      ValueError: if an argument is given that is no choice.
      TypeError: if there is no such argument.
      gymnasium.error.Error: if there is no such game.
    """
    try:
        import ale_py
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{env_id} needs ale-py: pip install 'dqn_jax[atari]'") from error
    gymnasium.register_envs(ale_py)
    for name in env_args.keys() & FIXED.keys():
        raise ValueError(f"{env_id} does not take {name}: {FIXED[name]}")
    given = {**env_args, "reward_clipping": False, "autoreset_mode": AutoresetMode.SAME_STEP}
    return _AnySeed(gymnasium.make_vec(env_id, num_envs, vectorization_mode="vector_entry_point", **given))


def learnt_reward(env_args: dict[str, Any]) -> Callable[[Any], Any]:
    """What an agent learns from of what a game paid: within [-1, 1], unless ``reward_clipping`` is False among the arguments."""
    return (lambda reward: np.clip(reward, -1, 1)) if env_args.get("reward_clipping", True) else (lambda reward: reward)


class _AnySeed(VectorWrapper):
    """Takes seeds as large as Gymnasium's."""

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """As of any vector environment; the games' seeds follow one another."""
        return self.env.reset(seed=None if seed is None else seed % (LARGEST_SEED - self.num_envs), options=options)


class AtariEnv(gymnasium.Env):
    """One game with the interface of one environment.

    Args:
      envs: of one game, as ``make_vec`` makes it.
      render_mode: "rgb_array", or None.
    """

    def __init__(self, envs: VectorEnv, render_mode: str | None = None):
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": 15}  # Decisions in a second of play.
        self.render_mode = render_mode
        self.observation_space, self.action_space = envs.single_observation_space, envs.single_action_space
        self._envs = envs
        self._begun: tuple[Any, dict[str, Any]] | None = None  # The next episode, which begins in the step that ends one.
        self._seen: Any = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begins an episode. Returns its first observation and what ale-py says about it."""
        super().reset(seed=seed)
        if seed is not None or self._begun is None:
            observation, infos = self._envs.reset(seed=seed, options=options)
            self._begun = observation[0], _first(infos)
        (self._seen, info), self._begun = self._begun, None
        return self._seen, info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One decision: observation (at the end the last one of the episode), reward, terminated, truncated and what ale-py says."""
        observation, rewards, terminations, truncations, infos = self._envs.step(np.array([action], self.action_space.dtype))
        terminated, truncated = bool(terminations[0]), bool(truncations[0])
        self._seen, self._begun = observation[0], None
        if terminated or truncated:
            self._begun = observation[0], _first(infos)
            self._seen = infos["final_obs"][0]
        return self._seen, float(rewards[0]), terminated, truncated, _first(infos)

    def render(self) -> np.ndarray:  # type: ignore[override]
        """The newest frame as the agent sees it, enlarged, uint8 ``[H, W, 3]``."""
        frame = self._seen[-1].repeat(ENLARGED, 0).repeat(ENLARGED, 1)
        return frame if frame.ndim == 3 else np.stack([frame] * 3, axis=-1)

    def close(self) -> None:
        """Closes the game."""
        self._envs.close()


def _first(infos: dict[str, Any]) -> dict[str, Any]:
    return {name: values[0] for name, values in infos.items() if name != "final_obs"}
