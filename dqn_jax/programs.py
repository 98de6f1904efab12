"""The compiled programs of the host driver, and the random numbers drawn ahead for them.

The agent's state travels in three parts, so that a program takes and returns only what it changes: each array that enters or leaves
costs more than the arithmetic of a small network. ``rest`` is the AgentState without learner and memory.
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


class Programs(NamedTuple):
    """The compiled functions of one agent; what they donate is gone after the call.

    Attributes:
      init: ``(key, observation[N]) -> AgentState``.
      begin: ``(learner, rest*, observation, noise, start) -> (pending, rest)``: the first decision of an episode.
      step: ``(learner, rest*, memory*, pending, observation, successor | None, outcome, noise, start) -> (pending, rest, memory)``: stores
        what ``observation`` completes, and decides. Without a successor the observation is it.
      end: ``(rest*, memory*, pending, observation, outcome) -> (rest, memory)``: stores the last transition of an episode.
      cut: ``(rest*, memory*) -> (rest, memory)``.
      update: ``(learner*, rest*, memory*, draws, start) -> (rest, memory, learner, metrics)``: all updates of one interval.
      act: ``(learner, observation) -> action[N]``, greedy.

    A star marks what is donated; ``outcome`` is ``[3, N]``: reward, discount, last; ``start`` is the counter at which a block begins.
    """

    init: Callable[..., Any]
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


def compile_programs(agent: Agent, num_envs: int, updates: int) -> Programs:
    """The programs of ``agent`` for ``num_envs`` environments and ``updates`` updates at each interval; each compiles when first called."""

    def whole(learner: Any, rest: AgentState, memory: Any) -> AgentState:
        return rest._replace(learner=learner, memory=memory)

    def apart(state: AgentState) -> tuple[AgentState, Any, Any]:
        return state._replace(learner=(), memory=()), state.memory, state.learner

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
        init=jax.jit(agent.init),
        begin=jax.jit(begin, donate_argnums=1),
        step=jax.jit(step, donate_argnums=(1, 2)),
        end=jax.jit(end, donate_argnums=(0, 1)),
        cut=jax.jit(cut, donate_argnums=(0, 1)),
        update=jax.jit(update, donate_argnums=(0, 1, 2)),
        act=jax.jit(agent.exploit),
    )
