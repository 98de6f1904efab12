"""Learning curves: every contender steps the same environment as often, and what it played is what the table says."""

import importlib.util
import json

import gymnasium
import numpy as np
import pytest

from dqn_jax.bench import curves

STEPS = 400


def test_a_run_of_ours_and_its_table(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(curves, "EPISODES", 2)
    monkeypatch.setattr(curves, "compute_inline", lambda: None)
    small = {"default": {"hidden": (8,), "batch_size": 8, "replay_start_size": 200, "capacity": 500}}
    monkeypatch.setitem(curves.OURS, "dqn", small)
    words = ["curves", "--contenders", "dqn", "--seeds", "2", "--steps", str(STEPS), "--out", str(tmp_path / "out.json")]
    monkeypatch.setattr("sys.argv", words)
    curves.main()
    runs = json.loads((tmp_path / "out.json").read_text())["runs"]["dqn"]
    assert [run["seed"] for run in runs] == [1000, 1001]
    for run in runs:
        assert run["updates"] == STEPS - 200 and len(run["curve"]) == curves.POINTS and 1 <= run["greedy"] <= 500
    printed = capsys.readouterr().out
    assert "CartPole-v1, 400 steps" in printed and "IQM of 2 seeds" in printed


@pytest.mark.skipif(importlib.util.find_spec("stable_baselines3") is None, reason="they need SB3")
@pytest.mark.parametrize("contender", ["sb3", "cleanrl-style"])
def test_a_peer_makes_the_same_steps(contender, monkeypatch):
    made = []

    class Counting(curves.Episodes):
        def step(self, action):
            made.append(action)
            return super().step(action)

    monkeypatch.setattr(curves, "Episodes", Counting)
    monkeypatch.setattr(curves, "EPISODES", 1)
    monkeypatch.setitem(curves.ZOO, "Acrobot-v1", {"learning_starts": 100, "train_freq": 4})
    run = curves.measure("Acrobot-v1", contender, 600, 3)
    assert len(made) == 600
    assert run["updates"] > 0 if contender == "sb3" else run["updates"] == 0  # CleanRL's script warms up for 10,000 steps.


def test_episodes_are_noted_when_they_end():
    env = curves.Episodes(gymnasium.make("CartPole-v1"))
    env.reset(seed=0)
    lengths = []
    for _ in range(3):
        length, ended = 0, False
        while not ended:
            _, _, terminated, truncated, _ = env.step(0)
            length, ended = length + 1, terminated or truncated
        lengths.append(length)
        env.reset()
    assert env.ended == list(zip(np.cumsum(lengths).tolist(), map(float, lengths), strict=True))


def test_unknown_names_end_with_those_there_are(monkeypatch):
    monkeypatch.setattr("sys.argv", ["curves", "--task", "Pong"])
    with pytest.raises(SystemExit, match=r"unknown: Pong; there are the tasks CartPole-v1, .* and the contenders dqn, c51"):
        curves.main()
