"""Distributions over actions against float64 NumPy, and at the places where float32 gives way: saturated, masked, certain."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dqn_jax import distributions
from dqn_jax.distributions import LOG_STD_RANGE, categorical, multi_categorical, normal, tanh_normal

DRAWS = 4_000
LOGITS = np.array([0.3, -1.2, 2.0, 0.0, 1.1], np.float32)
MASK = np.array([True, True, False, False, True])  # forbids the likeliest action, 2
MASKS = pytest.mark.parametrize("mask", [None, MASK], ids=["all allowed", "masked"])


# The squashed normal.

EDGES = np.array([1e-6, 1e-3, 0.1, 1.0, 3.0, 8.0, 9.1, 12.0, 20.0])  # tanh rounds to 1 in float32 from about 9 on
RAW = np.array([-10.0, -1.0, 0.0, 0.5, 10.0])
NOISE = np.array([-2.0, 0.0, 0.3, 4.0])


def std_of(raw):
    low, high = LOG_STD_RANGE
    return np.exp(low + (high - low) * (np.tanh(raw.astype(np.float64)) + 1) / 2)


def tanh_normal_oracle(outputs, noise):
    """In float64, each dimension by itself: what the normal draws, its squashed action, and the logarithm of its density."""
    mean, raw = np.split(outputs.astype(np.float64), 2, axis=-1)
    std, noise = std_of(raw), noise.astype(np.float64)
    u = mean + std * noise
    # 1 - tanh(u)^2 = (2 / (e^u + e^-u))^2, which loses nothing before e^u overflows.
    log_slope = 2 * np.log(2 / (np.exp(u) + np.exp(-u)))
    return u, np.tanh(u), -0.5 * noise**2 - 0.5 * np.log(2 * np.pi) - np.log(std) - log_slope


def at_the_edges():
    """Outputs ``[K, 2]`` and noise ``[K, 1]`` that lead to every u, up to float32, by way of every deviation and noise."""
    u, raw, noise = (each.ravel() for each in np.meshgrid(np.concatenate([-EDGES, [0.0], EDGES]), RAW, NOISE))
    outputs = np.stack([u - std_of(raw) * noise, raw], axis=-1)
    return outputs.astype(np.float32), noise[:, None].astype(np.float32)


# As users compile: unoptimised, as in the rest of the tests, XLA's exponentials are less exact than the bounds here.
OPTIMISED = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})


@pytest.mark.parametrize("transform", [lambda fn: fn, OPTIMISED], ids=["plain", "jit"])
def test_tanh_normal_equals_the_oracle_up_to_the_edges(transform):
    outputs, noise = at_the_edges()
    action, log_prob = transform(jax.vmap(tanh_normal))(outputs, noise)
    u, expected_action, expected = tanh_normal_oracle(outputs, noise)
    assert u.min() < -19.9 and u.max() > 19.9 and np.abs(u).min() < 1e-5
    assert (np.abs(action) <= 1).all()
    assert (np.abs(action[np.abs(u) > 12]) == 1).all()  # rounded: from the action alone the density could not be had
    # An error of float32 in u, 1e-7 of up to 30 before cancelling, is one of twice that in the logarithm.
    np.testing.assert_allclose(action, expected_action, rtol=0, atol=3e-6)
    np.testing.assert_allclose(log_prob, expected[:, 0], rtol=1e-6, atol=1e-5)


def test_the_log_probability_of_tanh_normal_is_summed_over_dimensions():
    outputs, noise = np.array([0.2, -3.0, 15.0, 0.1, -0.4, 0.7], np.float32), np.array([1.0, -0.5, 0.2], np.float32)
    action, log_prob = tanh_normal(outputs, noise)
    assert (action.shape, log_prob.shape) == ((3,), ())
    np.testing.assert_allclose(log_prob, tanh_normal_oracle(outputs, noise)[2].sum(), rtol=1e-6)


@pytest.mark.parametrize("outputs", [(0.0, 0.2), (1.5, -0.3), (-0.5, 0.6)])
def test_the_density_of_tanh_normal_integrates_to_one(outputs):
    noise = np.linspace(-9, 9, 20_001, dtype=np.float32)[:, None]
    action, log_prob = jax.vmap(tanh_normal, in_axes=(None, 0))(jnp.array(outputs), noise)
    assert abs(np.trapezoid(np.exp(np.float64(log_prob)), np.float64(action[:, 0])) - 1) < 1e-3


def test_the_deviation_of_tanh_normal_stays_in_its_range():
    raw = jnp.array([-1e30, -1e4, -3.0, -1.0, 0.0, 1.0, 3.0, 1e4, 1e30])
    # At the middle, squashing changes nothing: what is left of the logarithm is that of the deviation.
    log_prob = jax.vmap(lambda raw: tanh_normal(jnp.stack([0.0, raw]), jnp.zeros(1))[1])(raw)
    log_std = -np.asarray(log_prob) - 0.5 * np.log(2 * np.pi)
    low, high = LOG_STD_RANGE
    assert (log_std >= low - 1e-6).all() and (log_std <= high + 1e-6).all()
    np.testing.assert_allclose(log_std[[0, 1, 4, -2, -1]], [low, low, (low + high) / 2, high, high], atol=1e-6)
    assert (np.diff(log_std[1:-1]) > 0).all()


def test_the_gradient_of_tanh_normal_is_right_at_the_edges_and_finite_beyond():
    outputs, noise = at_the_edges()
    grads = jax.vmap(jax.grad(lambda outputs, noise: tanh_normal(outputs, noise)[1]))(outputs, noise)
    u, _, _ = tanh_normal_oracle(outputs, noise)
    mean, raw = np.split(outputs.astype(np.float64), 2, axis=-1)
    np.testing.assert_allclose(grads[:, :1], 2 * np.tanh(u), atol=1e-5)
    slope = (LOG_STD_RANGE[1] - LOG_STD_RANGE[0]) / 2 / np.cosh(raw) ** 2
    np.testing.assert_allclose(grads[:, 1:], slope * (2 * np.tanh(u) * (u - mean) - 1), rtol=1e-4, atol=1e-4)

    far = np.array([-1e30, -1e4, -50.0, 0.0, 50.0, 1e4, 1e30])
    mean, raw, noise = (each.ravel().astype(np.float32) for each in np.meshgrid(far, far, [-100.0, -6.0, 0.0, 6.0, 100.0]))
    for part in (0, 1):  # the action, then its log-probability
        jacobians = jax.vmap(jax.jacobian(lambda *args, part=part: tanh_normal(*args)[part]))(np.stack([mean, raw], 1), noise[:, None])
        assert np.isfinite(jacobians).all()


# One choice.


def softmax(logits, mask=None):
    """Probabilities in float64, one allowed action after the other."""
    allowed = np.ones(len(logits), bool) if mask is None else np.asarray(mask)
    weights = np.array([np.exp(np.float64(logit)) if ok else 0.0 for logit, ok in zip(logits, allowed, strict=True)])
    return weights / weights.sum()


def entropy_of(probabilities):
    return -sum(p * np.log(p) for p in probabilities if p > 0)


@MASKS
def test_categorical_equals_the_oracle(mask):
    one, expected = categorical(5), softmax(LOGITS, mask)
    assert one.num_outputs == 5
    for action in np.flatnonzero(expected):
        np.testing.assert_allclose(one.log_prob(LOGITS, mask, action), np.log(expected[action]), rtol=1e-5)
    np.testing.assert_allclose(one.entropy(LOGITS, mask), entropy_of(expected), rtol=1e-5)
    assert one.mode(LOGITS, mask) == (2 if mask is None else 4)
    assert one.mode(LOGITS, mask).dtype == one.sample(LOGITS, mask, jnp.zeros(5)).dtype == jnp.int32


@MASKS
def test_categorical_draws_in_proportion(mask):
    one, expected = categorical(5), softmax(LOGITS, mask)
    noise = one.noise(jax.random.key(0), DRAWS)
    actions = jax.vmap(one.sample, in_axes=(None, None, 0))(LOGITS, mask, noise)
    counts = np.bincount(actions, minlength=5)
    assert len(counts) == 5 and not counts[expected == 0].any()
    assert stats.chisquare(counts[expected > 0], DRAWS * expected[expected > 0]).pvalue > 1e-3
    pairs = np.zeros((5, 5))
    np.add.at(pairs, (actions[:-1], actions[1:]), 1)
    chance = np.outer(expected, expected)
    assert stats.chisquare(pairs[chance > 0], (DRAWS - 1) * chance[chance > 0]).pvalue > 1e-3  # one draw tells nothing of the next


@pytest.mark.parametrize("logits", [[1e4, -1e4, 1e4], [-1e4, -1e4, 1e4], [-1e4, 0.0, 1e4], [-1e4, -1e4, -1e4]])
@pytest.mark.parametrize("mask", [None, [True, True, False], [False, True, False]], ids=["all", "two", "one"])
def test_categorical_stays_finite_where_it_is_certain(logits, mask):
    one, logits = categorical(3), jnp.array(logits)
    mask = None if mask is None else jnp.array(mask)
    allowed = np.ones(3, bool) if mask is None else np.asarray(mask)
    best = allowed & (np.asarray(logits) == np.asarray(logits)[allowed].max())
    np.testing.assert_allclose(one.entropy(logits, mask), np.log(best.sum()), atol=1e-6)
    np.testing.assert_allclose(np.exp(distributions.log_probabilities(logits, mask)), best / best.sum(), atol=1e-6)
    draws = jax.vmap(one.sample, in_axes=(None, None, 0))(logits, mask, one.noise(jax.random.key(1), 200))
    assert set(np.asarray(draws).tolist()) == set(np.flatnonzero(best).tolist())
    for action in np.flatnonzero(allowed):
        grads = jax.grad(one.log_prob)(logits, mask, action)
        np.testing.assert_allclose(grads, np.eye(3)[action] * (allowed.sum() > 1) - best / best.sum() * (allowed.sum() > 1), atol=1e-6)
    assert np.isfinite(jax.grad(one.entropy)(logits, mask)).all()


def test_no_gradient_reaches_a_forbidden_logit():
    one = categorical(5)
    for function in (lambda logits: one.log_prob(logits, MASK, 0), lambda logits: one.entropy(logits, MASK)):
        grads = np.asarray(jax.grad(function)(LOGITS))
        assert (grads[~MASK] == 0).all() and (grads[MASK] != 0).all()


def test_a_forbidden_action_changes_nothing_about_the_others():
    short, one = LOGITS[MASK], categorical(5)
    np.testing.assert_allclose(one.entropy(LOGITS, MASK), categorical(3).entropy(short, None), rtol=1e-6)
    raised = np.where(MASK, LOGITS, 1e4).astype(np.float32)
    chex.assert_trees_all_equal(one.entropy(raised, MASK), one.entropy(LOGITS, MASK))
    chex.assert_trees_all_equal(one.log_prob(raised, MASK, 1), one.log_prob(LOGITS, MASK, 1))


def test_a_mask_that_forbids_everything_gives_no_nan():
    nothing = np.zeros(5, bool)
    assert np.isfinite(distributions.log_probabilities(LOGITS, nothing)).all()
    assert np.isfinite(categorical(5).entropy(LOGITS, nothing))


@MASKS
def test_log_probabilities_and_expectation(mask):
    expected = softmax(LOGITS, mask)
    log_probability = distributions.log_probabilities(LOGITS, mask)
    assert log_probability.shape == (5,) and np.isfinite(log_probability).all()
    np.testing.assert_allclose(log_probability[expected > 0], np.log(expected[expected > 0]), rtol=1e-5)
    assert (np.exp(log_probability[expected == 0]) == 0).all()
    values = np.array([5.0, -7.0, 11.0, 3.0, 2.0], np.float32)
    np.testing.assert_allclose(distributions.expectation(log_probability, values), np.dot(expected, values), rtol=1e-5)


def test_the_expectation_leaves_out_what_has_no_probability():
    log_probability = jnp.array([jnp.log(0.25), jnp.finfo(jnp.float32).min, jnp.log(0.75)])
    for worthless in (1e30, -jnp.inf, jnp.nan):
        np.testing.assert_allclose(distributions.expectation(log_probability, jnp.array([4.0, worthless, 8.0])), 7.0, rtol=1e-6)


# Several choices.

SIZES = (3, 1, 4)


def test_multi_categorical_is_independent_categoricals():
    several, parts = multi_categorical(SIZES), [categorical(size) for size in SIZES]
    logits = np.random.default_rng(0).normal(size=8).astype(np.float32)
    noise = several.noise(jax.random.key(2), 6)
    assert several.num_outputs == 8 and noise.shape == (6, 8)
    split = lambda joined: (joined[:3], joined[3:4], joined[4:])  # noqa: E731
    for row in noise:
        action = several.sample(logits, None, row)
        assert action.dtype == jnp.int32
        np.testing.assert_array_equal(
            action, [one.sample(part, None, drawn) for one, part, drawn in zip(parts, split(logits), split(row), strict=True)]
        )
        log_probs = [np.log(softmax(part)[chosen]) for part, chosen in zip(split(logits), action, strict=True)]
        np.testing.assert_allclose(several.log_prob(logits, None, action), sum(log_probs), rtol=1e-5)
    np.testing.assert_array_equal(several.mode(logits, None), [np.argmax(part) for part in split(logits)])
    np.testing.assert_allclose(several.entropy(logits, None), sum(entropy_of(softmax(part)) for part in split(logits)), rtol=1e-5)


def test_multi_categorical_draws_branches_in_proportion_and_independently():
    several, logits = multi_categorical((2, 3)), np.array([0.5, -0.5, 0.0, 1.0, -1.0], np.float32)
    actions = jax.vmap(several.sample, in_axes=(None, None, 0))(logits, None, several.noise(jax.random.key(3), DRAWS))
    counts = np.zeros((2, 3))
    np.add.at(counts, tuple(np.asarray(actions).T), 1)
    expected = np.outer(softmax(logits[:2]), softmax(logits[2:]))
    assert stats.chisquare(counts.ravel(), DRAWS * expected.ravel()).pvalue > 1e-3


@pytest.mark.parametrize(
    ("distribution", "action"), [(multi_categorical(SIZES), np.zeros(3, np.int32)), (normal(4), np.zeros(4, np.float32))]
)
def test_a_mask_is_refused_where_there_is_not_a_single_choice(distribution, action):
    outputs, mask = jnp.zeros(8), jnp.ones(8, bool)
    for function, args in (
        (distribution.sample, (distribution.noise(jax.random.key(0), 1)[0],)),
        (distribution.mode, ()),
        (distribution.log_prob, (action,)),
        (distribution.entropy, ()),
    ):
        with pytest.raises(ValueError, match="an action mask is for a single choice"):
            function(outputs, mask, *args)
        function(outputs, None, *args)


# The normal.

MEAN, LOG_STD = np.array([0.5, -3.0, 10.0], np.float32), np.array([-2.0, 0.0, 1.5], np.float32)
OUTPUTS = np.concatenate([MEAN, LOG_STD])


def test_normal_equals_the_oracle():
    free, std = normal(3), np.exp(LOG_STD.astype(np.float64))
    assert free.num_outputs == 6
    for action in (MEAN, MEAN + 1, np.array([0.4, 2.0, -5.0], np.float32)):
        densities = np.exp(-((action.astype(np.float64) - MEAN) ** 2) / (2 * std**2)) / np.sqrt(2 * np.pi * std**2)
        np.testing.assert_allclose(free.log_prob(OUTPUTS, None, action), np.log(densities).sum(), rtol=1e-5)
    np.testing.assert_allclose(free.entropy(OUTPUTS, None), sum(np.log(s * np.sqrt(2 * np.pi * np.e)) for s in std), rtol=1e-5)
    np.testing.assert_array_equal(free.mode(OUTPUTS, None), MEAN)


def test_normal_draws_mean_plus_deviation_times_noise():
    free = normal(3)
    noise = free.noise(jax.random.key(4), DRAWS)
    draws = jax.vmap(free.sample, in_axes=(None, None, 0))(OUTPUTS, None, noise)
    np.testing.assert_allclose(draws, MEAN + np.exp(LOG_STD.astype(np.float64)) * noise, rtol=1e-5, atol=1e-6)
    for column in np.asarray(noise).T:
        assert stats.kstest(column, "norm").pvalue > 1e-3
    assert np.abs(np.corrcoef(np.asarray(noise).T) - np.eye(3)).max() < 0.06
    # Over many draws the entropy is the mean of minus the log-probability.
    log_prob = jax.vmap(free.log_prob, in_axes=(None, None, 0))(OUTPUTS, None, draws)
    np.testing.assert_allclose(-np.mean(log_prob), free.entropy(OUTPUTS, None), atol=0.08)
