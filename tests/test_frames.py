"""Image replay against a slow model that keeps whole stacks: what was acted on is what is drawn, for as long as its frames are held.

A frame shows its number in the digits of its pixels, so that images are compared by the numbers in them; 0 is a black frame.
"""

import functools
import itertools
import random
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dqn_jax.memory.frames import frames
from dqn_jax.memory.prioritized import prioritized
from dqn_jax.memory.uniform import uniform
from dqn_jax.types import Transition


class Config(NamedTuple):
    num_envs: int
    stack: int | None
    stack_axis: int
    n_steps: int
    spare: int  # frames of each environment beyond the fewest that are legal
    dtype: type = np.uint8

    @property
    def depth(self):
        return self.stack or 1

    @property
    def length(self):
        return self.n_steps + 2 * self.depth + self.spare

    @property
    def storage(self):
        capacity = self.length * self.num_envs + self.num_envs - 1  # rounded down to whole rows
        return frames(capacity, stack=self.stack, stack_axis=self.stack_axis, n_steps=self.n_steps)

    @property
    def places(self):
        """What a digit of a frame's number counts."""
        return 2 ** np.arange(16) if self.dtype == np.bool_ else 256 ** np.arange(2)

    def image(self, numbers):
        """The observations of frames with these numbers ``[..., S]``, each a picture of two lines."""
        numbers = np.asarray(numbers)[..., None]
        digits = (numbers // self.places % self.places[1]).reshape(*numbers.shape[:-1], 2, -1).astype(self.dtype)
        return digits[..., 0, :, :] if self.stack is None else np.moveaxis(digits, -3, -1 if self.stack_axis == -1 else -3)

    def numbers(self, image):
        """The other way round: every image has numbers of its own."""
        assert image.dtype == self.dtype
        image = np.asarray(image).astype(np.int64)
        digits = image[..., None, :, :] if self.stack is None else np.moveaxis(image, -1 if self.stack_axis == -1 else -3, -3)
        assert digits.shape[-3:] == (self.depth, 2, len(self.places) // 2)
        return digits.reshape(*digits.shape[:-2], -1) @ self.places

    def transition(self, rows):
        """``rows [N]`` of the model, or arrays of such fields with any leading axes."""
        return Transition(
            observation=self.image(rows.stack),
            action=np.asarray(rows.number, np.int32) * 3,
            reward=np.asarray(rows.reward, np.float32),
            discount=np.asarray(rows.discount, np.float32),
            next_observation=self.image(rows.successor),
            last=np.asarray(rows.last, np.bool_),
            extras={"number": np.asarray(rows.number, np.float32)},
        )


class Row(NamedTuple):
    number: int
    stack: tuple
    successor: tuple
    oldest: int  # which of all frames that were ever written is the oldest in ``stack``
    reward: int
    discount: int
    last: bool


class Column:
    """One environment and its part of the replay: every row with its whole stacks, and every frame that was ever written."""

    def __init__(self, config, random, end_chance, fresh):
        self.config, self.random, self.end_chance, self.fresh = config, random, end_chance, fresh
        self.rows, self.frames = [], []
        self.begin()

    def begin(self, carry_on=False):
        depth, kind = self.config.depth, self.random.random()
        self.begins = True
        if carry_on and kind < 0.4:
            return  # After a cut the environment may go on where it was, ...
        if kind < 0.5:
            self.now = tuple(self.fresh() for _ in range(depth))  # ... or anywhere, without padding.
        elif kind < 0.75:
            self.now = (0,) * (depth - 1) + (self.fresh(),)  # padded by zeros
        else:
            self.now = (self.fresh(),) * depth  # padded by repetition

    def add(self):
        if self.begins:
            self.frames.extend(self.now)
        successor = (*self.now[1:], self.fresh())
        last = self.random.random() < self.end_chance
        discount = 0 if last and self.random.random() < 0.5 else 1
        oldest = len(self.frames) - self.config.depth
        self.rows.append(Row(self.fresh(), self.now, successor, oldest, self.random.randrange(-9, 10), discount, last))
        self.frames.append(successor[-1])
        self.now, self.begins = successor, False
        if last:
            self.begin()

    def cut(self):
        self.rows[-1] = self.rows[-1]._replace(last=True)
        self.begin(carry_on=not self.begins)

    def drawable(self):
        """Which rows can be drawn: those all of whose frames are among the newest, as many as are held."""
        held = range(len(self.frames) - self.config.length, len(self.frames))
        numbers = range(max(0, len(self.rows) - self.config.length), len(self.rows))
        return [r for r in numbers if all(self.rows[r].oldest + k in held for k in range(self.config.depth))]

    def window(self, r):
        """The window that begins at row r, as one flat tuple: see ``flat``."""
        n, row, walked = self.config.n_steps, self.rows[r], []
        for following in self.rows[r : r + n]:
            walked.append(following)
            if following.last:
                break
        # The stream ends at the write head, too.
        ends = [each.last or each is self.rows[-1] for each in walked]
        missing = [0] * (n - len(walked))
        rewards, discounts = [each.reward for each in walked], [each.discount for each in walked]
        walks = [1] * len(walked) + missing
        return (
            *row.stack,
            *walked[-1].successor,
            3 * row.number,
            row.number,
            *walks,
            *rewards,
            *missing,
            *discounts,
            *missing,
            *ends,
            *missing,
        )


def flat(config, t, walks):
    """Windows of the storage in the order of ``Column.window``; what follows the end of a walk does not count."""
    columns = [config.numbers(t.observation), config.numbers(t.next_observation), t.action[:, None], t.extras["number"][:, None]]
    return np.concatenate([*columns, walks, *(walks * np.asarray(field) for field in (t.reward, t.discount, t.last))], axis=1)


class Model:
    """All environments: a row at a time, and cuts."""

    def __init__(self, config, seed, end_chances, cut_chance):
        self.config, self.cut_chance = config, cut_chance
        self.random = random.Random(seed)
        fresh = functools.partial(next, itertools.count(1))
        self.columns = [Column(config, self.random, chance, fresh) for chance in end_chances]

    def operate(self):
        """One row of every environment, perhaps a cut: the rows as they were added, and the mask."""
        for column in self.columns:
            column.add()
        rows = [column.rows[-1] for column in self.columns]
        mask = [self.random.random() < self.cut_chance for _ in self.columns]
        for column, masked in zip(self.columns, mask, strict=True):
            if masked:
                column.cut()
        return rows, mask

    def slot(self, c, r):
        return r % self.config.length * self.config.num_envs + c

    def drawable(self):
        """The row of each slot that can be drawn."""
        return {self.slot(c, r): (c, r) for c, column in enumerate(self.columns) for r in column.drawable()}


class Seen(NamedTuple):
    """What a program saw after each operation."""

    filled: np.ndarray
    emptied: np.ndarray
    size: np.ndarray
    slots: np.ndarray  # of all numbers, also those beyond ``size``
    windows: Transition  # that begin there
    leaves: np.ndarray
    drawn: np.ndarray


def run(config, rows, masks, keys):
    """Adds rows, cuts, and looks at everything, with a prioritized memory above the storage."""
    storage, num_slots = config.storage, config.length * config.num_envs
    memory = prioritized(storage, 2, alpha=0.8)

    def operate(state, operation):
        row, mask, key = operation
        _, filled, emptied = storage.add(state.stored, row)
        state = memory.cut(memory.add(state, row), mask)
        slots = storage.slot(state.stored, jnp.arange(num_slots))
        batch = memory.sample(state, memory.noise(key))
        state = memory.reweigh(state, batch.index, 10 ** jax.random.uniform(key, (2,), minval=-3, maxval=1))
        leaves = state.tree[-((storage.capacity + 15) // 16) :].ravel()
        return state, Seen(filled, emptied, state.size, slots, storage.window(state.stored, slots), leaves, batch.index)

    state = memory.init(jax.tree.map(lambda leaf: leaf[0], rows))
    return jax.lax.scan(operate, memory.cut(state, masks[0]), (rows, masks, keys))[1]  # nothing is there to be cut at first


def stacked(config, operations):
    """The operations ``[K][L]`` of many sequences, as arrays ``[K, L, N]``."""
    rows = Row(*(np.array([[[row[k] for row in rows] for rows, _ in one] for one in operations]) for k in range(len(Row._fields))))
    return config.transition(rows), np.array([[mask for _, mask in one] for one in operations])


SEQUENCES, LENGTH = 1250, 32  # of each configuration: 10,000 in all
CONFIGS = [
    Config(1, None, 0, 1, spare=0),
    Config(2, None, 0, 3, spare=1, dtype=np.bool_),
    Config(3, 1, -1, 3, spare=0),
    Config(2, 3, -1, 1, spare=5),
    Config(3, 3, 0, 3, spare=0),
    Config(1, 3, 0, 3, spare=9, dtype=np.bool_),
    Config(2, 4, 0, 3, spare=2),
    Config(3, 4, -1, 1, spare=3, dtype=np.bool_),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.num_envs} envs, stack {c.stack} at {c.stack_axis}, {c.n_steps} steps")
def test_random_operations_equal_the_slow_model(config):
    num_slots = config.length * config.num_envs
    choose = np.random.default_rng(config.length)
    operations, expected, places = [], [], []
    drawable = np.zeros((SEQUENCES, LENGTH + 1, num_slots), bool)
    for k in range(SEQUENCES):
        model = Model(config, k, choose.choice([0.02, 0.1, 0.3, 0.9], config.num_envs), choose.choice([0, 0.05, 0.2]))
        operations.append([])
        looks = {*choose.integers(0, LENGTH, 2).tolist(), LENGTH - 1}  # when every window is compared
        for turn in range(LENGTH):
            operations[-1].append(model.operate())
            rows = model.drawable()
            drawable[k, turn + 1, list(rows)] = True
            if turn in looks:
                places.extend((k, turn, slot) for slot in rows)
                expected.extend(model.columns[c].window(r) for c, r in rows.values())
    rows, masks = stacked(config, operations)
    keys = jax.random.split(jax.random.key(0), (SEQUENCES, LENGTH))
    seen = jax.tree.map(np.asarray, jax.jit(jax.vmap(lambda *each: run(config, *each)))(rows, masks, keys))
    before, after = drawable[:, :-1], drawable[:, 1:]

    def marked(slots, counts):
        """Which slots are named, none twice."""
        k, turn, at = np.nonzero(counts)
        marks = np.zeros((SEQUENCES, LENGTH, num_slots), int)
        np.add.at(marks, (k, turn, slots[k, turn, at]), 1)
        assert marks.max() <= 1
        return marks == 1

    np.testing.assert_array_equal(seen.size, after.sum(axis=-1))
    is_number = np.arange(num_slots) < seen.size[..., None]
    np.testing.assert_array_equal(marked(seen.slots, is_number), after)
    filled = np.arange(LENGTH)[:, None] % config.length * config.num_envs + np.arange(config.num_envs)
    np.testing.assert_array_equal(seen.filled, np.broadcast_to(filled, seen.filled.shape))
    assert seen.emptied.min() >= -1
    np.testing.assert_array_equal(marked(seen.emptied, seen.emptied >= 0), before & ~after)
    np.testing.assert_array_equal(seen.leaves[..., :num_slots] > 0, after)
    assert not seen.leaves[..., num_slots:].any()
    assert np.take_along_axis(after, seen.drawn, axis=-1).all()
    # Where each slot stands among the numbers, and what begins there.
    number = np.argmax((seen.slots[..., None] == np.arange(num_slots)) & is_number[..., None], axis=-2)  # [K, L, slots]
    k, turn, slot = np.array(places).T
    expected = np.array(expected)
    windows = jax.tree.map(lambda leaf: leaf[k, turn, number[k, turn, slot]], seen.windows)
    walks = expected[:, 2 * config.depth + 2 :][:, : config.n_steps]
    np.testing.assert_array_equal(flat(config, windows, walks), expected)


def grown(memory, config, model, num_rows):
    """The memory after that many rows of the model, and without cuts."""
    rows, _ = stacked(config, [[model.operate() for _ in range(num_rows)]])
    rows = jax.tree.map(lambda leaf: leaf[0], rows)
    state = memory.init(jax.tree.map(lambda leaf: leaf[0], rows))
    return jax.jit(lambda state, rows: jax.lax.scan(lambda state, row: (memory.add(state, row), None), state, rows)[0])(state, rows)


@pytest.mark.parametrize("make", [uniform, lambda *args: prioritized(*args, alpha=0.0)], ids=["uniform", "prioritized"])
def test_sampling_is_uniform_over_columns_of_uneven_length(make):
    config = Config(3, 3, 0, 1, spare=23)  # 30 frames of each environment
    memory, model = make(config.storage, 20), Model(config, 0, (1.0, 0.3, 0.0), cut_chance=0)
    state = grown(memory, config, model, num_rows=70)
    rows = model.drawable()
    lengths = [len(column.drawable()) for column in model.columns]
    assert lengths[0] == 7 and lengths[0] < lengths[1] < lengths[2] == 27  # what this test is about
    assert int(state.size) == len(rows)
    noise = jax.vmap(memory.noise)(jax.random.split(jax.random.key(1), 1000))
    batch = jax.jit(jax.vmap(memory.sample, in_axes=(None, 0)))(state, noise)
    slots, counts = np.unique(batch.index, return_counts=True)
    assert slots.tolist() == sorted(rows)  # all of them, and nothing else
    assert stats.chisquare(counts).pvalue > 1e-3
    drawn = [rows[slot] for slot in np.asarray(batch.index).ravel().tolist()]
    np.testing.assert_array_equal(batch.transition.action.ravel(), [3 * model.columns[c].rows[r].number for c, r in drawn])


def test_the_true_final_observation_is_kept_and_the_next_episode_is_not_mixed_in():
    """By hand: two episodes of stacks of two, the first of one step."""
    storage = frames(16, stack=2)
    config = Config(1, 2, 0, 1, spare=0)
    rows = [
        Row(0, (1, 1), (1, 2), 0, 5, 0, True),
        Row(1, (0, 7), (7, 8), 0, 6, 1, False),
        Row(2, (7, 8), (8, 9), 0, 7, 1, True),
    ]
    state = storage.init(config.transition(Row(*zip(rows[0], strict=True))))
    empty = storage.cut(state, jnp.ones(1, bool))
    assert not empty.rows.last.any() and int(empty.size) == 0  # there is nothing to mark
    for row in rows:
        state, _, _ = storage.add(state, config.transition(Row(*zip(row, strict=True))))
    t = storage.window(state, storage.slot(state, jnp.arange(3)))
    assert config.numbers(t.observation).tolist() == [[1, 1], [0, 7], [7, 8]]
    assert config.numbers(t.next_observation).tolist() == [[1, 2], [7, 8], [8, 9]]
    assert (t.discount[:, 0].tolist(), t.last[:, 0].tolist()) == ([0, 1, 1], [True, False, True])
    # 3 + 4 frames: a stack and a successor, a stack and two successors.
    assert np.count_nonzero(config._replace(stack=None).numbers(state.frames[:, 0])) == 6 and int(state.head[0]) == 7


def test_a_million_frames_take_the_bytes_of_a_million_frames():
    image = jax.ShapeDtypeStruct((1, 4, 84, 84), jnp.uint8)
    number, flag = jax.ShapeDtypeStruct((1,), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.bool_)
    row = Transition(image, jax.ShapeDtypeStruct((1,), jnp.int32), number, number, image, flag)
    state = jax.eval_shape(prioritized(frames(1_000_000, stack=4, n_steps=3), 32).init, row)
    assert state.stored.frames.dtype == jnp.uint8 and state.stored.frames.shape == (1_000_000, 1, 84, 84)
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) <= 7.2e9  # 7.056e9 are the frames themselves


def row_of(shape=(3, 84, 84), dtype=np.uint8, num_envs=2):
    observation = np.zeros((num_envs, *shape), dtype)
    number = np.zeros(num_envs, np.float32)
    return Transition(observation, np.zeros(num_envs, np.int32), number, number, observation, np.zeros(num_envs, bool))


@pytest.mark.parametrize(
    ("stack", "stack_axis", "shape"), [(3, 0, (3, 8, 9)), (3, -1, (8, 9, 3)), (3, 1, (8, 3, 9)), (3, -3, (3, 8, 9)), (3, 0, (3,))]
)
def test_the_stack_may_be_along_any_axis(stack, stack_axis, shape):
    storage = frames(40, stack=stack, stack_axis=stack_axis)
    row = row_of(shape)
    random_bytes = np.random.default_rng(0).integers(0, 256, (2, 2, *shape)).astype(np.uint8)
    older = np.moveaxis(random_bytes[0], stack_axis + 1 if stack_axis >= 0 else stack_axis, 0)
    newest = np.moveaxis(random_bytes[1], stack_axis + 1 if stack_axis >= 0 else stack_axis, 0)[-1:]
    successor = np.moveaxis(np.concatenate([older[1:], newest]), 0, stack_axis + 1 if stack_axis >= 0 else stack_axis)
    row = row._replace(observation=random_bytes[0], next_observation=successor)
    state, slots, _ = storage.add(storage.init(row), row)
    assert state.frames.shape == (20, 2, *np.delete(shape, stack_axis))
    t = storage.window(state, slots)
    np.testing.assert_array_equal(t.observation, row.observation)
    np.testing.assert_array_equal(t.next_observation, row.next_observation)


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.int8, np.uint16])
def test_images_of_more_than_a_byte_are_refused(dtype):
    with pytest.raises(TypeError, match=f"uint8 or bool, one byte for each number, got {np.dtype(dtype)}.*use the ring"):
        frames(100, stack=3).init(row_of(dtype=dtype))


def test_observations_of_several_arrays_are_refused():
    row = row_of()
    for observation in ({"image": row.observation}, (row.observation, row.reward)):
        with pytest.raises(TypeError, match=r"one array, got PyTreeDef.*use the ring"):
            frames(100, stack=3).init(row._replace(observation=observation, next_observation=observation))


@pytest.mark.parametrize(
    ("stack", "stack_axis", "shape"),
    [(4, 0, (3, 84, 84)), (3, -1, (3, 84, 84)), (3, 3, (3, 84, 84)), (3, -4, (3, 84, 84)), (3, 0, ()), (1, 0, (84, 84))],
)
def test_an_observation_without_such_a_stack_is_refused(stack, stack_axis, shape):
    message = (
        rf"shape \({', '.join(map(str, shape))}\) has no stack of {stack} frames along axis {stack_axis}: name its stack and stack_axis"
    )
    with pytest.raises(ValueError, match=message):
        frames(100, stack=stack, stack_axis=stack_axis).init(row_of(shape))


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize(("stack", "n_steps"), [(None, 1), (3, 1), (4, 3)])
def test_a_capacity_too_small_for_a_window_is_refused(num_envs, stack, n_steps):
    fewest = (n_steps + 2 * (stack or 1)) * num_envs
    row = row_of((stack, 8, 8) if stack else (8, 8), num_envs=num_envs)
    with pytest.raises(ValueError, match=f"capacity {fewest - 1} leaves .* raise capacity to at least {fewest}, or lower n_steps"):
        frames(fewest - 1, stack=stack, n_steps=n_steps).init(row)
    frames(fewest, stack=stack, n_steps=n_steps).init(row)


@pytest.mark.parametrize("name", ["capacity", "stack", "n_steps"])
@pytest.mark.parametrize("number", [0, -1])
def test_numbers_below_one_are_refused(name, number):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got {number}"):
        frames(**{"capacity": 100, name: number})


WRONG = {
    "frames": {"observation": np.zeros((2, 3, 8, 9), np.uint8), "next_observation": np.zeros((2, 3, 8, 9), np.uint8)},
    "stack": {"observation": np.zeros((2, 4, 8, 8), np.uint8), "next_observation": np.zeros((2, 4, 8, 8), np.uint8)},
    "successor's stack": {"next_observation": np.zeros((2, 2, 8, 8), np.uint8)},
    "successor's type": {"next_observation": np.zeros((2, 3, 8, 8), np.float32)},
    "environments": row_of((3, 8, 8), num_envs=1)._asdict(),
    "actions": {"action": np.zeros(1, np.int32)},
    "discounts": {"discount": np.ones(1, np.float32)},
    "ends": {"last": np.zeros(1, bool)},
    "ends' type": {"last": np.zeros(2, np.float32)},
}


@pytest.mark.parametrize("fields", WRONG.values(), ids=WRONG)
def test_a_row_of_other_shapes_or_dtypes_is_refused(fields):
    """A row of fewer environments would be broadcast over all of them in silence."""
    storage, row = frames(40, stack=3), row_of((3, 8, 8))
    with pytest.raises((AssertionError, TypeError, ValueError)):
        storage.add(storage.init(row), row._replace(**fields))
