"""What the host driver keeps at hand between two programs: random numbers drawn ahead, and the rows that wait to be stored."""

import copy
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dqn_jax.programs import Packing
from dqn_jax.types import AgentState, Decision

AHEAD_BYTES = 1 << 20  # What a block of random numbers, drawn ahead in one call, may take.
AHEAD_ROWS = 1024
STAGED_BYTES = 1 << 20  # What the rows that wait to be stored may take.


class Ahead:
    """Random numbers of many rows, drawn in one call: in a program as small as one step a single draw costs more than the network.

    Row ``i`` of a block is what ``draw(state, i)`` gives: the same bits, however they are grouped.

    Args:
      draw: ``(state, counter) -> row``.
      state: shapes of an AgentState.
      group: rows that are used at once; a block holds a multiple of it.

    Attributes:
      row: shapes of one row.
      packing: of rows.
    """

    def __init__(self, draw: Callable[..., Any], state: AgentState, group: int = 1):
        self.row = jax.eval_shape(draw, state, state.updates)
        self._group = group
        size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.row))
        self._num_rows = max(1, min(AHEAD_ROWS, AHEAD_BYTES // max(1, size)) // group) * group
        counters = jnp.arange(self._num_rows, dtype=jnp.int32)
        self.packing = Packing(self.row)
        self._draw = jax.jit(lambda state, start: self.packing.pack(jax.vmap(lambda counter: draw(state, counter))(start + counters)))
        self._block: tuple[np.ndarray, ...] | None = None
        self._first = 0

    def rows(self, counter: int, live_state: Callable[[], AgentState]) -> tuple[np.ndarray, ...]:
        """The packed rows from ``counter`` on, ``[group, ...]``; a block is drawn where the last one is used up."""
        if self._block is None or not 0 <= counter - self._first <= self._num_rows - self._group:
            drawn = self._draw(live_state()._replace(memory=()), np.int32(counter))
            self._block, self._first = tuple(map(np.asarray, drawn)), counter
        start = counter - self._first
        return tuple(leaf[start : start + self._group] for leaf in self._block)

    def forget(self) -> None:
        """Drops the block: the key has changed."""
        self._block = None


class Staging:
    """The rows that happened and are not yet stored.

    A program that has been given the arrays may read them later, so they are not filled again until it has: ``emptied`` gives others.

    Args:
      observation: an example, ``[N, ...]``.
      decision: an example, ``[N, ...]``.
      num_rows: rows to hold, where a megabyte can.
      reusable: whether a program that has been given the arrays has read them when its call returns; two sets then take turns.

    Attributes:
      row: the structure of ``(observation, successor, decision, outcome)``.
      arrays: NumPy arrays ``[R, ...]``, one for each leaf of it.
      capacity: R.
      size: rows that wait, at the front of the arrays.
    """

    def __init__(self, observation: Any, decision: Decision, num_rows: int, reusable: bool = False):
        num_envs = jax.tree.leaves(observation)[0].shape[0]
        leaves, self.row = jax.tree.flatten((observation, observation, decision, np.zeros((3, num_envs), np.float32)))
        self.capacity = max(1, min(num_rows, STAGED_BYTES // sum(leaf.nbytes for leaf in leaves)))
        self.arrays = [np.empty((self.capacity, *leaf.shape), leaf.dtype) for leaf in leaves]
        self.size = 0
        self._other = self._another() if reusable else None
        if self._other is not None:
            self._other._other = self

    def _another(self) -> "Staging":
        other = copy.copy(self)
        other.arrays = [np.empty(array.shape, array.dtype) for array in self.arrays]
        other.size = 0
        return other

    def emptied(self) -> "Staging":
        """Another one like this, without rows. This one stays as it is, for the program that gets it."""
        if self._other is None:
            return self._another()
        self._other.size = 0  # What it held was read by the program before this one.
        return self._other

    def add(self, observation: Any, decision: list[np.ndarray], successor: Any, outcome: np.ndarray) -> None:
        """Takes one more row: of the decision its leaves; ``outcome`` is reward, discount and last, ``[3, N]``."""
        values = [*jax.tree.leaves(observation), *jax.tree.leaves(successor), *decision, outcome]
        for array, value in zip(self.arrays, values, strict=True):
            array[self.size] = value
        self.size += 1  # Last: an interrupt before it leaves the row uncounted.


def outcome_array(reward: np.ndarray, terminated: np.ndarray | None = None, last: np.ndarray | None = None) -> np.ndarray:
    """Reward, discount and last, ``[N]`` each, as one array ``[3, N]`` for a ``Staging``; without the flags nothing has ended."""
    outcome = np.empty((3, len(reward)), np.float32)
    outcome[0] = reward
    outcome[1] = 1.0 if terminated is None else ~terminated
    outcome[2] = 0.0 if last is None else last
    return outcome
