"""The compiled driver: an agent and a JAX environment become pure functions of a key.

Time is the nesting of scans with static lengths: rows, then updates, make a cycle; cycles make one point of the history; points make
a run. Nothing about the schedule is a traced predicate, so nothing turns into "run both branches" under ``vmap``.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from dqn_jax import checkpoint, footprint, seeds
from dqn_jax.types import Agent, AgentState, Env, RunState, Transition

CYCLES_PER_BLOCK = 64  # Cycles whose randomness is drawn at once,
DECISIONS_PER_BLOCK = 1 << 16  # unless their decisions, over all environments, would be more than this,
NOISE_BYTES = 1 << 22  # or what they draw would take more, as noisy layers do. Many seeds multiply it.


class EnvSide(NamedTuple):
    """The environments of a run: their states ``[N]``, what the agent sees ``[N, ...]``, and a key that never changes."""

    state: Any
    observation: chex.ArrayTree
    key: chex.PRNGKey


class EpisodeStatistics(NamedTuple):
    """Open episodes ``[N]``, and sums over the episodes that ended since the last point of the history."""

    open_return: chex.Array
    open_length: chex.Array
    episodes: chex.Array
    return_sum: chex.Array
    length_sum: chex.Array


class Result(NamedTuple):
    """What a run gives back; stacked along a first axis where it was mapped over seeds.

    Attributes:
      run: the RunState at the end, from which ``advance`` can go on.
      history: dict of arrays ``[points]``: ``step`` (transitions stored), ``episodes`` (ended since the point before), ``return`` and
        ``length`` (their means, NaN where none ended), and the means of the algorithm's metrics.
    """

    run: RunState
    history: dict[str, chex.Array]

    @property
    def state(self) -> AgentState:
        """The agent's state at the end."""
        return self.run.agent

    def seed(self, index: int) -> "Result":
        """One seed of a result that was mapped over seeds.

        Raises:
          IndexError: if there is no such seed.
        """
        return seeds.one_seed(self, index)

    def plot(self, ax: Any = None) -> Any:
        """Draws the mean return of ended episodes against steps: one line, or the median of the seeds and the band of quartiles.

        Args:
          ax: matplotlib axes to draw on; new ones by default.

        Returns:
          The axes.

        Raises:
          ModuleNotFoundError: if matplotlib is not installed.
        """
        try:
            import matplotlib.pyplot as plt
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("plot() needs matplotlib: pip install 'dqn_jax[plots]'") from error
        ax = plt.subplots()[1] if ax is None else ax
        returns = np.asarray(self.history["return"])
        returns = returns.reshape(-1, returns.shape[-1])  # [seeds, points]
        steps = np.asarray(self.history["step"]).reshape(returns.shape)[0]
        shown = ~np.all(np.isnan(returns), axis=0)
        low, middle, high = np.nanpercentile(returns[:, shown], (25, 50, 75), axis=0)
        if len(returns) > 1:
            ax.fill_between(steps[shown], low, high, alpha=0.3, label=f"quartiles of {len(returns)} seeds")
        ax.plot(steps[shown], middle, label="median" if len(returns) > 1 else None)
        ax.set(xlabel="steps", ylabel="return of ended episodes")
        if len(returns) > 1:
            ax.legend()
        return ax

    def __repr__(self) -> str:
        if any(not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer) for leaf in (self.state.step, self.history["return"])):
            return f"Result({self.run!r}, {self.history!r})"
        steps = np.ravel(self.state.step)
        returns = np.asarray(self.history["return"]).reshape(len(steps), -1)
        final = returns[:, -max(1, returns.shape[1] // 10) :]
        ended = final[~np.isnan(final)]
        says = f"{ended.mean():.1f}" if ended.size else "no episode ended"
        return f"Result(seeds={len(steps)}, steps={int(steps[0])}, points={returns.shape[1]}, return over the last tenth={says})"


class Training(NamedTuple):
    """A training run as pure functions; made by ``train``.

    Attributes:
      init: ``(key) -> RunState``, with the warm-up collected.
      resume: ``(key, agent_state) -> RunState``: fresh environments for an agent that exists. Called outside ``jit`` it raises
        ValueError where the agent is still in its warm-up, is in the middle of a rollout, or was built for another number of
        environments; inside it cannot look.
      advance: ``(RunState) -> (RunState, history)``: up to the next point of the history, a dict of scalars.
      run: ``(key) -> Result``: ``init`` and then ``num_points`` times ``advance``.
      num_points: points of the history in a run.
      num_steps: transitions collected by ``run``: what was asked for, rounded up to whole rows, cycles and points.
    """

    init: Callable[[chex.PRNGKey], RunState]
    resume: Callable[[chex.PRNGKey, AgentState], RunState]
    advance: Callable[[RunState], tuple[RunState, dict[str, chex.Array]]]
    run: Callable[[chex.PRNGKey], Result]
    num_points: int
    num_steps: int


def train(agent: Agent, env: Env, *, num_steps: int, num_envs: int = 1, history_length: int = 100) -> Training:
    """Training as pure functions: ``jax.jit(jax.vmap(train(...).run))(keys)`` trains one agent for each key, all at once.

    Args:
      agent: from ``assemble`` or a preset.
      env: a JAX environment.
      num_steps: transitions to collect, over all environments; rounded up to whole intervals between updates, for PPO whole rollouts, and
        to as many of these in each point of the history.
      num_envs: environments N that feed one agent.
      history_length: points of the history, at most.

    Returns:
      A ``Training``. Compile its functions; donate the state to ``advance``, or each call copies the replay.

    Raises:
      TypeError: if ``env`` is not a JAX environment.
      ValueError: if a number is below one, or environments and update period do not divide one another.
      MemoryError: if one agent's replay is larger than the device's memory.
    """
    if not isinstance(env, Env):
        raise TypeError(
            f"env must be a JAX environment from dqn_jax.make, got {env!r}: step a Gymnasium environment with dqn_jax.DQN and act_and_train"
        )
    if num_steps < 1 or history_length < 1:
        raise ValueError(f"num_steps and history_length must be at least 1, got {num_steps} and {history_length}")
    if num_steps >= 2**31:
        raise ValueError(f"num_steps must be below 2^31, which the counters of transitions hold, got {num_steps}: split the run in several")
    cadence = agent.cadence(num_envs)
    noise_bytes = max(1, _noise_bytes(agent, env, num_envs))
    cycles = max(1, math.ceil((math.ceil(num_steps / num_envs) - cadence.prefill) / cadence.rows))
    # What a block of cycles draws is drawn at once, ahead of them: a small draw inside the loop costs more than the network.
    most = max(1, min(CYCLES_PER_BLOCK, DECISIONS_PER_BLOCK // (cadence.rows * num_envs), NOISE_BYTES // (cadence.rows * noise_bytes)))
    blocks_per_point = math.ceil(math.ceil(cycles / history_length) / most)
    cycles_per_block = math.ceil(math.ceil(cycles / history_length) / blocks_per_point)
    num_points = math.ceil(cycles / (blocks_per_point * cycles_per_block))

    def decide_and_step(state: AgentState, side: EnvSide, noise: Any, keys: chex.PRNGKey) -> tuple[AgentState, EnvSide, Transition]:
        state, decision = agent.explore(state, side.observation, noise)
        env_state, step = jax.vmap(env.step)(keys, side.state, decision.action)
        transition = Transition(
            observation=side.observation,
            action=decision.action,
            reward=step.reward,
            discount=1.0 - step.terminated.astype(jnp.float32),
            next_observation=step.next_observation,
            last=step.terminated | step.truncated,
            extras=decision.extras,
        )
        return state, EnvSide(env_state, step.observation, side.key), transition

    def ahead(state: AgentState, side: EnvSide, rows: int) -> tuple[Any, chex.PRNGKey]:
        """The noise of the next rows of decisions and the keys of the environments' steps, ``[rows, N, ...]``."""
        counters = state.decisions + jnp.arange(rows)
        noise = jax.vmap(lambda counter: agent.noise(state, counter, num_envs))(counters)
        return noise, jax.vmap(lambda counter: jax.random.split(jax.random.fold_in(side.key, counter), num_envs))(counters)

    def begin(state: AgentState, key: chex.PRNGKey, env_state: Any, observation: chex.ArrayTree) -> RunState:
        """Takes the first decision: a row begins by storing what the row before it began."""
        side = EnvSide(env_state, observation, key)
        noise, keys = jax.tree.map(lambda leaf: leaf[0], ahead(state, side, 1))
        state, side, transition = decide_and_step(state, side, noise, keys)
        zero, zeros = jnp.zeros(()), jnp.zeros(num_envs)
        none_yet = EpisodeStatistics(zeros, zeros, zero, zero, zero)
        return RunState(state, side, transition, _count(none_yet, transition))

    def interact(run: RunState, drawn: tuple[Any, chex.PRNGKey]) -> tuple[RunState, None]:
        state = agent.observe(run.agent, run.pending)
        state, side, transition = decide_and_step(state, run.env, *drawn)
        return RunState(state, side, transition, _count(run.statistics, transition)), None

    def cycle(run: RunState, drawn: tuple[Any, tuple[Any, Any]]) -> tuple[RunState, Any]:
        tick, (for_rows, for_updates) = drawn
        if cadence.rows == 1:
            # A loop of one known turn would be inlined, and XLA would then fuse the write into the replay with the reads after it and
            # copy the replay for that. So the turn is hidden from it.
            row = jax.tree.map(lambda leaf: leaf[0], for_rows)
            run = jax.lax.fori_loop(tick, tick + 1, lambda _, run: interact(run, row)[0], run)
        else:
            run = jax.lax.scan(interact, run, for_rows)[0]
        state, metrics = jax.lax.scan(agent.update, run.agent, for_updates)
        return run._replace(agent=state), metrics

    def block(run: RunState, _: None) -> tuple[RunState, Any]:
        def by_cycle(tree: Any) -> Any:
            return jax.tree.map(lambda leaf: leaf.reshape(cycles_per_block, -1, *leaf.shape[1:]), tree)

        for_rows = ahead(run.agent, run.env, cycles_per_block * cadence.rows)
        counters = run.agent.updates + jnp.arange(cycles_per_block * cadence.updates)
        for_updates = jax.vmap(lambda counter: agent.draw(run.agent, counter))(counters)
        return jax.lax.scan(cycle, run, (jnp.arange(cycles_per_block), (by_cycle(for_rows), by_cycle(for_updates))))

    def reset(key: chex.PRNGKey) -> tuple[Any, chex.ArrayTree]:
        return jax.vmap(env.reset)(jax.random.split(key, num_envs))

    def init(key: chex.PRNGKey) -> RunState:
        key_agent, key_reset, key_env = jax.random.split(key, 3)
        env_state, observation = reset(key_reset)
        run = begin(agent.init(key_agent, observation), key_env, env_state, observation)
        return jax.lax.scan(interact, run, ahead(run.agent, run.env, cadence.prefill))[0] if cadence.prefill else run

    def resume(key: chex.PRNGKey, state: AgentState) -> RunState:
        one_key = jax.ShapeDtypeStruct((), state.key.dtype)
        expected = jax.eval_shape(lambda key, key_agent: agent.init(key_agent, reset(key)[1]), key, one_key)
        checkpoint.require_fit(state, expected, f"this training of {num_envs} environment(s)")
        if not isinstance(state.step, jax.core.Tracer) and int(np.min(state.step)) < cadence.prefill * num_envs:
            raise ValueError(
                f"the agent has stored {int(np.min(state.step))} transitions and learns from {cadence.prefill * num_envs} on: "
                "let it collect more where it began, or start a new run with init"
            )
        if (
            not cadence.once
            and not isinstance(state.step, jax.core.Tracer)
            and int(np.min(state.memory.size)) == 0 < int(np.min(state.step))
        ):
            raise ValueError("the agent's replay is empty, and it would learn at once: let it collect some steps where it was loaded")
        if cadence.once and not isinstance(state.step, jax.core.Tracer):
            fresh = state.step // num_envs - state.updates // cadence.updates * cadence.rows
            if np.any(fresh):
                raise ValueError(
                    f"the agent has collected {int(np.max(fresh))} steps that it has not learnt from, of the {cadence.rows} that it learns "
                    "from together: let it go on to its next update where it began, or start a new run with init"
                )
        key_reset, key_env = jax.random.split(key)
        # The environments begin anew, so a window must not run on from the last stored row into theirs.
        return begin(agent.cut(state, jnp.ones(num_envs, jnp.bool_)), key_env, *reset(key_reset))

    def advance(run: RunState) -> tuple[RunState, dict[str, chex.Array]]:
        run, metrics = jax.lax.scan(block, run, None, length=blocks_per_point)
        ended = run.statistics
        history = {
            "step": run.agent.step,
            "episodes": ended.episodes,
            "return": jnp.where(ended.episodes > 0, ended.return_sum / ended.episodes, jnp.nan),
            "length": jnp.where(ended.episodes > 0, ended.length_sum / ended.episodes, jnp.nan),
            **jax.tree.map(jnp.mean, metrics),
        }
        zero = jnp.zeros(())
        return run._replace(statistics=ended._replace(episodes=zero, return_sum=zero, length_sum=zero)), history

    def run(key: chex.PRNGKey) -> Result:
        return Result(*jax.lax.scan(lambda run, _: advance(run), init(key), None, length=num_points))

    footprint.require_room(jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0))))
    num_steps = (cadence.prefill + num_points * blocks_per_point * cycles_per_block * cadence.rows) * num_envs
    return Training(init, resume, advance, run, num_points, num_steps)


def evaluate(agent: Agent, env: Env, *, num_episodes: int = 20, max_steps: int | None = None) -> Callable[..., chex.Array]:
    """The return of greedy episodes, as a pure function ``(agent_state, key) -> returns [num_episodes]``.

    Args:
      agent: from ``assemble`` or a preset.
      env: a JAX environment.
      num_episodes: episodes, played side by side.
      max_steps: steps after which an episode counts as it stands; by default the environment's time limit.

    Raises:
      ValueError: if neither ``max_steps`` nor the environment limits an episode.
    """
    limit = env.time_limit if max_steps is None else max_steps
    if limit is None:
        raise ValueError("this environment has no time limit: pass max_steps to evaluate()")

    def returns(state: AgentState, key: chex.PRNGKey) -> chex.Array:
        key_reset, key_steps = jax.random.split(key)
        env_state, observation = jax.vmap(env.reset)(jax.random.split(key_reset, num_episodes))

        def play(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            time, env_state, observation, going, total = carry
            action = agent.exploit(state.learner, observation)
            keys = jax.random.split(jax.random.fold_in(key_steps, time), num_episodes)
            env_state, step = jax.vmap(env.step)(keys, env_state, action)
            total = total + jnp.where(going, step.reward, 0.0)
            return time + 1, env_state, step.observation, going & ~(step.terminated | step.truncated), total

        going = jnp.ones(num_episodes, jnp.bool_)
        start = (jnp.zeros((), jnp.int32), env_state, observation, going, jnp.zeros(num_episodes))
        return jax.lax.while_loop(lambda carry: jnp.any(carry[3]) & (carry[0] < limit), play, start)[4]

    return returns


def _noise_bytes(agent: Agent, env: Env, num_envs: int) -> int:
    """What one row of decisions draws, in bytes."""

    def drawn(key: chex.PRNGKey) -> Any:
        _, observation = jax.vmap(env.reset)(jax.random.split(key, num_envs))
        return agent.noise(agent.init(key, observation), 0, num_envs)

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(drawn, jax.random.key(0))))


def _count(statistics: EpisodeStatistics, transition: Transition) -> EpisodeStatistics:
    total, length = statistics.open_return + transition.reward, statistics.open_length + 1
    ended = transition.last.astype(jnp.float32)
    return EpisodeStatistics(
        open_return=total * (1 - ended),
        open_length=length * (1 - ended),
        episodes=statistics.episodes + jnp.sum(ended),
        return_sum=statistics.return_sum + jnp.sum(total * ended),
        length_sum=statistics.length_sum + jnp.sum(length * ended),
    )
