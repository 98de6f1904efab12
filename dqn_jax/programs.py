"""The compiled programs of the host driver, and how what they take is packed.

To decide changes nothing on the device. What happened is collected on the host and stored by the program that learns from it, so most
steps cost one small program. Each program takes only what it reads and returns only what it changes, because each array that enters
or leaves costs one or two microseconds, and a small network's decision takes twenty.

What a program donates travels as builtin tuples of raw arrays. To hand out a NamedTuple or a typed key runs Python code after the old
arrays are gone, and an interrupt that strikes there would lose both old and new.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from dqn_jax.types import Agent, AgentState, Transition

_INLINE = False  # Whether ``compute_inline`` has been called.


def compute_inline() -> None:
    """Lets JAX compute on the CPU in the thread that asks, and with no other: faster for small networks stepped from Python.

    To hand a small program to another thread, and to wait for it, takes longer than the program (figures in README.md). A large network
    or a large batch is better off with all threads, many seeds in a compiled loop with ``device_per_core``. It holds for the whole
    process and for those that it starts, so it is for the owner of the process to call, before anything else uses JAX.

    Raises:
      RuntimeError: if JAX has already begun to compute; nothing has changed then.
    """
    _require_not_begun("compute_inline")
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    os.environ["PJRT_NPROC"] = "1"  # Threads of the CPU backend; read when it starts.
    global _INLINE
    _INLINE = True


def device_per_core() -> None:
    """Makes the CPU as many devices as this process may use cores: ``dqn_jax.over_seeds`` then gives each of them a share of the seeds.

    A core that computes its share by itself does more than all cores together on everybody's (figures in README.md). What does not ask
    for several devices goes on using the first, a host loop somewhat slower than before. Where ``jax_num_cpu_devices`` has been set, it
    stays. It holds for the whole process, so it is for the owner of the process to call, before anything else uses JAX.

    Raises:
      RuntimeError: if JAX has already begun to compute; nothing has changed then.
    """
    _require_not_begun("device_per_core")
    os.environ.pop("PJRT_NPROC", None)  # A process in which ``compute_inline`` was called may have started this one.
    chosen: int = getattr(jax.config, "jax_num_cpu_devices")  # noqa: B009 (its type stubs do not know it)
    if chosen < 0 and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", usable_cores())


def _require_not_begun(function: str) -> None:
    from jax._src import xla_bridge  # There is no public way to ask whether JAX has started.

    if xla_bridge.backends_are_initialized():
        raise RuntimeError(f"JAX has already begun to compute: call {function}() before the first array is made")


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_inline() -> bool:
    """Whether a program has done all its work, and read all that it was given, when its call returns."""
    return _INLINE and jax.default_backend() == "cpu"


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
      noise: what one row of decisions draws, ``[1, ...]``.
      draws: what the updates of one interval draw, ``[updates, ...]``.
      row: the structure of ``(observation, successor, decision, outcome)``, the leaves of which are the ``rows`` of a ``Staging``.
    """

    learner: Packing
    memory: Packing
    noise: Packing
    draws: Packing
    row: Any


class Programs(NamedTuple):
    """The compiled functions of one agent.

    ``counts`` is int32 ``[4]``: decisions made, transitions and updates in the state that goes in, and how many rows to store.

    Attributes:
      explore: ``(learner, observation, noise, step) -> decision``: reads, and changes nothing.
      exploit: ``(learner, observation) -> action[N]``, greedy.
      store: ``(memory*, rows, counts) -> (memory,)``.
      cut: ``(memory*, counts) -> (memory,)``.
      learn: ``(learner*, memory*, rows, draws, counts) -> (learner, metrics, memory)``: stores, then makes the updates of an interval.

    A star marks what is donated: it is gone after the call. Learner, memory, noise and draws are packed, ``rows`` are the arrays of a
    ``Staging``, a decision is the tuple of its leaves.
    """

    explore: Callable[..., Any]
    exploit: Callable[..., Any]
    store: Callable[..., Any]
    cut: Callable[..., Any]
    learn: Callable[..., Any]


def compile_programs(agent: Agent, num_envs: int, parts: Parts) -> Programs:
    """The programs of ``agent`` for ``num_envs`` environments; each compiles when first called."""

    def state_of(learner: Any, memory: Any, decisions: Any, step: Any, updates: Any) -> AgentState:
        """The agent's state; no program needs the key, whose numbers are drawn ahead."""
        return AgentState(learner, memory, (), decisions, step, updates)  # type: ignore[arg-type]

    def stored(memory: Any, rows: list[chex.Array], counts: chex.Array) -> AgentState:
        """The state without its learner, after the first rows have been stored."""

        def one(row: chex.Array, state: AgentState) -> AgentState:
            leaves = [leaf[row] for leaf in rows]
            observation, successor, decision, (reward, discount, last) = jax.tree.unflatten(parts.row, leaves)
            transition = Transition(observation, decision.action, reward, discount, successor, last > 0, decision.extras)
            return agent.observe(state, transition)

        # The number of turns is not known to the compiler: it would fuse a known one with the reads that follow, and copy the replay.
        return jax.lax.fori_loop(0, counts[3], one, state_of((), memory, *counts[:3]))

    def explore(learner: Any, observation: Any, noise: Any, step: chex.Array) -> tuple[chex.Array, ...]:
        # Which decision it is has gone into the noise, and the number of updates does not matter.
        state = state_of(parts.learner.unpack(learner), (), decisions=jnp.zeros_like(step), step=step, updates=jnp.zeros_like(step))
        noise = jax.tree.map(lambda leaf: leaf[0], parts.noise.unpack(noise))
        return tuple(jax.tree.leaves(agent.explore(state, observation, noise)[1]))

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
