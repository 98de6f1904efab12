"""What Gymnasium spaces mean here: which are supported, how a value is checked at the boundary, how a network sees it.

The boundary is where people and environments hand in values. A value is converted once, into fresh arrays of fixed shape and dtype
(so that no kind of scalar or list causes a second compilation, and nothing outside shares memory with what JAX reads later), and a
bad one raises an error that says what came, what was expected and what to do, before anything has changed.
"""

import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces

from dqn_jax.types import Masked

Check = Callable[[Any], Any]
FLOAT32_MAX = float(np.finfo(np.float32).max)


def is_masked(space: spaces.Space) -> bool:
    """Whether the space is a Dict of exactly ``observation`` and ``action_mask``: the convention for forbidden actions."""
    return isinstance(space, spaces.Dict) and set(space.spaces) == {"observation", "action_mask"}


def num_actions(space: spaces.Space, algorithm: str) -> int:
    """The number of actions of a Discrete action space.

    Raises:
      ValueError: if the space is not Discrete.
      NotImplementedError: if its actions do not start at 0.
    """
    if not isinstance(space, spaces.Discrete):
        raise ValueError(
            f"{algorithm} needs a Discrete action space, got {space}: use PPO (--algo ppo), or SAC (--algo sac) for a bounded Box of "
            "floats, or discretise the actions with a gymnasium.ActionWrapper"
        )
    if space.start != 0:
        raise NotImplementedError(f"actions must start at 0, got {space}: shift them with gymnasium.wrappers.TransformAction")
    return int(space.n)


def leave(space: spaces.Space) -> Callable[[np.ndarray], np.ndarray]:
    """How an action, or a batch of them, leaves for the environment: a copy, and what a Box holds in its own dtype, within its bounds."""
    if isinstance(space, spaces.Box) and space.dtype != np.float32:  # In float32 the algorithms keep to the bounds themselves.
        return lambda action: np.asarray(np.clip(np.asarray(action, space.dtype), space.low, space.high))
    return np.array


def _leaf_dtype(space: spaces.Space) -> np.dtype:
    """The dtype in which values of a leaf space are kept: float32 for reals, int32 for choices, else the space's own."""
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        return np.dtype(np.int32)
    if np.issubdtype(space.dtype, np.floating):
        return np.dtype(np.float32)
    return np.dtype(jax.dtypes.canonicalize_dtype(space.dtype))  # JAX keeps 32 bits; values that need more are refused.


def _shape(space: spaces.Space) -> tuple[int, ...]:
    return tuple(space.shape or ())


def example(space: spaces.Space, num_envs: int) -> Any:
    """Zeros of the shape and dtype in which observations of this space are kept, ``[N, ...]``.

    Raises:
      NotImplementedError: if the space, or one inside it, is not supported.
    """
    if is_masked(space):
        assert isinstance(space, spaces.Dict)
        mask = np.ones((num_envs, *_shape(space["action_mask"])), np.bool_)
        return Masked(example(space["observation"], num_envs), mask)
    if isinstance(space, spaces.Dict):
        return {name: example(inner, num_envs) for name, inner in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(example(inner, num_envs) for inner in space.spaces)
    if isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        return np.zeros((num_envs, *_shape(space)), _leaf_dtype(space))
    raise NotImplementedError(
        f"observation space {space} is not supported; supported are Box, Discrete, MultiDiscrete, MultiBinary, and Dict or Tuple of "
        "these: convert it with gymnasium.wrappers.FlattenObservation or a wrapper of your own"
    )


def features(space: spaces.Space) -> Callable[[chex.ArrayTree], chex.Array]:
    """How a network reads observations of this space: a function from a batch ``[B, ...]`` to vectors ``[B, F]`` of float32.

    Discrete values become one-hot vectors, uint8 images are divided by 255, Dict and Tuple members are joined in order.
    """
    if is_masked(space):
        assert isinstance(space, spaces.Dict)
        return features(space["observation"])
    if isinstance(space, spaces.Dict | spaces.Tuple):
        members = space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces)
        parts = [(name, features(inner)) for name, inner in members]
        return lambda x: jnp.concatenate([part(x[name]) for name, part in parts], axis=-1)
    if isinstance(space, spaces.Discrete):
        return lambda x: jax.nn.one_hot(x - int(space.start), int(space.n))
    if isinstance(space, spaces.MultiDiscrete):
        sizes, starts = space.nvec.ravel().tolist(), space.start.ravel().tolist()

        def one_hots(x: chex.Array) -> chex.Array:
            columns = x.reshape(x.shape[0], -1).T
            return jnp.concatenate([jax.nn.one_hot(c - low, n) for c, low, n in zip(columns, starts, sizes, strict=True)], axis=-1)

        return one_hots
    scale = _scale(space)
    return lambda x: x.reshape(x.shape[0], -1).astype(jnp.float32) / scale


def _scale(space: spaces.Space) -> float:
    return 255.0 if space.dtype == np.uint8 and len(_shape(space)) > 1 else 1.0  # A vector of bytes is no image.


def is_image(space: spaces.Space) -> bool:
    """Whether observations look like images: a Box of uint8 or bool with two or three axes, with or without an action mask."""
    if is_masked(space):
        assert isinstance(space, spaces.Dict)
        return is_image(space["observation"])
    return isinstance(space, spaces.Box) and space.dtype in (np.uint8, np.bool_) and len(space.shape) in (2, 3)


def image(space: spaces.Space, channels_first: bool = False) -> Callable[[chex.Array], chex.Array]:
    """How a convolutional network reads observations of this space: from a batch ``[B, ...]`` to ``[B, H, W, C]`` of float32.

    uint8 is divided by 255, booleans become 0 and 1, and what has two axes gets a channel.

    Args:
      space: of one environment, with two or three axes; a Dict with an action mask counts by its observation.
      channels_first: whether three axes are ``[C, H, W]``, as a stack of frames has them, not ``[H, W, C]``.

    Raises:
      ValueError: if the space has not two or three axes.
    """
    if is_masked(space):
        assert isinstance(space, spaces.Dict)
        return image(space["observation"], channels_first)
    if len(_shape(space)) not in (2, 3):
        raise ValueError(f"an image has two or three axes, got {space}: let a network of vectors see it (encoder 'flat' or 'auto')")
    scale, flat = _scale(space), len(_shape(space)) == 2

    def read(x: chex.Array) -> chex.Array:
        x = x.astype(jnp.float32) / scale
        if flat:
            return x[..., None]
        return jnp.moveaxis(x, 1, -1) if channels_first else x

    return read


def observation_check(space: spaces.Space, num_envs: int | None) -> Check:
    """A function that turns an observation into fresh arrays ``[N, ...]``, or raises.

    Args:
      space: of one environment.
      num_envs: N, for observations that come as ``[N, ...]``; None for single ones, which get a leading axis of one.

    Returns:
      A function of the observation. It raises ValueError on a wrong shape, on NaN, infinity or a value outside a discrete space,
      and TypeError on a wrong dtype or structure.
    """
    return _check(space, () if num_envs is None else (num_envs,), "observation")


def _check(space: spaces.Space, lead: tuple[int, ...], name: str) -> Check:
    if is_masked(space):
        assert isinstance(space, spaces.Dict)
        inner = _check(space["observation"], lead, f"{name}['observation']")
        mask = _mask_check(_shape(space["action_mask"]), lead, f"{name}['action_mask']")

        def check_masked(value: Any) -> Masked:
            if isinstance(value, Masked):
                return Masked(inner(value.observation), mask(value.action_mask))
            if not isinstance(value, dict) or set(value) != {"observation", "action_mask"}:
                raise TypeError(f"{name} must be a Masked or a dict with observation and action_mask, got {_describe(value)}")
            return Masked(inner(value["observation"]), mask(value["action_mask"]))

        return check_masked
    if isinstance(space, spaces.Dict):
        parts = {key: _check(member, lead, f"{name}[{key!r}]") for key, member in space.spaces.items()}

        def check_dict(value: Any) -> dict[str, Any]:
            if not isinstance(value, dict) or set(value) != set(parts):
                raise TypeError(f"{name} must be a dict with the keys {sorted(parts)}, got {_describe(value)}")
            return {key: part(value[key]) for key, part in parts.items()}

        return check_dict
    if isinstance(space, spaces.Tuple):
        members = [_check(member, lead, f"{name}[{i}]") for i, member in enumerate(space.spaces)]

        def check_tuple(value: Any) -> tuple[Any, ...]:
            if not isinstance(value, tuple) or len(value) != len(members):
                raise TypeError(f"{name} must be a tuple of {len(members)}, got {_describe(value)}")
            return tuple(part(member) for part, member in zip(members, value, strict=True))

        return check_tuple
    return _leaf_check(space, lead, name)


def _leaf_check(space: spaces.Space, lead: tuple[int, ...], name: str) -> Check:
    dtype = _leaf_dtype(space)
    shape = (*lead, *_shape(space))
    kept = shape if lead else (1, *shape)
    real = dtype.kind == "f"
    choices = isinstance(space, spaces.Discrete | spaces.MultiDiscrete)
    low = high = np.asarray(0)
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        low = np.asarray(space.start)
        high = low + (space.n if isinstance(space, spaces.Discrete) else space.nvec) - 1

    def check(value: Any) -> np.ndarray:
        if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], dict):
            raise TypeError(
                f"{name} is a pair whose second is a dict, as env.reset() returns it: pass the observation alone, env.reset()[0]"
            )
        array = np.asarray(value)
        if array.shape != shape:
            raise ValueError(
                f"{name} has shape {array.shape}, the agent was built for {shape} ({space}): pass it as the environment returns it, "
                "or build the agent for this environment"
            )
        if array.dtype != dtype and not (array.dtype.kind == "f" if real else array.dtype.kind in "iub"):
            raise TypeError(f"{name} has dtype {array.dtype}, expected {dtype} ({space}): convert it before handing it in")
        if real and array.dtype != dtype:
            _require_finite(array, name)  # Before the cast: what float32 cannot hold would become infinite.
        fresh = np.array(array, dtype).reshape(kept)
        if real:
            # The sum of squares is finite only if every entry is; it can also overflow, hence the second look.
            if not math.isfinite(np.vdot(fresh, fresh)):
                _require_finite(fresh.reshape(shape), name)
        elif choices:
            if np.any(array < low) or np.any(array > high):
                raise ValueError(f"{name} is {value}, outside {space}: check the environment's observation space")
        elif array.dtype != dtype and np.any(fresh.reshape(shape) != array):
            raise ValueError(f"{name} has values that {dtype} cannot hold ({space}): convert it before handing it in")
        return fresh

    return check


def _mask_check(shape: tuple[int, ...], lead: tuple[int, ...], name: str) -> Check:
    def check(value: Any) -> np.ndarray:
        array = np.asarray(value)
        if array.shape != (*lead, *shape):
            raise ValueError(f"{name} has shape {array.shape}, expected {(*lead, *shape)}: one entry for each action")
        if array.dtype.kind not in "biu":
            raise TypeError(f"{name} has dtype {array.dtype}, expected booleans, or integers 0 and 1")
        return np.array(array, np.bool_).reshape((*(lead or (1,)), *shape))

    return check


def _require_finite(array: np.ndarray, name: str) -> None:
    bad = np.argwhere(~_fits_float32(array))
    if len(bad):
        where = ", ".join(map(str, bad[0]))
        raise ValueError(
            f"{name}[{where}] is {array[tuple(bad[0])]} ({len(bad)} of {array.size} entries are not finite): nothing was stored; "
            "repair the environment, or end the episode with stop_episode()"
        )


def _fits_float32(array: np.ndarray) -> np.ndarray:
    """Where the numbers are finite in float32. Compared in float64: in float16 the limit itself would be infinite."""
    return np.abs(array.astype(np.float64)) <= FLOAT32_MAX


def reward_check(num_envs: int | None) -> Check:
    """A function that turns a reward (or N of them) into float32 ``[N]``, or raises ValueError or TypeError."""
    shape = () if num_envs is None else (num_envs,)

    def check(value: Any) -> np.ndarray:
        if num_envs is None and isinstance(value, float) and -FLOAT32_MAX <= value <= FLOAT32_MAX:
            return np.array([value], np.float32)  # What nearly always comes, and five times as fast.
        array = np.asarray(value)
        if array.shape != shape:
            raise ValueError(f"reward has shape {array.shape}, expected {shape}: one number for each environment")
        if array.dtype.kind not in "fiub":
            raise TypeError(f"reward has dtype {array.dtype} (got {value!r}), expected a real number")
        if not _fits_float32(array).all():
            raise ValueError(
                f"reward is {value}, expected a finite number of at most {FLOAT32_MAX:.3g}, float32's largest: nothing was stored; repair "
                "the environment, or end the episode with stop_episode()"
            )
        return np.array(array, np.float32).reshape(num_envs or 1)

    return check


def flag_check(name: str, num_envs: int | None) -> Check:
    """A function that turns a truth value (or N of them) into bool ``[N]``, or raises ValueError or TypeError."""
    shape = () if num_envs is None else (num_envs,)

    def check(value: Any) -> np.ndarray:
        array = np.asarray(value)
        if array.dtype != np.bool_:
            raise TypeError(f"{name} is {value!r}, expected {'True or False' if num_envs is None else f'{num_envs} of dtype bool'}")
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
        return array.reshape(num_envs or 1)

    return check


def require_actions_allowed(observation: Any, terminated: np.ndarray | bool = False) -> None:
    """Raises ValueError if an observation ``[N, ...]`` forbids every action where the episode is not ``terminated`` ``[N]``."""
    if isinstance(observation, Masked) and not np.all(observation.action_mask.any(axis=-1) | terminated):
        raise ValueError(
            "action_mask allows no action: only the successor of a terminated episode may forbid all; "
            "end such an episode with stop_episode_and_train(observation, reward)"
        )


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        return f"a dict with the keys {sorted(map(str, value))}"
    return f"{type(value).__name__} {np.shape(value) if isinstance(value, np.ndarray | jax.Array | list | tuple) else value!r}"
