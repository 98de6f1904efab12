"""The benchmark of DQN's family: every member makes the same number of updates, and its cost stands in a table."""

import json

import jax
import numpy as np

from dqn_jax.bench import family


def test_every_member_is_timed_beside_dqn(monkeypatch, capsys, tmp_path):
    contenders = {name: family.DEFAULTS[name] for name in ("DQN", "C51")}
    monkeypatch.setattr(family, "QUICK", {"little": family.Work(family.VECTORS, 2, 4, 3, contenders)})
    monkeypatch.setattr("sys.argv", ["family", "--quick", "--out", str(tmp_path / "out.json")])
    family.main()
    measured = json.loads((tmp_path / "out.json").read_text())["agents"]["little"]
    assert [*measured] == ["DQN", "C51"]
    for one in measured.values():
        assert 0 < one["update_us"]["min"] <= one["update_us"]["median"] <= one["update_us"]["max"]
    assert measured["DQN"]["times_as_long"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    printed = capsys.readouterr().out
    assert "DQN's family, little" in printed and "times as long as DQN" in printed


def test_what_is_timed_are_updates(monkeypatch):
    seen = []
    real = family.dqn

    def spying(*args, **options):
        agent = real(*args, **options)

        def update(state, drawn):
            state, metrics = agent.update(state, drawn)
            jax.debug.callback(note, state.updates, state.memory.size, metrics["loss"], ordered=True)
            return state, metrics

        return agent._replace(update=update)

    def note(*numbers):
        seen.append([float(number) for number in numbers])

    monkeypatch.setattr(family, "dqn", spying)
    run = family.updates_of(family.Work(family.VECTORS, 2, 8, 5, {}), family.DEFAULTS["C51"])
    run()
    run()
    updates, sizes, losses = np.array(seen).T
    assert updates.tolist() == [*range(1, 11)] and set(sizes) == {family.ROWS} and np.isfinite(losses).all()
