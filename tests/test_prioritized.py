"""Prioritized replay against a slow model in float64: what is drawn, how often, with which weight, and what a new priority changes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from scipy import stats
from test_memory import check, transition

from dqn_jax.memory.prioritized import prioritized
from dqn_jax.memory.ring import ring

OFFSET = 1e-3


class Priorities:
    """The priorities of a ring of T rows for N environments, by slot, to the power that holds when they are written."""

    def __init__(self, capacity, num_envs, alpha):
        self.length, self.num_envs, self.alpha = capacity // num_envs, num_envs, alpha
        self.powered = np.zeros(capacity)  # zero where nothing is stored
        self.largest, self.rows = 1.0, 0

    def power(self, priority):
        return priority ** (self.alpha(self.rows * self.num_envs) if callable(self.alpha) else self.alpha)

    def add(self):
        """One row: its slots."""
        slots = self.rows % self.length * self.num_envs + np.arange(self.num_envs)
        self.powered[slots] = self.power(self.largest)
        self.rows += 1
        return slots

    def reweigh(self, slots, priorities):
        for slot, priority in zip(slots, priorities, strict=True):
            self.powered[slot] = self.power(priority + OFFSET)
            self.largest = max(self.largest, priority + OFFSET)

    def weights(self, slots, beta):
        number, probability = np.count_nonzero(self.powered), self.powered[slots] / self.powered.sum()
        weights = (number * probability) ** -beta
        return weights / weights.max()


def jitted(memory):
    return memory._replace(**{name: jax.jit(getattr(memory, name)) for name in ("add", "cut", "noise", "sample", "reweigh")})


@functools.cache
def compiled(capacity, batch_size, n_steps=1, **options):
    return jitted(prioritized(ring(capacity, n_steps=n_steps), batch_size, **{"offset": OFFSET, **options}))


def slots_of(state, capacity):
    """The values in the slots of the tree: its deepest rows."""
    return np.asarray(state.tree)[-((capacity + 15) // 16) :].ravel()


def filled(memory, num_envs, rows_added, priorities=None, seed=0):
    """A memory of that many rows, their priorities set by slot."""
    stream = oracle.Stream(num_envs, seed)
    state = memory.init(transition(stream.rows()))
    for _ in range(rows_added):
        state = memory.add(state, transition(stream.rows()))
    if priorities is not None:
        state = memory.reweigh(state, jnp.arange(len(priorities)), jnp.asarray(priorities, jnp.float32))
    return state


@pytest.mark.parametrize(
    ("capacity", "num_envs", "n_steps", "alpha", "beta"),
    [
        (1, 1, 1, 0.6, 0.4),
        (7, 1, 1, 0.6, 0.4),
        (9, 1, 3, 1.0, 1.0),
        (11, 2, 2, 0.5, 0.7),
        (50, 3, 3, 0.6, 0.4),
        (16, 2, 1, lambda n: 0.9 - 0.005 * n, lambda n: 0.2 + 0.005 * n),
    ],
)
def test_random_operations_equal_the_slow_model(capacity, num_envs, n_steps, alpha, beta):
    batch_size = min(capacity, 6)
    memory = compiled(capacity, batch_size, n_steps, alpha=alpha, beta=beta)
    random, stream = np.random.default_rng(capacity), oracle.Stream(num_envs, seed=capacity)
    model, stored = Priorities(capacity, num_envs, alpha), oracle.Replay(capacity, num_envs)
    state = memory.init(transition(stream.rows()))
    number_in = {}  # by slot
    duplicates = 0
    for turn in range(3 * capacity // num_envs + 10):
        rows = stream.rows()
        stored.add(rows)
        state = memory.add(state, transition(rows))
        number_in.update(zip(model.add().tolist(), (row.number for row in rows), strict=True))
        if random.random() < 0.2:
            mask = random.random(num_envs) < 0.6
            stored.cut(mask)
            stream.cut(mask)
            state = memory.cut(state, mask)
        batch = memory.sample(state, memory.noise(jax.random.key(turn)))
        check(batch, stored, n_steps)  # stored rows and nothing else, none beyond the write head
        slots = np.asarray(batch.index)
        assert [number_in[slot] for slot in slots.tolist()] == batch.transition.observation["count"].tolist()
        exponent = beta(model.rows * num_envs) if callable(beta) else beta
        np.testing.assert_allclose(batch.weight, model.weights(slots, exponent), rtol=1e-5)
        # An accelerator's power function rounds otherwise.
        np.testing.assert_allclose(batch.weight.max(), 1, rtol=0 if jax.default_backend() == "cpu" else 1e-6)
        if random.random() < 0.7:
            # Rows of one batch that are the same have the same error.
            error = (10.0 ** random.uniform(-4, 1.5, capacity))[slots].astype(np.float32) * (random.random() < 0.9)
            duplicates += len(slots) - len(set(slots.tolist()))
            model.reweigh(slots.tolist(), error.astype(np.float64).tolist())
            state = memory.reweigh(state, batch.index, error)
        leaves = slots_of(state, capacity)
        np.testing.assert_allclose(leaves[:capacity], model.powered, rtol=1e-5)
        assert not leaves[capacity:].any()
        np.testing.assert_allclose(state.largest, model.largest, rtol=1e-6)
        assert int(state.size) == np.count_nonzero(model.powered) == len(stored.stored())
        assert int(state.added) == model.rows * num_envs
    assert duplicates or capacity == 1
    assert model.largest > 10  # new rows entered with more than the 1 at the beginning


def test_new_rows_enter_with_the_largest_priority_ever_seen():
    memory, stream = compiled(4, 2, alpha=0.5), oracle.Stream(1, seed=0)
    state = memory.init(transition(stream.rows()))
    assert state.largest == 1 and not state.tree.any()
    for priorities, enters in (([], 1), ([0.1], 1), ([16.0, 0.2], 16), ([2.0], 16), ([0.0] * 4, 16), ([25.0], 25)):
        # Slots are overwritten, also that of the largest; it never decays.
        state = memory.reweigh(state, jnp.arange(len(priorities)), jnp.array(priorities, jnp.float32)) if priorities else state
        cursor = int(state.stored.cursor)
        state = memory.add(state, transition(stream.rows()))
        np.testing.assert_allclose(slots_of(state, 4)[cursor], enters**0.5, rtol=1e-3)
    state = memory.reweigh(state, jnp.arange(4), jnp.zeros(4))
    for _ in range(12):
        state = memory.add(state, transition(stream.rows()))
    np.testing.assert_allclose(slots_of(state, 4)[:4], 5, rtol=1e-3)  # whatever was there has been written over


def frequencies(memory, state, num_slots, batches=1500, key=7):
    noise = jax.vmap(memory.noise)(jax.random.split(jax.random.key(key), batches))
    return np.bincount(np.asarray(jax.vmap(memory.sample, in_axes=(None, 0))(state, noise).index).ravel(), minlength=num_slots)


@pytest.mark.parametrize("alpha", [0.0, 0.6])
@pytest.mark.parametrize(("num_envs", "rows_added"), [(1, 40), (1, 130), (3, 14), (3, 50)], ids=["1", "1 wrapped", "3", "3 wrapped"])
def test_transitions_are_drawn_in_proportion_to_their_priorities(num_envs, rows_added, alpha):
    capacity = 100
    memory = compiled(capacity, 20, alpha=alpha)
    stored = min(rows_added, capacity // num_envs) * num_envs
    priorities = 10.0 ** np.random.default_rng(1).uniform(-1, 1, stored)
    counts = frequencies(memory, filled(memory, num_envs, rows_added, priorities), capacity)
    expected = (priorities + OFFSET) ** alpha  # all the same where alpha is 0
    assert not counts[stored:].any()
    assert stats.chisquare(counts[:stored], counts.sum() * expected / expected.sum()).pvalue > 1e-3


def test_weights_undo_the_preference_where_beta_is_one_and_are_one_where_it_is_zero():
    priorities = 10.0 ** np.random.default_rng(2).uniform(-1, 1, 30)
    noise = jax.random.key(3)
    for beta in (0.0, 1.0):
        memory = compiled(30, 16, alpha=0.7, beta=beta)
        batch = memory.sample(filled(memory, 1, 30, priorities), memory.noise(noise))
        expected = (priorities + OFFSET)[np.asarray(batch.index)] ** (-0.7 * beta)
        assert batch.weight.dtype == jnp.float32
        np.testing.assert_allclose(batch.weight, expected / expected.max(), rtol=1e-5)
    # Equal priorities, equal weights, whatever beta is.
    assert memory.sample(filled(memory, 1, 30), memory.noise(noise)).weight.tolist() == [1.0] * 16


@pytest.mark.parametrize(("num_slots", "batch_size"), [(5, 5), (300, 32)])
def test_each_slice_of_the_sum_holds_one_draw(num_slots, batch_size):
    memory = compiled(num_slots, batch_size, alpha=1.0)
    priorities = np.random.default_rng(4).random(num_slots)
    state = filled(memory, 1, num_slots, priorities)
    ends = np.cumsum(priorities + OFFSET) / np.sum(priorities + OFFSET) * batch_size  # in slices
    seen = set()
    for k in range(20):
        noise = memory.noise(jax.random.key(k))
        within = np.asarray(noise[:, 0]) * batch_size - np.arange(batch_size)
        assert noise.shape == (batch_size, 2) and (within > -1e-5).all() and (within < 1 + 1e-5).all()
        slots = np.asarray(memory.sample(state, noise).index)
        begins = np.where(slots > 0, ends[slots - 1], 0)
        # The interval of each slot drawn overlaps the slice that it was drawn for.
        assert (ends[slots] > np.arange(batch_size) - 1e-4).all() and (begins < np.arange(batch_size) + 1 + 1e-4).all()
        seen.add(tuple(slots.tolist()))
    assert len(seen) > 3  # the place within the slice is random


def test_a_window_that_reaches_the_write_head_bootstraps_there():
    memory, stream, stored = compiled(6, 6, 4), oracle.Stream(1, seed=0, end_chance=0.0), oracle.Replay(6, 1)
    state = memory.init(transition(stream.rows()))
    for _ in range(8):  # wrapped, one endless episode
        rows = stream.rows()
        stored.add(rows)
        state = memory.add(state, transition(rows))
    batch = memory.sample(state, jnp.stack([(jnp.arange(6) + 0.5) / 6, jnp.zeros(6)], axis=1))  # equal priorities: every row once
    check(batch, stored, 4)
    ages = 8 - (np.asarray(batch.transition.observation["count"]) - stored.columns[0][0].number + 2)  # 1: the newest
    assert sorted(ages) == [1, 2, 3, 4, 5, 6]
    np.testing.assert_array_equal(batch.transition.last.any(axis=1), ages <= 4)
    np.testing.assert_array_equal(np.argmax(batch.transition.last, axis=1)[ages <= 4], ages[ages <= 4] - 1)
    assert (batch.transition.discount[:, 0] == 1).all()


def test_schedules_count_the_transitions_added():
    """Of all environments, and those that have been overwritten, too."""
    memory = jitted(prioritized(ring(6), 3, alpha=lambda n: n / 100, beta=lambda n: n / 50, offset=OFFSET))
    state = filled(memory, 2, 11)  # 22 transitions, and 6 slots
    before = memory.reweigh(state, jnp.arange(6), jnp.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]))
    raw = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]) + OFFSET
    np.testing.assert_allclose(slots_of(before, 6)[:6], raw**0.22, rtol=1e-5)
    after = memory.add(before, transition(oracle.Stream(2, seed=1).rows()))  # written with the alpha of 22, before it counts
    np.testing.assert_allclose(slots_of(after, 6)[4:6], raw[-1] ** 0.22, rtol=1e-5)
    batch = memory.sample(after, memory.noise(jax.random.key(0)))
    value = slots_of(after, 6)[np.asarray(batch.index)].astype(np.float64)
    assert len(set(value.tolist())) > 1
    np.testing.assert_allclose(batch.weight, value**-0.48 / (value**-0.48).max(), rtol=1e-5)
    twice = memory.reweigh(after, jnp.arange(6), jnp.full(6, 8.0))
    np.testing.assert_allclose(slots_of(twice, 6)[:6], (8 + OFFSET) ** 0.24, rtol=1e-5)


def test_many_replays_at_once_are_as_each_alone():
    memory, seeds = prioritized(ring(12, n_steps=2), 5, offset=OFFSET), 3

    def run(seed, rows):
        """Fill, learn thrice, fill again: all of it under one ``vmap``."""
        keys = jax.random.split(jax.random.key(seed), len(rows.reward))
        state = memory.init(jax.tree.map(lambda leaf: leaf[0], rows))

        def turn(state, step):
            row, key = step
            state = memory.cut(memory.add(state, row), jax.random.bernoulli(key, 0.2, (2,)))
            batch = memory.sample(state, memory.noise(key))
            # The same row, the same priority: of a slot named twice either would do.
            return memory.reweigh(state, batch.index, jnp.abs(batch.transition.reward[:, 0])), batch

        return jax.lax.scan(turn, state, (rows, keys))

    def rows_of(seed):
        stream = oracle.Stream(2, seed)
        return jax.tree.map(lambda *leaves: np.stack(leaves), *(transition(stream.rows()) for _ in range(15)))

    rows = [rows_of(seed) for seed in range(seeds)]
    together = jax.jit(jax.vmap(run))(jnp.arange(seeds), jax.tree.map(lambda *leaves: np.stack(leaves), *rows))
    alone = jax.jit(run)
    for seed in range(seeds):
        one = jax.tree.map(lambda leaf, seed=seed: leaf[seed], together)
        expected = alone(seed, rows[seed])
        chex.assert_trees_all_close(one, expected, rtol=1e-6)
        chex.assert_trees_all_equal(one[1].index, expected[1].index)
    assert len({tuple(index.ravel().tolist()) for index in np.asarray(together[1].index)}) == seeds


def test_noise_can_be_drawn_ahead():
    """It is a function of the key alone; and what a batch is depends on nothing else that is random."""
    memory = compiled(10, 4)
    keys = jax.random.split(jax.random.key(0), 3)
    ahead = jax.vmap(memory.noise)(keys)
    state = filled(memory, 1, 10, np.arange(10))
    for key, noise in zip(keys, ahead, strict=True):
        np.testing.assert_array_equal(memory.noise(key), noise)
        chex.assert_trees_all_equal(memory.sample(state, noise), memory.sample(state, memory.noise(key)))
    assert len(np.unique(ahead)) == ahead.size
    assert memory.demand is None


def test_a_priority_of_zero_is_drawn_again_all_the_same():
    memory = compiled(4, 2, alpha=1.0)
    counts = frequencies(memory, filled(memory, 1, 4, [0, 0, 0, 0.1]), 4, batches=4000)
    expected = np.array([OFFSET, OFFSET, OFFSET, 0.1 + OFFSET])
    assert stats.chisquare(counts, counts.sum() * expected / expected.sum()).pvalue > 1e-3


BAD = [float("nan"), float("inf"), -float("inf"), -0.5, -1e-3]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("row", [0, 2])
def test_a_bad_priority_is_refused_outside_jit_by_its_row(bad, row):
    memory = prioritized(ring(4), 2)
    state = filled(compiled(4, 2), 1, 4)
    wrong = np.ones(3, np.float32)
    wrong[row] = bad
    for priority in (wrong, jnp.asarray(wrong)):
        with pytest.raises(ValueError, match=rf"priority\[{row}\] is {wrong[row]}: priorities are finite and not negative"):
            memory.reweigh(state, jnp.arange(3), priority)
    memory.reweigh(state, jnp.arange(3), jnp.array([0.0, -0.0, 1e6]))


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_priority_writes_nothing_inside_jit(bad, alpha):
    memory = compiled(4, 2, alpha=alpha)
    state = filled(memory, 1, 4, [0.5, 0.6, 0.7, 0.8])
    after = memory.reweigh(state, jnp.array([1, 2, 3]), jnp.array([3.0, bad, 2.0]))
    expected = memory.reweigh(state, jnp.array([1, 3]), jnp.array([3.0, 2.0]))
    chex.assert_trees_all_equal(after, expected)  # the tree and the largest: as if that row had not been there
    chex.assert_trees_all_equal(memory.reweigh(state, jnp.array([2]), jnp.array([bad])), state)
    assert alpha == 0 or not np.array_equal(expected.tree, state.tree)


def test_priorities_of_another_shape_than_the_index_are_refused():
    memory = prioritized(ring(4), 2)
    state = filled(compiled(4, 2), 1, 4)
    for priority in (jnp.ones(1), jnp.ones((2, 1)), jnp.ones(())):
        with pytest.raises(AssertionError):
            memory.reweigh(state, jnp.arange(2), priority)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            ({name: value}, rf"{name} must be in \[0, 1\], got {value}")
            for name in ("alpha", "beta")
            for value in (-0.1, 1.1, float("nan"))
        ),
        *(({"offset": value}, f"offset must be positive.*got {value}") for value in (0, -1e-6, float("nan"))),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 17}, "batch_size 17 exceeds capacity 16"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        prioritized(ring(16), **{"batch_size": 4, **options})


def test_a_sweep_over_alpha_and_beta_is_one_program():
    """Numbers in range are not asked for where they are traced."""

    def run(alpha, beta):
        memory = prioritized(ring(8), 4, alpha=alpha, beta=beta, offset=OFFSET)
        state = filled(memory, 1, 5, jnp.arange(1.0, 6.0))
        return state.tree, memory.sample(state, jnp.full((4, 2), 0.5)).weight

    tree, weight = jax.vmap(run)(jnp.array([0.0, 1.0]), jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(tree[:, 0, :6], [[1] * 5 + [0], [*(np.arange(1, 6) + OFFSET), 0]], rtol=1e-5)
    assert weight.shape == (2, 4)


def test_a_batch_larger_than_what_is_stored_is_refused_outside_jit():
    memory = prioritized(ring(12), 4)
    state = filled(compiled(12, 4), 3, 1)
    with pytest.raises(ValueError, match="a batch of 4 was asked for and 3 transitions are stored"):
        memory.sample(state, memory.noise(jax.random.key(0)))
    assert prioritized(ring(12), 3).sample(state, jnp.zeros((3, 2))).index.tolist() == [0] * 3  # as many as there are
