r"""Prioritized replay: transitions are drawn in proportion to how wrong the values were when they were last learnt from.

.. math:: P(i) = \frac{p_i^\alpha}{\sum_k p_k^\alpha}, \qquad p_i = |\delta_i| + \epsilon, \qquad
          w_i = \frac{(N P(i))^{-\beta}}{\max_j (N P(j))^{-\beta}}

Schaul, Quan, Antonoglou and Silver, "Prioritized experience replay" (2016), equation 1, section 3.4 and algorithm 1.

Differs from the paper in:
  1. The weights are divided by the largest of the batch, as in CleanRL, DQN Zoo and Dopamine, not of the whole replay.
  2. A schedule of alpha or beta counts the transitions stored. A value stays as it was written until its transition is drawn again:
     a change of alpha changes only what is written from then on.
  3. With n-step windows the error is that of the n-step target.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from dqn_jax.memory import sum_tree
from dqn_jax.memory.uniform import require_batch, require_stored
from dqn_jax.types import Batch, Memory, Storage, Transition

FLOAT32 = jnp.finfo(jnp.float32)


class Prioritized(NamedTuple):
    """The storage and its priorities.

    Attributes:
      stored: the storage's state.
      tree: the sum tree of the priorities to the power of alpha, zero where there is nothing to draw.
      largest: the highest priority seen so far, float32: that of new transitions.
      added: transitions added so far, int32.
    """

    stored: Any
    tree: chex.Array
    largest: chex.Array
    added: chex.Array

    @property
    def size(self) -> chex.Array:
        """Transitions that can be drawn."""
        return self.stored.size


def prioritized(
    storage: Storage,
    batch_size: int,
    *,
    alpha: chex.Numeric | Callable[[chex.Array], chex.Numeric] = 0.6,
    beta: chex.Numeric | Callable[[chex.Array], chex.Numeric] = 0.4,
    offset: float = 1e-6,
) -> Memory:
    """A memory that draws transitions in proportion to their priorities, one from each of B equal slices of the sum.

    Args:
      storage: ``ring`` or ``frames``.
      batch_size: transitions B in a batch.
      alpha: how much priorities count, in [0, 1]: 0 is uniform. A number, or a schedule of the number of transitions added.
      beta: how far the importance weights make up for it, in [0, 1]: 1 wholly. A number, or a schedule.
      offset: epsilon, added to each priority so that no transition is lost to a single small error.

    Returns:
      A ``Memory`` whose state is ``Prioritized``. New transitions get the highest priority seen so far, at first 1.

    Raises:
      ValueError: if the batch is empty or exceeds the capacity, or alpha, beta or offset is out of range; from ``sample``, outside
        ``jit``, if the batch exceeds what is stored; from ``reweigh``, outside ``jit``, on a negative or non-finite priority. Inside
        ``jit`` such a priority is not written, nor is one so large that the sum over a full replay could overflow.
    """
    require_batch(batch_size, storage.capacity)
    for name, exponent in (("alpha", alpha), ("beta", beta)):
        if not callable(exponent) and not isinstance(exponent, jax.core.Tracer) and not 0 <= exponent <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {exponent}")
    if not FLOAT32.tiny <= offset <= FLOAT32.max:
        raise ValueError(f"offset must be positive and finite, or a transition without error could never be drawn again; got {offset}")

    def powered(priority: chex.Array, added: chex.Array) -> chex.Array:
        return priority ** (alpha(added) if callable(alpha) else alpha)

    def init(transition: Transition) -> Prioritized:
        zero = jnp.zeros((), jnp.int32)
        return Prioritized(storage.init(transition), sum_tree.init(storage.capacity), jnp.ones((), jnp.float32), zero)

    def add(state: Prioritized, transition: Transition) -> Prioritized:
        stored, filled, emptied = storage.add(state.stored, transition)
        new = jnp.full(filled.shape, powered(state.largest, state.added))
        slots, values = jnp.concatenate([emptied, filled]), jnp.concatenate([jnp.zeros(emptied.shape), new])
        return Prioritized(stored, sum_tree.write(state.tree, slots, values), state.largest, state.added + len(filled))

    def cut(state: Prioritized, mask: chex.Array) -> Prioritized:
        return state._replace(stored=storage.cut(state.stored, mask))

    def noise(key: chex.PRNGKey) -> chex.Array:
        fraction = jax.random.uniform(key, (batch_size, 2))
        return fraction.at[:, 0].set((jnp.arange(batch_size) + fraction[:, 0]) / batch_size)

    def sample(state: Prioritized, noise: chex.Array) -> Batch:
        require_stored(batch_size, state.size)
        slot, value = sum_tree.draw(state.tree, noise)  # [B]
        # The number of transitions and the sum of the priorities cancel in the quotient by the largest weight.
        weight = (jnp.min(value) / value) ** (beta(state.added) if callable(beta) else beta)  # [B]
        return Batch(storage.window(state.stored, slot), weight, slot)

    def reweigh(state: Prioritized, index: chex.Array, priority: chex.Array) -> Prioritized:
        chex.assert_equal_shape([index, priority])
        _require_priorities(priority)
        priority = priority + offset
        value = powered(priority, state.added)
        # Where alpha is 0 the power of an infinite priority is finite; and the sum over all slots has to be, too.
        sound = jnp.isfinite(priority) & (priority >= offset) & (value <= FLOAT32.max / storage.capacity)
        tree = sum_tree.write(state.tree, jnp.where(sound, index, -1), value)
        largest = jnp.maximum(state.largest, jnp.max(jnp.where(sound, priority, 0.0)))
        return state._replace(tree=tree, largest=largest)

    return Memory(init, add, cut, noise, sample, reweigh, demand=None)


def _require_priorities(priority: chex.Array) -> None:
    if isinstance(priority, jax.core.Tracer):
        return
    sound = jnp.isfinite(priority) & (priority >= 0)
    if not sound.all():
        row = int(jnp.argmin(sound))
        raise ValueError(f"priority[{row}] is {priority[row]}: priorities are finite and not negative, absolute TD errors for example")
