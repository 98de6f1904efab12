"""Train 2N steps equals train N, save, end the process, load in another, train N: bit for bit, for every agent, on both drivers."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from resume_cases import CASES, Compiled, Host

import dqn_jax
from dqn_jax import checkpoint

QUICK = ["host: dqn, prioritized", "compiled: ppo, rnd"]
ALL = [f"{driver}: {case}" for driver in ("host", "compiled") for case in CASES]


def process(folder, what, names):
    command = [sys.executable, str(Path(__file__).with_name("resume_cases.py")), str(folder), what, *names]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("names", [pytest.param(QUICK, id="quick"), pytest.param(ALL, id="all", marks=pytest.mark.slow)])
def test_a_run_in_two_processes_ends_as_one_in_one(names, tmp_path):
    whole = process(tmp_path, "whole", names)
    half = process(tmp_path, "first", names)
    resumed = process(tmp_path, "second", names)
    assert resumed == whole
    for name in names:
        assert 0 < half[name][1] < whole[name][1], name  # Both halves learn.
        assert half[name][0] != whole[name][0]
    print(f"{len(names)} runs resumed exactly")


def leaves(tree):
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): np.asarray(jax.random.key_data(x) if dqn_jax.checkpoint._is_key(x) else x) for path, x in flat}


@pytest.mark.parametrize("kind", [Host, Compiled])
def test_whatever_training_changes_is_in_the_file(kind, tmp_path):
    one = kind("dqn, prioritized")
    state = lambda: one.agent.run_state if kind is Host else one.run  # noqa: E731
    before = jax.device_get(state()._replace(agent=jax.tree.map(lambda x: x.copy(), state().agent)))
    one.go()
    one.save(tmp_path / "state")
    after = state()
    read, _ = checkpoint.load(tmp_path / "state", after)
    saved, now = leaves(read), leaves(after)
    assert saved.keys() == now.keys()
    changed = [name for name, leaf in leaves(before).items() if not np.array_equal(leaf, now[name], equal_nan=True)]
    assert len(changed) > 20  # Parameters, targets, moments, replay, priorities, counters ...
    for name in changed:
        np.testing.assert_array_equal(saved[name], now[name])
