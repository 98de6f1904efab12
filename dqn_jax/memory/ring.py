"""The ring: raw transitions, allocated once, overwritten oldest first, and the walk along an n-step window.

Rows stay raw. The n-step window is walked when a batch is drawn, so there is no accumulator, nothing to flush at the end of an
episode, and every tail is right: the walk stops at ``last`` or at the write head, whichever comes first.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from dqn_jax.types import Storage, Transition


class Ring(NamedTuple):
    """Storage of T rows for N environments.

    Attributes:
      rows: Transition of ``[T, N, ...]``.
      cursor: the row that the next ``add`` writes, int32.
      filled: rows filled so far, int32, at most T.
    """

    rows: Transition
    cursor: chex.Array
    filled: chex.Array

    @property
    def size(self) -> chex.Array:
        """Transitions that can be drawn, of all environments."""
        return self.filled * self.rows.reward.shape[-1]


def ring(capacity: int, *, n_steps: int = 1) -> Storage:
    """Keeps transitions whole, the newest of them.

    Args:
      capacity: transitions kept; rounded down to a multiple of the number of environments.
      n_steps: rows n in the window that begins at each drawn transition.

    Returns:
      A ``Storage`` whose windows carry reward, discount and last as ``[B, n]`` and observations at both ends.

    Raises:
      ValueError: if a number is below one, or the capacity cannot hold a window.
    """
    require_counts(capacity=capacity, n_steps=n_steps)
    require_window(capacity, n_steps)

    def init(transition: Transition) -> Ring:
        (num_envs,) = transition.reward.shape
        length = num_rows(capacity, num_envs, n_steps)
        rows = jax.tree.map(lambda leaf: jnp.zeros((length, *leaf.shape), leaf.dtype), transition)
        return Ring(rows, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def add(state: Ring, transition: Transition) -> tuple[Ring, chex.Array, chex.Array]:
        length, num_envs = state.rows.reward.shape
        rows = write_row(state.rows, state.cursor, transition)
        filled = state.cursor * num_envs + jnp.arange(num_envs)  # [N]
        state = Ring(rows, (state.cursor + 1) % length, jnp.minimum(state.filled + 1, length))
        return state, filled, jnp.zeros((0,), jnp.int32)

    def cut(state: Ring, mask: chex.Array) -> Ring:
        return state._replace(rows=end_newest(state.rows, state.cursor, mask & (state.filled > 0)))

    def slot(state: Ring, number: chex.Array) -> chex.Array:
        del state  # The first rows are the filled ones.
        return number

    def window(state: Ring, slot: chex.Array) -> Transition:
        num_envs = state.rows.reward.shape[1]
        first, column = slot // num_envs, slot % num_envs  # [B]
        transition, final = walk(state.rows, state.cursor, first, column, n_steps)
        successor = jax.tree.map(lambda leaf: leaf[final, column], state.rows.next_observation)
        observation = jax.tree.map(lambda leaf: leaf[first, column], state.rows.observation)
        return transition._replace(observation=observation, next_observation=successor)

    return Storage(capacity, init, add, cut, slot, window)


def walk(rows: Transition, cursor: chex.Array, first: chex.Array, column: chex.Array, n_steps: int) -> tuple[Transition, chex.Array]:
    """The windows that begin at rows ``first [B]`` of environments ``column [B]``.

    Args:
      rows: ``[T, N, ...]``.
      cursor: the row that is written next.
      first, column: ``[B]``.
      n_steps: rows n of a window.

    Returns:
      The transition, its observations left out, and the row ``[B]`` where each walk stops.
    """
    length = rows.reward.shape[0]
    window, columns = (first[:, None] + jnp.arange(n_steps)) % length, column[:, None]  # [B, n], [B, 1]
    # Past the newest row lies the oldest: to a window that reaches it, the stream ends there, without being terminated.
    last = rows.last[window, columns] | (window == (cursor - 1) % length)  # [B, n]
    stop = jnp.where(jnp.any(last, axis=1), jnp.argmax(last, axis=1), n_steps - 1)  # [B]

    def begin(tree: chex.ArrayTree) -> Any:
        return jax.tree.map(lambda leaf: leaf[first, column], tree)

    reward, discount = rows.reward[window, columns], rows.discount[window, columns]  # [B, n]
    return Transition((), begin(rows.action), reward, discount, (), last, begin(rows.extras)), (first + stop) % length


def write_row(rows: Transition, cursor: chex.Array, row: Transition) -> Transition:
    """``rows [T, N, ...]`` with ``row [N, ...]`` at the cursor; raises AssertionError, at trace time, if shapes or dtypes differ."""
    # A row of fewer environments would be broadcast over all of them in silence.
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), rows), row)
    return jax.tree.map(lambda stored, new: stored.at[cursor].set(new), rows, row)


def end_newest(rows: Transition, cursor: chex.Array, mask: chex.Array) -> Transition:
    """``rows [T, N, ...]`` with the newest marked as ``last`` in the environments of ``mask [N]``."""
    length, num_envs = rows.reward.shape
    chex.assert_shape(mask, (num_envs,))
    newest = (cursor - 1) % length
    return rows._replace(last=rows.last.at[newest].set(rows.last[newest] | mask))


def num_rows(capacity: int, num_envs: int, at_least: int) -> int:
    """The rows of N environments that make up ``capacity``. Raises ValueError if they are fewer than a window needs."""
    length = capacity // num_envs
    if length < at_least:
        raise ValueError(
            f"capacity {capacity} leaves {length} rows for each of {num_envs} environments, and a window needs {at_least}: "
            f"raise capacity to at least {at_least * num_envs}, or lower n_steps"
        )
    return length


def require_window(capacity: int, n_steps: int) -> None:
    """Raises ValueError if the capacity cannot hold a window, however few the environments."""
    if n_steps > capacity:
        raise ValueError(f"n_steps {n_steps} exceeds capacity {capacity}: raise capacity or lower n_steps")


def require_counts(**counts: int) -> None:
    """Raises ValueError if a number is below one."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
