"""Checkpoints: going on is the same as never having stopped, and a file is whole or not there."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gymnasium import spaces
from linear_networks import action_value, linear, policy_and_value

import dqn_jax
from dqn_jax import DQN, PPO, PQN, SAC, CheckpointError, checkpoint
from dqn_jax.algorithms.sac import Optimizers

SPACES = (spaces.Box(-1e6, 1e6, (2,), np.float32), spaces.Discrete(3))
SMALL = {
    "hidden": (8,),
    "batch_size": 4,
    "capacity": 50,
    "replay_start_size": 10,
    "update_interval": 4,
    "target_update_interval": 15,
    "n_steps": 3,
    "epsilon": (1.0, 0.1, 60),
    "optimizer": optax.adam(optax.linear_schedule(1e-3, 1e-4, 20)),
}


BOX = (SPACES[0], spaces.Box(-3, 1, (2,)))
RATE = optax.adam(optax.linear_schedule(1e-2, 1e-3, 50))
REPLAY = {name: SMALL[name] for name in ("batch_size", "capacity", "replay_start_size", "update_interval", "n_steps")}
SOFT = {**REPLAY, "optimizers": Optimizers(RATE, RATE, RATE)}
# An update falls due wherever it does for DQN.
ROLLOUT = {"rollout_length": 4, "batch_size": 2, "epochs": 2, "optimizer": RATE}
RAINBOW = {**SMALL, **dqn_jax.RAINBOW_PRESETS["default"], "num_atoms": 5, "epsilon": None}
AGENTS = {
    "DQN": lambda seed: DQN(SPACES, seed, **SMALL),
    "DQN, rainbow": lambda seed: DQN(SPACES, seed, **RAINBOW),
    "PPO": lambda seed: PPO(SPACES, seed, network=policy_and_value(3), **ROLLOUT),
    "PPO, box": lambda seed: PPO(BOX, seed, network=policy_and_value(4), normalize_observation=True, scale_reward=True, **ROLLOUT),
    "PQN": lambda seed: PQN(SPACES, seed, network=linear(3), epsilon=(1.0, 0.1, 60), **ROLLOUT),
    "SAC": lambda seed: SAC(SPACES, seed, actor=linear(3), critic=linear(3), prioritized=True, **SOFT),
    "SAC, box": lambda seed: SAC(BOX, seed, actor=linear(4), critic=action_value(), **SOFT),
}


def events():
    """An endless stream of calls: episodes of 1 to 9 steps with either end, some broken off."""
    rng = np.random.default_rng(7)
    while True:
        length, end = int(rng.integers(1, 10)), str(rng.choice(["terminated", "truncated", "broken off"], p=[0.5, 0.3, 0.2]))
        for _ in range(length):
            yield "act", rng.normal(size=2).astype(np.float32), float(rng.normal())
        yield end, rng.normal(size=2).astype(np.float32), float(rng.normal())


def play(agent, first, last):
    """Makes the calls number ``first`` to ``last - 1`` of the stream; returns the actions."""
    actions = []
    for number, (kind, observation, reward) in enumerate(events()):
        if number >= last:
            return actions
        if number < first:
            continue
        if kind == "act":
            actions.append(np.asarray(agent.act_and_train(observation, reward)).tolist())
        elif kind == "broken off":
            agent.stop_episode()
        else:
            agent.stop_episode_and_train(observation, reward, terminated=kind == "terminated")


def kinds(count):
    return [kind for (kind, _, _), _ in zip(events(), range(count), strict=False)]


def looks(agent):
    return dqn_jax.digest(agent.state), {k: repr(v) for k, v in agent.get_statistics().items()}


END = 211


@pytest.fixture(scope="module", params=AGENTS)
def make(request):
    """Makes an agent out of a seed."""
    return AGENTS[request.param]


@pytest.fixture(scope="module")
def straight(make):
    """An agent that never stopped, what it looks like at the end, and what it did."""
    agent = make(3)
    actions = play(agent, 0, END)
    assert agent.get_statistics()["n_updates"] > 30
    return looks(agent), actions


@pytest.fixture(scope="module")
def two(make):
    """The agent that is saved and the one, of another seed, that takes over; each is set back by loading a blank."""
    return make(3), make(99)


@pytest.fixture(scope="module")
def blank(two, tmp_path_factory):
    path = tmp_path_factory.mktemp("blank") / "agent"
    two[0].save(path)
    return path


def moments():
    """Calls after which to stop: mid-episode, with an update owed, after each kind of end, after the ring has wrapped."""
    seen = kinds(END)
    yield 0
    yield 7
    stored, pending, chosen = 0, False, set()
    for number, kind in enumerate(seen):
        before = stored
        stored += (kind == "act" and pending) or kind in ("terminated", "truncated")
        pending = kind == "act"
        owed = kind != "act" and stored > before and stored % 4 == 0 and stored >= 12
        name = (kind, owed, stored > 50)
        if name not in chosen:
            chosen.add(name)
            yield number + 1


def test_the_moments_cover_what_can_differ():
    seen = kinds(END)
    assert {seen[moment - 1] for moment in moments() if moment} == {"act", "terminated", "truncated", "broken off"}
    assert any(moment % 2 for moment in moments())


@pytest.mark.parametrize("stop", sorted(set(moments())))
def test_saved_and_restored_equals_never_stopped(straight, two, blank, tmp_path, stop):
    first, second = two
    first.load(blank)
    actions = play(first, 0, stop)
    at_stop = looks(first)
    first.save(tmp_path / "agent")
    assert looks(first) == at_stop  # Saving changes nothing.
    second.load(tmp_path / "agent")
    assert looks(second) == at_stop
    actions += play(second, stop, END)
    assert (looks(second), actions) == straight


def test_saving_again_and_again_changes_nothing(straight, two, blank, tmp_path):
    agent = two[0]
    agent.load(blank)
    for number in range(0, END, 13):
        play(agent, number, min(number + 13, END))
        agent.save(tmp_path / "agent")
    assert looks(agent) == straight[0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: DQN(SPACES, num_envs=4, **{**SMALL, "capacity": 48}),
        lambda: PPO(SPACES, num_envs=4, network=policy_and_value(3), scale_reward=True, **ROLLOUT),
    ],
    ids=["DQN", "PPO"],
)
def test_a_vector_agent_goes_on_too(make, tmp_path):
    rng = np.random.default_rng(0)
    calls = [
        (
            rng.normal(size=(4, 2)).astype(np.float32),
            rng.normal(size=4),
            rng.random(4) < 0.2,
            rng.random(4) < 0.2,
            rng.normal(size=(4, 2)).astype(np.float32),
        )
        for _ in range(41)
    ]
    agent = make()
    for call in calls[:23]:
        agent.batch_act_and_train(*call)
    agent.save(tmp_path / "agent")
    for call in calls[23:]:
        agent.batch_act_and_train(*call)
    expected = looks(agent)
    agent.load(tmp_path / "agent")
    for call in calls[23:]:
        agent.batch_act_and_train(*call)
    assert looks(agent) == expected
    assert expected[1]["t"] == "160"


COMPILED = {
    "DQN": lambda env: dqn_jax.dqn(env, **{**SMALL, "capacity": 300}),
    "PPO": lambda env: dqn_jax.ppo(env, network=policy_and_value(2), normalize_observation=True, scale_reward=True, **ROLLOUT),
    "PQN": lambda env: dqn_jax.pqn(env, network=linear(2), **ROLLOUT),
    "SAC": lambda env: dqn_jax.sac(env, actor=linear(2), critic=linear(2), prioritized=True, **{**SOFT, "capacity": 300}),
}


@pytest.fixture(scope="module", params=COMPILED)
def compiled(request):
    env = dqn_jax.make("phys2d/CartPole-v1", polemass_length=0.05)
    training = dqn_jax.train(COMPILED[request.param](env), env, num_envs=2, num_steps=1000, history_length=5)
    return training, jax.jit(training.init), jax.jit(training.advance)


def test_a_compiled_run_goes_on(compiled, tmp_path):
    training, init, advance = compiled
    run = init(jax.random.key(4))
    for number in range(training.num_points):
        if number == 2:
            checkpoint.save(tmp_path / "run", run, {"point": 2})
        run, history = advance(run)
    template = jax.eval_shape(training.init, jax.random.key(0))
    restored, info = checkpoint.load(tmp_path / "run", template)
    assert info["point"] == 2
    assert jax.tree.structure(restored) == jax.tree.structure(run)
    for _ in range(2, training.num_points):
        restored, again = advance(restored)
    assert dqn_jax.digest(restored) == dqn_jax.digest(run)
    assert dqn_jax.digest(again) == dqn_jax.digest(history)


TREE = {
    "half": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3) / 7,
    "small": jnp.array([0.5, -2.0], jnp.float8_e4m3fn),
    "single": jnp.array(jnp.pi),
    "whole": (jnp.array([1, -2], jnp.int32), jnp.zeros((0, 4), jnp.uint8), jnp.array(True)),
    "key": jax.random.key(3),
    "keys": jax.random.split(jax.random.key(3, impl="rbg"), 2),
    "unsafe": jax.random.key(5, impl="unsafe_rbg"),
    "none": None,
    "empty": (),
}


def test_every_kind_of_leaf_comes_back(tmp_path):
    checkpoint.save(tmp_path / "tree", TREE)
    for template in (TREE, jax.eval_shape(lambda: TREE)):
        back, _ = checkpoint.load(tmp_path / "tree", template)
        assert dqn_jax.digest(back) == dqn_jax.digest(TREE)
        assert jax.tree.structure(back) == jax.tree.structure(TREE)
        for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(TREE), strict=True):
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
    for name in ("key", "unsafe"):
        np.testing.assert_array_equal(jax.random.uniform(back[name], (3,)), jax.random.uniform(TREE[name], (3,)))


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("half", jnp.zeros((2, 3), jnp.float16)),
        ("half", jnp.zeros((2, 3), jnp.uint16)),
        ("half", jnp.zeros((3, 2), jnp.bfloat16)),
        ("single", jnp.zeros((1,))),
        ("key", jax.random.key(3, impl="rbg")),
        ("key", jnp.zeros(2, jnp.uint32)),
        ("keys", jax.random.split(jax.random.key(0, impl="unsafe_rbg"), 2)),
        ("empty", jnp.zeros(())),
    ],
)
def test_a_template_of_another_shape_or_dtype_is_refused(tmp_path, name, other):
    checkpoint.save(tmp_path / "tree", TREE)
    with pytest.raises(CheckpointError, match=name):
        checkpoint.load(tmp_path / "tree", {**TREE, name: other})


def test_every_difference_is_listed(tmp_path):
    checkpoint.save(tmp_path / "tree", {"a": jnp.zeros(2), "b": jnp.zeros(3), "old": jnp.zeros(1)})
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(tmp_path / "tree", {"a": jnp.zeros(2), "b": jnp.zeros(4), "new": jnp.zeros(1)})
    said = str(caught.value)
    assert "['b']: got ((3,), 'float32'), expected ((4,), 'float32')" in said
    assert "['new']: got nothing, expected" in said and "['old']: got " in said and "expected nothing" in said
    assert "['a']" not in said


def test_digest_tells_states_apart():
    base = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3], jnp.int32)}
    others = [
        {**base, "a": jnp.array([1.0, 2.0000002])},
        {**base, "a": jnp.array([[1.0, 2.0]])},
        {**base, "a": jnp.array([1.0, 2.0], jnp.bfloat16)},
        {"a": base["a"], "c": base["b"]},
        {"a": jnp.array([0.0, 2.0])},
        {**base, "b": jnp.array([3], jnp.uint32)},
    ]
    assert dqn_jax.digest(base) == dqn_jax.digest(jax.tree.map(np.asarray, base))
    assert len({dqn_jax.digest(tree) for tree in [base, *others]}) == len(others) + 1
    assert dqn_jax.digest({"a": jnp.array(0.0)}) != dqn_jax.digest({"a": jnp.array(-0.0)})


@pytest.mark.parametrize("broken", ["replace", "fsync"])
@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, broken, kind):
    path = tmp_path / "folder" / "tree"
    checkpoint.save(path, {"a": jnp.zeros(3)}, {"old": True})
    content = path.read_bytes()

    def fail(*_):
        raise kind("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(os, broken, fail)
        with pytest.raises(kind, match="the disk is full"):
            checkpoint.save(path, {"a": jnp.ones(3)})
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == ["tree"]
    checkpoint.save(path, {"a": jnp.ones(3)})
    assert checkpoint.load(path, {"a": jnp.ones(3)})[0]["a"].tolist() == [1, 1, 1]
    assert os.listdir(path.parent) == ["tree"]


def test_a_failing_save_of_an_agent_leaves_it_and_the_file(two, blank, tmp_path, monkeypatch):
    agent, path = two[0], tmp_path / "agent"
    agent.load(blank)
    play(agent, 0, 20)
    agent.save(path)
    content, before = path.read_bytes(), looks(agent)

    def fail(*_):
        raise OSError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="the disk is full"):
            agent.save(path)
    assert (path.read_bytes(), looks(agent)) == (content, before)


def test_info_comes_back(two, tmp_path):
    info = {"name": "Ünïcode", "numbers": [1, 2.5, None], "nested": {"yes": True}}
    checkpoint.save(tmp_path / "tree", {"a": jnp.zeros(1)}, info)
    assert checkpoint.read_info(tmp_path / "tree") == info
    two[0].save(tmp_path / "agent")
    assert checkpoint.read_info(tmp_path / "agent")["num_envs"] == 1
    for wrong in ("nowhere", "."):
        with pytest.raises(FileNotFoundError, match="no checkpoint at"):
            checkpoint.read_info(tmp_path / wrong)
    (tmp_path / "text").write_text("not a checkpoint at all")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        checkpoint.read_info(tmp_path / "text")


def test_no_code_can_hide_in_a_file(two, blank, tmp_path):
    two[0].load(blank)
    play(two[0], 0, 30)
    two[0].save(tmp_path / "agent")
    content = (tmp_path / "agent").read_bytes()
    assert content[8:9] == b"{"  # A length, then JSON, then numbers.
    header = int.from_bytes(content[:8], "little")
    for sign in (b"\x80\x04\x95", b"\x80\x03c", b"numpy.core", b"numpy._core", b"__reduce__", b"dqn_jax."):
        assert sign not in content[: 8 + header], sign
    source = "".join(path.read_text() for path in sorted(checkpoint.Path(checkpoint.__file__).parent.rglob("*.py")))
    for word in ("import pickle", "cloudpickle", "allow_pickle", "joblib"):
        assert word not in source


def test_what_was_loaded_does_not_hang_on_the_file(two, blank, tmp_path):
    agent, path = two[1], tmp_path / "agent"
    two[0].load(blank)
    play(two[0], 0, 40)
    two[0].save(path)
    agent.load(path)
    before = looks(agent)
    path.write_bytes(b"\0" * path.stat().st_size)
    path.unlink()
    assert looks(agent) == before
    play(agent, 40, 60)


def pictures(agent, first, last):
    """As ``play``, of stacks of two images; every fifth step ends the episode, one way or the other."""
    for number in range(first, last):
        image = np.random.default_rng(number + 1).integers(256, size=(2, 3, 3), dtype=np.uint8)
        image[0] = np.random.default_rng(number).integers(256, size=(2, 3, 3), dtype=np.uint8)[1]
        if number % 6 == 5:
            agent.stop_episode_and_train(image, 1.0, terminated=number % 4 == 1)
        else:
            agent.act_and_train(image, 1.0)


@pytest.mark.parametrize("stop", [29, 30, 31, 100, 133])  # After the end of an episode, at a start, and past the wrap of the frames.
def test_prioritized_frames_go_on_exactly(stop, tmp_path):
    both = spaces.Box(0, 255, (2, 3, 3), np.uint8), spaces.Discrete(3)
    options = {**SMALL, "prioritized": True, "frames": "stack_first", "beta": (0.4, 1.0, 80)}
    straight = DQN(both, 3, **options)
    pictures(straight, 0, stop)
    straight.save(tmp_path / "agent")
    pictures(straight, stop, 200)
    other = DQN(both, 99, **options)
    other.load(tmp_path / "agent")
    pictures(other, stop, 200)
    assert looks(other) == looks(straight)
    assert straight.get_statistics()["n_updates"] > 30


@pytest.mark.parametrize("make", [AGENTS["DQN"], AGENTS["PPO"], AGENTS["SAC"]], ids=["DQN", "PPO", "SAC"])
def test_without_the_replay_it_fills_a_new_one_and_learns_on(make, tmp_path):
    agent, other = make(3), make(4)
    play(agent, 0, 100)
    agent.save(tmp_path / "whole")
    agent.save(tmp_path / "small", replay=False)
    assert os.path.getsize(tmp_path / "small") < os.path.getsize(tmp_path / "whole")
    learner = agent.learner
    other.load(tmp_path / "small")
    assert dqn_jax.digest(other.learner) == dqn_jax.digest(learner)
    before, then = agent.get_statistics(), other.get_statistics()
    assert (then["t"], then["n_updates"], then["replay_size"]) == (before["t"], before["n_updates"], 0)
    made = []
    for number in range(100, 160):
        play(other, number, number + 1)
        counts = other.get_statistics()
        made.append((counts["t"] - before["t"], counts["n_updates"] - before["n_updates"]))
    first = next(stored for stored, updates in made if updates)
    assert first >= (4 if "PPO" in repr(other) else 10), "a batch before the warm-up"
    assert made[-1][1] > 2
    other.save(tmp_path / "again")  # And it resumes exactly, although its warm-up was late.
    play(other, 160, END)
    expected = looks(other)
    agent.load(tmp_path / "again")
    play(agent, 160, END)
    assert looks(agent) == expected


def test_an_agent_with_other_options_says_so_and_forks(tmp_path):
    DQN(SPACES, 1, hidden=(8,), gamma=0.9, capacity=2_000).save(tmp_path / "agent")
    other = DQN(SPACES, hidden=(8,), gamma=0.5, capacity=2_000)
    before = looks(other)
    with pytest.raises(CheckpointError, match=r"(?s)other options.*fork=True.*\n  gamma: saved with 0.9, this agent has 0.5$"):
        other.load(tmp_path / "agent")
    assert looks(other) == before
    other.load(tmp_path / "agent", fork=True)
    assert looks(other) != before


def test_the_file_tells_what_it_is(tmp_path):
    DQN(SPACES, hidden=(8,), gamma=0.9).save(tmp_path / "agent")
    info = checkpoint.read_info(tmp_path / "agent")
    assert info["agent"] == "DQN" and info["num_envs"] == 1 and info["replay"] is True
    assert info["options"]["gamma"] == 0.9 and info["options"]["hidden"] == [8]


def test_a_link_stays_and_what_is_no_file_is_left_alone(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk/state")
    checkpoint.save(tmp_path / "link", {"x": np.ones(3)})
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk/state").is_file()
    os.mkfifo(tmp_path / "pipe")
    for name in ("disk", "pipe"):
        with pytest.raises(OSError, match=f"{name} is there and is no file"):
            checkpoint.save(tmp_path / name, {"x": np.ones(3)})
    assert (tmp_path / "pipe").is_fifo()


def test_whoever_may_read_files_may_read_checkpoints(tmp_path):
    checkpoint.save(tmp_path / "state", {"x": np.ones(3)})
    (tmp_path / "other").touch()
    assert (tmp_path / "state").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_misfit_names_the_options_and_a_run_s_file_how_to_load_it(tmp_path):
    options = {name: value for name, value in SMALL.items() if name != "optimizer"}
    DQN(SPACES, **options).save(tmp_path / "agent")
    with pytest.raises(CheckpointError, match=r"(?s)does not fit.*\n  hidden: saved with \[8\], this agent has \[4\]$"):
        DQN(SPACES, **{**options, "hidden": (4,)}).load(tmp_path / "agent", fork=True)
    checkpoint.save(tmp_path / "run/last.safetensors", {"x": np.ones(3)}, {"task": {}})
    with pytest.raises(CheckpointError, match=r"load_run\('.*run', env\)"):
        DQN(SPACES, **options).load(tmp_path / "run/last.safetensors")


def test_without_its_replay_an_agent_goes_on_with_another_kind_of_it(tmp_path):
    options = {name: value for name, value in SMALL.items() if name != "optimizer"}
    one, other = DQN(SPACES, **options), DQN(SPACES, seed=1, **{**options, "capacity": 80, "prioritized": True})
    play(one, 0, 100)
    one.save(tmp_path / "agent", replay=False)
    other.load(tmp_path / "agent", fork=True)
    assert dqn_jax.digest(other.learner) == dqn_jax.digest(one.learner)
    play(other, 100, 200)
    assert other.get_statistics()["n_updates"] > one.get_statistics()["n_updates"]
