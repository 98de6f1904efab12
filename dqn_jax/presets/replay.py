"""The replay of a preset, from its options."""

from typing import Any

import gymnasium
import numpy as np

from dqn_jax.memory.frames import frames
from dqn_jax.memory.prioritized import prioritized
from dqn_jax.memory.ring import ring
from dqn_jax.memory.uniform import uniform
from dqn_jax.options import schedule
from dqn_jax.types import Memory, Storage

LONGEST_STACK = 16  # Frames: a longer axis, unless the image is that small, is a side of the image.
STACK_AXIS = {"stack_first": 0, "stack_last": -1}  # Along which axis frames are stacked, by the option ``frames``.


def storage_of(options: Any, observation_space: gymnasium.Space) -> Storage:
    """Where a replay with these options keeps its transitions.

    Raises:
      TypeError, ValueError: if ``frames`` does not suit the observation space.
    """
    if options.frames == "off":
        return ring(options.capacity, n_steps=options.n_steps)
    axis = STACK_AXIS.get(options.frames)
    shape = observation_space.shape or ()
    if not shape or observation_space.dtype not in (np.uint8, np.bool_):
        raise TypeError(f"frames={options.frames!r} stores images of uint8 or bool, the observation space is {observation_space}")
    if axis is None:
        return frames(options.capacity, n_steps=options.n_steps)
    if shape[axis] > max(LONGEST_STACK, min(shape)):
        raise ValueError(
            f"frames={options.frames!r} takes axis {axis} of {shape}, {shape[axis]} long, for a stack of frames: "
            "name the end where the stack is, or 'single' where an observation is one frame"
        )
    return frames(options.capacity, stack=shape[axis], stack_axis=axis, n_steps=options.n_steps)


def replay_of(options: Any, storage: Storage) -> Memory:
    """How a replay with these options draws from ``storage``."""
    if not options.prioritized:
        return uniform(storage, options.batch_size)
    return prioritized(storage, options.batch_size, alpha=options.alpha, beta=schedule(options.beta))
