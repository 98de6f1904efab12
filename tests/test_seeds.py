"""Seeds are spread over devices; how many share one is all that may touch the bits."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dqn_jax
from dqn_jax import footprint, seeds

# What a process with so many CPU devices learns: the digest of every seed, and where the results lie.
LEARN = """
import json
import gymnasium
import jax
import dqn_jax
SET_UP
env = dqn_jax.make("phys2d/CartPole-v1")
options = dict(hidden=(16,), batch_size=8, capacity=200, replay_start_size=50, prioritized=True)
training = dqn_jax.train(dqn_jax.dqn(env, **options), env, num_steps=300)
compiled = jax.jit(dqn_jax.over_seeds(training.run)).lower(jax.random.split(jax.random.key(0), 6)).compile()
result = compiled(jax.random.split(jax.random.key(0), 6))
ones = [result.seed(i) for i in range(6)]
agent = dqn_jax.DQN.from_state(gymnasium.make("CartPole-v1"), result.seed(-1).state, **options)
agent.act_and_train(agent.observation_space.sample(), 0.0)
print(json.dumps({
    "devices": len(jax.devices()),
    "shares": len(result.state.step.sharding.device_set),
    "digests": [dqn_jax.digest(one.state) for one in ones],
    "at home": all(leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves([ones, agent.state])),
    "talks": [word for word in ("all-reduce", "all-gather", "collective-permute", "all-to-all") if word in compiled.as_text()],
}))
"""


def in_a_fresh_process(program, *words):
    beside = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-c", program, *words], cwd=folder, env=beside, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def learn(set_up):
    return json.loads(in_a_fresh_process(LEARN.replace("SET_UP", set_up)))


def test_seeds_lie_on_all_devices_that_divide_them_and_none_waits_for_another():
    one, two, four = (learn(f"jax.config.update('jax_num_cpu_devices', {count})") for count in (1, 2, 4))
    assert [found["shares"] for found in (one, two, four)] == [1, 2, 3]  # Six seeds.
    assert all(found["at home"] and not found["talks"] for found in (one, two, four))
    # On XLA's CPU backend with networks of this size the number of seeds on a device changes no bit. This is not promised.
    assert one["digests"] == two["digests"] == four["digests"]
    assert len(set(one["digests"])) == 6


def test_there_is_a_device_for_each_core():
    program = "import jax, dqn_jax; dqn_jax.device_per_core(); print(len(jax.devices()))"
    assert int(in_a_fresh_process(program)) == dqn_jax.programs.usable_cores()


INITIALISE = """
import os
import jax
import dqn_jax
dqn_jax.device_per_core()
env = dqn_jax.make("phys2d/Pendulum-v0")
training = dqn_jax.train(dqn_jax.ppo(env, **dqn_jax.PPO_PRESETS["pendulum"]), env, num_steps=1, num_envs=8)
keys = jax.random.split(jax.random.key(0), 2 * len(jax.devices()))
jax.block_until_ready(jax.jit(dqn_jax.over_seeds(training.init))(keys))
print(os.environ.get("PJRT_NPROC"))
"""


def test_nothing_waits_for_ever_for_a_thread(monkeypatch):
    """LAPACK's QR did, in the initialisation of PPO's network, with as many devices as threads."""
    monkeypatch.setenv("PJRT_NPROC", "1")  # As in a process that another has started after ``compute_inline``.
    assert in_a_fresh_process(INITIALISE) == "None"


@pytest.mark.parametrize(
    "chosen",
    ["jax.config.update('jax_num_cpu_devices', 3)", "import os; os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=3'"],
)
def test_who_has_chosen_the_number_of_devices_keeps_it(chosen):
    program = f"import jax, dqn_jax; {chosen}; dqn_jax.device_per_core(); print(len(jax.devices()))"
    assert in_a_fresh_process(program) == "3"


def test_the_most_devices_that_divide_the_seeds():
    assert [seeds.num_devices(16, count) for count in (1, 2, 3, 5, 16, 64)] == [1, 2, 2, 4, 16, 16]
    assert seeds.num_devices(5, 2) == 1 and seeds.num_devices(1, 8) == 1


def test_cores_share_their_memory_and_other_devices_do_not(monkeypatch):
    assert seeds.num_in_one_memory(6) == 6

    class Card:
        platform = "gpu"

    monkeypatch.setattr(footprint, "devices", lambda: [Card(), Card()])
    assert seeds.num_in_one_memory(6) == 3 and seeds.num_in_one_memory(5) == 5


def test_a_chosen_device_is_the_only_one():
    device = jax.devices()[0]
    with jax.default_device(device):
        assert footprint.devices() == [device]
    with jax.default_device("cpu"):
        assert footprint.devices() == jax.local_devices(backend="cpu")


def test_one_seed_of_a_tree():
    tree = {"a": jnp.arange(6).reshape(3, 2), "b": np.arange(3)}
    for index in (2, -1):
        one = seeds.one_seed(tree, index)
        assert one["b"] == 2
        np.testing.assert_array_equal(one["a"], [4, 5])
    assert int(jax.jit(lambda tree: seeds.one_seed(tree, 1)["a"][0])(tree)) == 2


@pytest.mark.parametrize("index", [3, -4])
def test_a_seed_that_is_not_there_is_named(index):
    with pytest.raises(IndexError, match=f"there are 3 seeds, 0 to 2: there is no seed {index}"):
        seeds.one_seed(jnp.zeros((3, 2)), index)


COMMAND = """
import sys
import jax
from dqn_jax.cli import main
from dqn_jax.runs import CompiledRuns
jax.config.update("jax_num_cpu_devices", 2)
advance, stop_after = CompiledRuns.advance, int(sys.argv.pop(1))


def advance_and_stop(runs):
    global stop_after
    assert len(runs.state().agent.step.sharding.device_set) == 2
    if not stop_after:
        raise OSError("stopped")
    stop_after -= 1
    return advance(runs)


CompiledRuns.advance = advance_and_stop
main(sys.argv[1:])
"""


def test_the_command_goes_on_exactly_where_seeds_are_spread(tmp_path):
    small = ["--hidden", "8", "--batch-size", "8", "--capacity", "200", "--replay-start-size", "50", "--eval-episodes", "2", "--json"]
    train = ["train", "phys2d/CartPole-v1", "--seeds", "2", "--folder", str(tmp_path), "--steps", "1000", *small]
    whole = json.loads(in_a_fresh_process(COMMAND, "1000", *train, "--name", "whole"))
    stopped = subprocess.run([sys.executable, "-c", COMMAND, "30", *train, "--name", "half"], capture_output=True, text=True)
    assert stopped.returncode == 2 and stopped.stderr.endswith("error: stopped\n")
    resumed = json.loads(in_a_fresh_process(COMMAND, "1000", "train", "--resume", str(tmp_path / "half"), "--json"))
    assert whole["complete"] and resumed["complete"] and resumed["state_sha256"] == whole["state_sha256"]


def test_a_spread_state_is_written_whole_and_read_onto_its_devices():
    program = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from dqn_jax import checkpoint, seeds
jax.config.update("jax_num_cpu_devices", 4)
tree = {"key": jax.random.split(jax.random.key(0), 4), "x": jnp.arange(24.0).reshape(4, 6)}
spread = jax.device_put(tree, seeds.sharding(4))
both = NamedSharding(Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b")), PartitionSpec("a", "b"))
assert checkpoint.digest(spread) == checkpoint.digest(tree)
assert checkpoint.digest({**tree, "x": jax.device_put(tree["x"], both)}) == checkpoint.digest(tree)
one = seeds.one_seed(jax.device_put(tree["x"], both), 2)
assert one.devices() == {jax.devices()[0]} and one.tolist() == tree["x"][2].tolist()
checkpoint.save("state", spread, {})
loaded, _ = checkpoint.load("state", spread)
assert checkpoint.digest(loaded) == checkpoint.digest(tree)
assert all(leaf.sharding == seeds.sharding(4) for leaf in loaded.values())
alone, _ = checkpoint.load("state", tree)
assert all(len(leaf.devices()) == 1 for leaf in alone.values())
nested = jax.jit(seeds.over_seeds(seeds.over_seeds(lambda x: 2 * x)))(tree["x"])
assert len(nested.devices()) == 4 and np.array_equal(nested, 2 * tree["x"])
print("good")
"""
    assert in_a_fresh_process(program) == "good"


def test_spread_seeds_copy_no_replay():
    program = """
import jax
jax.config.update("jax_num_cpu_devices", 2)
import test_compile
from dqn_jax import seeds
training = test_compile.big_training(prioritized=True)
keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 4))
shapes = jax.eval_shape(jax.vmap(training.init), keys)
placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=seeds.sharding(4)), shapes)
advance = jax.jit(seeds.over_seeds(training.advance), donate_argnums=0)
# What is counted is one device's: two of the four replays.
share = jax.eval_shape(jax.vmap(training.init), jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2)))
test_compile.assert_in_place(advance, placed, memory=share.agent.memory)
print("good")
"""
    assert in_a_fresh_process(program) == "good"
