"""The ring: raw transitions, allocated once, overwritten oldest first, drawn uniformly with n-step windows.

Rows stay raw. The n-step window is walked when a batch is drawn, so there is no accumulator, nothing to flush at the end of an
episode, and every tail is right: the walk stops at ``last`` or at the write head, whichever comes first.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from dqn_jax.types import Batch, Memory, Transition


class Ring(NamedTuple):
    """Storage of T rows for N environments.

    Attributes:
      rows: Transition of ``[T, N, ...]``.
      cursor: the row that the next ``add`` writes, int32.
      size: rows filled so far, int32, at most T.
    """

    rows: Transition
    cursor: chex.Array
    size: chex.Array


def uniform(capacity: int, batch_size: int, *, n_steps: int = 1) -> Memory:
    """A memory that draws stored transitions uniformly, with replacement.

    Args:
      capacity: transitions kept; rounded down to a multiple of the number of environments.
      batch_size: transitions B in a batch.
      n_steps: rows n in the window that begins at each drawn transition.

    Returns:
      A ``Memory`` whose batches carry reward, discount and last as ``[B, n]`` and observations at both ends of the window.

    Raises:
      ValueError: if a number is below one, or the capacity cannot hold a batch or a window.
    """
    if min(capacity, batch_size, n_steps) < 1:
        raise ValueError(f"capacity, batch_size and n_steps must be at least 1, got {capacity}, {batch_size} and {n_steps}")
    if batch_size > capacity:
        raise ValueError(f"batch_size {batch_size} exceeds capacity {capacity}: raise capacity or lower batch_size")

    def init(transition: Transition) -> Ring:
        (num_envs,) = transition.reward.shape
        length = capacity // num_envs
        if length < n_steps:
            raise ValueError(
                f"capacity {capacity} leaves {length} rows for each of {num_envs} environments, fewer than n_steps {n_steps}: "
                f"raise capacity to at least {n_steps * num_envs}"
            )
        rows = jax.tree.map(lambda leaf: jnp.zeros((length, *leaf.shape), leaf.dtype), transition)
        return Ring(rows, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def add(state: Ring, transition: Transition) -> Ring:
        length = state.rows.reward.shape[0]
        # A row of fewer environments would be broadcast over all of them in silence.
        chex.assert_trees_all_equal_shapes_and_dtypes(
            jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), state.rows), transition
        )
        rows = jax.tree.map(lambda stored, new: stored.at[state.cursor].set(new), state.rows, transition)
        return Ring(rows, (state.cursor + 1) % length, jnp.minimum(state.size + 1, length))

    def cut(state: Ring, mask: chex.Array) -> Ring:
        length, num_envs = state.rows.reward.shape
        chex.assert_shape(mask, (num_envs,))
        # An empty ring has no newest row: a write out of range is dropped.
        newest = jnp.where(state.size > 0, (state.cursor - 1) % length, length)
        last = state.rows.last.at[newest].set(state.rows.last[newest] | mask, mode="drop")
        return state._replace(rows=state.rows._replace(last=last))

    def noise(key: chex.PRNGKey) -> chex.Array:
        return jax.random.bits(key, (batch_size,), jnp.uint32)

    def sample(state: Ring, noise: chex.Array) -> Batch:
        rows = state.rows
        length, num_envs = rows.reward.shape
        # The remainder favours low numbers by at most one part in 2**32 / size: 0.02 % at a million transitions.
        drawn = (noise % jnp.uint32(state.size * num_envs)).astype(jnp.int32)  # [B]
        first, column = drawn // num_envs, drawn % num_envs  # [B]
        window = (first[:, None] + jnp.arange(n_steps)) % length  # [B, n]
        columns = column[:, None]
        # Past the newest row lies the oldest: to a window that reaches it, the stream ends there, without being terminated.
        last = rows.last[window, columns] | (window == (state.cursor - 1) % length)  # [B, n]
        stop = jnp.where(jnp.any(last, axis=1), jnp.argmax(last, axis=1), n_steps - 1)  # [B]
        final = (first + stop) % length  # [B]

        def at(row: chex.Array, tree: chex.ArrayTree) -> Any:
            return jax.tree.map(lambda leaf: leaf[row, column], tree)

        transition = Transition(
            observation=at(first, rows.observation),
            action=at(first, rows.action),
            reward=rows.reward[window, columns],  # [B, n]
            discount=rows.discount[window, columns],  # [B, n]
            next_observation=at(final, rows.next_observation),
            last=last,
            extras=at(first, rows.extras),
        )
        return Batch(transition, index=drawn)

    def reweigh(state: Ring, index: chex.Array, priority: chex.ArrayTree) -> Ring:
        del index, priority  # Every transition is equally likely.
        return state

    return Memory(init, add, cut, noise, sample, reweigh, demand=None)
