"""Targets and losses against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from dqn_jax import returns

TRANSFORMS = {
    "plain": lambda fn: fn,
    "jit": jax.jit,
    # The row in the middle of a batch of three: the others must not leak into it.
    "vmap": lambda fn: (
        lambda *args: jax.tree.map(lambda out: out[1], jax.vmap(fn)(*(jnp.stack([a * 0 + 1, a, a * 0]) for a in map(jnp.asarray, args))))
    ),
}
with_transforms = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)


def windows(n, seed, num=40):
    """Windows with every tail: terminated, truncated, open, and episodes that end more than once within the window."""
    random = np.random.default_rng(seed)
    for _ in range(num):
        last = random.random(n) < random.choice([0.0, 0.3, 0.9])
        terminated = last & (random.random(n) < 0.5)
        yield random.normal(size=n).astype(np.float32), (0.9 * ~terminated).astype(np.float32), last


@pytest.mark.parametrize("n", [1, 2, 5])
@with_transforms
def test_n_step_equals_the_oracle(n, transform):
    fold = transform(returns.n_step)
    for reward, discount, last in windows(n, seed=n):
        got = fold(reward, discount, last)
        np.testing.assert_allclose(got, oracle.n_step(reward, discount, last)[:2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("discount", "last", "expected"),
    [
        ([0.5, 0.5, 0.5], [False, False, False], (1 + 0.5 * 10 + 0.25 * 100, 0.125)),  # the window ends, the episode does not
        ([0.5, 0.5, 0.5], [False, True, False], (1 + 0.5 * 10, 0.25)),  # truncated: bootstraps, two steps on
        ([0.5, 0.0, 0.5], [False, True, False], (1 + 0.5 * 10, 0.0)),  # terminated: does not
        ([0.0, 0.5, 0.5], [True, False, False], (1.0, 0.0)),
        ([0.5, 0.5, 0.0], [False, False, True], (31.0, 0.0)),
        ([0.5, 0.5, 0.0], [True, True, True], (1.0, 0.5)),  # the first end counts
    ],
)
def test_n_step_by_hand(discount, last, expected):
    got = returns.n_step(jnp.array([1.0, 10.0, 100.0]), jnp.array(discount), jnp.array(last))
    np.testing.assert_allclose(got, expected)


def test_n_step_of_a_scalar_window_is_the_row():
    reward, discount = returns.n_step(jnp.float32(3.0), jnp.float32(0.5), jnp.array(True))
    assert reward.shape == discount.shape == ()
    assert (reward, discount) == (3.0, 0.5)


def test_n_step_ignores_what_lies_past_the_end():
    past = [np.nan, np.inf]
    got = returns.n_step(jnp.array([1.0, *past]), jnp.array([0.5, *past]), jnp.array([True, False, True]))
    np.testing.assert_allclose(got, (1.0, 0.5))


@with_transforms
def test_losses_equal_their_formulas(transform):
    error = np.array([-3.0, -1.0, -0.4, 0.0, 0.7, 1.0, 1.5, 1e4], np.float32)
    np.testing.assert_allclose(transform(returns.squared)(error), error**2, rtol=1e-6)
    np.testing.assert_allclose(transform(returns.huber)(error), [oracle.huber(float(e)) for e in error], rtol=1e-6)


def test_the_gradient_of_huber_is_the_clipped_error():
    error = jnp.array([-3.0, -1.0, -0.4, 0.0, 0.7, 1.0, 1.5, 1e20])
    np.testing.assert_allclose(jax.vmap(jax.grad(returns.huber))(error), np.clip(error, -1, 1), rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(returns.squared))(error), 2 * error, rtol=1e-6)


one, row, matrix = jnp.zeros(()), jnp.zeros(3), jnp.zeros((2, 3))


@pytest.mark.parametrize("args", [(matrix, matrix, matrix > 0), (row, one, row > 0), (row, row[:2], row > 0), (row, row, one > 0)])
def test_n_step_refuses_wrong_shapes(args):
    with pytest.raises(AssertionError):
        returns.n_step(*args)


# Generalised advantage estimation.


def streams(length, seed, num=10):
    """Streams of many episodes: reward, discount, last, value and next_value; an end has a successor of its own."""
    random = np.random.default_rng(seed)
    for _ in range(num):
        last = random.random(length) < random.choice([0.0, 0.3, 0.9])
        terminated = last & (random.random(length) < 0.5)
        reward, value, final = random.normal(size=(3, length)).astype(np.float32)
        next_value = np.where(last, final, np.append(value[1:], final[-1]))
        yield reward, (0.9 * ~terminated).astype(np.float32), last, value, next_value


def gae_oracle(reward, discount, last, value, next_value, lambda_):
    """Each advantage by itself: the TD errors from there on, weighted by what was travelled, up to the end of the episode."""
    advantages = []
    for start in range(len(reward)):
        total, weight = 0.0, 1.0
        for t in range(start, len(reward)):
            total += weight * (float(reward[t]) + float(discount[t]) * float(next_value[t]) - float(value[t]))
            weight *= float(discount[t]) * float(lambda_)
            if last[t]:
                break
        advantages.append(total)
    return advantages


@pytest.mark.parametrize("lambda_", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("length", [1, 2, 17])
@with_transforms
def test_gae_equals_the_oracle(length, lambda_, transform):
    estimate, ends = transform(returns.gae), set()
    for stream in streams(length, seed=length):
        got = estimate(*stream, np.float32(lambda_))
        np.testing.assert_allclose(got, gae_oracle(*stream, lambda_), rtol=1e-5, atol=1e-5)
        ends.update(zip(stream[2].tolist(), (stream[1] == 0).tolist(), strict=True))
    assert ends >= {(False, False), (True, False), (True, True)} or length == 1


def test_gae_by_hand():
    reward, discount = jnp.array([1.0, 2.0, 4.0, 8.0]), jnp.array([0.5, 0.5, 0.0, 0.5])
    last = jnp.array([False, True, True, False])  # truncated after two steps, terminated after one, going on
    value, next_value = jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([2.0, 10.0, 99.0, 6.0])
    # TD errors: 1 + 1 - 1 = 1, 2 + 5 - 2 = 5, 4 - 3 = 1, 8 + 3 - 4 = 7.
    np.testing.assert_array_equal(returns.gae(reward, discount, last, value, next_value, 0.5), [1 + 0.25 * 5, 5, 1, 7])
    np.testing.assert_array_equal(returns.gae(reward, discount, last, value, next_value, 0.0), [1, 5, 1, 7])


@pytest.mark.parametrize("discount_at_ends", [0.9, 0.0], ids=["truncated", "terminated"])
def test_gae_does_not_leak_across_an_end(discount_at_ends):
    last = jnp.array([False, False, True, True, False, True, False, False])
    discount, zeros = jnp.where(last, discount_at_ends, 0.9), jnp.zeros(8)
    jacobian = jax.jacobian(lambda reward: returns.gae(reward, discount, last, zeros, zeros, 0.8))(zeros)
    episode = np.array([0, 0, 0, 1, 2, 2, 3, 3])
    reached = np.triu(episode[:, None] == episode[None, :])  # what comes later in the same episode
    steps = np.arange(8)[None, :] - np.arange(8)[:, None]
    np.testing.assert_allclose(jacobian, np.where(reached, (0.9 * 0.8) ** np.abs(steps), 0.0), rtol=1e-5)


def test_gae_with_lambda_one_is_the_discounted_return_less_the_value():
    for stream in streams(17, seed=3):
        reward, discount, last, value, next_value = stream
        expected = []
        for t in range(17):
            total, travelled, walked = oracle.n_step(reward[t:], discount[t:], last[t:])
            expected.append(total + travelled * next_value[t + walked - 1] - value[t])  # 0 travelled where it terminated
        np.testing.assert_allclose(returns.gae(*stream, 1.0), expected, rtol=1e-5, atol=1e-5)


def test_gae_of_several_environments_is_gae_of_each():
    many = [np.stack(columns, axis=1) for columns in zip(*streams(17, seed=4, num=3), strict=True)]  # [T, N]
    got = jax.vmap(returns.gae, in_axes=(1, 1, 1, 1, 1, None), out_axes=1)(*many, 0.95)
    assert got.shape == (17, 3)
    for n in range(3):
        np.testing.assert_allclose(got[:, n], returns.gae(*(leaf[:, n] for leaf in many), 0.95), rtol=1e-6)


@pytest.mark.parametrize("wrong", [row[:2], one, matrix], ids=["shorter", "scalar", "matrix"])
@pytest.mark.parametrize("place", range(5))
def test_gae_refuses_wrong_shapes(place, wrong):
    args = [row, row, row > 0, row, row]
    returns.gae(*args, 0.9)
    args[place] = wrong > 0 if place == 2 else wrong
    with pytest.raises(AssertionError):
        returns.gae(*args, 0.9)


@pytest.mark.parametrize("everywhere", [one, matrix], ids=["scalar", "matrix"])
def test_gae_refuses_more_or_fewer_axes_than_one(everywhere):
    with pytest.raises(AssertionError):
        returns.gae(*[everywhere] * 2, everywhere > 0, *[everywhere] * 2, 0.9)


def lambda_oracle(reward, discount, last, next_value, lambda_):
    """Each return by itself, forwards: the returns over 1, 2, ... steps up to the end of the episode or of the stream, mixed."""
    returns_ = []
    for start in range(len(reward)):
        mixed, travelled, paid, left = 0.0, 1.0, 0.0, 1.0
        for t in range(start, len(reward)):
            paid += travelled * float(reward[t])
            travelled *= float(discount[t])
            ends = last[t] or t == len(reward) - 1
            mixed += left * (1.0 if ends else 1.0 - float(lambda_)) * (paid + travelled * float(next_value[t]))
            left *= float(lambda_)
            if ends:
                break
        returns_.append(mixed)
    return returns_


@pytest.mark.parametrize("lambda_", [0.0, 0.65, 1.0])
@pytest.mark.parametrize("length", [1, 2, 17])
@with_transforms
def test_lambda_return_equals_the_oracle(length, lambda_, transform):
    mix, ends = transform(returns.lambda_return), set()
    for reward, discount, last, _, next_value in streams(length, seed=length):
        got = mix(reward, discount, last, next_value, np.float32(lambda_))
        np.testing.assert_allclose(got, lambda_oracle(reward, discount, last, next_value, lambda_), rtol=1e-5, atol=1e-5)
        ends.update(zip(last.tolist(), (discount == 0).tolist(), strict=True))
    assert ends >= {(False, False), (True, False), (True, True)} or length == 1


def test_lambda_return_by_hand():
    reward, discount = jnp.array([1.0, 2.0, 4.0, 8.0, 16.0]), jnp.array([0.5, 0.5, 0.0, 0.5, 0.5])
    last = jnp.array([False, True, True, False, False])  # truncated after two steps, terminated after one, going on
    next_value = jnp.array([2.0, 10.0, 99.0, 6.0, 4.0])
    # 2 + 0.5 * 10 = 7, so 1 + 0.5 * (2 + 7) / 2 before it; 4; 16 + 0.5 * 4 = 18, so 8 + 0.5 * (6 + 18) / 2 before it.
    np.testing.assert_array_equal(returns.lambda_return(reward, discount, last, next_value, 0.5), [3.25, 7, 4, 14, 18])
    np.testing.assert_array_equal(returns.lambda_return(reward, discount, last, next_value, 0.0), [2, 7, 4, 11, 18])


def test_lambda_return_is_gae_and_the_value():
    for reward, discount, last, value, _ in streams(17, seed=5):
        # Where the episode goes on the value of the successor is that of the next row, which is when the two agree.
        following = np.append(value[1:], np.float32(0.3))
        expected = returns.gae(reward, discount, last, value, following, 0.7) + value
        np.testing.assert_allclose(returns.lambda_return(reward, discount, last, following, 0.7), expected, rtol=1e-5, atol=1e-5)


def test_a_successor_that_allows_nothing_is_worth_nothing():
    lowest = np.finfo(np.float32).min  # what a maximum over forbidden actions gives
    reward, discount, last = jnp.array([1.0, 2.0, 3.0]), jnp.array([0.9, 0.0, 0.0]), jnp.array([False, True, True])
    got = returns.lambda_return(reward, discount, last, jnp.array([5.0, lowest, lowest]), 0.5)
    np.testing.assert_allclose(got, [1 + 0.9 * (2.5 + 1.0), 2, 3], rtol=1e-6)


@pytest.mark.parametrize("wrong", [row[:2], one, matrix], ids=["shorter", "scalar", "matrix"])
@pytest.mark.parametrize("place", range(4))
def test_lambda_return_refuses_wrong_shapes(place, wrong):
    args = [row, row, row > 0, row]
    returns.lambda_return(*args, 0.9)
    args[place] = wrong > 0 if place == 2 else wrong
    with pytest.raises(AssertionError):
        returns.lambda_return(*args, 0.9)
