"""The two ways to run an experiment's agents, behind one face: all seeds side by side, a chunk at a time.

``HostRuns`` steps Gymnasium environments through ``act_and_train``, ``CompiledRuns`` scans JAX environments over all seeds at once.
Both offer ``compile``, ``advance``, ``evaluate``, ``state``, ``world``, ``restore``, ``learners``, and the attributes ``steps`` (taken by
each agent), ``updates`` and ``lost`` (why a resumed run begins new episodes, or None).
"""

import json
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from dqn_jax import atari, checkpoint, env_state, envs, finite, footprint, seeds, spaces, training
from dqn_jax.online import OnlineAgent
from dqn_jax.play import Play, PlayBatch, play_greedily
from dqn_jax.presets.reading import read_spaces
from dqn_jax.presets.table import ALGORITHMS
from dqn_jax.types import Agent

COUNTS = {"t", "episodes", "n_updates", "replay_size"}  # Statistics of an agent that are no column of a learning curve.
LARGEST_WORLD = 2**25  # Characters; it stands in a checkpoint's header, which must not be longer than 100 MB.
CHUNKS = 100  # Points of the learning curve; progress is shown and an interrupt is heeded between them.


class Task(NamedTuple):
    """What to run.

    Attributes:
      env: id of a Gymnasium or JAX environment.
      env_args: its arguments.
      steps: transitions that each agent collects.
      seed: of the first agent; the others follow.
      seeds: agents.
      num_envs: environments for each agent.
      eval_episodes: greedy episodes in an evaluation.
      options: of the algorithm's preset.
      algo: the algorithm, by its name in ``presets.table``.
    """

    env: str
    env_args: dict[str, Any]
    steps: int
    seed: int
    seeds: int
    num_envs: int
    eval_episodes: int
    options: dict[str, Any]
    algo: str = "dqn"


class HostRuns:
    """One agent for each seed, each with Gymnasium environments of its own, advanced in turn."""

    def __init__(self, task: Task):
        atari.require_preprocessed(task.env)
        self.task = task
        self.steps = 0
        self._envs = [self._make() for _ in range(task.seeds)]
        preset = ALGORITHMS[task.algo]
        one = preset.build(self._envs[0], **task.options)
        example = spaces.example(read_spaces(self._envs[0])[0], task.num_envs)
        footprint.require_room(jax.eval_shape(one.init, jax.random.key(0), example), task.seeds)
        self._agents = [preset.online(env, seed=task.seed + i, **task.options) for i, env in enumerate(self._envs)]
        self._begin()
        self.lost: str | None = None
        self._rows = max(1, round(task.steps / CHUNKS / task.num_envs))

    def _begin(self) -> None:
        """New episodes in all environments; after a resume not those with which the run began."""
        loop: Any = Play if self.task.num_envs == 1 else PlayBatch
        seeds = np.random.SeedSequence([self.task.seed, self.steps]).generate_state(self.task.seeds)
        learnt = atari.learnt_reward(self.task.env_args) if atari.is_atari(self.task.env) else lambda reward: reward
        self._loops = [loop(*one, learnt) for one in zip(self._agents, self._envs, map(int, seeds), strict=True)]

    def _make(self) -> Any:
        if self.task.num_envs == 1:
            return make_env(self.task.env, **self.task.env_args)
        if atari.is_atari(self.task.env):
            return atari.make_vec(self.task.env, self.task.num_envs, **self.task.env_args)
        same_step = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
        return gymnasium.make_vec(
            self.task.env, self.task.num_envs, vectorization_mode="sync", vector_kwargs=same_step, **self.task.env_args
        )

    @property
    def agent(self) -> Agent:
        """The pure functions that all seeds share."""
        return self._agents[0].agent

    @property
    def updates(self) -> int:
        """Updates done by each agent."""
        return int(self._agents[0].get_statistics()["n_updates"])

    def compile(self) -> None:
        """Compiles everything, so that the progress bar does not stand still later."""
        for agent in self._agents:
            agent.compile()

    def advance(self) -> list[dict[str, float]]:
        """One chunk. Returns a row of the learning curve for each seed."""
        rows = min(self._rows, -(-(self.task.steps - self.steps) // self.task.num_envs))
        curve = []
        for number, (agent, loop) in enumerate(zip(self._agents, self._loops, strict=True)):
            try:
                ended = [episode for _ in range(rows) for episode in loop.step()]
            except Exception as error:
                error.add_note(f"in the run of seed {self.task.seed + number}, after about {agent.get_statistics()['t']:,} steps")
                raise
            statistics = agent.get_statistics()
            returns, lengths = np.mean(ended, axis=0) if ended else (np.nan, np.nan)
            means = {name.removeprefix("average_"): value for name, value in statistics.items() if name not in COUNTS}
            curve.append({"episodes": float(len(ended)), "return": float(returns), "length": float(lengths), **means})
        self.steps += rows * self.task.num_envs  # Last: if an environment raises, the chunk is not counted.
        return curve

    def evaluate(self) -> np.ndarray:
        """The mean return of greedy episodes, for each seed."""
        seeds = [self.task.seed + 10_000 + episode for episode in range(self.task.eval_episodes)]
        env = make_env(self.task.env, **self.task.env_args)  # A new one, which earlier evaluations have not touched.
        try:
            return np.array([np.mean([play_greedily(agent.act, env, seed) for seed in seeds]) for agent in self._agents])
        finally:
            env.close()

    def state(self) -> Any:
        """Everything, as one pytree; until the next step."""
        return [agent.live_run_state() for agent in self._agents]

    def world(self) -> Any:
        """The environments and the open episodes, as JSON values; None where they cannot be captured, ``lost`` then says why."""
        try:
            world = [env_state.encode(loop.position()) | {"env": env_state.capture(loop.env)} for loop in self._loops]
            size = len(json.dumps(world))
            self.lost = None if size <= LARGEST_WORLD else f"its state takes {size / 1e6:.0f} MB, more than {LARGEST_WORLD / 1e6:.0f}"
        except env_state.NotCapturable as error:
            self.lost = str(error)
        except Exception as error:  # Of an environment's own get_env_state, say: what was learnt is saved all the same.
            self.lost = f"its state could not be read ({error!r})"
        return world if self.lost is None else None

    def restore(self, state: Any, steps: int, world: Any) -> str | None:
        """Goes on from ``state``, exactly where it stopped; where the ``world`` was not captured or cannot be put back, with new episodes.

        Returns:
          Why the world could not be put back, or None.
        """
        for agent, run in zip(self._agents, state, strict=True):
            agent.restore(run)
        self.steps = steps
        failed = None
        try:
            for loop, saved in zip(self._loops, world or (), strict=world is not None):
                env_state.restore(loop.env, saved.pop("env"))
                loop.go_on(**env_state.decode(saved))
        except Exception as error:  # Whatever the environment's own code raises.
            failed = f"its state could not be put back ({error!r})"
            self._envs = [self._make() for _ in self._envs]  # The old ones may stand half-way.
        if world is None or failed:
            for agent in self._agents:
                agent.stop_episode()
            self._begin()
        return failed

    def learners(self) -> Any:
        """What the agents have learnt, stacked over seeds, as NumPy."""
        learners = [agent.learner for agent in self._agents]
        return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *learners)


class CompiledRuns:
    """All seeds at once, environments included, as one compiled program."""

    def __init__(self, task: Task):
        self.task = task
        self._env = envs.make(task.env, **task.env_args)
        self.agent = ALGORITHMS[task.algo].build(self._env, **task.options)
        self._training = training.train(self.agent, self._env, num_steps=task.steps, num_envs=task.num_envs, history_length=CHUNKS)
        self._where = seeds.sharding(task.seeds)
        self._refused = np.zeros(task.seeds, int)  # Updates refused without one that was not, for each seed.
        self._keys, self._eval_keys = (
            jax.device_put(jax.vmap(jax.random.key)(first + jnp.arange(task.seeds)), self._where)
            for first in (task.seed, task.seed + 10_000)
        )

    def compile(self) -> None:
        """Compiles everything, and collects the warm-up."""
        play = training.evaluate(self.agent, self._env, num_episodes=self.task.eval_episodes, max_steps=self._env.time_limit or 10_000)
        init, advance = jax.jit(seeds.over_seeds(self._training.init)), jax.jit(seeds.over_seeds(self._training.advance), donate_argnums=0)
        footprint.require_room(jax.eval_shape(self._training.init, self._keys[0]), seeds.num_in_one_memory(self.task.seeds))
        shape = jax.eval_shape(init, self._keys)
        shape = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._where), shape)
        self._init = init.lower(self._keys).compile()
        self._advance = advance.lower(shape).compile()
        self._evaluate = jax.jit(seeds.over_seeds(play)).lower(shape.agent, self._eval_keys).compile()
        self._run = self._init(self._keys)

    @property
    def steps(self) -> int:
        """Transitions collected by each agent."""
        return int(np.asarray(self._run.agent.step)[0])

    @property
    def updates(self) -> int:
        """Updates done by each agent."""
        return int(np.asarray(self._run.agent.updates)[0])

    def advance(self) -> list[dict[str, float]]:
        """One chunk. Returns a row of the learning curve for each seed."""
        before = self.updates
        self._run, history = self._advance(self._run)
        columns = {name: np.asarray(values) for name, values in history.items() if name != "step"}
        preset = ALGORITHMS[self.task.algo]
        scheduled = preset.scheduled(self.steps, self.task.options)
        self._require_learning(columns["refused"], self.updates - before)
        if said := preset.complaint({name: float(np.mean(values)) for name, values in columns.items()}):
            warnings.warn(said, stacklevel=2)
        return [{**{name: float(values[i]) for name, values in columns.items()}, **scheduled} for i in range(self.task.seeds)]

    def _require_learning(self, refused: np.ndarray, updates: int) -> None:
        """Raises if a seed's updates have all been refused, ``finite.PATIENCE`` of them or more, over whole points of the curve.

        Args:
          refused: the share of a point's updates that were refused, ``[seeds]``.
          updates: of the point.
        """
        self._refused = np.where(finite.all_refused(refused, updates), self._refused + updates, 0)
        if (self._refused >= finite.PATIENCE).any():
            seed = int(np.argmax(self._refused))
            why = finite.explain(self.agent, seeds.one_seed(self._run.agent, seed))
            raise finite.NonFiniteError(
                f"seed {self.task.seed + seed}: the last {self._refused[seed]:,} updates or more were refused, since loss or gradient were "
                f"not finite; nothing was learnt from them. Of update {self.updates}:\n  {why}"
            )

    def evaluate(self) -> np.ndarray:
        """The mean return of greedy episodes, for each seed."""
        return np.asarray(self._evaluate(self._run.agent, self._eval_keys)).mean(axis=1)

    def state(self) -> Any:
        """Everything, as one pytree."""
        return self._run

    lost: str | None = None

    def world(self) -> None:
        """Nothing: the environments are in the state."""

    def restore(self, state: Any, steps: int, world: Any) -> None:
        """Goes on from ``state``, exactly."""
        del steps, world  # They are in the state.
        self._run = state

    def learners(self) -> Any:
        """What the agents have learnt, stacked over seeds, as NumPy."""
        return jax.device_get(self._run.agent.learner)


def read_task(folder: Path) -> Task:
    """What the run in that folder was asked to do.

    Raises:
      FileNotFoundError: if the folder holds no run.
      ValueError: if its environment would import a module.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no run at {folder}: expected a folder made by dqn-jax train, with config.json in it")
    try:
        saved = json.loads(path.read_text())
        complete = {*Task._fields} - {"algo"} <= saved.keys() and isinstance(saved["options"], dict)
    except (ValueError, AttributeError):  # No JSON, or no object.
        complete = False
    if not complete:
        raise ValueError(f"{path} is damaged: expected a JSON object with the fields {', '.join(Task._fields)}")
    if ":" in saved["env"]:  # gymnasium.make would import the module before the colon.
        raise ValueError(f"{path} names the environment {saved['env']!r}: a module to import is not taken from a file")
    saved["options"].setdefault("encoder", "flat")  # Runs from before there were others.
    if saved.get("algo", "dqn") not in ALGORITHMS:
        raise ValueError(f"{path} names the algorithm {saved['algo']!r}: this version knows {', '.join(ALGORITHMS)}")
    return Task(**{name: value for name, value in saved.items() if name in Task._fields})  # Without what it was forked from.


def best_learner(folder: Path, seed: int, agent: Agent, observation_space: gymnasium.Space) -> Any:
    """What one of the run's agents had learnt when it evaluated best.

    Raises:
      ValueError: if the run has no such seed.
      FileNotFoundError, dqn_jax.CheckpointError: if there is no sound checkpoint, or ``agent`` has other parameters.
    """
    task = read_task(folder)
    if not 0 <= seed < task.seeds:
        raise ValueError(f"the run has {task.seeds} seed(s), 0 to {task.seeds - 1}: there is no seed {seed}")
    one = jax.eval_shape(agent.init, jax.random.key(0), spaces.example(observation_space, task.num_envs)).learner
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((task.seeds, *leaf.shape), leaf.dtype), one)
    learners, _ = checkpoint.load(folder / "best.safetensors", stacked)
    return jax.tree.map(lambda leaf: leaf[seed], learners)


def load_run(folder: str | os.PathLike, env: Any, *, seed: int = 0, num_envs: int | None = None) -> OnlineAgent:
    """An agent that has learnt what an agent of a ``dqn-jax train`` run had when it evaluated best; its replay is empty.

    Args:
      folder: of the run.
      env: an environment with the spaces of the run's, or the pair (observation_space, action_space); as for ``DQN``.
      seed: which of the run's agents: 0 is the first.
      num_envs: environments that are to feed it; by default those of ``env``. A PPO agent that scales rewards, or its own pay for what
        is new, has learnt something about each of its environments, so it needs as many as in the run.

    Returns:
      A ``DQN``, ``PPO``, ``PQN`` or ``SAC``, as the run's.

    Raises:
      ValueError: if the run has no such seed; and as ``DQN``.
      FileNotFoundError, dqn_jax.CheckpointError: if there is no run or no sound checkpoint, or ``env`` has other spaces.
    """
    task = read_task(Path(folder))
    online: Any = ALGORITHMS[task.algo].online
    fresh = online(env, num_envs=num_envs, **task.options)
    try:
        learner = best_learner(Path(folder), seed, fresh.agent, fresh.observation_space)
    except checkpoint.CheckpointError as error:
        raise checkpoint.CheckpointError(f"the run at {folder} trained in {task.env}; {error}") from error
    return online.from_state(env, fresh.state._replace(learner=learner), num_envs=num_envs, **task.options)


def greedy_policy(agent: Agent, learner: Any, observation_space: gymnasium.Space, action_space: gymnasium.Space) -> Any:
    """A function from one observation to the greedy action, NumPy."""
    check, leave = spaces.observation_check(observation_space, None), spaces.leave(action_space)
    exploit = jax.jit(agent.exploit)
    return lambda observation: leave(exploit(learner, check(observation))[0])


def make_env(env_id: str, **env_args: Any) -> gymnasium.Env:
    """One Gymnasium environment by its id, also ``ALE/NAME-v5``; see ``atari.make``."""
    return atari.make(env_id, **env_args) if atari.is_atari(env_id) else gymnasium.make(env_id, **env_args)


def make_runs(task: Task) -> HostRuns | CompiledRuns:
    """The compiled driver for a JAX environment, the host driver for any other."""
    return CompiledRuns(task) if envs.is_jax_env(task.env) else HostRuns(task)
