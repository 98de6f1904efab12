"""The host driver: an agent that a loop of your own calls once per environment step.

It holds the agent's state on the device and drives the pure functions of an ``Agent``; no learning happens here. One call of
``act_and_train`` is, in this order: (1) store the transition that this observation completes, (2) choose the action with the
parameters as they are, (3) learn if due, (4) return the action. The action does not wait for the update, so the update may still run
while the environment steps.
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

from dqn_jax import checkpoint, spaces
from dqn_jax.programs import Ahead, Packing, Parts, compile_programs
from dqn_jax.types import Agent, AgentState, RunState

RECENT = 100  # Updates over which the statistics are averaged.

PENDING, REST, MEMORY, LEARNER, METRICS = range(5)


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

    Raises:
      NotImplementedError: if a space is not supported.
      ValueError: if update period and environments do not divide one another, or the state does not fit.
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
    ):
        self.num_envs = num_envs
        self.observation_space = observation_space
        self.action_space = action_space
        self._agent = agent
        self._cadence = agent.cadence(num_envs)
        self._example = spaces.example(observation_space, num_envs)
        fresh = jax.eval_shape(agent.init, jax.random.key(seed), self._example)
        self._noise = Ahead(lambda state, counter: agent.noise(state, counter, num_envs), fresh)
        self._draws = Ahead(agent.draw, fresh, self._cadence.updates)
        self._metrics = tuple(jax.eval_shape(agent.update, fresh, self._draws.row)[1])
        pending = self._example, jax.eval_shape(agent.explore, fresh, self._example, self._noise.row)[1]
        self._nothing = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), pending)
        rest = fresh._replace(learner=(), memory=(), key=())
        self._parts = Parts(*map(Packing, (pending, rest, fresh.memory, fresh.learner)))
        self._action_place = len(jax.tree.leaves(self._example))  # Of the action among the pending leaves.
        self._programs = compile_programs(agent, num_envs, self._cadence.updates, self._parts)
        self._checks: dict[tuple[str, bool], spaces.Check] = {}
        for single in (True, False):
            lead = None if single else num_envs
            self._checks["observation", single] = spaces.observation_check(observation_space, lead)
            self._checks["reward", single] = spaces.reward_check(lead)
            self._checks["terminated", single] = spaces.flag_check("terminated", lead)
            self._checks["truncated", single] = spaces.flag_check("truncated", lead)
        self._cell: list[Any] = [None] * 5  # What the programs return, each in its place.
        self._recent: deque[Any] = deque(maxlen=RECENT)  # Metrics of the last updates, on the device until somebody asks.
        self._pending = False  # Whether a decision waits for its outcome.
        self._uncut = True  # Whether the stored stream may run on into an episode that it does not belong to.
        self._episodes = self._base = 0
        self._restart(jax.jit(agent.init)(jax.random.key(seed), self._example) if state is None else _fitting(fresh, state))

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
        if not self._pending:
            return int(self._advance(checked)[0])
        outcome = _outcome(self._checks["reward", True](reward))
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
        outcome = _outcome(self._checks["reward", True](reward), ended, np.ones(1, np.bool_))
        if not self._pending:
            raise RuntimeError("no episode is open: call act_and_train at least once before stop_episode_and_train")
        try:
            self._pending = False
            self._swap(
                slice(REST, LEARNER), self._programs.end, self._cell[REST], self._cell[MEMORY], self._cell[PENDING], checked, outcome
            )
            self._step += 1
            self._episodes += 1
        except BaseException:
            self._recover()
            raise

    def stop_episode(self) -> None:
        """Drops the pending step and ends the stored stream there, without learning anything. Call it after leaving a loop early."""
        self._pending = False
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
        if not self._pending:
            return np.array(self._advance(checked))
        ended = self._checks["terminated", False](terminated)
        last = ended | self._checks["truncated", False](truncated)
        outcome = _outcome(self._checks["reward", False](reward), ended, last)
        if next_observation is None:
            if last.any():
                raise ValueError(
                    "an environment ended and next_observation was not given: pass dqn_jax.true_successors(observation, infos), "
                    "with the vector environment made with autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP"
                )
            return np.array(self._advance(checked, outcome))
        successor = self._checks["observation", False](next_observation)
        spaces.require_actions_allowed(successor, ended)
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
        recent = jax.device_get(list(self._recent)) or [dict.fromkeys(self._metrics, math.nan)]
        averages = {f"average_{name}": float(np.mean([metrics[name] for metrics in recent])) for name in self._metrics}
        counts = {"t": self._step, "episodes": self._episodes, "n_updates": self._updates}
        return {**counts, "replay_size": int(np.array(self._part(MEMORY).size)) * self.num_envs, **averages}

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
        return jax.tree.map(jnp.copy, self._live_state())

    @property
    def run_state(self) -> RunState:
        """A copy of everything: the agent's state, the pending step, the counts."""
        recent = list(self._recent)
        padded = recent + [dict.fromkeys(self._metrics, math.nan)] * (RECENT - len(recent))
        statistics = {
            "pending": np.asarray(self._pending),
            "uncut": np.asarray(self._uncut),
            "episodes": np.asarray(self._episodes, np.int32),
            "owed": np.asarray(self._owed(), np.int32),
            "recent": np.asarray(len(recent), np.int32),
            "metrics": jax.tree.map(lambda *values: np.asarray(jax.device_get(values), np.float32), *padded),
        }
        return RunState(self.state, (), jax.tree.map(jnp.copy, self._part(PENDING)), statistics)

    def restore(self, run: RunState) -> None:
        """Goes on exactly where the agent stopped whose ``run_state`` this is. The arrays are taken over, not copied."""
        self._restart(run.agent)
        self._cell[PENDING] = self._parts.pending.pack(run.pending)
        saved = jax.device_get(run.statistics)
        self._pending, self._uncut = bool(saved["pending"]), bool(saved["uncut"])
        self._episodes = int(saved["episodes"])
        self._base += int(saved["owed"])
        self._recent.extend({name: values[i] for name, values in saved["metrics"].items()} for i in range(int(saved["recent"])))

    def save(self, path: str | os.PathLike) -> None:
        """Writes everything, the pending step and the replay included, to one file, atomically.

        Args:
          path: the file.
        """
        checkpoint.save(path, self.run_state, {"agent": type(self).__name__, "num_envs": self.num_envs})

    def load(self, path: str | os.PathLike) -> None:
        """Restores what ``save`` wrote; the agent goes on exactly where the saved one stopped. On an error it stays as it was.

        Args:
          path: the file.

        Raises:
          FileNotFoundError: if there is no such file.
          dqn_jax.CheckpointError: if it is no checkpoint, is damaged, or holds arrays of other shapes or dtypes than this agent has.
        """
        self.restore(checkpoint.load(path, jax.eval_shape(lambda: self.run_state))[0])

    def compile(self) -> None:
        """Compiles everything now, so that no later call waits for it. Works on copies, of the replay too: the agent does not change."""
        pending, rest, memory, learner = jax.tree.map(jnp.copy, self._cell[:METRICS])
        outcome = np.zeros((3, self.num_envs), np.float32)
        noise = self._noise.block(self._decisions, self._live_state)
        draws = self._draws.block(self._updates, self._live_state)
        run = self._programs
        run.act(learner, self._example)
        pending, rest = run.begin(learner, rest, self._example, *noise)
        rest, memory = run.cut(rest, memory)
        for successor in (None,) if self.num_envs == 1 else (None, self._example):
            pending, rest, memory = run.step(learner, rest, memory, pending, self._example, successor, outcome, *noise)
        rest, memory = run.end(rest, memory, pending, self._example, outcome)
        jax.block_until_ready(run.update(learner, rest, memory, *draws))

    # Inside.

    def _advance(self, observation: Any, outcome: np.ndarray | None = None, successor: Any = None) -> np.ndarray:
        """Stores (where a step is pending), explores, and learns if due. Returns the actions as NumPy."""
        programs, cell = self._programs, self._cell
        try:
            noise, start = self._noise.block(self._decisions, self._live_state)
            if outcome is None:
                if self._uncut:
                    self._swap(slice(REST, LEARNER), programs.cut, cell[REST], cell[MEMORY])
                    self._uncut = False
                self._swap(slice(PENDING, MEMORY), programs.begin, cell[LEARNER], cell[REST], observation, noise, start)
                self._pending = True
            else:
                args = (cell[LEARNER], cell[REST], cell[MEMORY], cell[PENDING], observation, successor, outcome, noise, start)
                self._swap(slice(PENDING, LEARNER), programs.step, *args)
                self._step += self.num_envs
            self._decisions += 1
            if self._owed() > 0:
                drawn = self._draws.block(self._updates, self._live_state)
                self._swap(slice(REST, METRICS + 1), programs.update, cell[LEARNER], cell[REST], cell[MEMORY], *drawn)
                self._updates += self._cadence.updates
                self._recent.append(cell[METRICS])
            return np.asarray(cell[PENDING][self._action_place])
        except BaseException:
            self._recover()
            raise

    def _swap(self, places: slice, program: Callable[..., Any], *args: Any) -> None:
        """Runs a program and puts its results into the cell within one C call.

        The old state is donated: an interrupt between the call and the assignment of its result would lose both.
        """
        self._cell[places] = itertools.chain.from_iterable(map(program, *((arg,) for arg in args)))

    def _owed(self) -> int:
        """Updates that have fallen due and are not done: read off the counters, so that an interrupt can neither lose nor repeat one."""
        return self._base + self._due(self._step) - self._updates

    def _due(self, step: int) -> int:
        cadence = self._cadence
        return max(0, (step // self.num_envs - cadence.prefill) // cadence.rows) * cadence.updates

    def _restart(self, state: AgentState) -> None:
        """Begins with this state, with no episode open and no update owed."""
        trees = jax.tree.map(jnp.array, self._nothing), state._replace(learner=(), memory=(), key=()), state.memory, state.learner
        self._key = state.key
        self._cell[:] = [*(packing.pack(tree) for packing, tree in zip(self._parts, trees, strict=True)), None]
        self._recent.clear()
        self._episodes = 0
        self._pending, self._uncut = False, True
        self._read_counters()
        self._base = self._updates - self._due(self._step)
        self._noise.forget()
        self._draws.forget()

    def _read_counters(self) -> None:
        rest = self._part(REST)
        self._step, self._decisions, self._updates = (int(np.array(n)) for n in (rest.step, rest.decisions, rest.updates))

    def _recover(self) -> None:
        """After an exception: the state is whole, what Python remembers about it may not be."""
        self.stop_episode()
        self._noise.forget()
        self._draws.forget()
        self._read_counters()  # Last: it waits for the device.

    def _live_state(self) -> AgentState:
        return self._part(REST)._replace(learner=self._part(LEARNER), memory=self._part(MEMORY), key=self._key)

    def _part(self, place: int) -> Any:
        return self._parts[place].unpack(self._cell[place])

    def _greedy(self, observation: Any) -> np.ndarray:
        return np.asarray(self._programs.act(self._cell[LEARNER], observation)[0])

    def _observation(self, observation: Any, single: bool) -> Any:
        checked = self._checks["observation", single](observation)
        spaces.require_actions_allowed(checked)
        return checked

    def _require_single(self, method: str) -> None:
        if self.num_envs != 1:
            raise RuntimeError(f"this agent was built for {self.num_envs} environments: use batch_act_and_train instead of {method}")


def _outcome(reward: np.ndarray, terminated: np.ndarray | None = None, last: np.ndarray | None = None) -> np.ndarray:
    """Reward, discount and last as one array ``[3, N]``: each array that enters a program costs."""
    outcome = np.empty((3, len(reward)), np.float32)
    outcome[0] = reward
    outcome[1] = 1.0 if terminated is None else ~terminated
    outcome[2] = 0.0 if last is None else last
    return outcome


def _fitting(expected: AgentState, state: AgentState) -> AgentState:
    """A copy of ``state``, checked against the shapes that this agent has."""
    want = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(expected)[0]}
    have = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}
    wrong = [
        name
        for name in want | have
        if name not in want or name not in have or (want[name].shape, want[name].dtype) != (have[name].shape, have[name].dtype)
    ]
    if wrong:
        name = wrong[0]
        got, need = (f"{tree[name].dtype}{list(tree[name].shape)}" if name in tree else "nothing" for tree in (have, want))
        raise ValueError(
            f"the state does not fit this agent in {len(wrong)} places, first {name}: got {got}, expected {need}. Build the agent with the "
            "options and the number of environments of the run it comes from, and pass one seed of it (result.seed(0).state)"
        )
    return jax.tree.map(jnp.copy, state)
