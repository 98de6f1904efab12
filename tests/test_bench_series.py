"""Series of measurements: contenders take turns, what they did is compared, and what is written is what was measured."""

import json

import pytest

from dqn_jax.bench import series
from dqn_jax.bench.series import Contender, Done, Group


def contender(calls, name, seconds, steps=40, updates=10, **more):
    """Notes each call; its measurements take these seconds."""

    def measure(number):
        calls.append((name, number))
        return Done(steps, updates, seconds[number])

    return Contender(measure, 3.0, 5, **more)


def test_contenders_take_turns_and_every_other_round_goes_backwards():
    calls = []
    both = {name: contender(calls, name, [1.0] * 3) for name in ("a", "b")}
    series.in_turns(4, both, 3)
    assert calls == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]


def test_points_hold_spreads_ratios_and_returns():
    one = contender([], "ours", [2.0, 1.0, 4.0], returns=lambda: 7.5)
    other = contender([], "theirs", [4.0, 4.0, 4.0])
    points = series.in_turns(8, {"ours": one, "theirs": other}, 3)
    ours, theirs = points["ours"], points["theirs"]
    assert (ours["count"], ours["steps"], ours["updates"], ours["compile_seconds"], ours["replay_bytes"]) == (8, 40, 10, 3.0, 5)
    assert (ours["median"], ours["min"], ours["max"]) == (20.0, 10.0, 40.0)
    assert theirs["ratio"] == {"median": 2.0, "min": 1.0, "max": 4.0}  # Of times in the same round.
    assert ours["return"] == 7.5 and "return" not in theirs and "ratio" not in ours
    by_updates = series.in_turns(8, {"ours": one}, 3, series.UPDATES)["ours"]
    assert (by_updates["median"], by_updates["min"], by_updates["max"]) == (5.0, 2.5, 10.0)


@pytest.mark.parametrize("which", ["steps", "updates"])
def test_contenders_that_did_other_work_do_not_compare(which):
    both = {"ours": contender([], "ours", [1.0]), "theirs": contender([], "theirs", [1.0], **{which: 44})}
    with pytest.raises(AssertionError, match="with 4 differ in what they did"):
        series.in_turns(4, both, 1)


def test_everything_is_kept_count_by_count_and_shown(capsys):
    def points(count):
        both = {"ours": contender([], "ours", [1.0], returns=lambda: 12.0), "theirs": contender([], "theirs", [2.0])}
        return series.in_turns(count, both, 1)

    kept = []
    groups = [Group("seeds", "steps per second", map(points, (2, 8))), Group("batch size", "updates per second", map(points, (1,)))]
    beside = {"device": "a device", "left_out": {"Pong": "it needs a screen"}}
    measured = series.measure(groups[:1], beside, lambda so_far: kept.append(json.loads(json.dumps(so_far))))
    assert [[len(one["points"]) for one in so_far["series"].values()] for so_far in kept] == [[1, 1], [2, 2]]
    assert kept[-1] == measured and list(series.curves(measured)) == ["ours", "theirs"]
    assert series.curves(measured)["theirs"] == ([2, 8], [20.0, 20.0])
    series.show(measured)
    shown = capsys.readouterr().out
    assert "theirs, on a device" in shown and "2.00 (2.00-2.00) times as fast" in shown and "12.0" in shown
    assert "Pong is left out: it needs a screen" in shown


def test_the_file_is_written_after_each_count(tmp_path):
    seen = []

    def measure(quick, keep):
        def points(count):
            seen.append(
                (tmp_path / "out.json").exists() and len(json.loads((tmp_path / "out.json").read_text())["series"]["ours"]["points"])
            )
            return series.in_turns(count, {"ours": contender([], "ours", [1.0])}, 1)

        return series.measure(
            [Group("seeds", "steps per second", map(points, (1, 2)))], {"device": "", "left_out": {}, "quick": quick}, keep
        )

    series.run(measure, True, tmp_path / "out.json", inline=True)
    written = json.loads((tmp_path / "out.json").read_text())
    assert seen == [False, 1] and len(written["series"]["ours"]["points"]) == 2
    assert written["inline"] is True and written["quick"] is True and written["machine"]["versions"]["jax"]
