"""The sum tree: never off by a rounding, never an empty slot, and in proportion to the values even among a million slots."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dqn_jax.memory import sum_tree

MILLION = 1_048_576  # 16**5: every node of the tree is used
EDGES = [0.0, np.float32(1e-45), 1e-9, 0.25, 0.5, np.nextafter(np.float32(1), np.float32(0)), 1.0]  # 1.0 by rounding only

write, draw = jax.jit(sum_tree.write, donate_argnums=0), jax.jit(sum_tree.draw)


def slots_of(tree, num_slots):
    """The values in the slots: the deepest rows."""
    return np.asarray(tree)[-((num_slots + 15) // 16) :].ravel()[:num_slots]


def tree_of(values):
    values = np.asarray(values, np.float32)
    return write(sum_tree.init(len(values)), jnp.arange(len(values)), values)


def pairwise(values):
    """Halves onto halves, in float32, by NumPy: the order that fixes what a sum of sixteen is to the last bit."""
    values = np.asarray(values)
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values[..., 0]


def assert_sound(tree):
    """Every entry above the slots is the pairwise sum of its sixteen children, or zero where it has none."""
    tree = np.asarray(tree)
    sums = np.zeros((tree.shape[0] + 15) // 16 * 16, np.float32)
    sums[: len(tree) - 1] = pairwise(tree[1:])
    inner = (len(tree) - 1 + 15) // 16  # rows that have children
    np.testing.assert_array_equal(tree[:inner].ravel(), sums[: inner * 16])


@functools.cache
def fractions(count):
    return jax.random.uniform(jax.random.key(count), (count, 2))


@pytest.mark.parametrize(
    ("num_slots", "rows"),
    [
        (1, 1),
        (16, 1),
        (17, 1 + 2),
        (256, 1 + 16),
        (257, 1 + 16 + 17),
        (4096, 1 + 16 + 256),
        (4097, 1 + 16 + 256 + 257),
        (MILLION, 1 + 16 + 256 + 4096 + 65536),
    ],
)
def test_shapes(num_slots, rows):
    tree = sum_tree.init(num_slots)
    assert tree.shape == (rows, 16) and tree.dtype == jnp.float32
    # The first slot and the last are where they should be, and are found again.
    for slot in {0, num_slots - 1}:
        written = write(jnp.zeros_like(tree), jnp.array([slot]), jnp.array([2.5]))
        assert sum_tree.total(written) == 2.5 and slots_of(written, num_slots)[slot] == 2.5
        assert_sound(written)
        drawn, value = draw(written, fractions(4))
        assert set(drawn.tolist()) == {slot} and set(value.tolist()) == {2.5}


def test_a_tree_without_slots_is_refused():
    with pytest.raises(ValueError, match="at least 1 slot, got 0"):
        sum_tree.init(0)


def test_a_million_writes_leave_no_drift():
    random = np.random.default_rng(0)
    batches, size = 1000, 1000
    hot = random.integers(0, MILLION, 3000)  # Slots written hundreds of times, often twice in a batch.
    slots = np.where(
        random.random((batches, size)) < 0.5, random.choice(hot, (batches, size)), random.integers(0, MILLION, (batches, size))
    )
    values = (10.0 ** random.uniform(-6, 6, slots.shape)).astype(np.float32)  # 12 orders of magnitude ...
    values[random.random(slots.shape) < 0.3] = 0  # ... and nothing at all
    run = jax.jit(
        lambda tree, writes: jax.lax.scan(lambda tree, one: (sum_tree.write(tree, *one), None), tree, writes)[0], donate_argnums=0
    )
    tree = run(sum_tree.init(MILLION), (slots.astype(np.int32), values))
    final = slots_of(tree, MILLION)
    # What stands in a slot is a value of the last batch that wrote it.
    last_batch = np.full(MILLION, -1)
    last_batch[slots.ravel()] = np.repeat(np.arange(batches), size)  # ascending: the last stays
    is_final = (last_batch[slots] == np.arange(batches)[:, None]) & (final[slots] == values)
    assert set(slots[is_final].tolist()) == set(slots.ravel().tolist())
    assert not final[last_batch < 0].any()
    assert any(len(set(batch.tolist())) < size for batch in slots) and (final > 0).sum() > 100_000  # what this test is about
    np.testing.assert_array_equal(sum_tree.total(tree), sum_tree.total(tree_of(final)))  # bit for bit
    np.testing.assert_allclose(sum_tree.total(tree), final.astype(np.float64).sum(), rtol=1e-6)
    assert_sound(tree)


def test_a_slot_written_twice_in_a_batch_keeps_one_of_the_values():
    tree = write(tree_of(np.ones(300)), jnp.array([299, 7, 299, 7, 299]), jnp.array([2.0, 3.0, 4.0, 5.0, 6.0]))
    slots = slots_of(tree, 300)
    assert slots[299] in (2, 4, 6) and slots[7] in (3, 5)
    assert np.delete(slots, [7, 299]).tolist() == [1] * 298
    assert_sound(tree)


@pytest.mark.parametrize("num_slots", [5, 16, 300, 5000])
def test_a_slot_out_of_range_is_skipped(num_slots):
    before = np.arange(num_slots) % 5
    beyond = (num_slots + 15) // 16 * 16  # The tree keeps whole rows: the first slot that has no place in it.
    for outside in ([-1], [-16], [-17], [beyond], [-(2**31)], [2**31 - 1]):
        tree = write(tree_of(before), jnp.array([*outside, 3], jnp.int32), jnp.array([100.0, 7.0]))
        np.testing.assert_array_equal(slots_of(tree, num_slots), np.where(np.arange(num_slots) == 3, 7, before))
        assert_sound(tree)
        tree = write(tree, jnp.array(outside, jnp.int32), jnp.array([np.nan]))  # nor does what it would have written matter
        np.testing.assert_array_equal(slots_of(tree, num_slots), np.where(np.arange(num_slots) == 3, 7, before))
        assert_sound(tree)


def sparse(num_slots, filled):
    values = np.zeros(num_slots, np.float32)
    values[list(filled)] = list(filled.values())
    return values


ROUNDING = {
    "few of a million": sparse(MILLION, {0: 1, 1: 0.3, 17: 0.1, 4095: 7, 4096: 1e-3, 524_287: 0.1, 700_001: 1e4, MILLION - 1: 0.7}),
    "the last of a million": sparse(MILLION, {MILLION - 1: 0.1}),
    "the first of a million": sparse(MILLION, {0: 0.1}),
    "a huge one, then nothing": sparse(5000, {0: 1e-3, 7: 3e37}),
    "a huge one, then tiny ones, then nothing": sparse(5000, {7: 1e30, **dict.fromkeys(range(8, 4000, 3), 1e-3)}),
    "tiny beside large": sparse(300, {0: 1e-30, 1: 1e6, 2: 1e-30, 40: 1e-30, 41: 1e6, 298: 1e-30}),
    "tiny only": np.where(np.arange(300) % 3 == 1, 1e-30, 0),
    "equal, of few bits": np.where(np.arange(5000) < 4000, 1, 0),
    **{f"{n} times 0.1, then nothing": sparse(300, dict.fromkeys(range(n), 0.1)) for n in (3, 13, 15, 16, 17, 250)},
    **{f"{n} times 0.1, then nothing": sparse(70_000, dict.fromkeys(range(n), 0.1)) for n in (4090, 60_001)},
    "0.1 with holes": np.where(np.arange(70_000) % 16 < 13, 0.1, 0),
    "random with holes": np.where(np.random.default_rng(0).random(70_000) < 0.3, np.random.default_rng(1).random(70_000), 0),
}


@pytest.mark.parametrize("values", ROUNDING.values(), ids=ROUNDING)
def test_an_empty_slot_is_never_drawn(values):
    values = np.asarray(values, np.float32)
    tree = tree_of(values)
    filled = np.flatnonzero(values)
    # Where one slot ends and the next begins, and to both sides of it: all of these places, or 300.
    ends = (np.cumsum(values.astype(np.float64))[filled] / values.astype(np.float64).sum()).astype(np.float32)
    ends = np.resize(ends[:: max(1, len(ends) // 300)], 300)  # of one length, so that few programs are compiled
    around = np.clip(np.concatenate([ends, np.nextafter(ends, np.float32(0)), np.nextafter(ends, np.float32(1))]), 0, 1)
    pairs = [*itertools.product(EDGES, EDGES), *itertools.product(around, EDGES), *itertools.product(EDGES, around)]
    slot, value = map(np.asarray, draw(tree, jnp.concatenate([jnp.asarray(np.array(pairs, np.float32)), fractions(20_000)])))
    assert set(slot.tolist()) <= set(filled.tolist())
    np.testing.assert_array_equal(value, values[slot])  # the value that is handed out is the slot's
    assert slot[0] == filled[0]  # stands at (0, 0)


def count(tree, num_slots, batches, batch_size, key):
    """How often each slot is drawn, by numbers as prioritized replay draws them, without its slices."""

    @jax.jit
    def run(tree, key):
        def add(counts, key):
            return counts.at[sum_tree.draw(tree, jax.random.uniform(key, (batch_size, 2)))[0]].add(1), None

        return jax.lax.scan(add, jnp.zeros(num_slots, jnp.int32), jax.random.split(key, batches))[0]

    return np.asarray(run(tree, jax.random.key(key)))


def test_draws_are_in_proportion_to_the_values():
    values = np.random.default_rng(2).random(40) * np.where(np.arange(40) % 4, 1, 0)
    counts = count(tree_of(values), 40, 10, 10_000, key=0)
    filled = values > 0
    assert draw(tree_of(values), jnp.array([[0.0, 0.0], [1.0, 1.0]]))[0].tolist() == [1, 39]
    assert not counts[~filled].any()
    assert stats.chisquare(counts[filled], 100_000 * values[filled] / values.sum()).pvalue > 1e-3


def test_draws_of_a_million_slots_are_in_proportion_to_the_classes_of_values():
    kind = np.random.default_rng(3).integers(0, 6, MILLION)
    values = np.array([0, 1e-4, 0.01, 0.1, 1 / 3, 1])[kind]
    counts = np.bincount(kind, count(tree_of(values), MILLION, 40, 50_000, key=1))
    assert counts[0] == 0
    share = np.bincount(kind, values)
    assert stats.chisquare(counts[1:], counts.sum() * share[1:] / share.sum()).pvalue > 1e-3


@pytest.mark.parametrize(("num_slots", "value"), [(MILLION, 1.0), (1_000_000, 0.1)])
def test_neighbours_among_a_million_equal_slots_are_equally_likely(num_slots, value):
    """One float32 has 24 bits, 4 more than it takes to number the slots: chosen by one, neighbours differ by an eighth and more."""
    counts = count(tree_of(np.full(num_slots, value)), num_slots, 80, 50_000, key=2)
    for bits in (4, 8):
        assert stats.chisquare(np.bincount(np.arange(num_slots) % 2**bits, counts)).pvalue > 1e-3
    # Each slot by itself: the statistic of so many of them is normal.
    expected = counts.sum() / num_slots
    statistic = np.sum((counts - expected) ** 2 / expected)
    assert abs(statistic - (num_slots - 1)) < 4 * np.sqrt(2 * num_slots)


def test_a_batch_of_trees_is_as_each_alone():
    random = np.random.default_rng(4)
    trees = jnp.stack([sum_tree.init(300)] * 3)
    for _ in range(4):
        slots, values = random.integers(-2, 300, (3, 50)), random.random((3, 50)).astype(np.float32)
        slots[:, 40:] = -1
        # Every tree writes slots of its own, none twice: of a slot named twice either value may stay.
        slots[:, :40] = [random.permutation(300)[:40] for _ in range(3)]
        alone = [write(tree.copy(), slot, value) for tree, slot, value in zip(trees, slots, values, strict=True)]
        trees = jax.jit(jax.vmap(sum_tree.write))(trees, slots, values)
        np.testing.assert_array_equal(trees, jnp.stack(alone))
    fraction = jnp.stack([fractions(30), fractions(30)[::-1], fractions(30) ** 2])
    together = jax.vmap(sum_tree.draw)(trees, fraction)
    for k in range(3):
        for drawn, alone in zip(together, draw(trees[k], fraction[k]), strict=True):
            np.testing.assert_array_equal(drawn[k], alone)


def test_shapes_that_would_be_broadcast_are_refused():
    tree = sum_tree.init(20)
    for slot, value in ((jnp.arange(3), jnp.ones(1)), (jnp.array(3), jnp.array(1.0)), (jnp.arange(4).reshape(2, 2), jnp.ones((2, 2)))):
        with pytest.raises(AssertionError):
            sum_tree.write(tree, slot, value)
    with pytest.raises(AssertionError):
        sum_tree.draw(tree, jnp.zeros(4))
