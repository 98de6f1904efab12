"""Curiosity: what it pays against slow models in NumPy, who moves whom, and what it makes of an algorithm."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear_networks import linear, policy_and_value

from dqn_jax import Masked, Transition
from dqn_jax.algorithms.dqn import dqn
from dqn_jax.algorithms.ppo import ppo
from dqn_jax.curiosity import snd
from dqn_jax.curiosity.curious import curious
from dqn_jax.curiosity.distillation import TargetLearning, distillation
from dqn_jax.curiosity.rnd import rnd
from dqn_jax.distributions import categorical
from dqn_jax.networks import MINATAR, FeatureNetwork
from dqn_jax.types import Batch

T, N, F, K = 5, 3, 4, 6
DISCOUNT = 0.9
TARGET, PREDICTOR = linear(K), linear(K)
PARTS = FeatureNetwork(K, (8,), parts=True)
STILL = optax.sgd(0.0)


def learning(kind, optimizer=None):
    """A target and how it learns."""
    optimizer = optax.sgd(0.1) if optimizer is None else optimizer
    if kind == "rnd":
        return TARGET, None
    if kind == "snd-std":
        return snd.with_classifiers(PARTS), TargetLearning(snd.infomax(PARTS.apply), optimizer)
    loss = snd.contrastive(TARGET.apply, snd.noisy) if kind == "snd-v" else snd.variance(TARGET.apply)
    return TARGET, TargetLearning(loss, optimizer)


KINDS = ["rnd", "snd-v", "snd-std", "snd-vic"]


def build(kind="rnd", predictor_optimizer=None, target_optimizer=None, **options):
    target, how = learning(kind, target_optimizer)
    optimizer = optax.sgd(0.1) if predictor_optimizer is None else predictor_optimizer
    return distillation(target, PREDICTOR, optimizer, learning=how, **options)


def stream(seed=0, lead=(T, N), scale=1.0, shift=0.0):
    random = np.random.default_rng(seed)
    see = lambda: (shift + scale * random.normal(size=(*lead, F))).astype(np.float32)  # noqa: E731
    last = random.random(lead) < 0.4
    discount = np.where(last & (random.random(lead) < 0.5), 0.0, DISCOUNT).astype(np.float32)
    action, reward = random.integers(2, size=lead).astype(np.int32), random.normal(size=lead).astype(np.float32)
    return jax.tree.map(jnp.asarray, Transition(see(), action, reward, discount, see(), last))


def begin(curiosity, num_envs=N):
    return jax.jit(curiosity.init)(jax.random.key(3), jnp.zeros((num_envs, F)))


def errors(state, rows, target=TARGET):
    """The bonus ``[...]`` before it is scaled, by float64."""
    of = lambda network, params: np.asarray(network.apply(params, jnp.asarray(rows.reshape(-1, F))), np.float64)  # noqa: E731
    return np.square(of(target, state.target) - of(PREDICTOR, state.predictor)).mean(axis=1).reshape(rows.shape[:-1])


# What it pays.


@pytest.mark.parametrize("on_successor", [True, False])
def test_the_bonus_is_the_mean_squared_error_times_its_scale(on_successor):
    curiosity = build(scale=0.5, bonus_on_successor=on_successor)
    state, t = begin(curiosity), stream()
    wanted = 0.5 * errors(state, t.next_observation if on_successor else t.observation)
    np.testing.assert_allclose(curiosity.reward(state, t), wanted, rtol=1e-5)
    clipped = build(scale=0.5, clip=float(np.median(wanted)), bonus_on_successor=on_successor).reward(state, t)
    np.testing.assert_allclose(clipped, np.minimum(wanted, np.median(wanted)), rtol=1e-5)


def test_in_rollouts_it_is_over_the_deviation_of_its_discounted_sums_which_know_no_episodes():
    curiosity = build(predictor_optimizer=STILL, discount=DISCOUNT)
    state = begin(curiosity)
    running, sums = np.zeros(N), []
    for seed in range(4):
        t = stream(seed)
        bonus = errors(state, t.next_observation)
        for row in bonus:
            running = DISCOUNT * running + row  # Whatever ended.
            sums.append(running)
        assert t.last.any()
        np.testing.assert_allclose(jax.jit(curiosity.reward)(state, t), bonus / np.std(sums), rtol=1e-4)
        before = state
        state, paid, _ = jax.jit(curiosity.learn)(state, t, jax.random.key(seed))
        np.testing.assert_allclose(paid, curiosity.reward(before, t), rtol=1e-5)
        np.testing.assert_allclose(state.running, running, rtol=1e-5)
        np.testing.assert_allclose(state.bonuses.variance, np.var(sums), rtol=1e-4)
        assert float(state.bonuses.count) == np.size(sums)
    with pytest.raises(ValueError, match=r"bonuses are summed over time in rollouts \[T, N\], got a batch \[8\]: leave out the discount"):
        curiosity.reward(state, stream(lead=(8,)))


def test_in_minibatches_the_bonus_is_the_same():
    """What is computed a part at a time: the first moments are those of the whole batch."""
    t = stream(scale=3.0)
    whole, parts = (build(normalize_observation=True, minibatch_size=size, predictor_optimizer=STILL) for size in (None, 5))
    state = begin(whole)
    for curiosity in (whole, parts):
        np.testing.assert_allclose(jax.jit(curiosity.reward)(state, t), whole.reward(state, t), rtol=1e-5)
    after = [jax.jit(curiosity.learn)(state, t, jax.random.key(0))[0] for curiosity in (whole, parts)]
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6), *after)


def test_in_batches_it_is_over_its_root_mean_square():
    curiosity = build(predictor_optimizer=STILL)
    state, seen = begin(curiosity), []
    for seed in range(3):
        t = stream(seed, (8,))
        bonus = errors(state, t.next_observation)
        seen.append(bonus)
        np.testing.assert_allclose(curiosity.reward(state, t), bonus / np.sqrt(np.mean(np.square(seen))), rtol=1e-4)
        state, *_ = jax.jit(curiosity.learn)(state, t, jax.random.key(seed))


def test_observations_are_normalised_by_what_earlier_batches_held_and_at_first_by_the_first():
    curiosity = build(normalize_observation=True, scale=1.0, predictor_optimizer=STILL)
    state, before = begin(curiosity), None
    for seed in range(3):
        t = stream(seed, scale=3.0, shift=np.arange(F))
        rows = np.asarray(t.next_observation, np.float64).reshape(-1, F)
        used = rows if before is None else before
        normalised = np.clip((t.next_observation - used.mean(axis=0)) / used.std(axis=0), -5, 5).astype(np.float32)
        np.testing.assert_allclose(jax.jit(curiosity.reward)(state, t), errors(state, normalised), rtol=1e-4)
        state, *_ = jax.jit(curiosity.learn)(state, t, jax.random.key(0))
        before = rows if before is None else np.concatenate([before, rows])
        np.testing.assert_allclose(state.observations.mean, before.mean(axis=0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state.observations.variance, before.var(axis=0), rtol=1e-4)
    far = t._replace(next_observation=t.next_observation + 1e3)
    np.testing.assert_allclose(curiosity.reward(state, far), errors(state, np.full_like(t.observation, 5.0)), rtol=1e-4)


def test_the_unit_of_observations_does_not_matter_once_they_are_normalised():
    curiosity = rnd(TARGET, PREDICTOR, optax.sgd(0.1))
    bonuses = []
    for scale, shift in ((1.0, 0.0), (1e3, -5e3)):
        state = begin(curiosity)
        for seed in range(3):
            t = stream(seed, scale=scale, shift=shift)
            bonuses.append(curiosity.reward(state, t))
            state, *_ = jax.jit(curiosity.learn)(state, t, jax.random.key(seed))
    for one, other in zip(bonuses[:3], bonuses[3:], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bonus_falls_where_the_agent_has_been_and_not_elsewhere(kind):
    target, how = learning(kind, optax.adam(1e-3))
    curiosity = distillation(target, FeatureNetwork(K, (32, 32)), optax.adam(1e-2), learning=how, scale=1.0)
    # Half of all corners are visited.
    corners = np.array(np.meshgrid(*[[0.0, 1.0]] * F), np.float32).reshape(F, -1).T
    visited, new = corners[::2], corners[1::2]
    state = begin(curiosity, 1)
    reward = jax.jit(curiosity.reward)
    row = lambda rows: Transition(rows, None, np.zeros(len(rows), np.float32), None, jnp.roll(rows, 1, axis=0), None)  # noqa: E731
    begun = [np.mean(reward(state, row(rows))) for rows in (visited, new)]
    keys = jax.random.split(jax.random.key(0), 300)
    see = lambda s, key: (curiosity.learn(s, row(jnp.asarray(visited)), key)[0], None)  # noqa: E731
    state, _ = jax.jit(lambda state: jax.lax.scan(see, state, keys))(state)
    ended = [np.mean(reward(state, row(rows))) for rows in (visited, new)]
    assert ended[0] < 0.1 * begun[0]
    assert ended[1] > 5 * ended[0]


def test_forbidden_actions_do_not_make_an_observation_new():
    t = stream()
    mask = np.random.default_rng(0).random((T, N, 2)) < 0.5
    masked = t._replace(observation=Masked(t.observation, mask), next_observation=Masked(t.next_observation, mask))
    curiosity = build()
    state = begin(curiosity)
    with_mask = curiosity.init(jax.random.key(3), Masked(jnp.zeros((N, F)), jnp.ones((N, 2), bool)))
    jax.tree.map(np.testing.assert_array_equal, with_mask, state)
    np.testing.assert_array_equal(curiosity.reward(state, masked), curiosity.reward(state, t))
    after = [jax.jit(curiosity.learn)(state, each, jax.random.key(0))[0] for each in (masked, t)]
    jax.tree.map(np.testing.assert_array_equal, *after)


# Who moves whom.


def moved(before, after):
    return any(bool((a != b).any()) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_random_target_stays_and_one_that_learns_moves(kind):
    curiosity = build(kind)
    state = begin(curiosity)
    after, _, metrics = jax.jit(curiosity.learn)(state, stream(), jax.random.key(0))
    assert moved(state.target, after.target) == (kind != "rnd")
    assert moved(state.predictor, after.predictor)
    assert set(metrics) == {"predictor_loss", "feature_spread"} | ({"target_loss"} if kind != "rnd" else set())
    assert all(np.isfinite(value) and value.shape == () for value in metrics.values())
    np.testing.assert_allclose(metrics["predictor_loss"], errors(state, stream().next_observation, learning(kind)[0]).mean(), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_neither_loss_reaches_the_others_network(kind):
    t, key = stream(), jax.random.key(0)
    state = begin(build(kind))
    both, *_ = jax.jit(build(kind).learn)(state, t, key)
    distilled, *_ = jax.jit(build(kind, target_optimizer=STILL).learn)(state, t, key)
    taught, *_ = jax.jit(build(kind, predictor_optimizer=STILL).learn)(state, t, key)
    assert not moved(state.target, distilled.target) and not moved(state.predictor, taught.predictor)
    # And neither step depends on whether the other is taken.
    jax.tree.map(np.testing.assert_array_equal, both.predictor, distilled.predictor)
    jax.tree.map(np.testing.assert_array_equal, both.target, taught.target)
    # Nor does a network move whose own loss has no slope: nothing of the other's comes through.
    target, _ = learning(kind)
    flat = TargetLearning(lambda params, now, following, key: (0.0 * sum(map(jnp.sum, jax.tree.leaves(params))), {}), optax.sgd(0.1))
    curiosity = distillation(target, PREDICTOR, optax.sgd(0.1), learning=flat)
    after, *_ = jax.jit(curiosity.learn)(state, t, key)
    assert not moved(state.target, after.target) and moved(state.predictor, after.predictor)
    if kind != "snd-std":  # Its predictor is of another kind than its target.
        alike = state._replace(predictor=state.target)
        after, *_ = jax.jit(build(kind, predictor_optimizer=optax.sgd(0.1)).learn)(alike, t, key)
        assert moved(alike.target, after.target) and not moved(alike.predictor, after.predictor)


def test_a_target_learns_from_so_many_rows_of_a_minibatch_other_ones_each_time():
    given = []

    def loss(params, now, following, key):
        jax.debug.callback(lambda rows: given.append(rows[:, 0].tolist()), following)
        return 0.0 * sum(map(jnp.sum, jax.tree.leaves(params))), {}

    t = stream(lead=(12,))
    for rows, expected in ((3, 3), (None, 4), (100, 4)):
        given.clear()
        few = TargetLearning(loss, optax.sgd(0.1), rows)
        curiosity = distillation(TARGET, PREDICTOR, optax.sgd(0.1), learning=few, scale=1.0, epochs=2, minibatch_size=4)
        jax.block_until_ready(jax.jit(curiosity.learn)(begin(curiosity, 1), t, jax.random.key(0)))
        jax.effects_barrier()
        assert [len(rows) for rows in given] == [expected] * 6 and len({*map(tuple, given)}) == 6


@pytest.mark.parametrize("share", [0.25, 0.5])
@pytest.mark.parametrize("mask_features", [True, False])
def test_the_predictor_learns_from_a_share_of_the_rows_or_of_the_features(share, mask_features):
    # Features of identity networks: row by row, feature by feature the gradient shows what was kept.
    rows = 400
    curiosity = build(scale=1.0, share=share, mask_features=mask_features, predictor_optimizer=optax.sgd(1.0))
    t = stream(lead=(rows,))
    # Each row is seen by one of the inputs alone.
    state = begin(curiosity, 1)
    state = state._replace(target={"w": jnp.ones((rows, K))}, predictor={"w": jnp.zeros((rows, K))})
    t = t._replace(next_observation=np.eye(rows, dtype=np.float32), observation=np.eye(rows, dtype=np.float32))
    after, *_ = jax.jit(curiosity.learn)(state, t, jax.random.key(0))
    kept = np.asarray(after.predictor["w"]) > 0
    if not mask_features:
        assert (kept.all(axis=1) | ~kept.any(axis=1)).all()
    else:
        assert (kept.any(axis=1) & ~kept.all(axis=1)).any()
    assert abs(kept.mean() - share) < 0.1
    # The loss is a mean over what was kept.
    np.testing.assert_allclose(np.asarray(after.predictor["w"])[kept], 2.0 / kept.sum(), rtol=1e-5)


def test_each_row_is_learnt_from_once_an_epoch():
    rows = 12
    curiosity = build(scale=1.0, epochs=2, minibatch_size=4, predictor_optimizer=optax.sgd(1e-3))
    t = stream(lead=(rows,))._replace(next_observation=np.eye(rows, dtype=np.float32))
    state = begin(curiosity, 1)._replace(target={"w": jnp.ones((rows, K))}, predictor={"w": jnp.zeros((rows, K))})
    after, *_ = jax.jit(curiosity.learn)(state, t, jax.random.key(0))
    np.testing.assert_allclose(after.predictor["w"], 2 * 1e-3 * 2 / (4 * K), rtol=1e-3)
    with pytest.raises(ValueError, match="12 transitions do not divide into minibatches of 5"):
        build(minibatch_size=5).learn(state, t, jax.random.key(0))
    with pytest.raises(ValueError, match="epochs and minibatch_size must be at least 1, got 0 and None"):
        build(epochs=0)


# The losses of SND.


def test_the_contrastive_loss_is_that_of_its_pairs():
    rows, random = 64, np.random.default_rng(0)
    features = random.normal(size=(rows, K))
    apply = lambda params, index: jnp.asarray(features, jnp.float32)[index[:, 0].astype(int)]  # noqa: E731
    pairs = []

    def note(key, index):
        pairs.append(np.asarray(index[:, 0], int))
        return index

    index = np.arange(rows, dtype=np.float32)[:, None]
    loss, _ = snd.contrastive(apply, note)({}, index, None, jax.random.key(0))
    first, second = pairs
    np.testing.assert_array_equal(first, np.arange(rows))
    differs = first != second
    assert 0.25 < differs.mean() < 0.75
    distance = np.square(features[first] - features[second]).mean(axis=1)
    np.testing.assert_allclose(loss, np.square(differs - distance).mean(), rtol=1e-5)
    features *= 20  # Beyond what is left alone.
    square = np.square(features[first]).mean() + np.square(features[second]).mean()
    distance = np.square(features[first] - features[second]).mean(axis=1)
    assert square > 200
    again, _ = snd.contrastive(apply, lambda key, index: index)({}, index, None, jax.random.key(0))
    np.testing.assert_allclose(again, np.square(differs - distance).mean() + square - 200, rtol=1e-5)


def test_the_loss_by_variance_is_vicregs():
    random = np.random.default_rng(0)
    first, second = (random.normal(size=(7, K)) * random.uniform(0.1, 2, K) for _ in range(2))

    def side(z):
        covariance = np.cov(z.T)
        beside = np.square(covariance).sum() - np.square(np.diag(covariance)).sum()
        return np.maximum(0, 1 - np.sqrt(z.var(axis=0, ddof=1) + 1e-4)).mean() + beside / K / 25

    wanted = np.square(first - second).mean() + side(first) + side(second)
    loss, _ = snd.variance(lambda params, rows: rows)({}, *map(jnp.float32, (first, second)), jax.random.key(0))
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)


def test_the_infomax_loss_is_that_of_a_classifier_of_rows_at_every_place():
    rows, places, width = 5, 3, 2
    random = np.random.default_rng(0)
    (z, zs), (c, cs) = random.normal(size=(2, rows, K)), random.normal(size=(2, rows, places, width))
    w, v = random.normal(size=(K, width)), random.normal(size=(width, width))
    total, norms = [], []
    for place in range(places):
        for scores in (zs @ w @ c[:, place].T, cs[:, place] @ v @ c[:, place].T):
            total += [np.log(np.exp(scores[i, i]) / np.exp(scores[i]).sum()) for i in range(rows)]
            norms += [np.linalg.norm(scores)]
    # Two losses, each a mean over the places; a row's features are to differ among themselves.
    wanted = 2 * (-np.mean(total) + 0.3 * np.mean(norms)) - 0.2 * z.std(axis=1).mean()
    apply = lambda params, now: (jnp.float32(z), jnp.float32(c)) if now else (jnp.float32(zs), jnp.float32(cs))  # noqa: E731
    params = {"network": {}, "classifiers": (jnp.float32(w), jnp.float32(v))}
    loss, _ = snd.infomax(apply, norm_coef=0.3, spread_coef=0.2)(params, True, False, jax.random.key(0))
    np.testing.assert_allclose(loss, wanted, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_rows_that_are_all_alike_have_finite_slopes(kind):
    curiosity = build(kind)
    t = jax.tree.map(jnp.zeros_like, stream())
    after, _, metrics = jax.jit(curiosity.learn)(begin(curiosity), t, jax.random.key(0))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((after, metrics)))


@pytest.mark.parametrize(("augment", "shape"), [(snd.noisy, (400, 50)), (snd.tiled, (400, 16, 12, 2))])
def test_another_view_leaves_out_and_adds_a_little_in_half_of_the_rows_each(augment, shape):
    sizes = set()
    for number in range(12):
        view = np.asarray(augment(jax.random.key(number), jnp.ones(shape)))
        noise, left_out = view - np.round(view), np.abs(view) < 0.5
        rest = tuple(range(1, len(shape)))
        noisy_rows, thinned = (np.abs(noise) > 1e-6).any(axis=rest), left_out.any(axis=rest)
        assert 0.4 < noisy_rows.mean() < 0.6 and thinned.mean() < 0.6 and np.abs(noise).max() <= 0.2
        assert (view[~noisy_rows & ~thinned] == 1).all()
        assert 0.03 < left_out.mean() < 0.08  # A tenth of half of them.
        if augment is snd.tiled:  # In squares, of all channels.
            np.testing.assert_array_equal(left_out[..., 0], left_out[..., 1])
            for image in left_out[thinned][..., 0]:
                sizes.add(
                    next(
                        side
                        for side in reversed(snd.TILES)
                        if all(
                            len(set(image[y : y + side, x : x + side].ravel())) == 1 for y in range(0, 16, side) for x in range(0, 12, side)
                        )
                    )
                )
    assert augment is snd.noisy or len(sizes) >= 4


def test_parts_are_the_places_of_the_last_convolution_or_the_last_hidden_layer():
    image, vector = jnp.ones((2, 10, 10, 4)), jnp.ones((2, 7))
    for rows, convolutions, hidden, wanted in ((image, MINATAR, (8,), (2, 64, 16)), (vector, (), (8, 9), (2, 1, 9))):
        network = FeatureNetwork(K, hidden, convolutions, parts=True)
        params = network.init(jax.random.key(0), rows)
        features, parts = network.apply(params, rows)
        assert features.shape == (2, K) and parts.shape == wanted
        np.testing.assert_array_equal(FeatureNetwork(K, hidden, convolutions).apply(params, rows), features)


# What it makes of an algorithm.


def test_a_replay_agent_is_paid_when_it_learns():
    seen = []
    plain = dqn(linear(2), optax.sgd(0.1), epsilon=0.1)

    def learn(learner, batch, key, step):
        seen.append(batch)
        return plain.learn(learner, batch, key, step)

    curiosity = build()
    agent = curious(plain._replace(learn=learn), curiosity, weight=0.5)
    state = agent.init(jax.random.key(0), jnp.zeros((N, F)))
    t = stream(lead=(8,))
    windows = t._replace(**{name: getattr(t, name)[:, None] for name in ("reward", "discount", "last")})
    bonus = curiosity.reward(state.curiosity, t)
    after, feedback = agent.learn(state, Batch(windows), jax.random.key(1), 0)
    np.testing.assert_allclose(seen[0].transition.reward, t.reward + 0.5 * bonus, rtol=1e-6)
    np.testing.assert_array_equal(seen[0].transition.discount, t.discount)
    np.testing.assert_allclose(feedback.metrics["intrinsic_reward"], 0.5 * np.mean(bonus), rtol=1e-6)
    assert {"loss", "q", "predictor_loss", "feature_spread"} <= set(feedback.metrics)
    assert moved(state.learner.params, after.learner.params) and moved(state.curiosity.predictor, after.curiosity.predictor)
    # The same rows once more: what the agent has learnt since is worth less.
    for number in range(30):
        after, _ = jax.jit(agent.learn)(after, Batch(windows), jax.random.key(number), 0)
    raw = [errors(each.curiosity, t.next_observation).mean() for each in (state, after)]
    assert raw[1] < 0.5 * raw[0]
    with pytest.raises(ValueError, match=r"a bonus cannot be added to windows of 3 steps.*give n_steps=1"):
        three = t._replace(**{name: np.repeat(getattr(t, name)[:, None], 3, axis=1) for name in ("reward", "discount", "last")})
        agent.learn(state, Batch(three), jax.random.key(1), 0)


def test_ppo_values_what_is_new_apart_and_across_the_ends_of_episodes():
    """Value targets of both streams, read off gradients of a value for each row of a table."""
    rows, bonus_discount, lam = T * N, 0.8, 0.7
    t = stream()
    index = np.arange(rows).reshape(T, N)
    # Observations are numbers of rows of the table; a successor is a row of its own where an episode ended, else the next row.
    following = np.concatenate([index[1:], rows + index[-1:] * 0 + np.arange(N)])
    successor = np.where(t.last, rows + N + index, following)
    random = np.random.default_rng(1)
    params = {"values": jnp.float32(random.normal(size=(2 * rows + N, 2))), "logits": jnp.zeros(2)}

    class Table:
        init = staticmethod(lambda key, observation: params)

        @staticmethod
        def apply(params, observation):
            return jnp.broadcast_to(params["logits"], (len(observation), 2)), params["values"][observation[:, 0].astype(int)]

    log_prob = np.full((T, N), np.log(0.5), np.float32)
    bonus = random.uniform(size=(T, N)).astype(np.float32)
    extras = {"log_prob": log_prob, "intrinsic_reward": bonus, "intrinsic_discount": np.full((T, N), bonus_discount, np.float32)}
    t = t._replace(observation=index[..., None].astype(np.float32), next_observation=successor[..., None].astype(np.float32), extras=extras)
    keep = optax.GradientTransformation(
        lambda params: params, lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads)
    )
    algorithm = ppo(
        Table, categorical(2), keep, epochs=1, minibatch_size=rows, gae_lambda=lam, value_coef=1.0, extrinsic_coef=2.0, intrinsic_coef=0.5
    )
    learner = algorithm.init(jax.random.key(0), t.observation[0])
    after, _ = jax.jit(algorithm.learn)(learner, Batch(t), jax.random.key(0), 0)
    value = np.asarray(params["values"], np.float64)
    targets = value[:rows] - rows * np.asarray(after.opt_state["values"], np.float64)[:rows]  # [T N, 2]
    wanted, urge = np.zeros((T + 1, N)), np.zeros((T + 1, N))
    for row in reversed(range(T)):
        v, after_v = value[index[row]], value[successor[row]]
        delta = t.reward[row] + t.discount[row] * after_v[:, 0] - v[:, 0]
        wanted[row] = delta + t.discount[row] * lam * (1 - t.last[row]) * wanted[row + 1]
        # The next row of the environment follows, also that of a new episode; behind the last row the true successor.
        beyond = value[index[row + 1], 1] if row + 1 < T else after_v[:, 1]
        delta = bonus[row] + bonus_discount * beyond - v[:, 1]
        urge[row] = delta + bonus_discount * lam * urge[row + 1]
    assert t.last[:-1].any()
    advantages = np.stack([wanted[:-1], urge[:-1]], axis=-1).reshape(rows, 2)
    np.testing.assert_allclose(targets, value[:rows] + advantages, rtol=1e-4, atol=1e-4)
    # And the policy follows the weighted sum of both.
    together = advantages @ [2.0, 0.5]
    normalised = (together - together.mean()) / together.std()
    chosen = np.stack([t.action.ravel() == a for a in range(2)], axis=1)
    np.testing.assert_allclose(after.opt_state["logits"], -(normalised[:, None] * (chosen - 0.5)).mean(axis=0), rtol=1e-3, atol=1e-5)


def test_one_curiosity_may_belong_to_several_agents():
    """The module goes from hand to hand; what one agent has seen is no longer new to the other."""
    agents = [curious(dqn(linear(2), optax.sgd(rate), epsilon=0.1), rnd(TARGET, PREDICTOR, optax.adam(0.1))) for rate in (0.1, 0.2)]
    learn = [jax.jit(agent.learn) for agent in agents]
    first, second = (agent.init(jax.random.key(number), jnp.zeros((N, F))) for number, agent in enumerate(agents))
    rows, others = Batch(stream(lead=(8,))), Batch(stream(1, lead=(8,)))
    for number in range(100):
        first, _ = learn[0](first, rows, jax.random.key(number), 0)
    alone, paid_alone = learn[1](second, rows, jax.random.key(0), 0)
    shared, paid_shared = learn[1](second._replace(curiosity=first.curiosity), rows, jax.random.key(0), 0)
    assert float(paid_shared.metrics["intrinsic_reward"]) < 0.1 * float(paid_alone.metrics["intrinsic_reward"])
    assert moved(alone.learner, shared.learner)  # It was paid otherwise, so it learnt otherwise.
    # And back: what the second one sees now, the first one knows then.
    news = [errors(first.curiosity, others.transition.next_observation).mean()]
    for number in range(100):
        shared, _ = learn[1](shared, others, jax.random.key(number), 0)
    first = first._replace(curiosity=shared.curiosity)
    news.append(errors(first.curiosity, others.transition.next_observation).mean())
    assert news[1] < 0.1 * news[0]


def test_policy_and_value_of_the_agent_stay_apart_from_curiosity():
    """Acting asks the algorithm alone."""
    plain = ppo(policy_and_value(2), categorical(2), optax.sgd(0.1), minibatch_size=T * N)
    agent = curious(plain, build(), discount=0.99)
    state = agent.init(jax.random.key(0), jnp.zeros((N, F)))
    observation, noise = stream().observation[0], agent.noise(state, jax.random.key(1), N)
    jax.tree.map(
        np.testing.assert_array_equal,
        agent.explore(state, observation, noise, 0),
        plain.explore(state.learner, observation, plain.noise(state.learner, jax.random.key(1), N), 0),
    )
    np.testing.assert_array_equal(agent.exploit(state, observation), plain.exploit(state.learner, observation))
