"""Minibatches: each row once an epoch, in the order that PPO's keys have always drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dqn_jax import minibatches

ROWS = {"number": jnp.arange(12), "image": jnp.arange(24.0).reshape(12, 2)}


def test_every_row_once_an_epoch_and_rows_stay_together():
    def step(seen, rows):
        return seen + 1, (seen, rows)

    count, (seen, rows) = jax.jit(lambda key: minibatches.repeat(step, 0, ROWS, key, epochs=3, minibatch_size=4))(jax.random.key(0))
    assert count == 9 and seen.ravel().tolist() == list(range(9))
    assert rows["number"].shape == (3, 3, 4) and rows["image"].shape == (3, 3, 4, 2)
    orders = rows["number"].reshape(3, 12)
    np.testing.assert_array_equal(np.sort(orders), np.tile(np.arange(12), (3, 1)))
    assert len({tuple(order) for order in orders.tolist()}) == 3
    np.testing.assert_array_equal(rows["image"], ROWS["image"][rows["number"]])


def test_the_orders_are_those_of_earlier_versions():
    # What PPO drew, epoch by epoch; and what a curiosity drew, all epochs with one key.
    key = jax.random.key(5)
    rows = minibatches.repeat(lambda state, rows: (state, rows), (), jnp.arange(12), key, epochs=2, minibatch_size=6)[1]
    for got, each in zip(rows.reshape(2, 12), jax.random.split(key, 2), strict=True):
        np.testing.assert_array_equal(got, jnp.argsort(jax.random.bits(each, (12,), jnp.uint32)))
    got = minibatches.shuffled(key, 12, 3, epochs=2)
    np.testing.assert_array_equal(got, jnp.argsort(jax.random.bits(key, (2, 12), jnp.uint32), axis=1).reshape(8, 3))


def test_a_function_of_all_rows_sees_a_minibatch_at_a_time():
    shapes = []

    def double(rows):
        shapes.append(rows["image"].shape)
        return 2 * rows["image"], rows["number"]

    twice, number = minibatches.in_minibatches(double, ROWS, 3)
    assert set(shapes) == {(3, 2)}
    np.testing.assert_array_equal(twice, 2 * ROWS["image"])
    np.testing.assert_array_equal(number, np.arange(12))


@pytest.mark.parametrize(
    "call",
    [
        lambda: minibatches.shuffled(jax.random.key(0), 12, 5),
        lambda: minibatches.in_minibatches(lambda rows: rows, ROWS, 5),
        lambda: minibatches.repeat(lambda *both: both, (), ROWS, jax.random.key(0), epochs=1, minibatch_size=5),
    ],
)
def test_rows_that_do_not_divide_are_refused_with_both_numbers(call):
    with pytest.raises(ValueError, match="12 transitions do not divide into minibatches of 5"):
        call()


@pytest.mark.parametrize("sizes", [(0, 4), (1, 0), (0, None)])
def test_counts_below_one_are_refused(sizes):
    minibatches.require_sizes(1, None)
    with pytest.raises(ValueError, match=f"epochs and minibatch_size must be at least 1, got {sizes[0]} and {sizes[1]}"):
        minibatches.require_sizes(*sizes)
