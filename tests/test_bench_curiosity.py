"""The benchmark of curiosity: every kind does the same work, and its cost stands in a table."""

import importlib.util
import json

import numpy as np
import pytest

from dqn_jax.bench import curiosity

needs_gymnax = pytest.mark.skipif(importlib.util.find_spec("gymnax") is None, reason="it plays gymnax's DeepSea")


@needs_gymnax
def test_every_kind_is_timed_against_none(monkeypatch, capsys):
    monkeypatch.setattr(curiosity, "NUM_ENVS", 4)
    monkeypatch.setattr(curiosity, "KINDS", ("off", "rnd", "snd-vic"))
    result = curiosity.measure(repeats=2, seeds=3, episodes=8 * 4)
    assert [*result] == ["off", "rnd", "snd-vic"]
    for one in result.values():
        assert len(one["speeds"]) == 2 and min(one["speeds"]) > 0 and one["compile_seconds"] > 0
        assert len(one["returns"]) == 6 and 0 <= one["found"] <= 1
    ratios = [plain / own for plain, own in zip(result["off"]["speeds"], result["rnd"]["speeds"], strict=True)]
    assert result["rnd"]["times_as_long"] == {"median": np.median(ratios), "min": min(ratios), "max": max(ratios)}
    curiosity.show(result, 3, 32)
    printed = capsys.readouterr().out
    assert "PPO on DeepSea of size 10, 4 environments, 3 seeds, 32 episodes each" in printed and "of 6" in printed


def test_without_gymnax_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["curiosity", "--out", str(tmp_path / "out.json")])
    curiosity.main()
    assert "gymnax is not installed (pip install 'dqn_jax[gymnax]')" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["skipped"] == "gymnax is not installed"
