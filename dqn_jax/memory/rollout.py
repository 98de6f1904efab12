"""The rollout: the newest rows in order of time, to be learnt from once and then overwritten."""

import chex
import jax
import jax.numpy as jnp

from dqn_jax.memory.ring import Ring, end_newest, require_counts, write_row
from dqn_jax.types import Batch, Memory, Transition


def rollout(length: int, *, minibatch_size: int = 1) -> Memory:
    """A memory of the last ``length`` rows, all of which are handed out together.

    Its demand is ``length`` fresh rows: whoever learns from it learns from each row once.

    Args:
      length: rows T of a rollout: steps of each environment.
      minibatch_size: transitions into which whoever learns will divide a rollout; only checked here, where N is first known.

    Returns:
      A ``Memory`` whose batches are ``[T, N, ...]``, oldest row first, reward, discount and last with them.

    Raises:
      ValueError: if a number is below one; from ``init``, if the rollout of N environments does not divide into minibatches; from
        ``sample``, outside ``jit``, if it is not full.
    """
    require_counts(length=length, minibatch_size=minibatch_size)

    def init(transition: Transition) -> Ring:
        (num_envs,) = transition.reward.shape
        if (length * num_envs) % minibatch_size:
            raise ValueError(
                f"a rollout of {length} steps of {num_envs} environment(s), {length * num_envs} transitions, does not divide into "
                f"minibatches of {minibatch_size}: choose a minibatch size that divides it, another rollout length, or more environments"
            )
        rows = jax.tree.map(lambda leaf: jnp.zeros((length, *leaf.shape), leaf.dtype), transition)
        return Ring(rows, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def add(state: Ring, transition: Transition) -> Ring:
        rows = write_row(state.rows, state.cursor, transition)
        return Ring(rows, (state.cursor + 1) % length, jnp.minimum(state.filled + 1, length))

    def cut(state: Ring, mask: chex.Array) -> Ring:
        return state._replace(rows=end_newest(state.rows, state.cursor, mask & (state.filled > 0)))

    def noise(key: chex.PRNGKey) -> tuple[()]:
        del key  # Everything is handed out: nothing is drawn.
        return ()

    def sample(state: Ring, noise: tuple[()]) -> Batch:
        del noise
        if not isinstance(state.filled, jax.core.Tracer) and state.filled < length:
            raise ValueError(f"a rollout of {length} rows was asked for and {state.filled} are there: add more before sampling")
        # The cursor stands at 0, unless somebody samples at other times than the loops do. One copy a rollout, for each row's few uses.
        order = (state.cursor + jnp.arange(length)) % length
        return Batch(jax.tree.map(lambda leaf: leaf[order], state.rows))

    def reweigh(state: Ring, index: chex.Array, priority: chex.ArrayTree) -> Ring:
        del index, priority
        return state

    return Memory(init, add, cut, noise, sample, reweigh, demand=length)
