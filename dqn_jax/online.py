"""The host driver: an agent that a loop of your own calls once per environment step.

What comes in is checked here; what then happens is in ``stepper.py``. No learning happens in either: they drive the pure functions of an
``Agent``.
"""

import json
import math
import os
from collections.abc import Callable
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from dqn_jax import checkpoint, spaces
from dqn_jax.staging import outcome_array
from dqn_jax.stepper import Stepper
from dqn_jax.types import Agent, AgentState, RunState


class OnlineAgent:
    """An agent with the interface ``act``, ``act_and_train``, ``stop_episode_and_train``; see ``dqn_jax.DQN`` for a ready-made one.

    An exception leaves it usable. A bad argument changes nothing; what strikes inside a call, an interrupt included, drops the pending
    step and cuts the stored stream there, as ``stop_episode`` does. An interrupt that strikes your own code cannot be seen from here:
    call ``stop_episode()`` before the next reset. While a program runs for the very first time its state is not yet safe from an
    interrupt; ``compile()`` beforehand closes that gap too.

    Args:
      agent: the pure functions.
      observation_space: of one environment.
      action_space: of one environment.
      num_envs: N; with 1 the scalar methods work, with any the ``batch_`` ones.
      seed: of all randomness of the agent.
      state: an AgentState to begin with instead of a fresh one, for example one seed of a compiled run; it is copied.
      require_succession: a check of ``(observation, successor, following, last)``, NumPy ``[N, ...]``, that raises where the replay could
        not keep such a step; see ``memory.frames.require_succession``.
      options: what the agent was built with, by name; checkpoints keep it, and ``load`` compares what is JSON.

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
        options: dict[str, Any] | None = None,
    ):
        self.num_envs = num_envs
        self._require_succession = require_succession
        self._options = {name: _as_json(value) for name, value in (options or {}).items()}
        self.observation_space = observation_space
        self.action_space = action_space
        self._agent = agent
        self._stepper = Stepper(agent, num_envs, spaces.example(observation_space, num_envs), seed, state)
        self._leave = spaces.leave(action_space)
        self._checks: dict[tuple[str, bool], spaces.Check] = {}
        for single in (True, False):
            lead = None if single else num_envs
            self._checks["observation", single] = spaces.observation_check(observation_space, lead)
            self._checks["reward", single] = spaces.reward_check(lead)
            self._checks["terminated", single] = spaces.flag_check("terminated", lead)
            self._checks["truncated", single] = spaces.flag_check("truncated", lead)

    def __repr__(self) -> str:
        stepper = self._stepper
        counts = f"num_envs={self.num_envs}, t={stepper.step}, episodes={stepper.episodes}, n_updates={stepper.updates}"
        return f"{type(self).__name__}({counts})"

    # The deck's interface: one environment.

    def act(self, observation: Any) -> Any:
        """The greedy action. Changes nothing.

        Args:
          observation: as the environment returns it.

        Returns:
          The action as the environment takes it: an int, or a NumPy array where the action space has a shape.

        Raises:
          ValueError: on a wrong shape, NaN or infinity, or a mask that allows nothing.
          TypeError: on a wrong dtype or structure.
        """
        return self._single(self._stepper.exploit(self._observation(observation, True)))

    def act_and_train(self, observation: Any, reward: float) -> Any:
        """Chooses the next action by exploring, and learns; call it once per environment step, before stepping.

        Args:
          observation: as the environment returns it.
          reward: what the environment paid for the *previous* action; ignored on the first call of an episode.

        Returns:
          The action as the environment takes it: an int, or a NumPy array where the action space has a shape.

        Raises:
          ValueError: on a wrong shape, NaN or infinity, or a mask that allows nothing.
          TypeError: on a wrong dtype or structure.
          RuntimeError: if the agent was built for several environments.
        """
        self._require_single("act_and_train")
        checked = self._observation(observation, True)
        if self._stepper.pending is None:
            return self._single(self._stepper.advance(checked))
        outcome = outcome_array(self._checks["reward", True](reward))
        self._check_succession(checked, checked, np.zeros(1, np.bool_))
        return self._single(self._stepper.advance(checked, outcome))

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
        if self._stepper.pending is None:
            raise RuntimeError("no episode is open: call act_and_train at least once before stop_episode_and_train")
        self._check_succession(checked, checked, np.ones(1, np.bool_))
        try:
            self._stepper.take_in(outcome, checked)
            self._stepper.episodes += 1
        except BaseException:
            self.stop_episode()
            raise

    def stop_episode(self) -> None:
        """Drops the pending step and ends the stored stream there, without learning anything. Call it after leaving a loop early."""
        self._stepper.drop()

    # Several environments.

    def batch_act(self, observation: Any) -> np.ndarray:
        """The greedy actions ``[N, ...]``. Changes nothing. Arguments and errors as ``act``, with a leading axis N."""
        return self._leave(self._stepper.exploit(self._observation(observation, False)))

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
          The actions ``[N, ...]``, NumPy.

        Raises:
          ValueError: on a wrong shape, NaN or infinity, a mask that allows nothing, or missing successors.
          TypeError: on a wrong dtype or structure.
        """
        checked = self._observation(observation, False)
        if self._stepper.pending is None:
            return self._leave(self._stepper.advance(checked))
        if reward is None and terminated is None and truncated is None:
            raise TypeError("a step is pending: give what env.step(actions) returned for it, reward, terminated and truncated")
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
            return self._leave(self._stepper.advance(checked, outcome))
        successor = self._checks["observation", False](next_observation)
        spaces.require_actions_allowed(successor, ended)
        self._check_succession(successor, checked, last)
        action = self._leave(self._stepper.advance(checked, outcome, successor))
        self._stepper.episodes += int(last.sum())
        return action

    # Looking in, saving, moving.

    def get_statistics(self) -> dict[str, float]:
        """How the agent is doing.

        Returns:
          ``t`` (transitions stored), ``episodes`` (ended), ``n_updates``, ``replay_size`` (transitions held), and ``average_...`` of
          each metric of the algorithm over the last 100 updates (``average_loss``, for DQN ``average_q``), NaN before the first.
        """
        stepper = self._stepper
        stepper.store()
        recent = jax.device_get(list(stepper.recent)) or [dict.fromkeys(stepper.metrics, math.nan)]
        averages = {f"average_{name}": float(np.mean([metrics[name] for metrics in recent])) for name in stepper.metrics}
        counts = {"t": stepper.step, "episodes": stepper.episodes, "n_updates": stepper.updates}
        return {**counts, "replay_size": int(np.array(stepper.memory.size)), **averages}

    @property
    def agent(self) -> Agent:
        """The pure functions, for ``dqn_jax.train`` and the like."""
        return self._agent

    @property
    def learner(self) -> Any:
        """A copy of what the agent has learnt: the learner of its state."""
        return jax.tree.map(jnp.copy, self._stepper.learner)

    @property
    def state(self) -> AgentState:
        """A copy of the agent's state; hand it to ``Training.resume``, or to another agent's ``from_state``."""
        self._stepper.store()
        return jax.tree.map(jnp.array, self._stepper.live_state())

    @property
    def run_state(self) -> RunState:
        """A copy of everything: the agent's state, the pending step, the counts."""
        return self._stepper.snapshot(self.state)

    def live_run_state(self) -> RunState:
        """As ``run_state``, not copied: the next call that learns uses its arrays up."""
        self._stepper.store()
        return self._saved_form(True)

    def restore(self, run: RunState) -> None:
        """Goes on exactly where the agent stopped whose ``run_state`` this is. The arrays are taken over, not copied."""
        self._stepper.restore(run)

    def save(self, path: str | os.PathLike, *, replay: bool = True) -> None:
        """Writes everything, the pending step and the replay included, to one file, atomically.

        Args:
          path: the file.
          replay: False leaves the replay out, which is most of the file. An agent that loads it fills a new one before it learns on, and
            the schedule of a prioritized replay's beta begins anew, so it does not go on exactly as this one would.
        """
        self._stepper.store()
        # The live state, not a copy of it: nothing is donated while it is written.
        info = {"agent": type(self).__name__, "num_envs": self.num_envs, "options": self._options, "replay": replay}
        checkpoint.save(path, self._saved_form(replay), info)

    def load(self, path: str | os.PathLike, *, fork: bool = False) -> None:
        """Restores what ``save`` wrote; the agent goes on exactly where the saved one stopped. On an error it stays as it was.

        Args:
          path: the file.
          fork: whether this agent's options may be others than those that the saved one was built with, where arrays keep their shapes:
            what was saved with ``replay=False`` fits a replay of another kind and size, too.

        Raises:
          FileNotFoundError: if there is no such file.
          dqn_jax.CheckpointError: if it is no checkpoint, is damaged, holds arrays of other shapes or dtypes than this agent has, or was
            saved with other options.
        """
        replay = checkpoint.read_info(path).get("replay", True)
        try:
            state, info = checkpoint.load(path, self._saved_form(replay))
        except checkpoint.MisfitError as error:
            raise checkpoint.CheckpointError(self._misfit(path, str(error))) from error
        if not fork and (differing := self._differing(info)):
            raise checkpoint.CheckpointError(
                f"{path} was saved with other options; build the agent with those, or go on with these by load(path, fork=True):\n  "
                + "\n  ".join(differing)
            )
        if replay:
            self.restore(state)
        else:
            self._stepper.restore_without_replay(state)

    def _saved_form(self, replay: bool) -> RunState:
        state = self._stepper.live_state()
        return self._stepper.snapshot(state if replay else state._replace(memory=()))

    def _differing(self, info: dict[str, Any]) -> list[str]:
        """A line for each option of a saved agent that this one has not."""
        saved = {name: value for name, value in info.items() if name == "num_envs"} | info.get("options", {})
        own = {"num_envs": self.num_envs} | self._options
        names = sorted(saved.keys() & own)
        return [f"{name}: saved with {saved[name]}, this agent has {own[name]}" for name in names if saved[name] != own[name]]

    def _misfit(self, path: str | os.PathLike, error: str) -> str:
        """Why a file cannot be loaded: the error, and what may lie behind it."""
        info, own = checkpoint.read_info(path), type(self).__name__
        if "task" in info:
            folder = os.path.dirname(path)
            return f"{path} is a checkpoint of a run of dqn-jax train: dqn_jax.load_run({folder!r}, env) gives its agent"
        if info.get("agent", own) != own:
            return f"{path} holds an agent of the class {info['agent']}, and this is a {own}: load it with a {info['agent']}"
        return "\n  ".join([error, *self._differing(info)])

    def compile(self) -> None:
        """Compiles everything now, so that no later call waits for it. The agent does not change: this works on copies.

        Of the replay, too, unless it is empty: then it is used up and made anew, since a large one may not fit into memory twice.
        """
        self._stepper.compile()

    # Inside.

    def _observation(self, observation: Any, single: bool) -> Any:
        checked = self._checks["observation", single](observation)
        spaces.require_actions_allowed(checked)
        return checked

    def _single(self, actions: np.ndarray) -> Any:
        return self._leave(actions[0]) if actions.ndim > 1 or actions.dtype.kind == "f" else int(actions[0])

    def _check_succession(self, successor: Any, following: Any, last: np.ndarray) -> None:
        if self._require_succession is not None and self._stepper.pending is not None:
            self._require_succession(self._stepper.pending[0], successor, following, last)

    def _require_single(self, method: str) -> None:
        if self.num_envs != 1:
            raise RuntimeError(f"this agent was built for {self.num_envs} environments: use batch_act_and_train instead of {method}")


def _as_json(value: Any) -> Any:
    """The value as JSON would give it back; where it is none, what it is."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return f"<{type(value).__name__}>"
