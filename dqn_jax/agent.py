"""``assemble``: the only place where an algorithm, a memory, random keys and the discount factor meet.

The result is a record of pure functions. The loops (``online.py`` on the host, ``training.py`` compiled) decide when each is called;
nothing here knows the time.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from dqn_jax import finite
from dqn_jax.types import Agent, AgentState, Algorithm, Batch, Cadence, Decision, Feedback, Memory, Transition

# Streams of random numbers: fold_in(fold_in(key, TAG), counter). The key itself never advances, so the two loops draw the same
# numbers, however their calls are grouped, and a resumed run goes on with the same streams.
INIT, EXPLORE, UPDATE = range(3)


def stream(key: chex.PRNGKey, tag: int, counter: chex.Numeric) -> chex.PRNGKey:
    """The key number ``counter`` of the stream ``tag``."""
    return jax.random.fold_in(jax.random.fold_in(key, tag), counter)


def assemble(algorithm: Algorithm, memory: Memory, *, discount: chex.Numeric, warmup: int = 0, period: int = 1, updates: int = 1) -> Agent:
    """Joins an algorithm and a memory into an agent.

    Args:
      algorithm: the mathematics.
      memory: the data.
      discount: the factor gamma per environment step; it is multiplied into what the memory hands out, and nowhere else.
      warmup: transitions stored before the first update.
      period: transitions between updates; it and the number of environments must divide one another. A memory that demands fresh
        rows sets its own period, and neither ``warmup`` nor ``period`` applies.
      updates: updates per period.

    Returns:
      An ``Agent``.

    Raises:
      ValueError: if a count is out of range; from ``cadence``, if period and environments do not divide one another.
      TypeError: from ``init``, if the key is not one of JAX's typed keys.
    """
    if warmup < 0 or period < 1 or updates < 1:
        raise ValueError(f"warmup must be >= 0, period and updates >= 1, got {warmup}, {period} and {updates}")

    def init(key: chex.PRNGKey, observation: chex.ArrayTree) -> AgentState:
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            raise TypeError(f"the key is a {key.dtype}{[*key.shape]}: pass jax.random.key(seed), or jax.random.wrap_key_data of yours")
        zero = jnp.zeros((), jnp.int32)
        learner = algorithm.init(stream(key, INIT, 0), observation)
        num_envs = jax.tree.leaves(observation)[0].shape[0]

        def decide(observation: chex.ArrayTree) -> Decision:
            return algorithm.explore(learner, observation, algorithm.noise(learner, stream(key, EXPLORE, 0), num_envs), zero)

        decision = jax.eval_shape(decide, observation)
        per_env = jax.ShapeDtypeStruct((num_envs,), jnp.float32)
        ended = jax.ShapeDtypeStruct((num_envs,), jnp.bool_)
        row = Transition(observation, decision.action, per_env, per_env, observation, ended, decision.extras)
        # Each counter is an array of its own: the same buffer twice in a donated state is an error.
        return AgentState(learner, memory.init(row), key, jnp.copy(zero), jnp.copy(zero), jnp.copy(zero))

    def noise(state: AgentState, decisions: chex.Numeric, num_envs: int) -> Any:
        return algorithm.noise(state.learner, stream(state.key, EXPLORE, decisions), num_envs)

    def explore(state: AgentState, observation: chex.ArrayTree, noise: Any) -> tuple[AgentState, Decision]:
        decision = algorithm.explore(state.learner, observation, noise, state.step)
        return state._replace(decisions=state.decisions + 1), decision

    def observe(state: AgentState, transition: Transition) -> AgentState:
        rows = memory.add(state.memory, transition)
        return _unchanged(state, state._replace(memory=rows, step=state.step + transition.reward.shape[0]))

    def cut(state: AgentState, mask: chex.Array) -> AgentState:
        return _unchanged(state, state._replace(memory=memory.cut(state.memory, mask)))

    def draw(state: AgentState, updates: chex.Numeric) -> tuple[Any, chex.PRNGKey]:
        key_sample, key_learn = jax.random.split(stream(state.key, UPDATE, updates))
        return memory.noise(key_sample), key_learn

    def examine(state: AgentState, drawn: tuple[Any, chex.PRNGKey]) -> tuple[Batch, Any, Feedback]:
        sample_noise, key_learn = drawn
        batch = memory.sample(state.memory, sample_noise)
        batch = batch._replace(transition=batch.transition._replace(discount=discount * batch.transition.discount))
        return batch, *algorithm.learn(state.learner, batch, key_learn, state.step)

    def update(state: AgentState, drawn: tuple[Any, chex.PRNGKey]) -> tuple[AgentState, Any]:
        batch, learner, (priority, metrics, sound, _) = examine(state, drawn)
        if any(leaf.ndim != 1 for leaf in jax.tree.leaves(priority)) or any(jnp.ndim(metric) for metric in dict(metrics).values()):
            raise ValueError(
                f"learn gives a priority of shape {jax.tree.map(jnp.shape, priority)} and metrics of {jax.tree.map(jnp.shape, metrics)}, "
                "expected [B] and scalars; a replay hands out reward, discount and last as windows [B, n]: fold them with returns.n_step"
            )
        if isinstance(sound, tuple):  # The algorithm has not looked.
            sound = finite.all_finite((learner, dict(metrics).get("loss", ())))
            learner = finite.choose(sound, learner, state.learner)
        # A priority that is not finite is not written.
        refused = jax.tree.map(lambda leaf: jnp.where(sound, leaf, jnp.nan), priority)
        rows = memory.reweigh(state.memory, batch.index, refused)
        # The count goes on, and with it the random numbers: the next try draws other rows.
        new = state._replace(learner=learner, memory=rows, updates=state.updates + 1)
        return _unchanged(state, new), {**dict(metrics), "refused": 1.0 - sound.astype(jnp.float32)}

    def cadence(num_envs: int) -> Cadence:
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}")
        if memory.demand is not None:  # It learns from fresh rows only: their number is the period.
            return Cadence(0, memory.demand, updates, once=True)
        if period % num_envs and num_envs % period:
            legal = [n for n in range(1, 2 * max(period, num_envs) + 1) if period % n == 0 or n % period == 0]
            nearest = max(n for n in legal if n < num_envs), min(n for n in legal if n > num_envs)
            raise ValueError(
                f"an update every {period} transitions does not fit {num_envs} environments: one must divide the other; "
                f"the nearest numbers of environments that fit are {' and '.join(map(str, nearest))}"
            )
        rows = max(1, period // num_envs)
        # The first update falls on the first multiple of the period, in whole rows, at or past the warm-up.
        first = max(1, -(-warmup // (rows * num_envs)))
        return Cadence((first - 1) * rows, rows, updates * max(1, num_envs // period))

    return Agent(init, noise, explore, algorithm.exploit, observe, cut, draw, update, examine, cadence)


def _unchanged(old: AgentState, new: AgentState) -> AgentState:
    """``new``, checked at trace time to have the structure, shapes and dtypes of ``old``: a scan and a donation rely on it."""
    chex.assert_trees_all_equal_shapes_and_dtypes(old, new)
    return new
