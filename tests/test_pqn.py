"""PQN against a slow model in NumPy: its targets and its loss, what it may choose, what it learns from, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gymnasium import spaces
from linear_networks import linear

import dqn_jax
from dqn_jax import Masked, Transition
from dqn_jax.algorithms.pqn import pqn
from dqn_jax.networks import Network
from dqn_jax.types import Batch

T, N, F, A = 6, 2, 4, 3
ROWS = T * N
GAMMA, LAMBDA, RATE = 0.9, 0.7, 0.03


def rollout(is_masked, seed=0):
    """A rollout with both kinds of ends inside; the successors of terminated episodes allow nothing."""
    random = np.random.default_rng(seed)
    last = random.random((T, N)) < 0.4
    terminated = last & (random.random((T, N)) < 0.5)
    assert (last & ~terminated).any() and terminated.any() and not last[-1].all()
    observation, final = random.normal(size=(T + 1, N, F)).astype(np.float32), random.normal(size=(T, N, F)).astype(np.float32)
    mask = random.random((T + 1, N, A)) < 0.5
    np.put_along_axis(mask, random.integers(A, size=(T + 1, N, 1)), True, axis=-1)
    action = np.argmax(random.random((T, N, A)) * (mask[:-1] if is_masked else 1), axis=-1).astype(np.int32)
    successor = np.where(last[..., None], final, observation[1:])
    after = np.where(terminated[..., None], False, np.where(last[..., None], np.roll(mask[1:], 1, axis=-1), mask[1:]))
    seen = (Masked(observation[:-1], mask[:-1]), Masked(successor, after)) if is_masked else (observation[:-1], successor)
    discount = np.where(terminated, 0.0, GAMMA).astype(np.float32)
    return Transition(seen[0], action, random.normal(size=(T, N)).astype(np.float32), discount, seen[1], last)


def best(weights, observation, mask):
    """The highest value of what is allowed, 0 where nothing is."""
    values = observation.astype(np.float64) @ weights
    return max((value for value, allowed in zip(values, mask, strict=True) if allowed), default=0.0)


def model_targets(t, weights):
    """Each target ``[T, N]`` by itself, from the returns over 1, 2, ... steps."""
    successor = t.next_observation
    observation, mask = successor if isinstance(successor, Masked) else (successor, np.ones((T, N, A), bool))
    targets = np.zeros((T, N))
    for start, n in np.ndindex(T, N):
        paid, travelled, left = 0.0, 1.0, 1.0
        for row in range(start, T):
            paid += travelled * t.reward[row, n]
            travelled *= t.discount[row, n]
            ends = t.last[row, n] or row == T - 1
            share = left if ends else left * (1 - LAMBDA)
            targets[start, n] += share * (paid + travelled * best(weights, observation[row, n], mask[row, n]))
            left *= LAMBDA
            if ends:
                break
    return targets


def fresh(t, optimizer, **options):
    algorithm = pqn(linear(A), optimizer, epsilon=0.1, lambda_=LAMBDA, **options)
    return algorithm, algorithm.init(jax.random.key(0), jax.tree.map(lambda leaf: leaf[0], t.observation))


@pytest.mark.parametrize("is_masked", [False, True], ids=["plain", "masked"])
def test_updates_go_down_the_slope_of_the_loss(is_masked):
    t, epochs = rollout(is_masked), 3
    algorithm, learner = fresh(t, optax.sgd(RATE), epochs=epochs, minibatch_size=ROWS)
    after, feedback = jax.jit(algorithm.learn)(learner, Batch(t), jax.random.key(1), 0)

    observation = (t.observation.observation if is_masked else t.observation).reshape(ROWS, F).astype(np.float64)
    weights, action = np.asarray(learner.params["w"], np.float64), t.action.ravel()
    targets, said = model_targets(t, weights).ravel(), []  # Once, by the values as they were.
    for _ in range(epochs):
        q = (observation @ weights)[np.arange(ROWS), action]
        said.append((0.5 * np.mean((targets - q) ** 2), q.mean()))
        slope = np.zeros((F, A))
        for row in range(ROWS):
            slope[:, action[row]] -= (targets[row] - q[row]) * observation[row] / ROWS
        weights = weights - RATE * slope
    np.testing.assert_allclose(after.params["w"], weights, rtol=1e-4, atol=1e-5)
    for name, expected in zip(("loss", "q"), np.mean(said, axis=0), strict=True):
        np.testing.assert_allclose(feedback.metrics[name], expected, rtol=1e-4, atol=1e-5, err_msg=name)
    assert feedback.priority == ()


def test_targets_do_not_depend_on_how_the_rollout_is_divided():
    # The values in them are computed a minibatch at a time: with a step size of 0 only the mean loss is left to see.
    t, losses = rollout(True), []
    for size in (1, 4, ROWS):
        algorithm, learner = fresh(t, optax.sgd(0.0), epochs=1, minibatch_size=size)
        after, feedback = jax.jit(algorithm.learn)(learner, Batch(t), jax.random.key(1), 0)
        np.testing.assert_array_equal(after.params["w"], learner.params["w"])
        losses.append(float(feedback.metrics["loss"]))
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)


def test_the_network_looks_at_successors_once_and_at_each_row_once_an_epoch():
    """How many rows go through the network in one update, forwards; a pass that is differentiated counts once."""
    t, plain, looked_at = rollout(False), linear(A), []

    def apply(params, observation):
        jax.debug.callback(lambda rows: looked_at.append(len(rows)), observation)
        return plain.apply(params, observation)

    algorithm = pqn(Network(plain.init, apply), optax.sgd(RATE), epsilon=0.1, epochs=3, minibatch_size=4)
    learner = algorithm.init(jax.random.key(0), t.observation[0])
    jax.block_until_ready(jax.jit(algorithm.learn)(learner, Batch(t), jax.random.key(1), 0))
    jax.effects_barrier()
    assert sum(looked_at) == ROWS + 3 * ROWS and set(looked_at) == {4}


def test_forbidden_actions_are_never_chosen_however_good_they_look():
    random = np.random.default_rng(0)
    network = Network(lambda key, o: {"one": jnp.ones(())}, lambda params, o: o * params["one"])
    algorithm = pqn(network, optax.sgd(1.0), epsilon=0.5)
    values = (random.normal(size=(2000, 5)) * np.float32([1, 10, 100, 1e4, 1e6])).astype(np.float32)
    mask = random.random((2000, 5)) < 0.3
    np.put_along_axis(mask, random.integers(5, size=(2000, 1)), True, axis=-1)
    seen = Masked(values, mask)
    learner = algorithm.init(jax.random.key(0), seen)
    tried = np.asarray(algorithm.explore(learner, seen, algorithm.noise(learner, jax.random.key(0), 2000), 0).action)
    greedy = np.asarray(algorithm.exploit(learner, seen))
    for actions in (tried, greedy):
        assert np.take_along_axis(mask, actions[:, None], axis=-1).all()
    np.testing.assert_array_equal(greedy, np.where(mask, values, -np.inf).argmax(axis=1))
    assert 0.1 < (tried != greedy).mean() < 0.5


SPACES = spaces.Box(-1, 1, (F,)), spaces.Discrete(A)


@pytest.mark.parametrize("num_envs", [1, 2])
def test_epsilon_falls_with_the_transitions_stored(num_envs):
    options = {"network": linear(A), "rollout_length": 50, "batch_size": 50, "optimizer": optax.sgd(0.0), "epsilon": (1.0, 0.0, 200)}
    agent = dqn_jax.PQN(SPACES, num_envs=num_envs, **options)
    observation, different, said = np.random.default_rng(0).uniform(-1, 1, (num_envs, F)).astype(np.float32), [], []
    nothing = np.zeros(num_envs), np.zeros(num_envs, bool), np.zeros(num_envs, bool), observation
    for step in range(400 // num_envs):
        actions = agent.batch_act_and_train(observation, *(nothing if step else ()))
        different.extend(actions != agent.batch_act(observation))
        said.append(agent.get_statistics()["epsilon"])
    stored = np.arange(1, 400 // num_envs) * num_envs  # before each decision; statistics are those of the next one
    np.testing.assert_allclose(said[1:], np.maximum(0, 1 - stored / 200), atol=0.006 * num_envs)
    early, late = np.array(different)[:50], np.array(different)[200 + num_envs :]
    assert early.mean() > 0.4 and not late.any()


def test_every_transition_on_the_host_is_learnt_from_once():
    # Three rollouts of eight steps; an episode ends on the boundary of two of them, another in the middle of one.
    steps, learnt = 24, []
    numbered = np.eye(steps + 1, dtype=np.float32)

    def keep(grads, state, params=None):
        # A unit vector's row of the weights is that observation's alone; with values of 0 its gradient is minus the target.
        jax.debug.callback(lambda w: learnt.append(set(np.flatnonzero(np.abs(w).sum(axis=1)))), grads["w"], ordered=True)
        return jax.tree.map(jnp.zeros_like, grads), state

    nought = Network(lambda key, o: {"w": jnp.zeros((o.shape[-1], 2))}, lambda params, o: o @ params["w"])
    optimizer = optax.GradientTransformation(lambda params: (), keep)
    both = spaces.Box(0, 1, (steps + 1,)), spaces.Discrete(2)
    agent = dqn_jax.PQN(both, network=nought, optimizer=optimizer, rollout_length=8, batch_size=2, epochs=1)
    for step in range(steps):
        agent.act_and_train(numbered[step], 1.0)
        if step in (7, 11):
            agent.stop_episode_and_train(numbered[steps], 1.0, terminated=step == 7)
    agent.act_and_train(numbered[steps], 1.0)
    assert agent.get_statistics()["n_updates"] == 3
    jax.effects_barrier()
    assert sorted(row for rows in learnt for row in rows) == list(range(steps))
    assert [set.union(*learnt[i : i + 4]) for i in (0, 4, 8)] == [set(range(i, i + 8)) for i in (0, 8, 16)]


def parameters_of(space, **options):
    agent = dqn_jax.pqn((space, spaces.Discrete(2)), **options)
    state = jax.eval_shape(agent.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *space.shape), space.dtype))
    return state.learner.params["params"]


@pytest.mark.parametrize(
    ("space", "layers"),
    [(spaces.Box(-1, 1, (4,)), 2), (spaces.Box(0, 1, (10, 10, 4), bool), 2), (spaces.Box(0, 255, (84, 84, 4), np.uint8), 4)],
    ids=["vector", "minatar", "nature"],
)
def test_every_layer_but_the_last_is_normalised_by_default(space, layers):
    for wanted in (True, False):
        names = parameters_of(space, **({} if wanted else {"layer_norm": False}))
        assert sum(name.startswith("LayerNorm") for name in names) == (layers if wanted else 0)


def test_the_learning_rate_falls_with_the_transitions_learnt_from():
    options = {"network": linear(A), "rollout_length": 8, "batch_size": 4, "epochs": 2, "max_grad_norm": None}
    agent = dqn_jax.PQN(SPACES, learning_rate=(0.1, 0.0, 16), **options)
    looks, random = [], np.random.default_rng(0)
    for _ in range(4 * 8 + 1):
        agent.act_and_train(random.uniform(-1, 1, F).astype(np.float32), 1.0)
        looks.append(np.asarray(agent.state.learner.params["w"]))
    moved = [(looks[i + 8] != looks[i]).any() for i in (0, 8, 16, 24)]
    assert moved == [True, True, False, False]  # 16 transitions, then nothing more.


@pytest.mark.parametrize("options", [{"epochs": 0}, {"minibatch_size": 0}])
def test_the_factory_checks_what_is_static(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        pqn(linear(A), optax.sgd(1.0), epsilon=0.1, **options)


def test_what_does_not_divide_or_is_no_rollout_is_refused_when_learnt_from():
    t = rollout(False)
    algorithm, learner = fresh(t, optax.sgd(1.0), minibatch_size=5)
    with pytest.raises(ValueError, match="12 transitions do not divide into minibatches of 5"):
        algorithm.learn(learner, Batch(t), jax.random.key(1), 0)
    with pytest.raises(AssertionError):
        algorithm.learn(learner, Batch(jax.tree.map(lambda leaf: leaf[:, 0], t)), jax.random.key(1), 0)
