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
# Arguments of AtariVectorEnv that are no choice, and why.
FIXED = {
    "game": "the id names it",
    "batch_size": "all games step together",
    "grayscale": "no network here takes stacks of colour pictures",
    "vectorization_mode": "ale-py has one of its own",
    "autoreset_mode": "the agent needs SAME_STEP",
    "life_loss_info": "ale-py then gives no true successor where a life is lost; episodic_life=true ends the episode, and the game, there",
}
COUNTS = {"num_envs", "stack_num", "frameskip", "img_height", "img_width", "max_num_frames_per_episode"}
SWITCHES = {"reward_clipping", "episodic_life", "full_action_space", "use_fire_reset", "maxpool"}


def is_atari(env_id: str) -> bool:
    """Whether ``make`` and ``make_vec`` are for this id."""
    return env_id.startswith("ALE/")


def hint(env_id: str) -> str:
    """What to tell who asks for a game by a name that it once had, and that is unknown; empty for other names."""
    old = any(part in env_id for part in ("NoFrameskip", "Deterministic", "-v4", "-v5"))
    return "; games of Atari are ALE/NAME-v5, ALE/Pong-v5 for example" if old else ""


def require_preprocessed(env_id: str) -> None:
    """Raises if an id is one of ale-py's older ones, ``PongNoFrameskip-v4``, which Gymnasium knows as soon as ale-py has registered them.

    Raises:
      ValueError: then; such an environment gives pictures of the screen in colour, or the machine's memory.
    """
    spec = gymnasium.registry.get(env_id)
    if spec is not None and str(spec.entry_point).startswith("ale_py") and not is_atari(env_id):
        name = "".join(word.title() for word in spec.kwargs["game"].split("_"))
        raise ValueError(f"{env_id} is not preprocessed as agents need it (small grey pictures, in stacks): take ALE/{name}-v5")


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
      ValueError: if an argument is given that is no choice, or one is out of range: ale-py itself hangs or crashes on some of these.
      TypeError: if there is no such argument.
      gymnasium.error.Error: if there is no such game.
    """
    try:
        import ale_py
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{env_id} needs ale-py: pip install 'dqn_jax[atari]'") from error
    gymnasium.register_envs(ale_py)
    _require(env_id, {"num_envs": num_envs, **env_args})
    given = {**env_args, "reward_clipping": False, "autoreset_mode": AutoresetMode.SAME_STEP}
    return _AnySeed(gymnasium.make_vec(env_id, num_envs, vectorization_mode="vector_entry_point", **given))


def learnt_reward(env_args: dict[str, Any]) -> Callable[[Any], Any]:
    """What an agent learns from of what a game paid: within [-1, 1], unless ``reward_clipping`` is False among the arguments."""
    return (lambda reward: np.clip(reward, -1, 1)) if env_args.get("reward_clipping", True) else (lambda reward: reward)


def _require(env_id: str, env_args: dict[str, Any]) -> None:
    for name, value in env_args.items():
        if name in FIXED:
            raise ValueError(f"{env_id} does not take {name}: {FIXED[name]}")
        if name in COUNTS and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if name in SWITCHES and not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {value!r}")
    chance = env_args.get("repeat_action_probability", 0.0)
    if not isinstance(chance, int | float) or not 0 <= chance <= 1:
        raise ValueError(f"repeat_action_probability must be in [0, 1], got {chance!r}")


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
        """One decision: observation (at the end the last one of the episode), reward, terminated, truncated, and what ale-py says, which
        at the end is about the next episode.
        """
        observation, rewards, terminations, truncations, infos = self._envs.step(np.array([action], self.action_space.dtype))
        terminated, truncated = bool(terminations[0]), bool(truncations[0])
        self._seen, self._begun = observation[0], None
        if terminated or truncated:
            self._begun = observation[0], _first(infos)
            self._seen = infos["final_obs"][0]
        return self._seen, float(rewards[0]), terminated, truncated, _first(infos)

    def render(self) -> np.ndarray:  # type: ignore[override]
        """The newest frame as the agent sees it, uint8 ``[H, W, 3]``: a view, since a recording keeps all frames of an episode."""
        return np.broadcast_to(self._seen[-1][..., None], (*self._seen[-1].shape, 3))

    def close(self) -> None:
        """Closes the game."""
        self._envs.close()


def _first(infos: dict[str, Any]) -> dict[str, Any]:
    return {name: values[0] for name, values in infos.items() if name != "final_obs"}
