"""The compiled programs of the host driver, and the random numbers drawn ahead for them.

The agent's state travels in parts, so that a program takes and returns only what it changes (each array that enters or leaves costs
more than the arithmetic of a small network), and each part as a builtin tuple of raw arrays. To hand out a NamedTuple or a typed key
runs Python code after the old state is gone, and there an interrupt would strike: it then lost agents in half of the trials.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from dqn_jax.types import Agent, AgentState, Decision, Transition

AHEAD_BYTES = 1 << 20  # What a block of random numbers, drawn ahead in one call, may take.
AHEAD_ROWS = 1024


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
    """How each part of an agent's state is packed.

    Attributes:
      pending: ``(observation, Decision)``: the decision that waits for its outcome.
      rest: the AgentState without learner, memory and key; no program needs the key, whose numbers are drawn ahead.
      memory: the replay.
      learner: the algorithm's record.
    """

    pending: Packing
    rest: Packing
    memory: Packing
    learner: Packing


class Programs(NamedTuple):
    """The compiled functions of one agent, on packed parts; what they donate is gone after the call.

    Attributes:
      begin: ``(learner, rest*, observation, noise, start) -> (pending, rest)``: the first decision of an episode.
      step: ``(learner, rest*, memory*, pending, observation, successor | None, outcome, noise, start) -> (pending, rest, memory)``: stores
        what ``observation`` completes, and decides. Without a successor the observation is it.
      end: ``(rest*, memory*, pending, observation, outcome) -> (rest, memory)``: stores the last transition of an episode.
      cut: ``(rest*, memory*) -> (rest, memory)``.
      update: ``(learner*, rest*, memory*, draws, start) -> (rest, memory, learner, metrics)``: all updates of one interval.
      act: ``(learner, observation) -> action[N]``, greedy.

    A star marks what is donated; ``outcome`` is ``[3, N]``: reward, discount, last; ``start`` is the counter at which a block begins.
    """

    begin: Callable[..., Any]
    step: Callable[..., Any]
    end: Callable[..., Any]
    cut: Callable[..., Any]
    update: Callable[..., Any]
    act: Callable[..., Any]


class Ahead:
    """Random numbers of many rows, drawn in one call: in a program as small as one step a single draw costs more than the network.

    Row ``i`` of a block that begins at ``start`` is what ``draw(state, start + i)`` gives: the same bits, however they are grouped.

    Args:
      draw: ``(state, counter) -> row``.
      state: shapes of an AgentState.
      group: rows that are used at once; a block holds a multiple of it.
    """

    def __init__(self, draw: Callable[..., Any], state: AgentState, group: int = 1):
        self.row = jax.eval_shape(draw, state, state.updates)
        size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.row))
        rows = min(AHEAD_ROWS, AHEAD_BYTES // max(1, size))
        self._rows = max(1, rows // group) * group
        counters = jnp.arange(self._rows, dtype=jnp.int32)
        self._draw = jax.jit(lambda state, start: jax.vmap(lambda counter: draw(state, counter))(start + counters))
        self._block: tuple[Any, Any] | None = None
        self._first = 0

    def block(self, counter: int, live_state: Callable[[], AgentState]) -> tuple[Any, Any]:
        """The block that holds row ``counter``, and where it begins; drawn anew when the rows are used up."""
        if self._block is None or not self._first <= counter < self._first + self._rows:
            start = jnp.asarray(counter, jnp.int32)
            self._block = (self._draw(live_state()._replace(memory=()), start), start)
            self._first = counter
        return self._block

    def forget(self) -> None:
        """Drops the block: the state has changed under it."""
        self._block = None


def compile_programs(agent: Agent, num_envs: int, updates: int, parts: Parts) -> Programs:
    """The programs of ``agent`` for ``num_envs`` environments and ``updates`` updates at each interval; each compiles when first called."""

    def program(function: Callable[..., Any], takes: str, gives: str, donate: tuple[int, ...] = ()) -> Callable[..., Any]:
        """``function`` on trees, compiled on packed parts: the words name them, a dash goes as it is."""
        taken, given = ([getattr(parts, word, None) for word in words.split()] for words in (takes, gives))

        def run(*args: Any) -> tuple[Any, ...]:
            trees = [arg if part is None else part.unpack(arg) for part, arg in zip(taken, args, strict=True)]
            results = function(*trees)
            return tuple(tree if part is None else part.pack(tree) for part, tree in zip(given, results, strict=True))

        return jax.jit(run, donate_argnums=donate)

    def whole(learner: Any, rest: AgentState, memory: Any) -> AgentState:
        return rest._replace(learner=learner, memory=memory)

    def apart(state: AgentState) -> tuple[AgentState, Any, Any]:
        return state._replace(learner=(), memory=(), key=()), state.memory, state.learner

    def row(block: Any, index: chex.Array) -> Any:
        return jax.tree.map(lambda leaf: leaf[index], block)

    def explore(state: AgentState, observation: Any, noise: Any, start: chex.Array) -> tuple[AgentState, tuple[Any, Decision]]:
        state, decision = agent.explore(state, observation, row(noise, state.decisions - start))
        return state, (observation, decision)

    def store(state: AgentState, pending: tuple[Any, Decision], successor: Any, outcome: chex.Array) -> AgentState:
        observation, decision = pending
        reward, discount, last = outcome
        return agent.observe(state, Transition(observation, decision.action, reward, discount, successor, last > 0, decision.extras))

    def begin(learner: Any, rest: AgentState, observation: Any, noise: Any, start: chex.Array) -> tuple[Any, ...]:
        state, pending = explore(whole(learner, rest, ()), observation, noise, start)
        return pending, apart(state)[0]

    def step(
        learner: Any,
        rest: AgentState,
        memory: Any,
        pending: Any,
        observation: Any,
        successor: Any,
        outcome: chex.Array,
        noise: Any,
        start: Any,
    ) -> tuple[Any, ...]:
        successor = observation if successor is None else successor
        state = store(whole(learner, rest, memory), pending, successor, outcome)
        state, pending = explore(state, observation, noise, start)
        return (pending, *apart(state)[:2])

    def end(rest: AgentState, memory: Any, pending: Any, observation: Any, outcome: chex.Array) -> tuple[Any, ...]:
        return apart(store(whole((), rest, memory), pending, observation, outcome))[:2]

    def cut(rest: AgentState, memory: Any) -> tuple[Any, ...]:
        return apart(agent.cut(whole((), rest, memory), jnp.ones(num_envs, jnp.bool_)))[:2]

    def update(learner: Any, rest: AgentState, memory: Any, draws: Any, start: chex.Array) -> tuple[Any, ...]:
        def one(state: AgentState, _: None) -> tuple[AgentState, Any]:
            return agent.update(state, row(draws, state.updates - start))

        state, metrics = jax.lax.scan(one, whole(learner, rest, memory), None, length=updates)
        return (*apart(state), jax.tree.map(jnp.mean, metrics))

    return Programs(
        begin=program(begin, "learner rest - - -", "pending rest", donate=(1,)),
        step=program(step, "learner rest memory pending - - - - -", "pending rest memory", donate=(1, 2)),
        end=program(end, "rest memory pending - -", "rest memory", donate=(0, 1)),
        cut=program(cut, "rest memory", "rest memory", donate=(0, 1)),
        update=program(update, "learner rest memory - -", "rest memory learner -", donate=(0, 1, 2)),
        act=program(lambda learner, observation: (agent.exploit(learner, observation),), "learner -", "-"),
    )


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
