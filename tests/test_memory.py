"""The ring and uniform replay against a slow model: random operations, and in every field a number that tells which row it comes from."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from scipy import stats

from dqn_jax import returns
from dqn_jax.memory.ring import ring
from dqn_jax.memory.uniform import uniform
from dqn_jax.types import Transition

GAMMA = 0.5  # exact in float32: folded rewards can be compared closely


def observation(numbers):
    """Three dtypes, one number: an image in base 200, a vector, a count."""
    numbers = np.asarray(numbers)
    image = np.stack([numbers % 200, numbers // 200], axis=-1).astype(np.uint8)
    return {
        "image": np.repeat(image[..., None], 3, axis=-1),
        "vector": np.stack([numbers, -numbers], -1).astype(np.float32),
        "count": numbers.astype(np.int32),
    }


def transition(rows):
    numbers, successors = [row.number for row in rows], [row.next_number for row in rows]
    return Transition(
        observation=observation(numbers),
        action=np.asarray(numbers, np.int32) * 3,
        reward=np.asarray([row.reward for row in rows], np.float32),
        discount=np.asarray([row.discount for row in rows], np.float32),
        next_observation=observation(successors),
        last=np.asarray([row.last for row in rows]),
        extras={"log_probability": -np.asarray(numbers, np.float32)},
    )


@functools.cache
def compiled(capacity, batch_size, n_steps):
    memory = uniform(ring(capacity, n_steps=n_steps), batch_size)
    return memory._replace(add=jax.jit(memory.add), cut=jax.jit(memory.cut), noise=jax.jit(memory.noise), sample=jax.jit(memory.sample))


def start(capacity, num_envs, batch_size, n_steps=1):
    memory = compiled(capacity, batch_size, n_steps)
    stream = oracle.Stream(num_envs, seed=capacity + 10 * num_envs + n_steps)
    return memory, stream, oracle.Replay(capacity, num_envs), memory.init(transition(stream.rows()))


fold = jax.jit(jax.vmap(returns.n_step))


def check(batch, model, n_steps):
    """Every field of every drawn window is the model's."""
    t = jax.tree.map(np.asarray, batch.transition)
    folded = fold(t.reward, GAMMA * t.discount, t.last)
    for b, number in enumerate(t.observation["count"]):
        walked = model.window(number, n_steps)  # fails if the row has been overwritten
        columns = oracle.Row(*zip(*walked, strict=True))  # each field along the walk
        length = len(walked)
        np.testing.assert_array_equal(t.reward[b, :length], columns.reward)
        np.testing.assert_array_equal(t.discount[b, :length], columns.discount)
        ends = [*columns.last[:-1], columns.last[-1] or model.is_newest(walked[-1])]  # the stream ends at the write head, too
        np.testing.assert_array_equal(t.last[b, :length], ends)
        expected = transition([walked[0]])._replace(next_observation=observation([walked[-1].next_number]))
        drawn = jax.tree.map(lambda leaf, b=b: leaf[b : b + 1], t)
        for field in ("observation", "action", "next_observation", "extras"):
            chex.assert_trees_all_equal(getattr(drawn, field), getattr(expected, field))
        discounts = GAMMA * np.array(columns.discount)
        np.testing.assert_allclose((folded[0][b], folded[1][b]), oracle.n_step(columns.reward, discounts, ends)[:2])


@pytest.mark.parametrize(
    ("capacity", "num_envs", "n_steps"), [(1, 1, 1), (4, 1, 4), (7, 1, 1), (9, 1, 3), (11, 2, 2), (12, 3, 4), (16, 4, 1)]
)
def test_random_operations_equal_the_slow_model(capacity, num_envs, n_steps):
    memory, stream, model, state = start(capacity, num_envs, batch_size=min(capacity, 6), n_steps=n_steps)
    random = np.random.default_rng(capacity)
    ages = set()
    for turn in range(5 * capacity // num_envs + 10):
        rows = stream.rows()
        model.add(rows)
        state = memory.add(state, transition(rows))
        if random.random() < 0.2:
            mask = random.random(num_envs) < 0.6
            model.cut(mask)
            stream.cut(mask)
            state = memory.cut(state, mask)
        batch = memory.sample(state, memory.noise(jax.random.key(turn)))
        check(batch, model, n_steps)
        stored = model.stored()
        ages.update(stored.index(number) for number in np.asarray(batch.transition.observation["count"]).tolist())
        assert int(state.size) == len(stored)
    assert ages == set(range(capacity // num_envs * num_envs))  # the oldest row and the newest have been drawn, too


def filled(capacity, num_envs, rows_added, batch_size, n_steps=1, end_chance=0.3):
    memory, stream, model, state = start(capacity, num_envs, batch_size, n_steps)
    stream.end_chance = end_chance
    for _ in range(rows_added):
        rows = stream.rows()
        model.add(rows)
        state = memory.add(state, transition(rows))
    return memory, model, state


@pytest.mark.parametrize("rows_added", [3, 6, 10], ids=["before full", "full", "after wrap"])
@pytest.mark.parametrize("num_envs", [1, 3])
def test_sampling_is_uniform_over_stored_transitions(rows_added, num_envs):
    memory, model, state = filled(6 * num_envs, num_envs, rows_added, batch_size=6 * num_envs)
    noise = jax.vmap(memory.noise)(jax.random.split(jax.random.key(5), 400))
    drawn = np.asarray(jax.vmap(memory.sample, in_axes=(None, 0))(state, noise).transition.observation["count"]).ravel()
    numbers, counts = np.unique(drawn, return_counts=True)
    assert numbers.tolist() == model.stored()  # all of them, and nothing else
    assert stats.chisquare(counts).pvalue > 1e-3


def test_draws_of_one_batch_are_independent():
    memory, _, state = filled(6, 1, 6, batch_size=6)
    noise = jax.vmap(memory.noise)(jax.random.split(jax.random.key(6), 600))
    drawn = np.asarray(jax.vmap(memory.sample, in_axes=(None, 0))(state, noise).index)  # [600, B]
    pairs = np.zeros((6, 6))
    np.add.at(pairs, (drawn[:, :-1].ravel(), drawn[:, 1:].ravel()), 1)
    assert stats.chisquare(pairs.ravel()).pvalue > 1e-3


def test_a_window_that_reaches_the_write_head_bootstraps_there():
    memory, model, state = filled(6, 1, 8, batch_size=6, n_steps=4, end_chance=0.0)  # wrapped, one endless episode
    batch = memory.sample(state, memory.noise(jax.random.key(0)))
    check(batch, model, 4)
    newest, oldest = model.columns[0][-1], model.columns[0][0]
    batch = memory.sample(state, jnp.arange(6, dtype=jnp.uint32))
    t = batch.transition
    lengths = {int(n): int(np.argmax(last)) + 1 if last.any() else 4 for n, last in zip(t.observation["count"], t.last, strict=True)}
    assert lengths == {
        oldest.number: 4,
        oldest.number + 1: 4,
        oldest.number + 2: 4,
        newest.number - 2: 3,
        newest.number - 1: 2,
        newest.number: 1,
    }
    at = int(np.argmax(t.observation["count"] == newest.number))
    assert t.next_observation["count"][at] == newest.next_number
    assert t.discount[at, 0] == 1


def test_storage_keeps_dtypes():
    memory, _, state = filled(6, 2, 2, batch_size=4)
    batch = memory.sample(state, memory.noise(jax.random.key(0)))
    for transition in (state.rows, batch.transition):
        dtypes = jax.tree.map(lambda leaf: str(leaf.dtype), transition)
        assert dtypes.observation == dtypes.next_observation == {"image": "uint8", "vector": "float32", "count": "int32"}
        assert (dtypes.action, dtypes.reward, dtypes.discount, dtypes.last) == ("int32", "float32", "float32", "bool")
    assert state.rows.observation["image"].shape == (3, 2, 2, 3)
    assert batch.transition.observation["image"].shape == (4, 2, 3)


def test_the_storage_tells_which_slots_it_filled_and_numbers_those_that_can_be_drawn():
    storage, stream = ring(7), oracle.Stream(2, seed=0)
    state = storage.init(transition(stream.rows()))
    held = {}  # by slot
    for turn in range(8):  # 3 rows of 2 environments: wraps twice
        rows = stream.rows()
        state, filled, emptied = storage.add(state, transition(rows))
        assert filled.tolist() == [turn % 3 * 2, turn % 3 * 2 + 1] and emptied.shape == (0,)
        held.update(zip(filled.tolist(), (row.number for row in rows), strict=True))
        slots = storage.slot(state, jnp.arange(state.size))
        assert sorted(slots.tolist()) == sorted(held)
        np.testing.assert_array_equal(storage.window(state, slots).observation["count"], [held[slot] for slot in slots.tolist()])


def test_capacity_is_rounded_down_to_whole_rows():
    _, model, state = filled(11, 3, 9, batch_size=4)
    assert state.rows.reward.shape == (3, 3)
    assert len(model.stored()) == 9


def test_cut_marks_only_the_newest_row_of_the_masked_environments():
    memory, _, state = filled(12, 3, 2, batch_size=4, end_chance=0.0)
    after = memory.cut(state, jnp.array([True, False, True]))
    np.testing.assert_array_equal(after.rows.last, [[False] * 3, [True, False, True], [False] * 3, [False] * 3])
    chex.assert_trees_all_equal(after._replace(rows=after.rows._replace(last=state.rows.last)), state)  # not terminated, nothing else
    again = memory.cut(after, jnp.array([False, False, False]))
    chex.assert_trees_all_equal(again, after)  # a mark stays


def test_cut_of_an_empty_ring_writes_nothing():
    memory, _, _, state = start(6, 2, batch_size=4)
    chex.assert_trees_all_equal(memory.cut(state, jnp.ones(2, bool)), state)


def test_cut_after_wrapping_to_row_zero_marks_the_final_row():
    memory, _, state = filled(4, 1, 4, batch_size=4, end_chance=0.0)
    assert int(state.cursor) == 0
    np.testing.assert_array_equal(memory.cut(state, jnp.array([True])).rows.last[:, 0], [False, False, False, True])


def test_reweigh_changes_nothing_and_any_mixture_will_do():
    memory, _, state = filled(6, 1, 4, batch_size=4)
    chex.assert_trees_all_equal(memory.reweigh(state, jnp.arange(4), jnp.ones(4)), state)
    assert memory.demand is None
    assert memory.sample(state, memory.noise(jax.random.key(0))).weight == 1.0


@pytest.mark.parametrize(
    ("name", "capacity", "batch_size", "n_steps"),
    [("capacity", 0, 1, 1), ("batch_size", 8, 0, 1), ("n_steps", 8, 4, 0), ("capacity", -1, 1, 1)],
)
def test_numbers_below_one_are_refused(name, capacity, batch_size, n_steps):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got "):
        uniform(ring(capacity, n_steps=n_steps), batch_size)


def test_a_batch_larger_than_the_capacity_is_refused():
    with pytest.raises(ValueError, match=r"32 exceeds capacity 16"):
        uniform(ring(16), 32)


def test_a_batch_larger_than_what_is_stored_is_refused_outside_jit():
    _, _, state = filled(12, 3, 1, batch_size=4)  # 1 row, 3 transitions
    memory = uniform(ring(12), 4)
    with pytest.raises(ValueError, match="a batch of 4 was asked for and 3 transitions are stored"):
        memory.sample(state, memory.noise(jax.random.key(0)))
    uniform(ring(12), 3).sample(state, jnp.arange(3, dtype=jnp.uint32))  # as many as there are


def test_a_row_of_other_shapes_or_dtypes_is_refused():
    """A row of one environment would be broadcast over all of them in silence, and a float64 reward rounded."""
    storage, row = ring(12), transition(oracle.Stream(3, seed=0).rows())
    state = storage.init(row)
    for wrong in (transition(oracle.Stream(1, seed=0).rows()), row._replace(action=row.action[:1]), row._replace(last=row.reward)):
        with pytest.raises(AssertionError):
            storage.add(state, wrong)


def test_a_capacity_too_small_for_a_window_of_all_environments_is_refused():
    memory = uniform(ring(8, n_steps=3), 4)
    with pytest.raises(ValueError, match="raise capacity to at least 12"):
        memory.init(transition(oracle.Stream(4, seed=0).rows()))
    memory.init(transition(oracle.Stream(2, seed=0).rows()))
