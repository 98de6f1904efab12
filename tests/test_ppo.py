"""PPO against slow models in NumPy: its loss and its targets, what it clips, where it stops, what it normalises, how it acts."""

import functools

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gymnasium import spaces

import dqn_jax
from dqn_jax import Masked, Transition, distributions
from dqn_jax.algorithms.ppo import ppo
from dqn_jax.networks import Network
from dqn_jax.types import Batch

T, N, F = 6, 2, 4
ROWS = T * N
GAMMA, LAMBDA = 0.9, 0.8
SIZES = (3, 2)
KINDS = {
    "categorical": distributions.categorical(3),
    "masked": distributions.categorical(3),
    "multi": distributions.multi_categorical(SIZES),
    "normal": distributions.normal(2),
}


def linear(num_outputs, scale=0.5):
    """Outputs and value are linear in the observation, with random parameters of that size."""

    def init(key, observation):
        random, (_, size) = np.random.default_rng(0), observation.shape
        shapes = {"policy": (size, num_outputs), "policy_bias": (num_outputs,), "value": (size,), "value_bias": ()}
        return {name: jnp.asarray(scale * random.normal(size=shape), jnp.float32) for name, shape in shapes.items()}

    def apply(params, observation):
        return observation @ params["policy"] + params["policy_bias"], observation @ params["value"] + params["value_bias"]

    return Network(init, apply)


def network_of(kind):
    # Deviations of one normal that differ by orders of magnitude would make ratios that no float holds.
    return linear(KINDS[kind].num_outputs, 0.15 if kind == "normal" else 0.5)


# The model: one row at a time, float64.


def judge(kind, outputs, mask, action):
    """The log-probability of an action, and the entropy, of one observation."""
    if kind == "normal":
        mean, log_std = np.split(outputs, 2)
        log_density = -0.5 * ((action - mean) / np.exp(log_std)) ** 2 - np.log(np.exp(log_std) * np.sqrt(2 * np.pi))
        return log_density.sum(), (log_std + 0.5 * np.log(2 * np.pi * np.e)).sum()
    log_prob = entropy = 0.0
    branches = np.split(outputs, np.cumsum(SIZES)[:-1]) if kind == "multi" else [outputs]
    for logits, choice in zip(branches, np.atleast_1d(action), strict=True):
        allowed = np.arange(len(logits)) if mask is None else np.flatnonzero(mask)
        weights = np.exp(logits[allowed] - logits[allowed].max())
        probability = dict(zip(allowed, weights / weights.sum(), strict=True))
        log_prob += np.log(probability[int(choice)])
        entropy -= sum(p * np.log(p) for p in probability.values())
    return log_prob, entropy


def apply(params, observation):
    return observation @ params["policy"] + params["policy_bias"], observation @ params["value"] + params["value_bias"]


def advantages(t, value, next_value, lambda_=LAMBDA):
    """Of rows ``[T, N]``: the sum is cut at every end."""
    result = np.zeros(t.reward.shape)
    for env in range(t.reward.shape[1]):
        following = 0.0
        for row in reversed(range(len(t.reward))):
            if t.last[row, env]:
                following = 0.0
            td_error = t.reward[row, env] + t.discount[row, env] * next_value[row, env] - value[row, env]
            result[row, env] = following = td_error + t.discount[row, env] * lambda_ * following
    return result


def model_loss(kind, params, rows, *, clip=0.2, value_coef=0.5, entropy_coef=0.01, value_clip=None):
    """The loss of a minibatch and what is reported; ``rows`` are (observation, mask, action, log_prob, advantage, value, target)."""
    raw = np.array([row[4] for row in rows])
    parts = []
    for (observation, mask, action, old_log_prob, _, old_value, target), advantage in zip(
        rows, (raw - raw.mean()) / raw.std(), strict=True
    ):
        outputs, value = apply(params, observation)
        log_prob, entropy = judge(kind, outputs, mask, action)
        ratio = np.exp(log_prob - old_log_prob)
        surrogate = min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)
        error = (value - target) ** 2
        if value_clip is not None:
            near = old_value + min(max(value - old_value, -value_clip), value_clip)
            error = max(error, (near - target) ** 2)
        parts.append((-surrogate, 0.5 * error, entropy, ratio - 1 - np.log(ratio), abs(ratio - 1) > clip))
    policy_loss, value_loss, entropy, kl, clipped = np.mean(parts, axis=0)
    loss = policy_loss + value_coef * value_loss - entropy_coef * entropy
    return loss, {"loss": loss, "policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy, "kl": kl, "clipped": clipped}


def slope(function, params, step=1e-6):
    """The gradient by finite differences."""
    grads = {}
    for name, value in params.items():
        grads[name] = np.zeros(np.shape(value))
        for place in np.ndindex(np.shape(value)):
            sides = []
            for sign in (1, -1):
                moved = {**params, name: np.array(value)}
                moved[name][place] += sign * step
                sides.append(function(moved))
            grads[name][place] = (sides[0] - sides[1]) / (2 * step)
    return grads


def doubles(params):
    return {name: np.asarray(value, np.float64) for name, value in params.items()}


def rollout(kind, seed=0, drift=0.15):
    """A rollout with both kinds of ends inside, chosen by a policy that the network's parameters have since drifted away from."""
    random = np.random.default_rng(seed)
    observation, successor = random.normal(size=(2, T, N, F)).astype(np.float32)
    action = random.integers(SIZES if kind == "multi" else 3, size=(T, N, 2) if kind == "multi" else (T, N)).astype(np.int32)
    last, mask = random.random((T, N)) < 0.4, np.zeros((T, N, 3), bool)
    terminated = last & (random.random((T, N)) < 0.5)
    assert (last & ~terminated).any() and terminated.any()
    network = network_of(kind)
    behaviour = {k: v + drift * random.normal(size=v.shape) for k, v in doubles(network.init(None, observation[0])).items()}
    if kind == "normal":
        mean, log_std = np.split(apply(behaviour, observation)[0], 2, axis=-1)
        action = (mean + np.exp(log_std) * random.normal(size=mean.shape)).astype(np.float32)
    if kind == "masked":
        mask = random.random((T, N, 3)) < 0.5
        np.put_along_axis(mask, action[..., None], True, axis=-1)
    log_prob = np.array(
        [
            [
                judge(kind, apply(behaviour, observation[t, n])[0], mask[t, n] if kind == "masked" else None, action[t, n])[0]
                for n in range(N)
            ]
            for t in range(T)
        ]
    )
    seen = [Masked(o, mask) if kind == "masked" else o for o in (observation, successor)]
    reward, discount = random.normal(size=(T, N)), np.where(terminated, 0.0, GAMMA)
    extras = {"log_prob": log_prob.astype(np.float32)}
    return Transition(seen[0], action, reward.astype(np.float32), discount.astype(np.float32), seen[1], last, extras)


def model_rows(t, params):
    """The rows of a rollout as ``model_loss`` takes them."""
    is_masked = isinstance(t.observation, Masked)
    observation, successor = (o.observation if is_masked else o for o in (t.observation, t.next_observation))
    value, next_value = (apply(params, o.astype(np.float64))[1] for o in (observation, successor))
    advantage = advantages(t, value, next_value)
    mask = t.observation.action_mask if is_masked else np.full((T, N), None)
    fields = (observation, mask, t.action, t.extras["log_prob"], advantage, value, advantage + value)
    return [tuple(field[row] for field in fields) for row in np.ndindex(T, N)]


@functools.cache
def program(kind, optimizer, **static):
    """Learning, with the options that are numbers as arguments: cases that differ in those share it."""
    network = network_of(kind)
    return jax.jit(
        lambda learner, t, key, numbers: ppo(network, KINDS[kind], optimizer, **static, **numbers).learn(learner, Batch(t), key, 0)
    )


def fresh(kind, t, optimizer, values=None, **options):
    """A learner; ``values`` are those of unit vectors."""
    algorithm = ppo(network_of(kind), KINDS[kind], optimizer, **options)
    learner = algorithm.init(jax.random.key(0), jax.tree.map(lambda leaf: leaf[0], t.observation))
    if values is not None:
        learner.params.update(value=jnp.asarray(values, jnp.float32), value_bias=jnp.zeros(()))
    return learner


RATE = 0.03
SGD, ADAM = optax.sgd(RATE), optax.adam(0.1)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("categorical", {}),
        ("categorical", {"value_clip": 0.05}),
        ("masked", {"value_clip": 0.5, "clip": 0.4, "entropy_coef": 0.0}),
        *((kind, {"clip": 0.1, "value_coef": 1.5, "entropy_coef": 0.3}) for kind in ("masked", "multi", "normal")),
    ],
    ids=str,
)
def test_updates_go_down_the_slope_of_the_loss(kind, options):
    epochs, t = 3, rollout(kind)
    learner, numbers = fresh(kind, t, SGD), {"gae_lambda": LAMBDA, **options}
    after, feedback = program(kind, SGD, epochs=epochs, minibatch_size=ROWS)(learner, t, jax.random.key(1), numbers)

    params = doubles(learner.params)
    rows, said = model_rows(t, params), []
    for _ in range(epochs):
        said.append(model_loss(kind, params, rows, **options)[1])
        grads = slope(lambda p: model_loss(kind, p, rows, **options)[0], params)
        params = {name: value - RATE * grads[name] for name, value in params.items()}
    assert any(one["clipped"] for one in said)
    for name, value in params.items():
        np.testing.assert_allclose(after.params[name], value, rtol=2e-4, atol=2e-5, err_msg=name)
    for name in said[0]:
        np.testing.assert_allclose(feedback.metrics[name], np.mean([one[name] for one in said]), rtol=2e-4, atol=2e-5, err_msg=name)
    values, targets = np.array([row[5] for row in rows]), np.array([row[6] for row in rows])
    np.testing.assert_allclose(feedback.metrics["explained_variance"], 1 - np.var(targets - values) / np.var(targets), rtol=1e-3, atol=1e-4)
    assert feedback.priority == ()


# Rows that can be told apart: each observation is a unit vector, so the gradient at a row's parameters is that row's alone.


@functools.cache
def recorder(number):
    """An optimizer that moves nothing and keeps every gradient: ``(gradients so far, [number, ...])``."""

    def init(params):
        return jnp.zeros((), jnp.int32), jax.tree.map(lambda leaf: jnp.zeros((number, *leaf.shape)), params)

    def update(grads, state, params=None):
        count, kept = state
        kept = jax.tree.map(lambda all_of_it, leaf: all_of_it.at[count].set(leaf), kept, grads)
        return jax.tree.map(jnp.zeros_like, grads), (count + 1, kept)

    return optax.GradientTransformation(init, update)


def told_apart(seed=0, length=T, **fields):
    """A rollout of unit vectors: row number i sees vector i, its successor is vector ``rows + i``, unlike anything that was acted on."""
    random, rows = np.random.default_rng(seed), length * N
    observation, successor = np.eye(2 * rows, dtype=np.float32).reshape(2, length, N, 2 * rows)
    last = random.random((length, N)) < 0.4
    terminated = last & (random.random((length, N)) < 0.5)
    t = Transition(
        observation,
        random.integers(3, size=(length, N)).astype(np.int32),
        random.normal(size=(length, N)).astype(np.float32),
        np.where(terminated, 0.0, GAMMA).astype(np.float32),
        successor,
        last,
        {"log_prob": np.full((length, N), -1.0, np.float32)},
    )
    return t._replace(**fields)


def recorded(
    t,
    *,
    number=1,
    seed=0,
    learner=None,
    values=None,
    epochs=1,
    minibatch_size=None,
    scale_reward=False,
    normalize_advantage=True,
    **numbers,
):
    """A learner that has recorded the gradients of one rollout, which have moved nothing."""
    static = {"epochs": epochs, "minibatch_size": minibatch_size or t.reward.size, "scale_reward": scale_reward}
    static["normalize_advantage"] = normalize_advantage
    if learner is None:
        learner = fresh("categorical", t, recorder(number), values, scale_reward=scale_reward)
    return program("categorical", recorder(number), **static)(learner, t, jax.random.key(seed), {"value_coef": 1.0, **numbers})


def targets_used(t, after):
    """The value targets ``[T, N]``, read off the one gradient that was recorded."""
    rows, params = t.reward.size, doubles(after.params)
    grad = np.asarray(after.opt_state[1]["value"][0], np.float64)[:rows]
    value = params["value"][:rows] + params["value_bias"]
    return (value - rows * grad).reshape(t.reward.shape)


def values_of(t, after):
    rows, params = t.reward.size, doubles(after.params)
    value = params["value"] + params["value_bias"]
    return value[:rows].reshape(t.reward.shape), value[rows:].reshape(t.reward.shape)


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("lambda_", [0.0, LAMBDA, 1.0])
def test_the_value_target_is_made_of_advantages_as_they_were_before_normalisation(scale, lambda_):
    t = told_apart()
    t = t._replace(reward=t.reward * np.float32(scale) + np.float32(3 * scale))
    after, _ = recorded(t, gae_lambda=lambda_)
    value, next_value = values_of(t, after)
    wanted = value + advantages(t, value, next_value, lambda_)
    np.testing.assert_allclose(targets_used(t, after), wanted, rtol=1e-4, atol=1e-4 * scale)
    # They are far from what normalised advantages would give: mean 0, deviation 1, around the values.
    assert abs((wanted - value).mean()) > 2 * scale


def test_a_truncated_row_is_worth_what_its_true_successor_is_and_a_terminated_one_nothing_more():
    last, discount = np.zeros((3, N), bool), np.full((3, N), GAMMA, np.float32)
    last[2, 0], discount[2, 0] = True, GAMMA  # The last row: truncated.
    last[2, 1], discount[2, 1] = True, 0.0  # Terminated.
    last[0, 0], discount[0, 0] = True, GAMMA  # And inside the rollout.
    last[0, 1], discount[0, 1] = True, 0.0
    reward = np.ones((3, N), np.float32)
    # Of rows 0 to 5, then of their successors: those of the last rows are worth 100 and 110.
    values = np.array([0, 10, 20, 30, 40, 50, 60, 70, 40, 50, 100, 110], np.float32)
    t = told_apart(length=3, reward=reward, discount=discount, last=last)
    after, _ = recorded(t, gae_lambda=1.0, values=values)
    ends = [1 + GAMMA * 100, 1.0]
    wanted = [[1 + GAMMA * 60, 1.0], [1 + GAMMA * ends[0], 1 + GAMMA * ends[1]], ends]
    np.testing.assert_allclose(targets_used(t, after), wanted, rtol=1e-5, atol=1e-4)
    # Where the rollout ends and the episode does not, the successor's value stands in, too.
    values[6:8] = values[2:4]
    t = t._replace(last=np.zeros((3, N), bool), discount=np.full((3, N), GAMMA, np.float32))
    after, _ = recorded(t, gae_lambda=1.0, values=values)
    wanted = [[sum(GAMMA**k for k in range(left)) + GAMMA**left * end for end in (100, 110)] for left in (3, 2, 1)]
    np.testing.assert_allclose(targets_used(t, after), wanted, rtol=1e-5, atol=1e-4)


def rows_in(after):
    """Which rows each recorded gradient was of."""
    grads = np.asarray(after.opt_state[1]["value"])
    return [set(np.flatnonzero(grad).tolist()) for grad in grads[: int(after.opt_state[0])]]


def test_every_row_is_learnt_from_once_in_each_epoch_in_an_order_of_its_own():
    t, orders = told_apart(), set()
    for seed in range(3):
        after, _ = recorded(t, number=8, minibatch_size=3, epochs=2, seed=seed)
        batches = rows_in(after)
        assert [len(rows) for rows in batches] == [3] * 8
        for epoch in (batches[:4], batches[4:]):
            assert set.union(*epoch) == set(range(ROWS))
            orders.add(tuple(tuple(sorted(rows)) for rows in epoch))
    assert len(orders) == 6


@pytest.mark.parametrize("normalised", [True, False])
def test_advantages_are_normalised_within_each_minibatch_or_as_they_are(normalised):
    t = told_apart()
    options = {"minibatch_size": 3, "gae_lambda": LAMBDA, "entropy_coef": 0.0, "clip": 1e6, "normalize_advantage": normalised}
    after, _ = recorded(t, number=4, **options)
    params, (value, next_value) = doubles(after.params), values_of(t, after)
    raw = advantages(t, value, next_value).ravel()
    for number, rows in enumerate(sorted(batch) for batch in rows_in(after)):
        advantage = (raw[rows] - raw[rows].mean()) / raw[rows].std() if normalised else raw[rows]
        for row, of_row in zip(rows, advantage, strict=True):
            logits = params["policy"][row] + params["policy_bias"]
            probability = np.exp(logits) / np.exp(logits).sum()
            action, ratio = t.action.ravel()[row], probability[t.action.ravel()[row]] / np.exp(-1.0)
            wanted = -of_row * ratio * (np.eye(3)[action] - probability) / 3
            np.testing.assert_allclose(after.opt_state[1]["policy"][number, row], wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("ratio", "of_the_good", "of_the_bad"),
    [(1.0, True, True), (1.15, True, True), (1.25, False, True), (3.0, False, True), (0.85, True, True), (0.75, True, False)],
)
def test_a_ratio_that_left_the_range_counts_only_where_it_is_to_come_back(ratio, of_the_good, of_the_bad):
    last, reward = np.ones((1, N), bool), np.array([[1.0, -1.0]], np.float32)  # A good action and a bad one.
    t = told_apart(length=1, reward=reward, discount=np.zeros((1, N), np.float32), last=last)
    learner = fresh("categorical", t, recorder(1), values=np.zeros(2 * N))
    params = doubles(learner.params)
    now = [judge("categorical", apply(params, t.observation[0, n])[0], None, t.action[0, n])[0] for n in range(N)]
    t = t._replace(extras={"log_prob": (np.array([now]) - np.log(ratio)).astype(np.float32)})
    after, feedback = recorded(t, learner=learner, clip=0.2, entropy_coef=0.0)
    grads = np.asarray(after.opt_state[1]["policy"][0])[:N]
    assert [bool(grad.any()) for grad in grads] == [of_the_good, of_the_bad]
    assert float(feedback.metrics["clipped"]) == (abs(ratio - 1) > 0.2)
    if of_the_good:
        assert grads[0, t.action[0, 0]] < 0  # Down this slope the good action gets likelier,
    if of_the_bad:
        assert grads[1, t.action[0, 1]] > 0  # and the bad one less so.


@pytest.mark.parametrize("log_ratio", [4.0, -4.0, 1e3, -1e3])
def test_what_is_far_off_the_policy_moves_nothing(log_ratio):
    # Not even a bad action that has become much likelier, which is to come back: such a row would outweigh all others.
    last, reward = np.ones((1, N), bool), np.array([[1.0, -1.0]], np.float32)
    t = told_apart(length=1, reward=reward, discount=np.zeros((1, N), np.float32), last=last)
    learner = fresh("categorical", t, recorder(1), values=np.zeros(2 * N))
    params = doubles(learner.params)
    now = [judge("categorical", apply(params, t.observation[0, n])[0], None, t.action[0, n])[0] for n in range(N)]
    t = t._replace(extras={"log_prob": (np.array([now]) - log_ratio).astype(np.float32)})
    after, feedback = recorded(t, learner=learner, clip=0.2, entropy_coef=0.0)
    assert not np.asarray(after.opt_state[1]["policy"][0])[:N].any()
    assert float(feedback.metrics["kl"]) >= 0 and np.isfinite(float(feedback.metrics["loss"]))


def test_a_clipped_value_goes_no_further_than_its_range_in_one_rollout():
    last = np.ones((1, N), bool)
    t = told_apart(length=1, reward=np.full((1, N), 10.0, np.float32), discount=np.zeros((1, N), np.float32), last=last)
    learner, moved = fresh("categorical", t, SGD, values=np.zeros(2 * N)), {}
    for epochs in (1, 4):
        for value_clip in (0.5, 100.0):
            numbers = {"value_clip": value_clip, "value_coef": 0.2 / RATE, "entropy_coef": 0.0}
            learn = program("categorical", SGD, epochs=epochs, minibatch_size=N)
            moved[epochs, value_clip] = np.asarray(learn(learner, t, jax.random.key(0), numbers)[0].params["value"])[:N]
    # The first step, of a tenth of the way, leads out of the range. There only the clipped value counts, which is a constant.
    np.testing.assert_allclose(moved[1, 0.5], 1.0, rtol=1e-5)
    np.testing.assert_array_equal(moved[4, 0.5], moved[1, 0.5])
    assert (moved[4, 100.0] > 2).all()


def test_learning_stops_where_the_policy_has_moved_far_enough():
    t = rollout("categorical", drift=0.0)
    learner = fresh("categorical", t, ADAM)

    def learnt(epochs, **numbers):
        return program("categorical", ADAM, epochs=epochs, minibatch_size=ROWS)(learner, t, jax.random.key(1), numbers)

    once, _ = learnt(epochs=1)
    four, feedback = learnt(epochs=4, target_kl=1e-4)
    # Before the first step nothing has moved; after it enough has.
    for one, other in zip(jax.tree.leaves((once.params, once.opt_state)), jax.tree.leaves((four.params, four.opt_state)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)
    assert int(four.opt_state[0].count) == 1 and float(feedback.metrics["learnt"]) == 0.25
    # Metrics are those of the two minibatches that were looked at: before the step, and after it.
    first, second = (program("categorical", ADAM, epochs=1, minibatch_size=ROWS)(by, t, jax.random.key(1), {})[1] for by in (learner, once))
    for name in ("kl", "entropy"):  # The loss of the second is of other value targets.
        np.testing.assert_allclose(feedback.metrics[name], (first.metrics[name] + second.metrics[name]) / 2, rtol=1e-5, atol=1e-7)
    assert float(second.metrics["kl"]) > 1e-4
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(once.params), jax.tree.leaves(learner.params), strict=True))
    far, _ = learnt(epochs=4, target_kl=1e6)
    free, _ = learnt(epochs=4)
    assert int(far.opt_state[0].count) == int(free.opt_state[0].count) == 4
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6), far.params, free.params)


def test_once_stopped_it_stays_stopped_until_the_next_rollout():
    # One row's noted probability is far off; the others are as they were. Whoever looks at each minibatch alone learns from all the others.
    t = told_apart()
    learner = fresh("categorical", t, recorder(24))
    params = doubles(learner.params)
    log_prob = np.array([[judge("categorical", apply(params, t.observation[r])[0], None, t.action[r])[0] for r in np.ndindex(T, N)]])
    log_prob = log_prob.reshape(T, N).astype(np.float32)
    log_prob[2, 1] -= 3.0
    t, counts = t._replace(extras={"log_prob": log_prob}), []
    options = {"number": 24, "epochs": 2, "minibatch_size": 1, "target_kl": 0.1}
    for seed in range(6):
        after, _ = recorded(t, learner=learner, seed=seed, **options)
        seen = rows_in(after)
        assert {2 * N + 1} not in seen and len(seen) < ROWS
        counts.append(len(seen))
    assert len(set(counts)) > 2 and max(counts) > 0
    t.extras["log_prob"][2, 1] += 3.0
    after, _ = recorded(t, learner=after, **options)
    assert int(after.opt_state[0]) == counts[-1] + 2 * ROWS


# What was seen so far.


def test_rewards_are_scaled_as_by_a_loop_over_everything_seen_so_far():
    learner, running, totals, ends = None, np.zeros(N), [], []
    for number in range(5):
        t = told_apart(seed=number + 1)
        t = t._replace(reward=(5 * t.reward + 1).astype(np.float32))
        after, _ = recorded(t, gae_lambda=0.0, scale_reward=True, values=np.zeros(2 * ROWS), learner=learner)
        for row in range(T):
            running = running + t.reward[row]
            totals.append(running)
            running = running * np.where(t.last[row], 0.0, GAMMA)  # An episode that goes on does so in the next rollout.
        wanted = np.clip(t.reward / np.std(totals), -10, 10)
        # With values of zero the targets are the rewards as they were learnt from.
        np.testing.assert_allclose(targets_used(t, after), wanted, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(after.running, running, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(after.returns.mean, np.mean(totals), rtol=1e-4, atol=1e-5)
        assert float(after.returns.count) == len(totals) * N
        learner = after._replace(opt_state=recorder(1).init(after.params))
        ends += [np.any(running != 0)]
    assert any(ends[:-1])  # Some episode did.


def test_a_scaled_reward_is_no_larger_than_ten():
    # One reward all along does not vary: its deviation is nothing.
    t = told_apart(reward=np.full((T, N), -3.0, np.float32), last=np.ones((T, N), bool))
    after, _ = recorded(t, gae_lambda=0.0, scale_reward=True, values=np.zeros(2 * ROWS))
    np.testing.assert_allclose(targets_used(t, after), np.full((T, N), -10.0), rtol=1e-5)


def normalising(**options):
    return ppo(linear(3), KINDS["categorical"], optax.sgd(0.1), epochs=1, minibatch_size=ROWS, normalize_observation=True, **options)


def test_the_moments_of_observations_are_those_of_all_that_was_learnt_from():
    algorithm, everything = normalising(), []
    learner = algorithm.init(jax.random.key(0), jnp.zeros((N, F)))
    learn = jax.jit(algorithm.learn)
    for number in range(4):
        t = rollout("categorical", seed=number)
        t = t._replace(observation=t.observation * np.float32([1, 10, 0.1, 0]) + np.float32(100 * number))
        learner, _ = learn(learner, Batch(t), jax.random.key(number), 0)
        everything.append(t.observation.reshape(-1, F))
        seen = np.concatenate(everything).astype(np.float64)
        assert float(learner.observations.count) == len(seen)
        np.testing.assert_allclose(learner.observations.mean, seen.mean(axis=0), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(learner.observations.variance, seen.var(axis=0), rtol=1e-3, atol=1e-4)


def test_a_network_sees_what_is_normalised_by_moments_that_acting_does_not_change():
    algorithm, plain = normalising(), ppo(linear(3), KINDS["categorical"], optax.sgd(0.1))
    random = np.random.default_rng(0)
    learner = algorithm.init(jax.random.key(0), jnp.zeros((N, F)))
    start = plain.init(jax.random.key(0), jnp.zeros((N, F)))
    observation = (random.normal(size=(300, F)) * 5 + 7).astype(np.float32)
    noise = algorithm.noise(learner, jax.random.key(1), 300)
    # Before the first rollout nothing is known, and nothing changes, but for the clip.
    for one, other in zip(
        jax.tree.leaves(algorithm.explore(learner, observation, noise, 0)),
        jax.tree.leaves(plain.explore(start, np.clip(observation, -10, 10), noise, 0)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    t = rollout("categorical")
    learner, _ = jax.jit(algorithm.learn)(learner, Batch(t), jax.random.key(2), 0)
    mean, deviation = t.observation.reshape(-1, F).mean(axis=0), t.observation.reshape(-1, F).std(axis=0)
    seen = np.clip((observation - mean) / deviation, -10, 10)
    assert (np.abs(seen) == 10).any()
    start = start._replace(params=learner.params)
    decision = algorithm.explore(learner, observation, noise, 0)
    expected = plain.explore(start, seen, noise, 0)
    np.testing.assert_array_equal(decision.action, expected.action)
    np.testing.assert_allclose(decision.extras["log_prob"], expected.extras["log_prob"], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(algorithm.exploit(learner, observation), plain.exploit(start, seen))


def test_a_rollout_is_learnt_from_with_the_moments_that_it_was_chosen_by():
    options = {"network": linear(3), "optimizer": optax.sgd(0.1), "rollout_length": T, "batch_size": ROWS, "epochs": 1}
    agent = dqn_jax.ppo((spaces.Box(-9, 9, (F,)), spaces.Discrete(3)), **options, normalize_observation=True)
    random = np.random.default_rng(0)
    state = agent.init(jax.random.key(0), np.zeros((N, F), np.float32))
    explore, update = jax.jit(agent.explore), jax.jit(agent.update)
    for _ in range(3):
        before = dqn_jax.digest(state.learner)
        for _ in range(T):
            observation, successor = (4 * random.normal(size=(2, N, F)) + 9).astype(np.float32)
            state, decision = explore(state, observation, agent.noise(state, state.decisions, N))
            going = np.zeros(N, bool)
            reward = random.normal(size=N).astype(np.float32)
            row = Transition(observation, decision.action, reward, np.ones(N, np.float32), successor, going, decision.extras)
            state = agent.observe(state, row)
        assert dqn_jax.digest(state.learner) == before  # Acting changes nothing.
        state, metrics = update(state, agent.draw(state, state.updates))
        # The one minibatch comes before anything has moved: with other moments its ratios would not be one.
        assert abs(float(metrics["kl"])) < 1e-6 and float(metrics["clipped"]) == 0
        assert dqn_jax.digest(state.learner) != before
    assert float(state.learner.observations.count) == 3 * ROWS


# Acting.

BOX = spaces.Box(np.float32([-1, 0, -np.inf, 2]), np.float32([3, np.inf, np.inf, 2.5]))


def through_the_box(box, num_envs, tamper=lambda decision: decision):
    """Decisions of PPO in a Box, the parameters that they came from, and what it says of them when it learns."""
    network = linear(2 * box.shape[0])
    agent = dqn_jax.ppo(
        (spaces.Box(-9, 9, (F,)), box), network=network, optimizer=optax.sgd(0.0), rollout_length=1, batch_size=num_envs, epochs=1
    )
    observation = np.random.default_rng(0).normal(size=(num_envs, F)).astype(np.float32)
    state = agent.init(jax.random.key(0), observation)
    state, decision = agent.explore(state, observation, agent.noise(state, 0, num_envs))
    chosen, zeros = tamper(decision), np.zeros(num_envs, np.float32)
    row = Transition(observation, chosen.action, observation[:, 0], zeros, observation, zeros > 1, chosen.extras)
    state = agent.observe(state, row)
    _, metrics = agent.update(state, agent.draw(state, 0))
    outputs, _ = network.apply(state.learner.params, observation)
    return decision, np.asarray(outputs, np.float64), metrics, np.asarray(agent.exploit(state.learner, observation))


def test_actions_in_a_box_are_draws_scaled_to_its_bounds_and_cut_off_there():
    decision, outputs, metrics, greedy = through_the_box(BOX, 500)
    drawn = np.asarray(decision.extras["drawn"], np.float64)
    scale, middle = np.array([2, 1, 1, 0.25]), np.array([1, 0, 0, 2.25])
    np.testing.assert_allclose(decision.action, np.clip(middle + scale * drawn, BOX.low, BOX.high), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(greedy, np.clip(middle + scale * outputs[:, :4], BOX.low, BOX.high), rtol=1e-5, atol=1e-5)
    action = np.asarray(decision.action)
    assert action.dtype == np.float32 and all(BOX.contains(one) for one in (*action, *greedy))
    assert (action == BOX.low).any(axis=0).tolist() == [True, True, False, True]
    assert (action == BOX.high).any(axis=0).tolist() == [True, False, False, True]
    # The noted probability, and the ratio, are those of the draw, not of what was made of it.
    log_prob = [judge("normal", *row)[0] for row in zip(outputs, [None] * 500, drawn, strict=True)]
    np.testing.assert_allclose(decision.extras["log_prob"], log_prob, rtol=1e-4, atol=1e-4)
    assert abs(float(metrics["kl"])) < 1e-6 and float(metrics["clipped"]) == 0

    def cut_off(decision):
        return decision._replace(extras={**decision.extras, "drawn": (decision.action - middle) / scale})

    assert through_the_box(BOX, 500, cut_off)[2]["kl"] > 0.1  # A ratio of the action that was taken would be seen above.


def test_a_box_without_bounds_gets_the_draws_as_they_are():
    box = spaces.Box(-np.inf, np.inf, (2,))
    decision, _, metrics, _ = through_the_box(box, 50)
    np.testing.assert_array_equal(decision.action, decision.extras["drawn"])
    assert abs(float(metrics["kl"])) < 1e-6


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
def test_a_box_of_any_shape(shape):
    box, network = spaces.Box(-2, 5, shape), linear(2 * int(np.prod(shape)))
    agent = dqn_jax.ppo((spaces.Box(-1, 1, (F,)), box), network=network, optimizer=optax.sgd(0.1), rollout_length=2, batch_size=4)
    observation, zeros = np.random.default_rng(0).normal(size=(2, F)).astype(np.float32), np.zeros(2, np.float32)
    state = agent.init(jax.random.key(0), observation)
    for _ in range(2):
        state, decision = agent.explore(state, observation, agent.noise(state, state.decisions, 2))
        assert all(box.contains(np.asarray(one)) for one in decision.action)
        state = agent.observe(state, Transition(observation, decision.action, zeros, zeros, observation, zeros > 1, decision.extras))
    assert agent.exploit(state.learner, observation).shape == (2, *shape)
    state, metrics = agent.update(state, agent.draw(state, 0))
    assert all(np.isfinite(value) for value in metrics.values())


def test_forbidden_actions_are_never_chosen_however_good_they_look():
    random = np.random.default_rng(0)
    network = Network(lambda key, o: {"one": jnp.ones(())}, lambda params, o: (o * params["one"], o[:, 0]))
    algorithm = ppo(network, distributions.categorical(5), optax.sgd(1.0))
    logits = (random.normal(size=(2000, 5)) * np.float32([1, 10, 100, 1e4, 1e6])).astype(np.float32)
    mask = random.random((2000, 5)) < 0.3
    np.put_along_axis(mask, random.integers(5, size=(2000, 1)), True, axis=-1)
    seen = Masked(logits, mask)
    learner = algorithm.init(jax.random.key(0), seen)
    decision = algorithm.explore(learner, seen, algorithm.noise(learner, jax.random.key(0), 2000), 0)
    greedy = np.asarray(algorithm.exploit(learner, seen))
    for actions in (np.asarray(decision.action), greedy):
        assert np.take_along_axis(mask, actions[:, None], axis=-1).all()
    np.testing.assert_array_equal(greedy, np.where(mask, logits, -np.inf).argmax(axis=1))
    assert np.isfinite(decision.extras["log_prob"]).all()
    assert (np.asarray(decision.extras["log_prob"])[mask.sum(axis=1) == 1] == 0).all()  # The only one is certain.


def test_a_terminated_successor_may_forbid_everything():
    t = rollout("masked")
    nothing = np.where((t.discount == 0)[..., None], False, t.next_observation.action_mask)
    algorithm = ppo(linear(3), KINDS["masked"], optax.adam(0.1), minibatch_size=4)
    learner = algorithm.init(jax.random.key(0), jax.tree.map(lambda leaf: leaf[0], t.observation))
    given = [t._replace(next_observation=t.next_observation._replace(action_mask=mask)) for mask in (nothing, np.ones_like(nothing))]
    after = [jax.jit(algorithm.learn)(learner, Batch(one), jax.random.key(1), 0)[0] for one in given]
    jax.tree.map(np.testing.assert_array_equal, *after)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after[0]))


def test_every_transition_on_the_host_is_learnt_from_once():
    # Three rollouts of eight steps; an episode ends on the boundary of two of them, another in the middle of one.
    steps, network = 24, linear(2)
    both = spaces.Box(0, 1, (steps + 1,)), spaces.Discrete(2)
    agent = dqn_jax.PPO(both, network=network, optimizer=recorder(12), rollout_length=8, batch_size=2, epochs=1)
    numbered = np.eye(steps + 1, dtype=np.float32)
    for step in range(steps):
        agent.act_and_train(numbered[step], 1.0)
        if step in (7, 11):
            agent.stop_episode_and_train(numbered[steps], 1.0, terminated=step == 7)
    assert int(agent.learner.opt_state[0]) == 8  # The last transition is pending.
    agent.act_and_train(numbered[steps], 1.0)
    batches = rows_in(agent.learner)
    assert sorted(row for rows in batches for row in rows) == list(range(steps))
    assert [set.union(*batches[i : i + 4]) for i in (0, 4, 8)] == [set(range(i, i + 8)) for i in (0, 8, 16)]


@pytest.mark.parametrize("options", [{"epochs": 0}, {"minibatch_size": 0}])
def test_the_factory_checks_what_is_static(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ppo(linear(3), KINDS["categorical"], optax.sgd(1.0), **options)


def test_a_rollout_that_does_not_divide_is_refused_when_learnt_from():
    t = told_apart()
    with pytest.raises(ValueError, match="12 transitions do not divide into minibatches of 5"):
        recorded(t, minibatch_size=5)


class Lock(gymnasium.Env):
    """Pays for each of two wheels that stands right; an episode is one step."""

    observation_space, action_space = spaces.Box(-1, 1, (1,)), spaces.MultiDiscrete([4, 3])

    def reset(self, *, seed=None, options=None):
        return np.ones(1, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        return np.ones(1, np.float32), float(action[0] == 2) + float(action[1] == 1), True, False, {}


def test_choices_in_several_branches_are_learnt():
    env = Lock()
    agent = dqn_jax.PPO(env, 0, network=linear(7), optimizer=optax.adam(0.1), rollout_length=32, batch_size=32, epochs=4)
    for _ in range(32 * 20):
        observation, reward, *_ = env.step(agent.act_and_train(env.reset()[0], 0.0))
        agent.stop_episode_and_train(observation, reward)
    agent.act_and_train(env.reset()[0], 0.0)
    assert agent.act(env.reset()[0]).tolist() == [2, 1]
    assert agent.get_statistics()["n_updates"] == 20
