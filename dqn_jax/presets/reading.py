"""What the presets read off an environment: its spaces, and what kind of network suits its observations."""

from collections.abc import Callable
from typing import Any

import gymnasium

from dqn_jax import networks, spaces
from dqn_jax.options import require_int
from dqn_jax.types import Env, Masked

NATURE_SIDE = 36  # Pixels: the smallest image that Nature's three convolutions leave something of.


def read_spaces(env_or_spaces: Any) -> tuple[gymnasium.Space, gymnasium.Space, int | None]:
    """The spaces of one environment, and the number of environments where a vector environment was given.

    Raises:
      TypeError: if it is neither an environment nor a pair of spaces.
      ValueError: if it is a vector environment whose auto-reset is not SAME_STEP.
    """
    if isinstance(env_or_spaces, gymnasium.vector.VectorEnv):
        mode = env_or_spaces.metadata.get("autoreset_mode")
        if mode != gymnasium.vector.AutoresetMode.SAME_STEP:
            raise ValueError(
                f"this vector environment resets with {mode}; batch_act_and_train needs SAME_STEP: make it with "
                "gymnasium.make_vec(id, num_envs, vectorization_mode='sync', "
                "vector_kwargs={'autoreset_mode': gymnasium.vector.AutoresetMode.SAME_STEP})"
            )
        return env_or_spaces.single_observation_space, env_or_spaces.single_action_space, env_or_spaces.num_envs
    if isinstance(env_or_spaces, gymnasium.Env | Env):
        return env_or_spaces.observation_space, env_or_spaces.action_space, None
    if isinstance(env_or_spaces, tuple) and len(env_or_spaces) == 2 and all(isinstance(s, gymnasium.Space) for s in env_or_spaces):
        return *env_or_spaces, None
    make = f" {env_or_spaces!r}: make it with gymnasium.make" if isinstance(env_or_spaces, str) else ""
    raise TypeError(f"expected an environment or the pair (observation_space, action_space), got {type(env_or_spaces).__name__}{make}")


def read_env(env_or_spaces: Any, num_envs: int | None, seed: int) -> tuple[gymnasium.Space, gymnasium.Space, int]:
    """The spaces of one environment and their number: as asked for, that of a vector environment, or 1.

    Raises:
      TypeError, ValueError: as ``read_spaces``, and if the number or the seed is not a whole number, or two numbers contradict.
    """
    observation_space, action_space, given = read_spaces(env_or_spaces)
    if num_envs is not None and given is not None and num_envs != given:
        raise ValueError(f"num_envs is {num_envs}, the vector environment has {given}: leave num_envs out")
    if num_envs is None:
        num_envs = 1 if given is None else given
    require_int("num_envs", num_envs, 1)
    require_int("seed", seed, -(2**63))
    return observation_space, action_space, num_envs


def require_mask(observation_space: gymnasium.Space, num_actions: int | None) -> None:
    """Raises ValueError if there is an action mask without one entry for each action; NotImplementedError on an unsupported space.

    Args:
      observation_space: of one environment.
      num_actions: None where actions are not numbered.
    """
    observation = spaces.example(observation_space, 1)
    if isinstance(observation, Masked) and num_actions is None:
        raise ValueError(f"an action mask is for numbered actions (Discrete): take it out of {observation_space}")
    if isinstance(observation, Masked) and observation.action_mask.shape[1:] != (num_actions,):
        raise ValueError(
            f"action_mask has shape {observation.action_mask.shape[1:]}, there are {num_actions} actions: give one entry for each"
        )


def encoder_of(encoder: str, observation_space: gymnasium.Space, frames: str = "off") -> tuple[str, bool]:
    """What the network sees first, "auto" resolved; and whether an image's channels, or its stacked frames, are its first axis.

    Args:
      encoder: the option of that name.
      observation_space: of one environment.
      frames: the option of that name.
    """
    space = observation_space
    if isinstance(space, gymnasium.spaces.Dict) and spaces.is_masked(space):
        space = space["observation"]
    shape = space.shape or ()
    # Channels are the shortest axis if they come first, unless the option says where the frames are.
    guess = len(shape) == 3 and shape[0] < min(shape[1:])
    channels_first = {"stack_first": True, "stack_last": False}.get(frames, guess)
    if encoder != "auto":
        return encoder, channels_first
    if not spaces.is_image(space):
        return "flat", channels_first
    side = min(shape[1:] if len(shape) == 3 and channels_first else shape[:2])
    return "nature" if side >= NATURE_SIDE else "minatar" if side >= 3 else "flat", channels_first


def q_network(
    options: Any, observation_space: gymnasium.Space, num_actions: int, flat: tuple[int, ...] = (64, 64), *, layer_norm: bool = False
) -> networks.QNetwork | networks.ConvQNetwork:
    """The network that gives one value per action, by the options ``encoder``, ``hidden`` and, where there is one, ``frames``.

    Args:
      options: an agent's.
      observation_space: of one environment.
      num_actions: A.
      flat: widths of the hidden layers for vectors, unless the options give some.
      layer_norm: whether layers are normalised.
    """
    convolutions, hidden, read = layers_of(options, observation_space, flat)
    if convolutions:
        return networks.ConvQNetwork(num_actions, convolutions, hidden, read, layer_norm=layer_norm)
    return networks.QNetwork(num_actions, hidden, read, layer_norm=layer_norm)


def layers_of(
    options: Any, observation_space: gymnasium.Space, flat: tuple[int, ...] = (64, 64)
) -> tuple[tuple[tuple[int, int, int], ...], tuple[int, ...], Callable[[Any], Any]]:
    """The convolutions, none for vectors; the widths of the hidden layers; and what makes images or vectors of observations.

    Args:
      options: an agent's.
      observation_space: of one environment.
      flat: as for ``q_network``.
    """
    hidden = options.hidden
    encoder, channels_first = encoder_of(options.encoder, observation_space, getattr(options, "frames", "off"))
    if encoder == "flat":
        return (), tuple(hidden or flat), spaces.features(observation_space)
    convolutions, default = (networks.NATURE, (512,)) if encoder == "nature" else (networks.MINATAR, (128,))
    return convolutions, tuple(hidden or default), spaces.image(observation_space, channels_first)
