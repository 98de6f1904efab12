"""Minibatches: the rows of a batch in random order, a few at a time, several times over.

Rows are any pytree whose leaves share their first axis.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp


def require_sizes(epochs: int, minibatch_size: int | None) -> None:
    """Raises ValueError if a count is below one; None stands for all rows at once."""
    if epochs < 1 or (minibatch_size is not None and minibatch_size < 1):
        raise ValueError(f"epochs and minibatch_size must be at least 1, got {epochs} and {minibatch_size}")


def require_division(num_rows: int, minibatch_size: int) -> None:
    """Raises ValueError, with both numbers, unless the rows divide into minibatches."""
    if num_rows % minibatch_size:
        raise ValueError(f"{num_rows} transitions do not divide into minibatches of {minibatch_size}")


def shuffled(key: chex.PRNGKey, num_rows: int, minibatch_size: int, epochs: int = 1) -> chex.Array:
    """Which rows make up each minibatch: ``[epochs M, B]``, in each epoch's M minibatches every row once.

    Args:
      key: a typed key.
      num_rows: M times B.
      minibatch_size: B.
      epochs: times that each row occurs.

    Raises:
      ValueError: if the rows do not divide.
    """
    require_division(num_rows, minibatch_size)
    # One sort by random bits: jax.random.permutation sorts twice from 1,626 rows on, to be right for far longer vectors.
    return jnp.argsort(jax.random.bits(key, (epochs, num_rows), jnp.uint32), axis=1).reshape(-1, minibatch_size)


def in_minibatches(function: Callable[[chex.ArrayTree], chex.ArrayTree], rows: chex.ArrayTree, minibatch_size: int) -> chex.ArrayTree:
    """``function`` of all rows ``[M B, ...]``, a minibatch at a time, in order: all of a rollout's images would not fit a cache.

    Args:
      function: from rows ``[B, ...]`` to any pytree of ``[B, ...]``.
      rows: ``[M B, ...]``.
      minibatch_size: B.

    Raises:
      ValueError: if the rows do not divide.
    """
    require_division(len(jax.tree.leaves(rows)[0]), minibatch_size)
    parts = jax.tree.map(lambda leaf: leaf.reshape(-1, minibatch_size, *leaf.shape[1:]), rows)  # [M, B, ...]
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), jax.lax.map(function, parts))


def repeat(
    step: Callable[[Any, chex.ArrayTree], tuple[Any, Any]],
    state: Any,
    rows: chex.ArrayTree,
    key: chex.PRNGKey,
    *,
    epochs: int,
    minibatch_size: int,
) -> tuple[Any, Any]:
    """Learns from all rows ``epochs`` times over, in shuffled minibatches, which is what PPO and PQN do with a rollout.

    Args:
      step: ``(state, rows [B, ...]) -> (state, metrics)``: learns from one minibatch.
      state: what it learns.
      rows: ``[M B, ...]``.
      key: draws the orders, another for each epoch.
      epochs: times that each row is learnt from.
      minibatch_size: B.

    Returns:
      The state at the end, and the metrics ``[epochs, M, ...]``.

    Raises:
      ValueError: if the rows do not divide.
    """
    num_rows = len(jax.tree.leaves(rows)[0])

    def minibatch(state: Any, index: chex.Array) -> tuple[Any, Any]:
        return step(state, jax.tree.map(lambda leaf: leaf[index], rows))

    def epoch(state: Any, key: chex.PRNGKey) -> tuple[Any, Any]:
        return jax.lax.scan(minibatch, state, shuffled(key, num_rows, minibatch_size))

    return jax.lax.scan(epoch, state, jax.random.split(key, epochs))
