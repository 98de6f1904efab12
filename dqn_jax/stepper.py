"""The state of the host driver, and what happens to it in one step: the half of an ``OnlineAgent`` that knows the device.

One step is, in this order: (1) take in the transition that this observation completes, (2) choose the action with the parameters as they
are, (3) learn if due. Transitions wait on the host until something reads the replay, and are then stored in one go. The action does not
wait for the update, so the update may still run while the environment steps. (One program that both decides and learns was tried with
``compute_inline``, and was slower.)
"""

import itertools
import math
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dqn_jax import checkpoint, finite, footprint
from dqn_jax.programs import Packing, Parts, compile_programs, is_inline
from dqn_jax.staging import Ahead, Staging
from dqn_jax.types import Agent, AgentState, RunState

RECENT = 100  # Updates over which the statistics are averaged.

# The state, and what must change together with it. Programs return learner, metrics and memory in this order.
LEARNER, METRICS, MEMORY, UPDATES, STORED, STAGING = range(6)


class Stepper:
    """Drives the pure functions of an agent, one row of decisions after another; holds their state on the device.

    What strikes inside a call, an interrupt included, drops the pending step and cuts the stored stream there.

    Args:
      agent: the pure functions.
      num_envs: N.
      example: an observation, ``[N, ...]``.
      seed: of all randomness.
      state: an AgentState to begin with instead of a fresh one; it is copied.

    Attributes:
      pending: an observation and the leaves of the Decision that awaits its outcome, or None.
      episodes: ended, as told by the owner.
      metrics: names of the algorithm's metrics.
      recent: metrics of the last updates, on the device until somebody asks.

    Raises:
      ValueError: if update period and environments do not divide one another, or the state does not fit.
      MemoryError: if the replay is larger than the device's memory; nothing has been allocated then.
    """

    def __init__(self, agent: Agent, num_envs: int, example: Any, seed: int, state: AgentState | None):
        self._agent = agent
        self._num_envs = num_envs
        self._cadence = agent.cadence(num_envs)
        self._example = example
        fresh = jax.eval_shape(agent.init, jax.random.key(seed), example)
        footprint.require_room(fresh)
        self._noise = Ahead(lambda state, counter: agent.noise(state, counter, num_envs), fresh)
        self._draws = Ahead(agent.draw, fresh, self._cadence.updates)
        self.metrics = tuple(jax.eval_shape(agent.update, fresh, self._draws.row)[1])
        decision = jax.eval_shape(agent.explore, fresh, example, self._noise.row)[1]
        self._no_decision = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), decision)
        self._unstaged = Staging(example, self._no_decision, self._cadence.rows, reusable=is_inline())
        ahead = self._noise.packing, self._draws.packing
        self._parts = Parts(Packing(fresh.learner), Packing(fresh.memory), *ahead, self._unstaged.row)
        self._programs = compile_programs(agent, num_envs, self._parts)
        self._cell: list[Any] = [None] * 6
        self.recent: deque[Any] = deque(maxlen=RECENT)
        self.pending: tuple[Any, list[np.ndarray]] | None = None
        self._uncut = True  # Whether the stored stream may run on into an episode that it does not belong to.
        self.episodes = self._base = self._origin = 0
        if state is None:
            self.restart(jax.jit(agent.init)(jax.random.key(seed), example))
        else:
            if type(state.learner) is not type(fresh.learner):
                given, own = type(state.learner).__name__, type(fresh.learner).__name__
                raise ValueError(
                    f"the state holds a {given}, and this agent learns a {own}: hand it to an agent of the algorithm it is from"
                )
            checkpoint.require_fit(state, fresh, f"this agent of {num_envs} environment(s)")
            self.restart(jax.tree.map(jnp.copy, state))

    # Stepping.

    def exploit(self, observation: Any) -> np.ndarray:
        """The greedy actions ``[N]``."""
        return np.asarray(self._programs.exploit(self._cell[LEARNER], observation))

    def advance(self, observation: Any, outcome: np.ndarray | None = None, successor: Any = None) -> np.ndarray:
        """Takes in what happened (where a step is pending), explores, and learns if due.

        Args:
          observation: ``[N, ...]``.
          outcome: of the pending step: reward, discount and last, ``[3, N]``.
          successor: of the pending step, where it is not the observation.

        Returns:
          The actions ``[N]``.
        """
        try:
            if outcome is not None:
                self.take_in(outcome, observation if successor is None else successor)
            elif self._uncut:
                self.store()
                self._swap(slice(MEMORY, MEMORY + 1), (), self._programs.cut, self._cell[MEMORY], self._counts())
                self._uncut = False
            noise = self._noise.rows(self._decisions, self.live_state)
            decided = self._programs.explore(self._cell[LEARNER], observation, noise, np.int32(self.step))
            decision = [np.asarray(leaf) for leaf in decided]
            self._decisions += 1
            self.pending = observation, decision
            if self._base + self._due(self.step) > self._cell[UPDATES]:
                self._learn()
            return decision[0]  # The action: the first field of a Decision.
        except BaseException:
            self.drop()
            raise

    def take_in(self, outcome: np.ndarray, successor: Any) -> None:
        """Lets the pending step, whose outcome this is, wait to be stored."""
        assert self.pending is not None
        if self._cell[STAGING].size == self._unstaged.capacity:
            self.store()
        observation, decision = self.pending
        self.pending = None
        self._cell[STAGING].add(observation, decision, successor, outcome)

    def drop(self) -> None:
        """Drops the pending step and ends the stored stream there, without learning anything."""
        self.pending = None
        self._uncut = True

    def store(self) -> None:
        """Stores the rows that wait."""
        staging = self._cell[STAGING]
        if staging.size:
            noted = self._cell[UPDATES], self.step, staging.emptied()
            self._swap(slice(MEMORY, None), noted, self._programs.store, self._cell[MEMORY], staging.arrays, self._counts())

    def _learn(self) -> None:
        """Stores the rows that wait, and makes the updates of one interval."""
        learner, _, memory, updates, _, staging = self._cell
        draws = self._draws.rows(updates, self.live_state)
        noted = updates + self._cadence.updates, self.step, staging.emptied()
        self._swap(slice(LEARNER, None), noted, self._programs.learn, learner, memory, staging.arrays, draws, self._counts())
        self.recent.append(self._cell[METRICS])
        if noted[0] // self._cadence.updates % finite.PATIENCE == 0:
            self._require_learning()

    def _require_learning(self) -> None:
        """Raises if nothing has been learnt lately. To look waits for the device, so it is done once in a while."""
        recent = list(self.recent)[-finite.PATIENCE :]

        def all_refused(metrics: Any) -> bool:
            return bool(finite.all_refused(metrics["refused"], self._cadence.updates))

        # Not the newest first: it may still be computed.
        if len(recent) == finite.PATIENCE and all_refused(recent[-2]) and all(map(all_refused, recent)):
            why = finite.explain(self._agent, self.live_state())
            raise finite.NonFiniteError(
                f"the updates of {finite.PATIENCE} calls in a row were refused, since loss or gradient were not finite; nothing was learnt "
                f"from them, and the agent is as it was before them. Of update {self.updates}:\n  {why}"
            )

    def _swap(self, places: slice, noted: tuple[Any, ...], program: Callable[..., Any], *args: Any) -> None:
        """Runs a program and puts its results, and what is to be noted with them, into the cell within one C call.

        The old state is donated: an interrupt between the call and the assignment of its result would lose both, and one before the
        counters are changed would store the rows twice.
        """
        results = itertools.chain.from_iterable(map(program, *((arg,) for arg in args)))
        self._cell[places] = itertools.chain(results, noted)

    def _counts(self) -> np.ndarray:
        return np.array([self._decisions, self._cell[STORED], self._cell[UPDATES], self._cell[STAGING].size], np.int32)

    @property
    def step(self) -> int:
        """Transitions taken in, those that wait to be stored included."""
        return self._cell[STORED] + self._cell[STAGING].size * self._num_envs

    @property
    def updates(self) -> int:
        """Updates made."""
        return self._cell[UPDATES]

    def _due(self, step: int) -> int:
        """Updates that fall due up to there; what of it is owed is read off the counters, so an interrupt neither loses nor repeats one."""
        cadence = self._cadence
        return max(0, (step // self._num_envs - self._origin - cadence.prefill) // cadence.rows) * cadence.updates

    # The state.

    @property
    def learner(self) -> Any:
        """The learner, not copied: the next update uses it up."""
        return self._parts.learner.unpack(self._cell[LEARNER])

    @property
    def memory(self) -> Any:
        """The replay without the rows that wait, not copied: the next program that writes it uses it up."""
        return self._parts.memory.unpack(self._cell[MEMORY])

    def live_state(self) -> AgentState:
        """The state without the rows that wait, not copied; its counters are NumPy."""
        decisions, step, updates = map(np.int32, (self._decisions, self._cell[STORED], self._cell[UPDATES]))
        return AgentState(self.learner, self.memory, self._key, decisions, step, updates)

    def restart(self, state: AgentState) -> None:
        """Begins with this state, which is taken over, with no episode open and no update owed."""
        decisions, step, updates = (int(np.array(count)) for count in (state.decisions, state.step, state.updates))
        learner, memory = self._parts.learner.pack(state.learner), self._parts.memory.pack(state.memory)
        self._noise.forget()
        self._draws.forget()
        self.recent.clear()
        self.drop()
        self._key, self._decisions, self.episodes = state.key, decisions, 0
        self._origin = 0  # The row from which on the warm-up and the updates are counted.
        # Rows that are to be learnt from once are owed an update whoever has collected them.
        self._base = 0 if self._cadence.once else updates - self._due(step)
        self._cell[:] = [learner, None, memory, updates, step, self._unstaged.emptied()]

    def snapshot(self, state: AgentState) -> RunState:
        """The RunState that has this state of the agent; the rest is copied."""
        observation, decision = self.pending or (self._example, jax.tree.leaves(self._no_decision))
        pending = observation, jax.tree.unflatten(jax.tree.structure(self._no_decision), decision)
        recent = list(self.recent)
        padded = recent + [dict.fromkeys(self.metrics, math.nan)] * (RECENT - len(recent))
        statistics = {
            "pending": np.asarray(self.pending is not None),
            "uncut": np.asarray(self._uncut),
            "episodes": np.asarray(self.episodes, np.int32),
            "origin": np.asarray(self._origin, np.int32),
            "owed": np.asarray(self._base + self._due(self.step) - self._cell[UPDATES], np.int32),
            "recent": np.asarray(len(recent), np.int32),
            "metrics": jax.tree.map(lambda *values: np.asarray(jax.device_get(values), np.float32), *padded),
        }
        return RunState(state, (), jax.tree.map(np.array, pending), statistics)

    def restore(self, run: RunState) -> None:
        """Goes on exactly where the agent stopped whose ``snapshot`` this is. The arrays are taken over, not copied."""
        self.restart(run.agent)
        saved = jax.device_get(run.statistics)
        observation, decision = jax.device_get(run.pending)
        self.pending = (observation, jax.tree.leaves(decision)) if saved["pending"] else None
        self._uncut = bool(saved["uncut"])
        self.episodes, self._origin = int(saved["episodes"]), int(saved["origin"])
        self._base = self._cell[UPDATES] - self._due(self.step) + int(saved["owed"])
        self.recent.extend({name: values[i] for name, values in saved["metrics"].items()} for i in range(int(saved["recent"])))

    def restore_without_replay(self, run: RunState) -> None:
        """As ``restore`` of a state whose memory was left out: with an empty one, after which there is a warm-up as at the beginning."""
        self.restore(run._replace(agent=run.agent._replace(memory=self.empty_memory())))
        self._origin = self.step // self._num_envs
        self._base = self._cell[UPDATES]

    def empty_memory(self) -> Any:
        """The replay as it was in the beginning."""
        return jax.jit(lambda key: self._agent.init(key, self._example).memory)(self._key)

    def compile(self) -> None:
        """Compiles everything now, on copies; of the replay, too, unless it is empty: then it is used up and made anew, since a large one
        may not fit into memory twice.
        """
        is_empty = int(np.array(self.memory.size)) == 0
        learner = jax.tree.map(jnp.copy, self._cell[LEARNER])
        memory = self._cell[MEMORY] if is_empty else jax.tree.map(jnp.copy, self._cell[MEMORY])
        try:
            self._compile(learner, memory)
        finally:
            if is_empty:
                del memory
                self._cell[MEMORY] = ()
                self._cell[MEMORY] = self._parts.memory.pack(self.empty_memory())

    def _compile(self, learner: Any, memory: Any) -> None:
        """Calls every program once; ``learner`` and ``memory`` are used up."""
        programs, rows, counts = self._programs, [np.zeros_like(array) for array in self._unstaged.arrays], np.zeros(4, np.int32)
        programs.exploit(learner, self._example)
        noise = self._noise.rows(self._decisions, self.live_state)
        draws = self._draws.rows(self._cell[UPDATES], self.live_state)
        programs.explore(learner, self._example, noise, counts[1])
        (memory,) = programs.store(memory, rows, counts)
        (memory,) = programs.cut(memory, counts)
        jax.block_until_ready(programs.learn(learner, memory, rows, draws, counts))
