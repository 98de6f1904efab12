"""Image replay: each frame is stored once; stacks and successors are put together again when a batch is drawn.

A transition of stacked images holds S frames, and its successor S more, of which all but one are its own. So the frames of each
environment stand in a ring of their own, with a write head of its own, and a transition remembers where its newest frame is: the stack
ends there, and the successor's ends one further on. An episode begins with the whole stack of its first observation, as it came, so a
stack is never put together across an episode's boundary and however the first one was padded does not matter. An episode's last
successor is a frame like any other: the true final observation costs no store beside.

Transitions whose frames have been overwritten cannot be drawn; of each environment the newest can, as many as have all their frames.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from dqn_jax.memory.ring import end_newest, num_rows, require_counts, require_window, walk, write_row
from dqn_jax.types import Storage, Transition


class Frames(NamedTuple):
    """Storage of T frames and at most as many transitions for each of N environments.

    Attributes:
      frames: ``[T, N, ...]``, one byte for each number.
      rows: Transition of ``[T, N, ...]``; for the observation it holds the place ``[T, N]`` of its newest frame, int32.
      cursor: the row that the next ``add`` writes, int32.
      head: the place ``[N]`` of the newest frame, int32.
      begins: whether the next row begins an episode, ``[N]`` bool.
      sizes: transitions ``[N]`` that can be drawn, int32: the newest ones.
    """

    frames: chex.Array
    rows: Transition
    cursor: chex.Array
    head: chex.Array
    begins: chex.Array
    sizes: chex.Array

    @property
    def size(self) -> chex.Array:
        """Transitions that can be drawn, of all environments."""
        return jnp.sum(self.sizes)


def frames(capacity: int, *, stack: int | None = None, stack_axis: int = 0, n_steps: int = 1) -> Storage:
    """Keeps each image once.

    Every observation must be the one before it, its oldest frame dropped and a new one appended, or begin an episode.

    Args:
      capacity: frames kept; rounded down to a multiple of the number of environments. An episode of L steps takes L + S of them, so a
        replay of short episodes of deep stacks holds far fewer transitions than this.
      stack: the frames S in an observation, oldest first; None where an observation is a single frame without an axis for the stack.
      stack_axis: the axis of one observation along which frames are stacked: 0 as Gymnasium's FrameStackObservation does, -1 for
        channels last.
      n_steps: rows n in the window that begins at each drawn transition.

    Returns:
      A ``Storage`` whose windows carry reward, discount and last as ``[B, n]`` and observations at both ends, as they were acted on.

    Raises:
      ValueError: if a number is below one, the capacity cannot hold a window, or, from ``init``, the observation has no such stack.
      TypeError: from ``init``, if the observation is not one array of uint8 or bool.
    """
    depth = 1 if stack is None else stack  # S
    require_counts(capacity=capacity, stack=depth, n_steps=n_steps)
    require_window(capacity, n_steps)

    def unstack(observation: chex.Array) -> chex.Array:
        """The frames ``[S, N, ...]`` of observations ``[N, ...]``."""
        return observation[None] if stack is None else jnp.moveaxis(observation, _after_batch(stack_axis), 0)

    def restack(frames: chex.Array) -> chex.Array:
        """Observations ``[B, ...]`` of frames ``[B, S, ...]``."""
        return frames[:, 0] if stack is None else jnp.moveaxis(frames, 1, _after_batch(stack_axis))

    def init(transition: Transition) -> Frames:
        _require_image(transition.observation, stack, stack_axis)
        (num_envs,) = transition.reward.shape
        # A window's first stack, its successors, and the longest stride of the write head.
        length = num_rows(capacity, num_envs, n_steps + 2 * depth)
        frame = jax.eval_shape(unstack, transition.observation)
        rows = transition._replace(observation=jnp.zeros(num_envs, jnp.int32), next_observation=())
        return Frames(
            frames=jnp.zeros((length, *frame.shape[1:]), frame.dtype),
            rows=jax.tree.map(lambda leaf: jnp.zeros((length, *leaf.shape), leaf.dtype), rows),
            cursor=jnp.zeros((), jnp.int32),
            head=jnp.zeros(num_envs, jnp.int32),
            begins=jnp.ones(num_envs, jnp.bool_),
            sizes=jnp.zeros(num_envs, jnp.int32),
        )

    def add(state: Frames, transition: Transition) -> tuple[Frames, chex.Array, chex.Array]:
        length, num_envs = state.rows.reward.shape
        columns = jnp.arange(num_envs)
        chex.assert_trees_all_equal_shapes_and_dtypes(transition.observation, transition.next_observation)
        observation, successor = unstack(transition.observation), unstack(transition.next_observation)  # [S, N, ...]
        new = jnp.concatenate([observation, successor[-1:]])  # [S + 1, N, ...]
        chex.assert_trees_all_equal_shapes_and_dtypes(new[0], state.frames[0])
        stride = jnp.where(state.begins, depth + 1, 1)  # [N]
        place = (state.head + stride - depth + jnp.arange(depth + 1)[:, None]) % length  # [S + 1, N]
        # Within an episode the observation's frames are there already, and only the successor's is written.
        is_new = state.begins | (jnp.arange(depth + 1)[:, None] == depth)
        stored = state.frames.at[jnp.where(is_new, place, length), columns].set(new, mode="drop")
        row = transition._replace(observation=place[-2], next_observation=())
        rows = write_row(state.rows, state.cursor, row)
        # The oldest transitions whose stacks have lost a frame, S + 1 of an environment at most, are gone.
        oldest = (state.cursor - state.sizes + jnp.arange(depth + 1)[:, None]) % length  # [S + 1, N]
        age = (state.head - rows.observation[oldest, columns]) % length + stride  # [S + 1, N]
        gone = (age + depth > length) & (jnp.arange(depth + 1)[:, None] < state.sizes)
        emptied = jnp.where(gone, oldest * num_envs + columns, -1).ravel()
        filled = state.cursor * num_envs + columns
        state = Frames(
            frames=stored,
            rows=rows,
            cursor=(state.cursor + 1) % length,
            head=place[-1],
            begins=transition.last,
            sizes=state.sizes + 1 - jnp.sum(gone, axis=0, dtype=jnp.int32),
        )
        return state, filled, emptied

    def cut(state: Frames, mask: chex.Array) -> Frames:
        rows = end_newest(state.rows, state.cursor, mask & (state.sizes > 0))
        return state._replace(rows=rows, begins=state.begins | mask)

    def slot(state: Frames, number: chex.Array) -> chex.Array:
        length, num_envs = state.rows.reward.shape
        ends = jnp.cumsum(state.sizes)  # [N]
        column = jnp.sum(number[:, None] >= ends, axis=1)  # [B]
        row = (state.cursor - (ends[column] - number)) % length
        return row * num_envs + column

    def window(state: Frames, slot: chex.Array) -> Transition:
        length, num_envs = state.rows.reward.shape
        first, column = slot // num_envs, slot % num_envs  # [B]
        transition, final = walk(state.rows, state.cursor, first, column, n_steps)

        def stacked(newest: chex.Array) -> chex.Array:
            place = (newest[:, None] - jnp.arange(depth)[::-1]) % length  # [B, S]
            return restack(state.frames[place, column[:, None]])

        observation = stacked(state.rows.observation[first, column])
        successor = stacked(state.rows.observation[final, column] + 1)
        return transition._replace(observation=observation, next_observation=successor)

    return Storage(capacity, init, add, cut, slot, window)


def require_succession(stack_axis: int | None) -> Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]:
    """A check, for the boundary, of what could not be put together again once it is stored.

    Args:
      stack_axis: as for ``frames``; None where an observation is a single frame.

    Returns:
      A function of the observation, its successor, what follows (after an end the first observation of the next episode), all
      ``[N, ...]``, and whether the episode ended ``[N]``. It raises ValueError if the successor is not the observation with its oldest
      frame dropped and a new one appended, or if the episode goes on with anything but the successor.
    """

    def check(observation: np.ndarray, successor: np.ndarray, following: np.ndarray, last: np.ndarray) -> None:
        if stack_axis is not None:
            axis = _after_batch(stack_axis)
            older, newer = np.moveaxis(observation, axis, 1)[:, 1:], np.moveaxis(successor, axis, 1)[:, :-1]
            if not np.array_equal(older, newer):
                raise ValueError(
                    f"the next observation does not hold the older frames of the one before it along axis {stack_axis}: these are no "
                    'stacked frames, oldest first. Set frames to "single" if that axis holds colours or the like, or to "off"'
                )
        if following is not successor and not np.array_equal(following[~last], successor[~last]):
            raise ValueError(
                "next_observation differs from observation where no episode ended: with each frame stored once the one must go on with "
                'the other. Set frames to "off", or pass dqn_jax.true_successors(observation, infos)'
            )

    return check


def _after_batch(axis: int) -> int:
    return axis + 1 if axis >= 0 else axis


def _require_image(observation: Any, stack: int | None, stack_axis: int) -> None:
    if not hasattr(observation, "dtype"):
        raise TypeError(f"image replay keeps observations that are one array, got {jax.tree.structure(observation)}: use the ring instead")
    if observation.dtype not in (np.uint8, np.bool_):
        raise TypeError(
            f"image replay keeps uint8 or bool, one byte for each number, got {observation.dtype}: have the environment return "
            "uint8 images, or use the ring instead"
        )
    shape = observation.shape[1:]
    if stack is None:
        return
    if not -len(shape) <= stack_axis < len(shape) or shape[stack_axis] != stack:
        raise ValueError(
            f"an observation of shape {shape} has no stack of {stack} frames along axis {stack_axis}: "
            "name its stack and stack_axis, or leave stack out where an observation is a single frame"
        )
