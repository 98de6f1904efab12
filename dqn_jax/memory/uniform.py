"""Uniform replay: every stored transition is as likely as any other, however the storage arranges them."""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from dqn_jax.memory.ring import require_counts
from dqn_jax.types import Batch, Memory, Storage, Transition


def uniform(storage: Storage, batch_size: int) -> Memory:
    """A memory that draws stored transitions uniformly, with replacement.

    Args:
      storage: ``ring`` or ``frames``.
      batch_size: transitions B in a batch.

    Returns:
      A ``Memory`` whose state is the storage's.

    Raises:
      ValueError: if the batch is empty or exceeds the capacity; from ``sample``, outside ``jit``, if it exceeds what is stored.
    """
    require_batch(batch_size, storage.capacity)

    def add(state: Any, transition: Transition) -> Any:
        return storage.add(state, transition)[0]

    def noise(key: chex.PRNGKey) -> chex.Array:
        return jax.random.bits(key, (batch_size,), jnp.uint32)

    def sample(state: Any, noise: chex.Array) -> Batch:
        require_stored(batch_size, state.size)
        # The remainder favours low numbers by at most one part in 2**32 / size: 0.02 % at a million transitions.
        number = (noise % jnp.asarray(state.size, jnp.uint32)).astype(jnp.int32)  # [B]
        slot = storage.slot(state, number)
        return Batch(storage.window(state, slot), index=slot)

    def reweigh(state: Any, index: chex.Array, priority: chex.ArrayTree) -> Any:
        del index, priority  # Every transition is equally likely.
        return state

    return Memory(storage.init, add, storage.cut, noise, sample, reweigh, demand=None)


def require_batch(batch_size: int, capacity: int) -> None:
    """Raises ValueError if a batch is empty, or larger than what can ever be stored."""
    require_counts(batch_size=batch_size)
    if batch_size > capacity:
        raise ValueError(f"batch_size {batch_size} exceeds capacity {capacity}: raise capacity or lower batch_size")


def require_stored(batch_size: int, size: chex.Array) -> None:
    """Raises ValueError if a batch is larger than what is stored. Inside ``jit`` nobody can look."""
    if not isinstance(size, jax.core.Tracer) and batch_size > size:
        raise ValueError(f"a batch of {batch_size} was asked for and {size} transitions are stored: add more before sampling")
