"""What is compiled, how often, and that no program copies the replay: read off the optimised programs, at full size, allocating nothing."""

import logging
import math
import os
import re
import subprocess
import sys

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dqn_jax import DQN, digest, dqn, envs, stepper, train
from dqn_jax.memory.prioritized import Prioritized
from dqn_jax.programs import Packing, Parts, compile_programs
from dqn_jax.staging import Ahead, Staging

OBSERVATION_SPACE = gymnasium.spaces.Box(-np.inf, np.inf, (8,))
ACTION_SPACE = gymnasium.spaces.Discrete(4)
SPACES = OBSERVATION_SPACE, ACTION_SPACE
IMAGE_SPACE = gymnasium.spaces.Box(0, 255, (2, 8, 8), np.uint8)  # Two frames of 8 x 8.
SMALL = {"hidden": (8,), "batch_size": 4, "replay_start_size": 4, "update_interval": 2}


# How often.


@pytest.fixture(scope="module")
def host():
    """An agent that has met everything that it ever compiles for: two ends of an episode, a cut, an update, a greedy action."""
    agent = DQN(SPACES, capacity=64, **SMALL)
    for _ in range(2):
        for _ in range(6):
            agent.act_and_train(np.ones(8, np.float32), 1.0)
        agent.stop_episode_and_train(np.ones(8, np.float32), 1.0, terminated=False)
        agent.act_and_train(np.ones(8, np.float32), 0.0)
        agent.act_and_train(np.ones(8, np.float32), 0.0)
        agent.stop_episode()
        agent.act(np.ones(8, np.float32))
    return agent


def compiled_in(caplog):
    return [
        text for text in map(logging.LogRecord.getMessage, caplog.records) if text.startswith(("Compiling", "Finished XLA compilation"))
    ]


def compilations(agent):
    programs = {name: program._cache_size() for name, program in agent._stepper._programs._asdict().items()}
    return {**programs, "noise": agent._stepper._noise._draw._cache_size(), "draws": agent._stepper._draws._draw._cache_size()}


def test_each_program_of_the_host_driver_is_compiled_once(host):
    # ``store`` is for rows that are read before an update falls due on them.
    assert compilations(host) == dict.fromkeys(("explore", "exploit", "store", "cut", "learn", "noise", "draws"), 1)


@pytest.mark.parametrize(
    "reward",
    [1.5, 2, True, np.float64(1.5), np.float32(1.5), np.int64(2), np.array(1.5), jnp.float32(1.5)],
    ids=lambda r: f"{type(r).__name__}",
)
@pytest.mark.parametrize(
    "observation",
    [np.ones(8, np.float32), np.ones(8), [1.0] * 8, np.ones(16, np.float32)[::2], jnp.ones(8), np.ones(8, np.float16)],
    ids=["float32", "float64", "list", "strided", "jax", "float16"],
)
def test_no_kind_of_scalar_or_observation_compiles_anything_again(host, reward, observation, caplog):
    before = compilations(host)
    with jax.log_compiles(), caplog.at_level(logging.DEBUG, logger="jax"):
        for _ in range(5):  # more than an update interval
            host.act_and_train(observation, reward)
        host.act(observation)
        host.stop_episode_and_train(observation, reward)
    assert compilations(host) == before
    assert not compiled_in(caplog)


def test_the_log_of_compilations_is_heard(caplog):
    with jax.log_compiles(), caplog.at_level(logging.DEBUG, logger="jax"):
        jax.jit(lambda x: x + 41)(1.0)
    assert compiled_in(caplog)


def test_batches_compile_once_with_successors_and_without():
    agent = DQN(SPACES, num_envs=2, capacity=64, **SMALL)
    observation, no = np.ones((2, 8), np.float32), np.zeros(2, bool)
    for reward in ([1, 2], [0.5, 1.0], np.ones(2), np.ones(2, np.float32), jnp.ones(2), (True, False)):
        agent.batch_act_and_train(observation, reward, no, no)
        agent.batch_act_and_train(observation, reward, no, ~no, observation.astype(np.float64))
    assert compilations(agent) == {**dict.fromkeys(compilations(agent), 1), "exploit": 0}


@pytest.mark.parametrize(("num_envs", "rows"), [(1, 0), (2, 0), (2, 3)])
def test_compile_leaves_nothing_to_compile_and_changes_nothing(num_envs, rows, caplog):
    agent = DQN(SPACES, num_envs=num_envs, capacity=64, prioritized=True, **SMALL)
    for row in range(rows + 1 if rows else 0):
        outcome = (np.ones(2), np.zeros(2, bool), np.zeros(2, bool)) if row else ()
        agent.batch_act_and_train(np.ones((2, 8)), *outcome)
    before = digest(agent.state)
    agent.compile()
    assert digest(agent.state) == before
    compiled = compilations(agent)
    assert compiled == dict.fromkeys(compiled, 1)
    with jax.log_compiles(), caplog.at_level(logging.DEBUG, logger="jax"):
        for _ in range(8):
            if num_envs == 1:
                agent.act_and_train(np.ones(8), 1)
            else:
                agent.batch_act_and_train(np.ones((2, 8)), np.ones(2), np.zeros(2, bool), np.zeros(2, bool), np.ones((2, 8)))
    assert compilations(agent) == compiled
    assert not compiled_in(caplog)


# Donation.


def test_donated_inputs_are_gone(host):
    def leaves(*places):
        return [leaf for place in places for leaf in jax.tree.leaves(host._stepper._cell[place])]

    host.stop_episode()
    before = leaves(stepper.MEMORY)
    host.act_and_train(np.ones(8), 0.0)  # cuts
    assert all(leaf.is_deleted() for leaf in before)
    learnt = 0
    for _ in range(4):
        before = leaves(stepper.MEMORY, stepper.LEARNER)
        updates = host._stepper._cell[stepper.UPDATES]
        host.act_and_train(np.ones(8), 1.0)
        is_due = host._stepper._cell[stepper.UPDATES] > updates
        assert [leaf.is_deleted() for leaf in before] == [is_due] * len(before)  # Otherwise the row waits on the host.
        learnt += is_due
    assert learnt == 2
    before = leaves(stepper.MEMORY)
    host.stop_episode_and_train(np.ones(8), 1.0)
    assert not any(leaf.is_deleted() for leaf in before)  # The row waits on the host ...
    host.get_statistics()
    assert all(leaf.is_deleted() for leaf in before)  # ... until somebody looks.


def test_nobody_outside_holds_what_is_donated(host):
    state = host.state
    host.act_and_train(np.ones(8), 0.0)
    host.act_and_train(np.ones(8), 1.0)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


# Copies. A program is compiled from shapes alone, at a million transitions.

CAPACITY = 1_000_000
SEEDS = 4
WIDTHS = {"pred": 1, "bf16": 2}
SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
MOVES = re.compile(r" = (.*?) (copy|copy-start|select|transpose|concatenate|pad)\(")


def num_bytes(tree):
    return sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))


def leaf_bytes(leaf):
    return 0 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else math.prod(leaf.shape) * leaf.dtype.itemsize


def largest(text):
    """The bytes of the largest array in a shape of the program's text: ``f32[4,8]{1,0}``, or a tuple of such."""

    def size(dtype, dims):
        width = WIDTHS.get(dtype) or max(1, int(re.sub(r"\D", "", dtype) or 0) // 8)
        return width * math.prod(int(dim) for dim in dims.split(",") if dim)

    return max((size(*found) for found in SHAPE.findall(text)), default=0)


def moves(compiled, at_least):
    """The operations of the optimised program that write as many bytes as that, to move them or to choose between them."""
    found, entry = [], False
    for line in compiled.as_text().splitlines():
        if line.endswith("{") and not line.startswith(" "):
            entry = line.startswith("ENTRY")
        match = MOVES.search(line)
        # A program that makes its replay fills one array with zeros and may copy that, once, into the next.
        filled = entry and re.search(r"copy\(%\w*broadcast[\w.]*\)", line)
        if match and largest(match.group(1)) >= at_least and not filled:
            found.append(line.strip())
    return found


def assert_in_place(program, *args, memory, donated=True, made=0):
    """``program`` is jitted, ``args`` are shapes, ``memory`` the shapes of one replay; ``made`` are bytes that it makes once, beside."""
    compiled = program.lower(*args).compile()
    replay = num_bytes(memory)
    assert replay > 50 * CAPACITY  # the shapes are those of the full size
    found = moves(compiled, CAPACITY // 2)  # half the smallest array in the replay: ``last``, one byte a transition
    assert not found, "\n".join(found)
    analysis = compiled.memory_analysis()
    assert analysis.temp_size_in_bytes < CAPACITY // 2 + made
    if donated:
        assert analysis.alias_size_in_bytes >= replay, "the replay is not donated"


def stacked(tree, num):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((num, *leaf.shape), leaf.dtype), tree)


MEMORIES = {
    "uniform": {},
    "prioritized": {"prioritized": True},
    "frames": {"frames": "stack_first"},
    "prioritized frames": {"prioritized": True, "frames": "stack_first"},
}


def space_of(options):
    return IMAGE_SPACE if "frames" in options else OBSERVATION_SPACE


def big_agent(**options):
    return dqn((space_of(options), ACTION_SPACE), capacity=CAPACITY, **{**SMALL, **options})


KEY = jax.eval_shape(lambda: jax.random.key(0))


class Shapes:
    """The arguments of the host driver's programs, as shapes."""

    def __init__(self, num_envs, **options):
        agent, space = big_agent(**options), space_of(options)
        observation = jnp.zeros((num_envs, *space.shape), space.dtype)
        state = jax.eval_shape(agent.init, KEY, observation)
        cadence = agent.cadence(num_envs)
        noise = Ahead(lambda s, counter: agent.noise(s, counter, num_envs), state)
        draws = Ahead(agent.draw, state, cadence.updates)
        decision = jax.eval_shape(agent.explore, state, observation, noise.row)[1]
        no_decision = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), decision)
        staging = Staging(np.asarray(observation), no_decision, cadence.rows)
        parts = Parts(Packing(state.learner), Packing(state.memory), noise.packing, draws.packing, staging.row)
        programs = compile_programs(agent, num_envs, parts)
        learner, memory = parts.learner.pack(state.learner), parts.memory.pack(state.memory)
        self.state, self.memory = state.memory, memory
        drawn = jax.eval_shape(parts.draws.pack, stacked(draws.row, cadence.updates))
        counts = jax.ShapeDtypeStruct((4,), jnp.int32)
        noise_row = jax.eval_shape(parts.noise.pack, stacked(noise.row, 1))
        self.calls = {
            "explore": (programs.explore, (learner, observation, noise_row, jnp.int32(0))),
            "exploit": (programs.exploit, (learner, observation)),
            "store": (programs.store, (memory, staging.arrays, counts)),
            "cut": (programs.cut, (memory, counts)),
            "learn": (programs.learn, (learner, memory, staging.arrays, drawn, counts)),
        }


@pytest.mark.parametrize("name", ["store", "cut", "learn"])
@pytest.mark.parametrize(
    ("memory", "num_envs", "n_steps", "interval"),
    [
        ("uniform", 1, 1, 2),
        ("uniform", 4, 3, 2),
        *((memory, *case) for memory in MEMORIES for case in ((1, 2, 1), (4, 3, 8))),
    ],
)
def test_the_host_driver_copies_no_replay(name, memory, num_envs, n_steps, interval):
    shapes = Shapes(num_envs, n_steps=n_steps, update_interval=interval, **MEMORIES[memory])
    program, args = shapes.calls[name]
    assert_in_place(program, *args, memory=shapes.memory)


# Arrays that enter and leave, and bytes needed on the way, for one hidden layer and a batch of 4. Each array costs time at every call:
# whoever needs one more should know what it is for, and say so here. The 23rd of learn says whether the update was refused.
FEW = {"explore": (15, 1, 1_024), "exploit": (13, 1, 1_024), "store": (13, 8, 1_024), "cut": (9, 8, 1_024), "learn": (27, 23, 4_096)}


@pytest.mark.parametrize("name", FEW)
def test_the_host_drivers_programs_take_few_arrays_and_little_memory(name):
    program, args = Shapes(1).calls[name]
    taken, given = len(jax.tree.leaves(args)), len(jax.tree.leaves(jax.eval_shape(program, *args)))
    used = program.lower(*args).compile().memory_analysis().temp_size_in_bytes
    most_taken, most_given, most_used = FEW[name]
    assert taken <= most_taken and given <= most_given and used <= most_used


def drift(space):
    """An environment whose next observation depends on the action."""

    def observe(state):
        return state.astype(space.dtype) if space is OBSERVATION_SPACE else jnp.broadcast_to(state, (2, 8, 8)).astype(space.dtype)

    def reset(key):
        state = jax.random.normal(key, (8,))
        return state, observe(state)

    def step(key, state, action):
        state = state + 0.1 * jax.random.normal(key, (8,)) + action
        return state, observe(state), jnp.sum(state), state[0] > 3, jnp.zeros((), bool)

    return envs.with_auto_reset(reset, step, space, ACTION_SPACE, 20)


def big_training(num_envs=1, **options):
    return train(big_agent(**options), drift(space_of(options)), num_steps=2_000, num_envs=num_envs, history_length=2)


KEYS = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), SEEDS))


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("num_envs", [1, 4])
def test_advance_copies_no_replay(num_envs, memory):
    training = big_training(num_envs, **MEMORIES[memory])
    run = jax.eval_shape(training.init, KEY)
    assert_in_place(jax.jit(training.advance, donate_argnums=0), run, memory=run.agent.memory)


@pytest.mark.parametrize("memory", MEMORIES)
def test_advance_of_several_seeds_copies_no_replay(memory):
    training = big_training(**MEMORIES[memory])
    runs = jax.eval_shape(jax.vmap(training.init), KEYS)
    program = jax.jit(jax.vmap(training.advance), donate_argnums=0)
    # Measured against a single seed: a program must not copy one seed after the other either.
    one = jax.eval_shape(training.init, KEY).agent.memory
    assert_in_place(program, runs, memory=one)
    assert program.lower(runs).compile().memory_analysis().alias_size_in_bytes >= SEEDS * num_bytes(one)


# With an interval of 1 a cycle has a single row, and its loop must not be inlined.
@pytest.mark.parametrize(("interval", "memory"), [(2, "uniform"), *((1, memory) for memory in MEMORIES)])
def test_run_of_several_seeds_copies_no_replay(interval, memory):
    training = big_training(update_interval=interval, **MEMORIES[memory])
    memory = jax.eval_shape(training.init, KEY).agent.memory
    # Until the first update all seeds have the same priorities, and one tree.
    tree = num_bytes(memory.tree) if isinstance(memory, Prioritized) else 0
    assert_in_place(jax.jit(jax.vmap(training.run)), KEYS, memory=memory, donated=False, made=tree)


def test_resume_copies_no_replay_that_is_donated():
    training = big_training()
    state = jax.eval_shape(training.init, KEY).agent
    assert_in_place(jax.jit(training.resume, donate_argnums=1), KEY, state, memory=state.memory)


# The judge itself: what it must not let pass.


@pytest.fixture(scope="module")
def memory_and_row():
    ring = Shapes(1).state
    row = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), ring.rows)
    return ring, row


def added(memory, row):
    return memory._replace(rows=jax.tree.map(lambda stored, new: stored.at[memory.cursor].set(new), memory.rows, row))


def read_after_writing(memory, row):
    new = added(memory, row)
    # What is read of the old storage depends on the new one, so both must exist at once.
    return new, memory.rows.reward[new.rows.action[0, 0]]


def added_by_cond(memory, row):
    return jax.lax.cond(row.last[0], added, lambda memory, row: memory, memory, row)


def test_the_judge_passes_a_write_in_place(memory_and_row):
    assert_in_place(jax.jit(added, donate_argnums=0), *memory_and_row, memory=memory_and_row[0])


def test_the_judge_sees_that_nothing_is_donated(memory_and_row):
    memory, row = memory_and_row
    with pytest.raises(AssertionError, match="not donated"):
        assert_in_place(jax.jit(lambda memory, row: memory.rows.reward[3]), memory, row, memory=memory)


@pytest.mark.parametrize(
    ("program", "num_seeds", "operation"),
    [
        (jax.jit(added), None, "copy"),
        (jax.jit(read_after_writing, donate_argnums=0), None, "copy"),
        (jax.jit(jax.vmap(added_by_cond), donate_argnums=0), SEEDS, "select"),
    ],
    ids=["not donated", "read after writing", "cond under vmap"],
)
def test_the_judge_sees_what_copies(memory_and_row, program, num_seeds, operation):
    memory, row = memory_and_row
    args = stacked((memory, row), num_seeds) if num_seeds else (memory, row)
    with pytest.raises(AssertionError, match=rf" {operation}\("):
        assert_in_place(program, *args, memory=memory)


# Threads.

WAITS = """
import resource, sys
import gymnasium, numpy as np
import dqn_jax

dqn_jax.compute_inline()
options = dqn_jax.PRESETS["deck"] if sys.argv[1] == "deck" else {"hidden": (64, 64), "prioritized": sys.argv[1] == "prioritized"}
options = {**options, "batch_size": 64, "replay_start_size": 64, "update_interval": 1, "capacity": 1_000}
agent = dqn_jax.DQN((gymnasium.spaces.Box(-1, 1, (4,)), gymnasium.spaces.Discrete(2)), **options)
observation = np.zeros(4, np.float32)
for step in range(600):
    if step == 100:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
    agent.act_and_train(observation, 1.0)
print((resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before) / 500)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts how often the process waited as Linux tells it")
@pytest.mark.parametrize("which", ["default", "prioritized", "deck"])
def test_computing_inline_waits_for_no_other_thread(which):
    """XLA's CPU runtime hands operations over, and waits, where more than eight are ready at the same time (``finite.learn_if``)."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # As users compile.
    done = subprocess.run([sys.executable, "-c", WAITS, which], capture_output=True, text=True, check=True, env=environment)
    assert float(done.stdout) < 0.5  # Waits in a step; a hand-over is two.
