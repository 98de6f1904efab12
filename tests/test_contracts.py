"""What every agent promises, whatever it is made of: one table, and each promise checked for each of its rows."""

import functools
from typing import Any, NamedTuple

import chex
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from linear_networks import action_value, linear, policy_and_value

from dqn_jax import envs, heads, networks
from dqn_jax.agent import assemble
from dqn_jax.algorithms.dqn import Munchausen, dqn
from dqn_jax.algorithms.ppo import ppo
from dqn_jax.algorithms.pqn import pqn
from dqn_jax.algorithms.sac import Optimizers, discrete_sac, sac
from dqn_jax.curiosity.curious import curious
from dqn_jax.curiosity.rnd import rnd
from dqn_jax.memory.frames import frames
from dqn_jax.memory.prioritized import Prioritized, prioritized
from dqn_jax.memory.ring import ring
from dqn_jax.memory.rollout import rollout
from dqn_jax.memory.uniform import uniform
from dqn_jax.online import OnlineAgent
from dqn_jax.presets.ppo import distribution_of
from dqn_jax.training import train
from dqn_jax.types import Batch, Cadence, Masked, Transition
from dqn_jax.value_networks import ValueNetwork

N, A, B, ROWS = 2, 3, 8, 10


class Linear(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(4, A, rngs=rngs)

    def __call__(self, x):
        return self.layer(x)


def vectors(num_rows, seed=0):
    return np.random.default_rng(seed).normal(size=(num_rows, N, 4)).astype(np.float32)


def masked(num_rows, seed=0):
    random = np.random.default_rng(seed)
    mask = random.random((num_rows, N, A)) < 0.4
    np.put_along_axis(mask, random.integers(A, size=(num_rows, N, 1)), True, axis=-1)
    return Masked(vectors(num_rows, seed), mask)


def images(num_rows, seed=0):
    """Stacks of two images of 3 x 2, channels last: each observation is the one before it with a new image appended."""
    stream = np.random.default_rng(seed).integers(256, size=(num_rows + 1, N, 3, 2)).astype(np.uint8)
    return np.stack([stream[:-1], stream[1:]], axis=-1)


def dicts(num_rows, seed=0):
    image = np.random.default_rng(seed + 1).integers(256, size=(num_rows, N, 2, 2)).astype(np.uint8)
    return {"image": image, "speed": vectors(num_rows, seed)}


class Float(NamedTuple):
    """A number that an agent is built with: what the table uses, another value, and what that makes different: fields, or "actions"."""

    value: float
    other: float
    changes: set[str]


class Case(NamedTuple):
    """A row of the table.

    Attributes:
      build: ``(**floats) -> Agent``.
      floats: by name.
      memory: the agent's.
      observations: ``(rows) -> [rows, N, ...]``.
      actions: the space that actions are from.
      parameters: the learner's fields that an update is to change.
      targets: of these, the fields that begin as copies of others, and which those are.
    """

    build: Any
    floats: dict[str, Float]
    memory: Any
    observations: Any
    actions: gymnasium.Space
    parameters: tuple[str, ...]
    targets: dict[str, str]

    def agent(self, **floats):
        return self.build(**{name: number.value for name, number in self.floats.items()} | floats)


DISCRETE = gymnasium.spaces.Discrete(A)
BOX = gymnasium.spaces.Box(np.float32([-1, 2]), np.float32([3, 2.5]))


UNIFORM = uniform(ring(16), B)
VALUES = networks.QNetwork(A, (8,))


def values(algorithm=(), memory=UNIFORM, observations=vectors, network=VALUES, optimizer=optax.adam):
    """DQN with these options."""

    def build(*, learning_rate, discount, tau, epsilon):
        options = {"target_update_interval": 4, **dict(algorithm)}
        return assemble(dqn(network, optimizer(learning_rate), epsilon=epsilon, tau=tau, **options), memory, discount=discount)

    floats = {
        "learning_rate": Float(0.05, 0.1, {"params"}),
        "discount": Float(0.9, 0.5, {"params"}),
        "tau": Float(1.0, 0.5, {"target_params"}),
        "epsilon": Float(0.5, 0.0, {"params", "actions"}),
    }
    return Case(build, floats, memory, observations, DISCRETE, ("params",), {"target_params": "params"})


def distributional(head, algorithm=(), memory=UNIFORM, observations=vectors, **shape):
    """DQN with this head and a network to go with it."""
    return values({"head": head, **dict(algorithm)}, memory, observations, ValueNetwork(A, hidden=(8,), **shape))


def on_policy(actions, observations=vectors, **options):
    """PPO, whose rollouts are shorter than what is played."""
    distribution, to_action, _ = distribution_of(actions)
    network = policy_and_value(distribution.num_outputs)
    memory = rollout(6, minibatch_size=4)

    def build(*, learning_rate, discount, **floats):
        given = {"to_action": to_action, "epochs": 2, "minibatch_size": 4, **options, **floats}
        return assemble(ppo(network, distribution, optax.adam(learning_rate), **given), memory, discount=discount)

    floats = {
        "learning_rate": Float(0.05, 0.1, {"params", "opt_state"}),
        "discount": Float(0.9, 0.5, {"params"}),
        "clip": Float(0.2, 0.01, {"params"}),
        "gae_lambda": Float(0.95, 0.1, {"params"}),
        "value_coef": Float(0.5, 0.1, {"params"}),
        "entropy_coef": Float(0.01, 0.5, {"params"}),
    }
    return Case(build, floats, memory, observations, actions, ("params",), {})


def values_of_rollouts(observations=vectors):
    """PQN, whose rollouts are shorter than what is played."""
    network, memory = networks.QNetwork(A, (8,), layer_norm=True), rollout(6, minibatch_size=4)

    def build(*, learning_rate, discount, **floats):
        return assemble(pqn(network, optax.adam(learning_rate), epochs=2, minibatch_size=4, **floats), memory, discount=discount)

    floats = {
        "learning_rate": Float(0.05, 0.1, {"params", "opt_state"}),
        "discount": Float(0.9, 0.5, {"params"}),
        "lambda_": Float(0.65, 0.1, {"params"}),
        "epsilon": Float(0.5, 0.0, {"params", "actions"}),
    }
    return Case(build, floats, memory, observations, DISCRETE, ("params",), {})


def soft(actions, memory=UNIFORM, observations=vectors):
    """SAC, whose warm-up ends while it is played."""

    def build(*, learning_rate, discount, **floats):
        optimizers = Optimizers(*(optax.adam(learning_rate) for _ in range(3)))
        if isinstance(actions, gymnasium.spaces.Box):
            actor, critic = linear(2 * len(actions.low)), action_value()
            algorithm = sac(actor, critic, optimizers, low=actions.low, high=actions.high, warmup=ROWS, **floats)
        else:
            actor = critic = linear(A)
            algorithm = discrete_sac(actor, critic, optimizers, num_actions=A, warmup=ROWS, **floats)
        return assemble(algorithm, memory, discount=discount)

    floats = {
        "learning_rate": Float(0.05, 0.1, {"actor", "critics", "log_temperature"}),
        "discount": Float(0.9, 0.5, {"critics"}),
        "tau": Float(0.5, 0.1, {"target_critics"}),
        "reward_scale": Float(1.0, 5.0, {"critics"}),
    }
    return Case(build, floats, memory, observations, actions, ("actor", "critics", "log_temperature"), {"target_critics": "critics"})


def paid_for_news(memory, streams):
    """DQN whose rewards are relabelled, or PPO with a second stream of rewards."""

    def build(*, learning_rate, discount, share):
        optimizer = optax.adam(learning_rate)
        if streams == 1:
            algorithm, extra = dqn(VALUES, optimizer, epsilon=0.5), {}
        else:
            read = lambda outputs: (outputs[:, :A], outputs[:, A:])  # noqa: E731
            options = {"epochs": 2, "minibatch_size": 4, "intrinsic_coef": 1.0}
            algorithm, extra = ppo(linear(A + 2, read), distribution_of(DISCRETE)[0], optimizer, **options), {"discount": 0.9}
        urge = rnd(linear(5), linear(5), optimizer, share=share)
        return assemble(curious(algorithm, urge, **extra), memory, discount=discount)

    floats = {
        "learning_rate": Float(0.05, 0.1, {"learner", "curiosity"}),
        "discount": Float(0.9, 0.5, {"learner"}),
        "share": Float(0.9, 0.1, {"curiosity"}),
    }
    return Case(build, floats, memory, vectors, DISCRETE, ("learner", "curiosity"), {})


def scheduled(learning_rate):
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(learning_rate, 0.0, 10)))


def ramps(storage):
    return prioritized(storage, B, alpha=optax.linear_schedule(0.5, 1.0, 20), beta=optax.linear_schedule(0.4, 1.0, 20))


CASES = {
    "double huber": values(),
    "single mse, refresh after every update": values({"double": False, "head": heads.expected("mse"), "target_update_interval": 1}),
    # Odd, so that one place is rounded away, and small, so that it wraps while the tests play.
    "n steps in a small ring": values(memory=uniform(ring(9, n_steps=3), B)),
    "masked": values(observations=masked),
    "dict, scheduled optimizer": values(observations=dicts, optimizer=scheduled),
    "prioritized": values(memory=prioritized(ring(16), B)),
    "prioritized n steps in a small ring": values(memory=ramps(ring(9, n_steps=3))),
    "frames": values(memory=uniform(frames(16, stack=2, stack_axis=-1), B), observations=images),
    "prioritized frames, n steps": values(memory=prioritized(frames(40, stack=2, stack_axis=-1, n_steps=3), B), observations=images),
    "nnx, flattened optimizer": values(
        network=networks.from_nnx(lambda rngs: Linear(rngs)), optimizer=lambda rate: optax.flatten(optax.sgd(rate, momentum=0.9))
    ),
    "C51, dueling, noisy, prioritized": distributional(
        heads.categorical(np.linspace(-3, 3, 5, dtype=np.float32)), memory=prioritized(ring(16), B), num_outputs=5, dueling=True, noisy=0.5
    ),
    "quantiles, masked": distributional(heads.quantiles(3), observations=masked, num_outputs=3),
    "implicit quantiles, noisy, Munchausen": distributional(
        heads.implicit_quantiles(3), {"munchausen": Munchausen()}, cosines=4, noisy=0.5, dueling=True
    ),
    "PPO": on_policy(DISCRETE, value_clip=0.2, target_kl=0.5),
    "PPO, masked": on_policy(DISCRETE, masked),
    "PPO, box, normalised and scaled": on_policy(BOX, normalize_observation=True, scale_reward=True),
    "PPO, several choices": on_policy(gymnasium.spaces.MultiDiscrete([2, 3])),
    "PQN": values_of_rollouts(),
    "PQN, masked": values_of_rollouts(masked),
    "DQN, curious": paid_for_news(UNIFORM, 1),
    "PPO, curious": paid_for_news(rollout(6, minibatch_size=4), 2),
    "SAC, box": soft(BOX),
    "SAC": soft(DISCRETE),
    "SAC, masked": soft(DISCRETE, observations=masked),
    "SAC, prioritized n steps in a small ring": soft(BOX, ramps(ring(9, n_steps=3))),
}


def plain(tree):
    """Typed keys as numbers, all as NumPy copies: what can be compared."""
    return jax.tree.map(lambda x: np.array(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x), tree)


def row_of(tree, t):
    return jax.tree.map(lambda leaf: leaf[t], tree)


@jax.jit
def transition(observation, decision, successor, t):
    """Row t of a made-up stream: every third row ends the first environment's episode, every fourth terminates the second's."""
    reward = (decision.action.reshape(N, -1).sum(axis=1) - 1.0) * jnp.array([1.0, 2.0])
    last = jnp.stack([t % 3 == 2, t % 4 == 3])
    return Transition(observation, decision.action, reward, 1.0 - last * jnp.array([0.0, 1.0]), successor, last, decision.extras)


def play(agent, state, observations, num_rows=ROWS):
    """Rows of a made-up stream: the state after them, and the actions ``[rows, N, ...]``."""
    actions = []
    for t in range(num_rows):
        observation = row_of(observations, t)
        state, decision = agent.explore(state, observation, agent.noise(state, state.decisions))
        state = agent.observe(state, transition(observation, decision, row_of(observations, t + 1), t))
        actions.append(decision.action)
    return state, np.stack(actions)


class Subject(NamedTuple):
    """An agent of the table; the same with each function compiled, a second trace being an error; and a state that has seen some rows."""

    case: Case
    agent: Any
    compiled: Any
    state: Any
    observations: Any


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def subject(request):
    case = request.param
    agent = case.agent()
    chex.clear_trace_counter()  # It knows functions by their text, which is the same for every row of the table.
    noise = agent._replace(noise=lambda state, decisions: agent.noise(state, decisions, N))
    compiled = type(agent)(*(jax.jit(chex.assert_max_traces(fn, n=1)) for fn in noise[:-1]), agent.cadence)
    observations = jax.tree.map(jnp.asarray, case.observations(ROWS + 1))
    state, _ = play(compiled, compiled.init(jax.random.key(0), row_of(observations, 0)), observations)
    return Subject(case, agent, compiled, state, observations)


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


def test_types_are_kept(subject):
    agent, observation = subject.agent, row_of(subject.observations, 0)
    state = jax.eval_shape(agent.init, jax.random.key(0), observation)
    noise = jax.eval_shape(lambda s: agent.noise(s, 0, N), state)
    explored, decision = jax.eval_shape(agent.explore, state, observation, noise)
    row = jax.eval_shape(transition, observation, decision, observation, 0)
    updated, metrics = jax.eval_shape(agent.update, state, jax.eval_shape(agent.draw, state, 0))
    # A weak type that turned strong would compile everything once more.
    for after in (explored, jax.eval_shape(agent.observe, state, row), jax.eval_shape(agent.cut, state, row.last), updated):
        assert shapes(after) == shapes(state)
    space = subject.case.actions
    as_the_space = (N, *space.shape), jnp.float32 if isinstance(space, gymnasium.spaces.Box) else jnp.int32
    for action in (decision.action, jax.eval_shape(agent.exploit, state.learner, observation)):
        assert (action.shape, action.dtype) == as_the_space
    assert {metric.shape for metric in metrics.values()} == {()}
    batch = jax.eval_shape(lambda state: subject.case.memory.sample(state.memory, agent.draw(state, 0)[0]), state)
    chex.assert_trees_all_equal_dtypes(batch.transition.observation, batch.transition.next_observation, observation)


def test_functions_are_pure(subject):
    agent, state, observation = subject.compiled, subject.state, row_of(subject.observations, 3)
    noise, drawn = agent.noise(state, state.decisions), agent.draw(state, state.updates)
    _, decision = agent.explore(state, observation, noise)
    row = transition(observation, decision, row_of(subject.observations, 4), 3)
    calls = {
        agent.noise: (state, state.decisions),
        agent.explore: (state, observation, noise),
        agent.exploit: (state.learner, observation),
        agent.observe: (state, row),
        agent.cut: (state, row.last),
        agent.draw: (state, state.updates),
        agent.update: (state, drawn),
    }
    for fn, args in calls.items():
        before = plain(args)
        first = plain(fn(*args))
        chex.assert_trees_all_equal(plain(fn(*args)), first)
        chex.assert_trees_all_equal(plain(args), before)


def test_each_function_is_traced_once(subject):
    # The compiled functions refuse a second trace: here they meet everything that their own results can bring.
    agent, state = subject.compiled, subject.state
    for _ in range(3):
        state, _ = play(agent, state, subject.observations, 2)
        state = agent.cut(state, jnp.array([True, False]))
        state, _ = agent.update(state, agent.draw(state, state.updates))
        agent.exploit(state.learner, row_of(subject.observations, 0))


def test_counters_count_and_the_key_stays(subject):
    agent, state = subject.compiled, subject.state
    assert (int(state.decisions), int(state.step), int(state.updates)) == (ROWS, ROWS * N, 0)
    updated = agent.update(state, agent.draw(state, state.updates))[0]
    assert (int(updated.decisions), int(updated.step), int(updated.updates)) == (ROWS, ROWS * N, 1)
    chex.assert_trees_all_equal(plain(updated.key), plain(jax.random.key(0)))


def test_randomness_drawn_ahead_is_the_same(subject):
    agent, state = subject.agent, subject.state
    for draw in (lambda counter: agent.noise(state, counter, N), lambda counter: agent.draw(state, counter)):
        ahead = plain(jax.jit(jax.vmap(draw))(jnp.arange(5, 8)))
        for i in range(3):
            chex.assert_trees_all_equal(row_of(ahead, i), plain(draw(5 + i)))
        assert all((leaf[0] != leaf[1]).any() and (leaf[1] != leaf[2]).any() for leaf in jax.tree.leaves(ahead))


def test_an_update_changes_the_learner_and_only_it(subject):
    agent, state = subject.compiled, subject.state
    after, metrics = agent.update(state, agent.draw(state, state.updates))
    for field in (*subject.case.parameters, *subject.case.targets):
        moved = jax.tree.map(lambda new, old: bool((new != old).any()), getattr(after.learner, field), getattr(state.learner, field))
        assert any(jax.tree.leaves(moved)), field
    if isinstance(state.memory, Prioritized):  # Priorities are the one thing in a memory that an update changes.
        assert (after.memory.tree != state.memory.tree).any()
        after = after._replace(memory=after.memory._replace(tree=state.memory.tree, largest=state.memory.largest))
    chex.assert_trees_all_equal(after.memory, state.memory)
    assert all(np.isfinite(value) for value in metrics.values())


def paid(state, reward):
    """The state with this in place of every stored reward."""

    def replaced(path, leaf):
        return jnp.full_like(leaf, reward) if jax.tree_util.keystr(path).endswith(".reward") else leaf

    return state._replace(memory=jax.tree_util.tree_map_with_path(replaced, state.memory))


def test_an_update_that_is_not_finite_changes_nothing_but_the_count(subject):
    agent, state = subject.compiled, paid(subject.state, np.nan)
    after, metrics = agent.update(state, agent.draw(state, state.updates))
    assert float(metrics["refused"]) == 1.0
    assert int(after.updates) == int(state.updates) + 1  # The next try draws other rows.
    chex.assert_trees_all_equal(plain(after._replace(updates=state.updates)), plain(state))
    _, metrics = agent.update(subject.state, agent.draw(subject.state, subject.state.updates))
    assert float(metrics["refused"]) == 0.0


def test_parameters_and_targets_are_different_buffers(subject):
    state = subject.compiled.init(jax.random.key(0), row_of(subject.observations, 0))
    eager = subject.agent.init(jax.random.key(0), row_of(subject.observations, 0))
    for learner in (state.learner, eager.learner):
        for target, field in subject.case.targets.items():
            chex.assert_trees_all_equal(getattr(learner, target), getattr(learner, field))
    for whole in (state, eager):
        places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(whole) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
        assert len(set(places)) == len(places)  # a buffer that stands twice in a state cannot be donated


def test_exploit_is_deterministic_and_never_takes_a_forbidden_action(subject):
    actions = [subject.compiled.exploit(subject.state.learner, row_of(subject.observations, t)) for t in (*range(ROWS), *range(ROWS))]
    chex.assert_trees_all_equal(actions[:ROWS], actions[ROWS:])
    require_allowed(subject, np.stack(actions[:ROWS]))


def test_explore_never_takes_a_forbidden_action(subject):
    state = subject.state
    for seed in range(3):
        other = state._replace(key=jax.random.key(seed))
        require_allowed(subject, play(subject.compiled, other, subject.observations)[1])


def require_allowed(subject, actions):
    observations, space = subject.observations, subject.case.actions
    assert all(space.contains(action) for action in actions.reshape(-1, *space.shape))
    if isinstance(observations, Masked):
        assert np.take_along_axis(np.asarray(observations.action_mask[: len(actions)]), actions[..., None], axis=-1).all()


def test_seeds_and_floats_can_be_vmapped(subject):
    """Tracers as floats: a sweep is a vmap over a function that builds, plays and learns."""
    observations = subject.observations

    def whole(key, floats):
        agent = subject.case.agent(**floats)
        state = agent.init(key, row_of(observations, 0))

        def one_row(state, t):
            observation = row_of(observations, t)
            state, decision = agent.explore(state, observation, agent.noise(state, state.decisions, N))
            state = agent.observe(state, transition(observation, decision, row_of(observations, t + 1), t))
            return state, decision.action

        def one_update(state, _):
            return agent.update(state, agent.draw(state, state.updates))

        state, actions = jax.lax.scan(one_row, state, jnp.arange(ROWS))
        state, _ = jax.lax.scan(one_update, state, None, length=3)
        return state.learner, actions

    # Run 0, another seed, and one other value for each float.
    floats = subject.case.floats
    base = {name: number.value for name, number in floats.items()}
    runs = [base] * 2 + [{**base, name: number.other} for name, number in floats.items()]
    keys = jax.vmap(jax.random.key)(jnp.array([0, 1] + [0] * len(floats)))
    learners, actions = jax.jit(jax.vmap(whole))(keys, jax.tree.map(lambda *values: jnp.array(values), *runs))

    def differing(run):
        """The fields of the learner that are not as in run 0, and "actions"."""
        both = {"actions": actions, **learners._asdict()}
        return {name for name, tree in both.items() if any((leaf[run] != leaf[0]).any() for leaf in jax.tree.leaves(tree))}

    assert differing(1) >= {"actions", *subject.case.parameters}
    for run, (name, number) in enumerate(floats.items(), start=2):
        assert differing(run) >= number.changes, name
        assert ("actions" in differing(run)) == ("actions" in number.changes), name

    # What Python floats and separate calls give.
    agent = subject.compiled
    state, alone = play(agent, agent.init(jax.random.key(0), row_of(observations, 0)), observations)
    for _ in range(3):
        state, _ = agent.update(state, agent.draw(state, state.updates))
    if alone.dtype == np.int32:
        np.testing.assert_array_equal(alone, actions[0])
    else:
        np.testing.assert_allclose(alone, actions[0], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(row_of(learners, 0), state.learner, rtol=1e-4, atol=1e-5)


# One learner by itself: plain gradient descent with step size one, so that parameters move by the gradient.


def batch(weight=1.0, n=2, seed=0):
    random = np.random.default_rng(seed)
    observation, successor = random.normal(size=(2, B, 4)).astype(np.float32)
    last = random.random((B, n)) < 0.3
    reward = random.normal(size=(B, n)).astype(np.float32)
    action = random.integers(A, size=B).astype(np.int32)
    return Batch(Transition(observation, action, reward, np.where(last, 0.0, 0.9).astype(np.float32), successor, last), weight)


@functools.cache
def learner_of(interval=1_000, tau=1.0, loss="huber"):
    options = {"target_update_interval": interval, "tau": tau, "head": heads.expected(loss)}
    algorithm = dqn(networks.QNetwork(A, (8,)), optax.sgd(1.0), epsilon=0.1, **options)
    state = algorithm.init(jax.random.key(0), jnp.zeros((1, 4)))
    return jax.jit(algorithm.learn), state._replace(target_params=jax.tree.map(lambda leaf: leaf + 0.1, state.params))


def gradient(weight, loss="huber"):
    learn, state = learner_of(loss=loss)
    after, _ = learn(state, batch(jnp.asarray(weight, jnp.float32)), jax.random.key(1), 1)
    return jax.tree.map(lambda new, old: old - new, after.params, state.params)


@pytest.mark.parametrize("loss", ["huber", "mse"])
def test_the_gradient_is_linear_in_the_importance_weights(loss):
    first, second = np.random.default_rng(1).random((2, B)).astype(np.float32)
    both = jax.tree.map(lambda a, b: 2 * a + 3 * b, gradient(first, loss), gradient(second, loss))
    chex.assert_trees_all_close(gradient(2 * first + 3 * second, loss), both, rtol=1e-4, atol=1e-5)
    # Each row's weight reaches that row: the rows one by one sum to the whole.
    rows = [gradient(row, loss) for row in np.eye(B)]
    chex.assert_trees_all_close(jax.tree.map(lambda *leaves: sum(leaves), *rows), gradient(np.ones(B), loss), rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_equal(gradient(np.zeros(B), loss), jax.tree.map(jnp.zeros_like, both))
    chex.assert_trees_all_close(gradient(1.0, loss), gradient(np.ones(B), loss), rtol=1e-5)


def test_priorities_are_absolute_td_errors_and_ignore_weights():
    learn, state = learner_of()
    feedback = [learn(state, batch(jnp.full(B, weight)), jax.random.key(1), 1)[1] for weight in (1.0, 5.0)]
    assert feedback[0].priority.shape == (B,) and (feedback[0].priority > 0).all()
    chex.assert_trees_all_equal(feedback[0].priority, feedback[1].priority)
    np.testing.assert_allclose(5 * feedback[0].metrics["loss"], feedback[1].metrics["loss"], rtol=1e-5)


@pytest.mark.parametrize(
    ("interval", "steps", "refreshed"),
    [
        (4, [1, 3, 4, 5, 9, 10, 16], [False, False, True, False, True, False, True]),
        (5, [16, 16, 17, 20, 31], [True, False, False, True, True]),  # a long warm-up; two updates on one step; several multiples at once
        (1, [7, 7, 7], [True, True, True]),  # 1 means after every update, also of one step
    ],
)
@pytest.mark.parametrize("tau", [1.0, 0.25])
def test_the_target_moves_exactly_when_the_step_crosses_a_multiple_of_the_interval(interval, steps, refreshed, tau):
    learn, state = learner_of(interval, tau)
    for step, moves in zip(steps, refreshed, strict=True):
        after, _ = learn(state, batch(seed=step), jax.random.key(1), step)
        if moves:
            expected = jax.tree.map(lambda old, new: old + tau * (new - old), state.target_params, after.params)
            chex.assert_trees_all_close(after.target_params, expected, rtol=1e-5, atol=1e-6)
        else:
            chex.assert_trees_all_equal(after.target_params, state.target_params)
        assert int(after.step) == step
        state = after


def test_the_target_gets_no_gradient_and_does_matter():
    learn, state = learner_of()
    one = batch()
    ended = one._replace(transition=one.transition._replace(discount=np.zeros_like(one.transition.discount)))
    other = state._replace(target_params=jax.tree.map(lambda leaf: leaf + 1, state.target_params))
    for given, matters in ((one, True), (ended, False)):
        params = [learn(s, given, jax.random.key(1), 1)[0].params for s in (state, other)]
        same = all((a == b).all() for a, b in zip(*map(jax.tree.leaves, params), strict=True))
        assert same != matters


def test_the_factory_checks_what_is_static():
    with pytest.raises(ValueError, match="target_update_interval"):
        dqn(networks.QNetwork(A), optax.sgd(1.0), epsilon=0.1, target_update_interval=0)
    with pytest.raises(ValueError, match=r"loss must be one of .* got 'l1'"):
        heads.expected("l1")


# The cadence.


def with_schedule(demand=None, **schedule):
    memory = uniform(ring(16), B)._replace(demand=demand)
    return assemble(dqn(networks.QNetwork(A), optax.sgd(1.0), epsilon=0.1), memory, discount=0.9, **schedule)


@pytest.mark.parametrize(
    ("warmup", "period", "updates", "num_envs", "expected"),
    [
        (0, 1, 1, 1, Cadence(0, 1, 1)),
        (1, 1, 1, 1, Cadence(0, 1, 1)),
        (1_000, 4, 1, 1, Cadence(996, 4, 1)),  # the first update falls on transition 1,000
        (10, 4, 1, 1, Cadence(8, 4, 1)),  # rounded up to 12
        (10, 4, 1, 2, Cadence(4, 2, 1)),
        (10, 4, 1, 4, Cadence(2, 1, 1)),
        (10, 4, 1, 8, Cadence(1, 1, 2)),  # a row of 8 pays for two updates
        (10, 4, 3, 8, Cadence(1, 1, 6)),
        (0, 4, 3, 2, Cadence(0, 2, 3)),
        (17, 1, 1, 16, Cadence(1, 1, 16)),
    ],
)
def test_cadence(warmup, period, updates, num_envs, expected):
    cadence = with_schedule(warmup=warmup, period=period, updates=updates).cadence(num_envs)
    assert cadence == expected
    assert all(type(number) is int for number in cadence[:3]) and cadence.once is False


def test_the_replay_ratio_does_not_depend_on_the_number_of_environments():
    for period in (1, 2, 6, 8):
        agent = with_schedule(warmup=50, period=period, updates=2)
        for num_envs in (n for n in range(1, 25) if period % n == 0 or n % period == 0):
            cadence = agent.cadence(num_envs)
            assert cadence.updates * period == 2 * cadence.rows * num_envs
            first = (cadence.prefill + cadence.rows) * num_envs
            assert 50 <= first < 50 + cadence.rows * num_envs


@pytest.mark.parametrize(("period", "num_envs", "nearest"), [(4, 3, (2, 4)), (4, 6, (4, 8)), (8, 7, (4, 8)), (6, 13, (12, 18))])
def test_a_period_that_does_not_fit_is_refused_with_what_would(period, num_envs, nearest):
    with pytest.raises(ValueError, match=rf"\b{period} transitions\b.*\b{num_envs} environments\b.*\b{nearest[0]} and {nearest[1]}\b"):
        with_schedule(period=period).cadence(num_envs)


def test_a_memory_that_demands_fresh_rows_sets_its_own_cadence():
    agent = with_schedule(demand=5, warmup=100, period=4, updates=3)
    assert agent.cadence(3) == Cadence(0, 5, 3, once=True)


@pytest.mark.parametrize("schedule", [{"warmup": -1}, {"period": 0}, {"updates": 0}])
def test_counts_out_of_range_are_refused(schedule):
    with pytest.raises(ValueError, match=next(iter(schedule))):
        with_schedule(**schedule)
    with pytest.raises(ValueError, match="num_envs"):
        with_schedule().cadence(0)


def walk(actions):
    """A random walk on a line of reals, whose steps and starts draw random numbers."""

    def reset(key):
        position = jax.random.normal(key, (1,))
        return position, position

    def step(key, position, action):
        position = position + 0.1 * (jnp.sum(action) - 1.0) + 0.1 * jax.random.normal(key, (1,))
        return position, position, -jnp.abs(position[0]), jnp.abs(position[0]) > 2, jnp.zeros((), bool)

    space = gymnasium.spaces.Box(-np.inf, np.inf, (1,))
    return envs.with_auto_reset(reset, step, space, actions, 7)


@pytest.mark.parametrize("name", ["double huber", "PPO, several choices", "SAC, box"])
def test_no_key_is_used_twice(name):
    case = CASES[name]
    env, agent = walk(case.actions), case.agent()
    if case.memory.demand is None:
        agent = agent._replace(cadence=with_schedule(warmup=8, period=4, updates=2).cadence)
    with jax.debug_key_reuse(True):
        with pytest.raises(jax.errors.KeyReuseError):  # the check itself works with typed keys
            jax.jit(lambda key: jax.random.bits(key) + jax.random.bits(key))(jax.random.key(0))
        training = train(agent, env, num_steps=40, num_envs=2, history_length=2)
        result = jax.jit(training.run)(jax.random.key(0))
        assert int(result.state.updates) > (4 if case.memory.demand is None else 2)
        if name == "double huber":  # The other driver draws with the same functions, whatever the agent.
            online = OnlineAgent(agent, env.observation_space, env.action_space, seed=1)
            for t in range(20):
                online.act_and_train(np.array([0.1 * t], np.float32), 1.0)
            assert online.get_statistics()["n_updates"] > 2
