"""The compiled programs of the host driver, the rows that wait for them, and the random numbers drawn ahead for them.

To decide changes nothing on the device. What happened is collected on the host and stored by the program that learns from it, so most
steps cost one small program. Each program takes only what it reads and returns only what it changes, because each array that enters
or leaves costs one or two microseconds, and a small network's decision takes twenty.

What a program donates travels as builtin tuples of raw arrays. To hand out a NamedTuple or a typed key runs Python code after the old
arrays are gone, and an interrupt that strikes there would lose both old and new.
"""

import copy
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from dqn_jax.types import Agent, AgentState, Decision, Transition

AHEAD_BYTES = 1 << 20  # What a block of random numbers, drawn ahead in one call, may take.
AHEAD_ROWS = 1024
STAGED_BYTES = 1 << 20  # What the rows that wait to be stored may take.


def compute_inline() -> None:
    """Lets JAX compute on the CPU in the thread that asks, and with no other: faster for small networks stepped from Python.

    To hand a small program to another thread, and to wait for it, takes longer than the program (figures in README.md). A large network
    or a large batch is better off with all threads. It holds for the whole process and for those that it starts, so it is for the owner
    of the process to call, before anything else uses JAX.

    Raises:
      RuntimeError: if JAX has already begun to compute; nothing has changed then.
    """
    from jax._src import xla_bridge  # There is no public way to ask whether JAX has started.

    if xla_bridge.backends_are_initialized():
        raise RuntimeError("JAX has already begun to compute: call compute_inline() before the first array is made")
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    os.environ["PJRT_NPROC"] = "1"  # Threads of the CPU backend; read when it starts.


class Packing:
    """Turns trees of one shape into builtin tuples of raw arrays, and back.

    Args:
      shapes: the tree, of arrays or shapes.
    """

    def __init__(self, shapes: Any):
        leaves = jax.tree.leaves(shapes)
        self._structure: Any = jax.tree.structure(shapes)
        self._impls = [jax.random.key_impl(jnp.zeros(leaf.shape, leaf.dtype)) if _is_key(leaf) else None for leaf in leaves]

    def pack(self, tree: Any) -> tuple[Any, ...]:
        """The leaves, typed keys as their data."""
        return tuple(jax.random.key_data(leaf) if _is_key(leaf) else leaf for leaf in jax.tree.leaves(tree))

    def unpack(self, leaves: tuple[Any, ...]) -> Any:
        """The tree again."""
        both = zip(leaves, self._impls, strict=True)
        return self._structure.unflatten([leaf if impl is None else jax.random.wrap_key_data(leaf, impl=impl) for leaf, impl in both])


class Parts(NamedTuple):
    """How each part of what the programs take is packed.

    Attributes:
      learner: the algorithm's record.
      memory: the replay.
      noise: what one row of decisions draws.
      draws: what the updates of one interval draw, ``[updates, ...]``.
    """

    learner: Packing
    memory: Packing
    noise: Packing
    draws: Packing


class Programs(NamedTuple):
    """The compiled functions of one agent.

    ``counts`` is int32 ``[4]``: decisions made, transitions and updates in the state that goes in, and how many rows to store.

    Attributes:
      explore: ``(learner, observation, noise, step) -> leaves of the Decision``: reads, and changes nothing.
      exploit: ``(learner, observation) -> action[N]``, greedy.
      store: ``(memory*, rows, counts) -> (memory,)``.
      cut: ``(memory*, counts) -> (memory,)``.
      learn: ``(learner*, memory*, rows, draws, counts) -> (learner, metrics, memory)``: stores, then makes the updates of an interval.

    A star marks what is donated: it is gone after the call. Learner, memory, noise and draws are packed, ``rows`` are the arrays
    of a ``Staging``.
    """

    explore: Callable[..., Any]
    exploit: Callable[..., Any]
    store: Callable[..., Any]
    cut: Callable[..., Any]
    learn: Callable[..., Any]


class Ahead:
    """Random numbers of many rows, drawn in one call: in a program as small as one step a single draw costs more than the network.

    Row ``i`` of a block is what ``draw(state, i)`` gives: the same bits, however they are grouped.

    Args:
      draw: ``(state, counter) -> row``.
      state: shapes of an AgentState.
      group: rows that are used at once; a block holds a multiple of it.
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

    A program that has been given the arrays may read them later, so they are not filled again: ``emptied`` gives the next ones.

    Args:
      observation: an example, ``[N, ...]``.
      decision: an example, ``[N, ...]``.
      num_rows: rows to hold, where a megabyte can.

    Attributes:
      arrays: NumPy arrays ``[R, ...]``, one for each leaf of ``(observation, successor, decision, outcome)``.
      structure: of that tuple.
      capacity: R.
      size: rows that wait, at the front of the arrays.
    """

    def __init__(self, observation: Any, decision: Decision, num_rows: int):
        num_envs = jax.tree.leaves(observation)[0].shape[0]
        example = observation, observation, decision, np.zeros((3, num_envs), np.float32)
        leaves, self.structure = jax.tree.flatten(example)
        self.capacity = max(1, min(num_rows, STAGED_BYTES // sum(leaf.nbytes for leaf in leaves)))
        self.arrays = [np.empty((self.capacity, *leaf.shape), leaf.dtype) for leaf in leaves]
        self.size = 0

    def emptied(self) -> "Staging":
        """Another one like this, without rows."""
        other = copy.copy(self)
        other.arrays = [np.empty(array.shape, array.dtype) for array in self.arrays]
        other.size = 0
        return other

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


def compile_programs(agent: Agent, num_envs: int, parts: Parts, staging: Staging) -> Programs:
    """The programs of ``agent`` for ``num_envs`` environments; each compiles when first called."""

    def state_of(learner: Any, memory: Any, decisions: Any, step: Any, updates: Any) -> AgentState:
        """The agent's state; no program needs the key, whose numbers are drawn ahead."""
        return AgentState(learner, memory, (), decisions, step, updates)  # type: ignore[arg-type]

    def stored(memory: Any, rows: list[chex.Array], counts: chex.Array) -> AgentState:
        """The state without its learner, after the first rows have been stored."""

        def one(row: chex.Array, state: AgentState) -> AgentState:
            leaves = [leaf[row] for leaf in rows]
            observation, successor, decision, (reward, discount, last) = jax.tree.unflatten(staging.structure, leaves)
            transition = Transition(observation, decision.action, reward, discount, successor, last > 0, decision.extras)
            return agent.observe(state, transition)

        # The number of turns is not known to the compiler: it would fuse a known one with the reads that follow, and copy the replay.
        return jax.lax.fori_loop(0, counts[3], one, state_of((), memory, *counts[:3]))

    def explore(learner: Any, observation: Any, noise: Any, step: chex.Array) -> list[chex.Array]:
        # Which decision it is has gone into the noise, and the number of updates does not matter.
        state = state_of(parts.learner.unpack(learner), (), decisions=jnp.zeros_like(step), step=step, updates=jnp.zeros_like(step))
        noise = jax.tree.map(lambda leaf: leaf[0], parts.noise.unpack(noise))
        return jax.tree.leaves(agent.explore(state, observation, noise)[1])

    def exploit(learner: Any, observation: Any) -> chex.Array:
        return agent.exploit(parts.learner.unpack(learner), observation)

    def store(memory: Any, rows: list[chex.Array], counts: chex.Array) -> tuple[Any]:
        return (parts.memory.pack(stored(parts.memory.unpack(memory), rows, counts).memory),)

    def cut(memory: Any, counts: chex.Array) -> tuple[Any]:
        state = agent.cut(state_of((), parts.memory.unpack(memory), *counts[:3]), jnp.ones(num_envs, jnp.bool_))
        return (parts.memory.pack(state.memory),)

    def learn(learner: Any, memory: Any, rows: list[chex.Array], draws: Any, counts: chex.Array) -> tuple[Any, ...]:
        state = stored(parts.memory.unpack(memory), rows, counts)._replace(learner=parts.learner.unpack(learner))
        state, metrics = jax.lax.scan(agent.update, state, parts.draws.unpack(draws))
        return parts.learner.pack(state.learner), jax.tree.map(jnp.mean, metrics), parts.memory.pack(state.memory)

    return Programs(
        explore=jax.jit(explore),
        exploit=jax.jit(exploit),
        store=jax.jit(store, donate_argnums=0),
        cut=jax.jit(cut, donate_argnums=0),
        learn=jax.jit(learn, donate_argnums=(0, 1)),
    )


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
