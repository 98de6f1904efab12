"""The host driver: an agent that a loop of your own calls once per environment step.

It holds the agent's state on the device and drives the pure functions of an ``Agent``; no learning happens here. One call of
``act_and_train`` is, in this order: (1) take in the transition that this observation completes, (2) choose the action with the
parameters as they are, (3) learn if due, (4) return the action. Transitions wait on the host until something reads the replay, and are
then stored in one go. The action does not wait for the update, so the update may still run while the environment steps.
"""

import itertools
import math
import os
from collections import deque
from collections.abc import Callable
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from dqn_jax import checkpoint, footprint, spaces
from dqn_jax.programs import Ahead, Packing, Parts, Staging, compile_programs, outcome_array
from dqn_jax.types import Agent, AgentState, RunState

RECENT = 100  # Updates over which the statistics are averaged.

# The state, and what must change together with it. Programs return learner, metrics and memory in this order.
LEARNER, METRICS, MEMORY, UPDATES, STORED, STAGING = range(6)


class OnlineAgent:
    """An agent with the interface ``act``, ``act_and_train``, ``stop_episode_and_train``; see ``dqn_jax.DQN`` for a ready-made one.

    An exception leaves it usable. A bad argument changes nothing; what strikes inside a call, an interrupt included, drops the pending
    step and cuts the stored stream there, as ``stop_episode`` does. An interrupt that strikes your own code cannot be seen from here:
    call ``stop_episode()`` before the next reset. While a program runs for the very first time its state is not yet safe from an
    interrupt; ``compile()`` beforehand closes that gap too.

    Args:
      agent: the pure functions.
      observation_space: of one environment.
      action_space: of one environment, Discrete.
      num_envs: N; with 1 the scalar methods work, with any the ``batch_`` ones.
      seed: of all randomness of the agent.
      state: an AgentState to begin with instead of a fresh one, for example one seed of a compiled run; it is copied.
      require_succession: a check of ``(observation, successor, following, last)``, NumPy ``[N, ...]``, that raises where the replay could
        not keep such a step; see ``memory.frames.require_succession``.

    Raises:
      NotImplementedError: if a space is not supported.
      ValueError: if update period and environments do not divide one another, or the state does not fit.
      MemoryError: if the replay is larger than the device's memory; nothing has been allocated then.
    """

    def __init__(
        self,
        agent: Agent,
        observation_space: gymnasium.Space,
        action_space: gymnasium.Space,
        *,
        num_envs: int = 1,
        seed: int = 0,
        state: AgentState | None = None,
        require_succession: Callable[[Any, Any, Any, np.ndarray], None] | None = None,
    ):
        self.num_envs = num_envs
        self._require_succession = require_succession
        self.observation_space = observation_space
        self.action_space = action_space
        self._agent = agent
        self._cadence = agent.cadence(num_envs)
        self._example = spaces.example(observation_space, num_envs)
        fresh = jax.eval_shape(agent.init, jax.random.key(seed), self._example)
        footprint.require_room(fresh)
        self._noise = Ahead(lambda state, counter: agent.noise(state, counter, num_envs), fresh)
        self._draws = Ahead(agent.draw, fresh, self._cadence.updates)
        self._metrics = tuple(jax.eval_shape(agent.update, fresh, self._draws.row)[1])
        decision = jax.eval_shape(agent.explore, fresh, self._example, self._noise.row)[1]
        self._no_decision = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), decision)
        self._unstaged = Staging(self._example, self._no_decision, self._cadence.rows)
        self._parts = Parts(Packing(fresh.learner), Packing(fresh.memory), self._noise.packing, self._draws.packing)
        self._programs = compile_programs(agent, num_envs, self._parts, self._unstaged)
        self._checks: dict[tuple[str, bool], spaces.Check] = {}
        for single in (True, False):
            lead = None if single else num_envs
            self._checks["observation", single] = spaces.observation_check(observation_space, lead)
            self._checks["reward", single] = spaces.reward_check(lead)
            self._checks["terminated", single] = spaces.flag_check("terminated", lead)
            self._checks["truncated", single] = spaces.flag_check("truncated", lead)
        self._cell: list[Any] = [None] * 6
        self._recent: deque[Any] = deque(maxlen=RECENT)  # Metrics of the last updates, on the device until somebody asks.
        self._pending: tuple[Any, list[np.ndarray]] | None = None  # An observation, and the leaves of the Decision that awaits its outcome.
        self._uncut = True  # Whether the stored stream may run on into an episode that it does not belong to.
        self._episodes = self._base = 0
        if state is None:
            self._restart(jax.jit(agent.init)(jax.random.key(seed), self._example))
        else:
            checkpoint.require_fit(state, fresh, f"this agent of {num_envs} environment(s)")
            self._restart(jax.tree.map(jnp.copy, state))

    def __repr__(self) -> str:
        counts = f"num_envs={self.num_envs}, t={self._step}, episodes={self._episodes}, n_updates={self._cell[UPDATES]}"
        return f"{type(self).__name__}({counts})"

    # The deck's interface: one environment.

    def act(self, observation: Any) -> int:
        """The greedy action. Changes nothing.

        Args:
          observation: as the environment returns it.

        Returns:
          The action, an int.

        Raises:
          ValueError: on a wrong shape, NaN or infinity, or a mask that allows nothing.
          TypeError: on a wrong dtype or structure.
        """
        return int(self._greedy(self._observation(observation, True))[0])

    def act_and_train(self, observation: Any, reward: float) -> int:
        """Chooses the next action by exploring, and learns; call it once per environment step, before stepping.

        Args:
          observation: as the environment returns it.
          reward: what the environment paid for the *previous* action; ignored on the first call of an episode.

        Returns:
          The action, an int.

        Raises:
          ValueError: on a wrong shape, NaN or infinity, or a mask that allows nothing.
          TypeError: on a wrong dtype or structure.
          RuntimeError: if the agent was built for several environments.
        """
        self._require_single("act_and_train")
        checked = self._observation(observation, True)
        if self._pending is None:
            return int(self._advance(checked)[0])
        outcome = outcome_array(self._checks["reward", True](reward))
        self._check_succession(checked, checked, np.zeros(1, np.bool_))
        return int(self._advance(checked, outcome)[0])

    def stop_episode_and_train(self, observation: Any, reward: float, terminated: bool = True) -> None:
        """Closes the episode. What falls due on it is learnt by the next ``act_and_train``.

        Args:
          observation: the last observation of the episode.
          reward: what the last action paid.
          terminated: False where the episode was cut, by a time limit for example: the value of ``observation`` is then bootstrapped.

        Raises:
          ValueError, TypeError: as ``act_and_train``.
          RuntimeError: if no step is pending, or the agent was built for several environments.
        """
        self._require_single("stop_episode_and_train")
        checked = self._checks["observation", True](observation)
        ended = self._checks["terminated", True](terminated)
        spaces.require_actions_allowed(checked, ended)
        outcome = outcome_array(self._checks["reward", True](reward), ended, np.ones(1, np.bool_))
        if self._pending is None:
            raise RuntimeError("no episode is open: call act_and_train at least once before stop_episode_and_train")
        self._check_succession(checked, checked, np.ones(1, np.bool_))
        try:
            self._take_in(outcome, checked)
            self._episodes += 1
        except BaseException:
            self.stop_episode()
            raise

    def stop_episode(self) -> None:
        """Drops the pending step and ends the stored stream there, without learning anything. Call it after leaving a loop early."""
        self._pending = None
        self._uncut = True

    # Several environments.

    def batch_act(self, observation: Any) -> np.ndarray:
        """The greedy actions ``[N]``. Changes nothing. Arguments and errors as ``act``, with a leading axis N."""
        return np.array(self._greedy(self._observation(observation, False)))

    def batch_act_and_train(
        self, observation: Any, reward: Any = None, terminated: Any = None, truncated: Any = None, next_observation: Any = None
    ) -> np.ndarray:
        """``act_and_train`` for N environments that restart by themselves in the step that ends an episode (SAME_STEP).

        Args:
          observation: ``[N, ...]`` what the agents see now: for ended environments the first observation of the next episode.
          reward: ``[N]`` what the previous actions paid. This and what follows is ignored on the first call.
          terminated: ``[N]`` bool.
          truncated: ``[N]`` bool.
          next_observation: ``[N, ...]`` the true successors: ``dqn_jax.true_successors(observation, infos)``. May be left out where no
            environment ended.

        Returns:
          The actions ``[N]``, int32.

        Raises:
          ValueError: on a wrong shape, NaN or infinity, a mask that allows nothing, or missing successors.
          TypeError: on a wrong dtype or structure.
        """
        checked = self._observation(observation, False)
        if self._pending is None:
            return np.array(self._advance(checked))
        ended = self._checks["terminated", False](terminated)
        last = ended | self._checks["truncated", False](truncated)
        outcome = outcome_array(self._checks["reward", False](reward), ended, last)
        if next_observation is None:
            if last.any():
                raise ValueError(
                    "an environment ended and next_observation was not given: pass dqn_jax.true_successors(observation, infos), "
                    "with the vector environment made with autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP"
                )
            self._check_succession(checked, checked, last)
            return np.array(self._advance(checked, outcome))
        successor = self._checks["observation", False](next_observation)
        spaces.require_actions_allowed(successor, ended)
        self._check_succession(successor, checked, last)
        action = np.array(self._advance(checked, outcome, successor))
        self._episodes += int(last.sum())
        return action

    # Looking in, saving, moving.

    def get_statistics(self) -> dict[str, float]:
        """How the agent is doing.

        Returns:
          ``t`` (transitions stored), ``episodes`` (ended), ``n_updates``, ``replay_size`` (transitions held), and ``average_...`` of
          each metric of the algorithm over the last 100 updates (``average_loss`` and ``average_q`` for DQN), NaN before the first.
        """
        self._store()
        recent = jax.device_get(list(self._recent)) or [dict.fromkeys(self._metrics, math.nan)]
        averages = {f"average_{name}": float(np.mean([metrics[name] for metrics in recent])) for name in self._metrics}
        counts = {"t": self._step, "episodes": self._episodes, "n_updates": self._cell[UPDATES]}
        return {**counts, "replay_size": int(np.array(self._part(MEMORY).size)), **averages}

    @property
    def agent(self) -> Agent:
        """The pure functions, for ``dqn_jax.train`` and the like."""
        return self._agent

    @property
    def learner(self) -> Any:
        """A copy of what the agent has learnt: the learner of its state."""
        return jax.tree.map(jnp.copy, self._part(LEARNER))

    @property
    def state(self) -> AgentState:
        """A copy of the agent's state; hand it to ``Training.resume``, or to another agent's ``from_state``."""
        self._store()
        return jax.tree.map(jnp.array, self._live_state())

    @property
    def run_state(self) -> RunState:
        """A copy of everything: the agent's state, the pending step, the counts."""
        return self._with_counts(self.state)

    def restore(self, run: RunState) -> None:
        """Goes on exactly where the agent stopped whose ``run_state`` this is. The arrays are taken over, not copied."""
        self._restart(run.agent)
        saved = jax.device_get(run.statistics)
        observation, decision = jax.device_get(run.pending)
        self._pending = (observation, jax.tree.leaves(decision)) if saved["pending"] else None
        self._uncut = bool(saved["uncut"])
        self._episodes = int(saved["episodes"])
        self._base += int(saved["owed"])
        self._recent.extend({name: values[i] for name, values in saved["metrics"].items()} for i in range(int(saved["recent"])))

    def save(self, path: str | os.PathLike) -> None:
        """Writes everything, the pending step and the replay included, to one file, atomically.

        Args:
          path: the file.
        """
        self._store()
        # The live state, not a copy of it: nothing is donated while it is written.
        checkpoint.save(path, self._with_counts(self._live_state()), {"agent": type(self).__name__, "num_envs": self.num_envs})

    def load(self, path: str | os.PathLike) -> None:
        """Restores what ``save`` wrote; the agent goes on exactly where the saved one stopped. On an error it stays as it was.

        Args:
          path: the file.

        Raises:
          FileNotFoundError: if there is no such file.
          dqn_jax.CheckpointError: if it is no checkpoint, is damaged, or holds arrays of other shapes or dtypes than this agent has.
        """
        self.restore(checkpoint.load(path, self._with_counts(self._live_state()))[0])

    def compile(self) -> None:
        """Compiles everything now, so that no later call waits for it. The agent does not change: this works on copies.

        Of the replay, too, unless it is empty: then it is used up and made anew, since a large one may not fit into memory twice.
        """
        is_empty = int(np.array(self._part(MEMORY).size)) == 0
        learner = jax.tree.map(jnp.copy, self._cell[LEARNER])
        memory = self._cell[MEMORY] if is_empty else jax.tree.map(jnp.copy, self._cell[MEMORY])
        try:
            self._compile(learner, memory)
        finally:
            if is_empty:
                del memory
                self._cell[MEMORY] = ()
                make = jax.jit(lambda key: self._agent.init(key, self._example).memory)
                self._cell[MEMORY] = self._parts.memory.pack(make(self._key))

    def _compile(self, learner: Any, memory: Any) -> None:
        """Calls every program once; ``learner`` and ``memory`` are used up."""
        arrays, counts = [np.zeros_like(array) for array in self._unstaged.arrays], self._counts(0)
        programs = self._programs
        programs.exploit(learner, self._example)
        programs.explore(learner, self._example, self._noise.rows(self._decisions, self._live_state), counts[1])
        (memory,) = programs.store(memory, arrays, counts)
        (memory,) = programs.cut(memory, counts)
        draws = self._draws.rows(self._cell[UPDATES], self._live_state)
        jax.block_until_ready(programs.learn(learner, memory, arrays, draws, counts))

    # Inside.

    def _advance(self, observation: Any, outcome: np.ndarray | None = None, successor: Any = None) -> np.ndarray:
        """Takes in what happened (where a step is pending), explores, and learns if due. Returns the actions as NumPy."""
        try:
            if outcome is not None:
                self._take_in(outcome, observation if successor is None else successor)
            elif self._uncut:
                self._store()
                self._swap(slice(MEMORY, MEMORY + 1), (), self._programs.cut, self._cell[MEMORY], self._counts(0))
                self._uncut = False
            noise = self._noise.rows(self._decisions, self._live_state)
            decided = self._programs.explore(self._cell[LEARNER], observation, noise, np.int32(self._step))
            decision = [np.asarray(leaf) for leaf in decided]
            self._decisions += 1
            self._pending = observation, decision
            if self._base + self._due(self._step) > self._cell[UPDATES]:
                self._learn()
            return decision[0]  # The action: the first field of a Decision.
        except BaseException:
            self.stop_episode()
            raise

    def _take_in(self, outcome: np.ndarray, successor: Any) -> None:
        """Lets the pending step, whose outcome this is, wait to be stored."""
        assert self._pending is not None
        if self._cell[STAGING].size == self._unstaged.capacity:
            self._store()
        observation, decision = self._pending
        self._pending = None
        self._cell[STAGING].add(observation, decision, successor, outcome)

    def _store(self) -> None:
        """Stores the rows that wait."""
        staging = self._cell[STAGING]
        if staging.size:
            noted = self._cell[UPDATES], self._step, staging.emptied()
            self._swap(slice(MEMORY, None), noted, self._programs.store, self._cell[MEMORY], staging.arrays, self._counts(staging.size))

    def _learn(self) -> None:
        """Stores the rows that wait, and makes the updates of one interval."""
        learner, _, memory, updates, _, staging = self._cell
        draws = self._draws.rows(updates, self._live_state)
        noted = updates + self._cadence.updates, self._step, staging.emptied()
        args = learner, memory, staging.arrays, draws, self._counts(staging.size)
        self._swap(slice(LEARNER, None), noted, self._programs.learn, *args)
        self._recent.append(self._cell[METRICS])

    def _swap(self, places: slice, noted: tuple[Any, ...], program: Callable[..., Any], *args: Any) -> None:
        """Runs a program and puts its results, and what is to be noted with them, into the cell within one C call.

        The old state is donated: an interrupt between the call and the assignment of its result would lose both, and one before the
        counters are changed would store the rows twice.
        """
        results = itertools.chain.from_iterable(map(program, *((arg,) for arg in args)))
        self._cell[places] = itertools.chain(results, noted)

    def _counts(self, num_rows: int) -> np.ndarray:
        return np.array([self._decisions, self._cell[STORED], self._cell[UPDATES], num_rows], np.int32)

    @property
    def _step(self) -> int:
        """Transitions taken in, those that wait to be stored included."""
        return self._cell[STORED] + self._cell[STAGING].size * self.num_envs

    def _due(self, step: int) -> int:
        """Updates that fall due up to there; what of it is owed is read off the counters, so an interrupt neither loses nor repeats one."""
        cadence = self._cadence
        return max(0, (step // self.num_envs - cadence.prefill) // cadence.rows) * cadence.updates

    def _restart(self, state: AgentState) -> None:
        """Begins with this state, with no episode open and no update owed."""
        decisions, step, updates = (int(np.array(count)) for count in (state.decisions, state.step, state.updates))
        learner, memory = self._parts.learner.pack(state.learner), self._parts.memory.pack(state.memory)
        self._noise.forget()
        self._draws.forget()
        self._recent.clear()
        self._pending, self._uncut = None, True
        self._key, self._decisions, self._episodes = state.key, decisions, 0
        self._base = updates - self._due(step)
        self._cell[:] = [learner, None, memory, updates, step, self._unstaged.emptied()]

    def _with_counts(self, state: AgentState) -> RunState:
        """The RunState that has this state of the agent; the rest is copied."""
        observation, decision = self._pending or (self._example, jax.tree.leaves(self._no_decision))
        pending = observation, jax.tree.unflatten(jax.tree.structure(self._no_decision), decision)
        recent = list(self._recent)
        padded = recent + [dict.fromkeys(self._metrics, math.nan)] * (RECENT - len(recent))
        statistics = {
            "pending": np.asarray(self._pending is not None),
            "uncut": np.asarray(self._uncut),
            "episodes": np.asarray(self._episodes, np.int32),
            "owed": np.asarray(self._base + self._due(self._step) - self._cell[UPDATES], np.int32),
            "recent": np.asarray(len(recent), np.int32),
            "metrics": jax.tree.map(lambda *values: np.asarray(jax.device_get(values), np.float32), *padded),
        }
        return RunState(state, (), jax.tree.map(np.array, pending), statistics)

    def _live_state(self) -> AgentState:
        """The state without the rows that wait; its counters are NumPy."""
        decisions, step, updates = map(np.int32, (self._decisions, self._cell[STORED], self._cell[UPDATES]))
        return AgentState(self._part(LEARNER), self._part(MEMORY), self._key, decisions, step, updates)

    def _part(self, place: int) -> Any:
        return (self._parts.memory if place == MEMORY else self._parts.learner).unpack(self._cell[place])

    def _greedy(self, observation: Any) -> np.ndarray:
        return np.asarray(self._programs.exploit(self._cell[LEARNER], observation))

    def _observation(self, observation: Any, single: bool) -> Any:
        checked = self._checks["observation", single](observation)
        spaces.require_actions_allowed(checked)
        return checked

    def _check_succession(self, successor: Any, following: Any, last: np.ndarray) -> None:
        if self._require_succession is not None and self._pending is not None:
            self._require_succession(self._pending[0], successor, following, last)

    def _require_single(self, method: str) -> None:
        if self.num_envs != 1:
            raise RuntimeError(f"this agent was built for {self.num_envs} environments: use batch_act_and_train instead of {method}")
