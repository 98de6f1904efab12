"""The same seed gives the same numbers, in another process, in pieces of another length, and with JAX's own checks on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from resume_cases import CASES

import dqn_jax

NAMES = ["host: dqn, prioritized", "host: ppo"]


def whole(folder, names, **environment):
    command = [sys.executable, str(Path(__file__).with_name("resume_cases.py")), str(folder), "whole", *names]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "names",
    [pytest.param(NAMES, id="quick"), pytest.param([f"host: {case}" for case in CASES], id="all", marks=pytest.mark.slow)],
)
def test_no_key_is_used_twice_and_no_program_makes_a_nan(names, tmp_path):
    checked = whole(tmp_path, names, JAX_DEBUG_KEY_REUSE="1", JAX_DEBUG_NANS="1")
    assert checked == whole(tmp_path, names)  # A second process; and the checks change nothing.


def test_the_check_of_keys_is_on():
    """That it would have found something."""
    code = "import jax; k = jax.random.key(0); jax.random.uniform(k); jax.random.uniform(k)"
    environment = {**os.environ, "JAX_DEBUG_KEY_REUSE": "1"}
    assert "KeyReuseError" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment).stderr


@pytest.mark.parametrize("algorithm", ["dqn", "ppo"])
def test_how_a_run_is_cut_into_points_changes_nothing(algorithm):
    env = dqn_jax.make("phys2d/CartPole-v1")
    options, steps = {"rollout_length": 16, "batch_size": 8}, 512
    if algorithm == "dqn":  # Three rows of four come before the first cycle.
        options, steps = {"replay_start_size": 16, "update_interval": 4, "capacity": 64, "batch_size": 8}, 12 + 512
    agent = getattr(dqn_jax, algorithm)(env, hidden=(8,), **options)
    states = []
    for points in (2, 8):
        training = dqn_jax.train(agent, env, num_steps=steps, history_length=points)
        assert training.num_points == points
        run = jax.jit(training.init)(jax.random.key(0))
        advance = jax.jit(training.advance)
        for _ in range(points):
            run, _ = advance(run)
        states.append((int(run.agent.step), dqn_jax.digest(run.agent)))
    assert states[0] == states[1]
