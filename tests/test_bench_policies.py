"""PPO's loops and SAC's updates of the benchmark: all do the same work, and what is said about it."""

import importlib.util

import jax
import numpy as np
import pytest

from dqn_jax.bench import policies, policy_loops
from dqn_jax.envs import make

pytestmark = pytest.mark.filterwarnings("ignore:jax.core:DeprecationWarning")  # What rejax imports uses names that JAX is about to drop.


@pytest.fixture
def small(monkeypatch):
    """Two environments, eight steps, one epoch: what compiles is the same."""
    for name, value in {"NUM_ENVS": 2, "LENGTH": 8, "EPOCHS": 1, "MINIBATCHES": 2, "ROLLOUT": 16}.items():
        monkeypatch.setattr(policy_loops, name, value)
    monkeypatch.setattr(policies, "EPISODES", 2)


def installed(package):
    return importlib.util.find_spec(package) is not None


def test_all_loops_do_the_same_work_and_stand_in_one_table(small, capsys):
    measured = policies.measure_loops([("phys2d/CartPole-v1", {"polemass_length": 0.05}, 3, 2)], repeats=2)
    ((title, result),) = measured.items()
    assert title == "phys2d/CartPole-v1, 2 seeds, 48 steps each"
    assert set(result) == {"ours", "PureJaxRL style"} | ({"rejax"} if installed("rejax") else set())
    for one in result.values():
        assert one["steps"] == [48, 48] and len(one["speeds"]) == 2 and min(one["speeds"]) > 0 and one["compile_seconds"] > 0
        assert len(one["returns"]) == 4 and all(5 < value <= 500 for value in one["returns"])
    assert result["ours"]["ratio"] == {"median": 1, "min": 1, "max": 1}
    theirs = result["PureJaxRL style"]
    ratios = [ours / other for ours, other in zip(result["ours"]["speeds"], theirs["speeds"], strict=True)]
    assert theirs["ratio"] == {"median": np.median(ratios), "min": min(ratios), "max": max(ratios)}
    printed = capsys.readouterr().out
    assert f"PPO, {title}" in printed and "rejax" in printed  # Measured, or said to be skipped.


def test_a_loop_that_does_other_work_is_no_contender(small, monkeypatch):
    def loop(steps):
        return lambda env, rollouts: lambda key: (jax.numpy.zeros(()), jax.numpy.asarray(steps))

    monkeypatch.setattr(policies, "LOOPS", {"ours": loop(16), "half": loop(8)})
    with pytest.raises(RuntimeError, match=r"did not make the same steps: \{'ours': \[16\], 'half': \[8\]\}"):
        policies.measure_loops([("phys2d/CartPole-v1", {}, 1, 1)], repeats=1)


def test_parameters_of_all_loops_are_those_of_one_network(small):
    env = make("phys2d/CartPole-v1")
    wanted = jax.eval_shape(lambda key: policy_loops.network_of(env).init(key, np.zeros((1, 4), np.float32)), jax.random.key(0))
    for name, build in policies.LOOPS.items():
        if name != policies.REJAX or installed("rejax"):
            params, steps = jax.eval_shape(build(env, 1), jax.random.key(0))
            assert jax.tree.map(lambda leaf: leaf.shape, params) == jax.tree.map(lambda leaf: leaf.shape, wanted), name
            assert steps.shape == ()


def test_updates_of_sac_are_timed_and_what_is_timed_plays(monkeypatch, capsys):
    monkeypatch.setattr(policies, "_others", lambda package: policies.Sac(policies._ours_updater, policies._ours_learn))
    monkeypatch.setattr(policies, "SAC_BATCH", 8)
    result = policies.measure_sac(repeats=2, torch_threads=1, quick=True)
    products = result.pop(policies.PRODUCTS)
    assert products["update_ms"]["min"] > 0 and "return" not in products
    assert {"ours"} <= set(result) <= {"ours", "SB3", "SBX"}
    for one in result.values():
        assert one["update_ms"]["min"] > 0 and -2_000 < one["return"] < 0
        assert one["updates"] == 15 and one["learn_steps"] == 600  # Compiled, then twice.
    assert result["ours"]["ratio"] == {"median": 1, "min": 1, "max": 1}
    printed = capsys.readouterr().out
    assert (
        "SAC, 2x256, batch 8" in printed
        and "after 600 steps, 1 episode\n" in printed
        and all(name in printed for name in ("ours", "SB3", "SBX"))
    )
