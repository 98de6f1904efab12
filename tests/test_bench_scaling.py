"""The benchmark of many at once: what it counts is what was done. How fast anything is, is not asserted."""

import importlib.util
import json

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dqn_jax.bench import latency, scaling
from dqn_jax.presets.dqn import dqn
from dqn_jax.training import Result
from dqn_jax.types import AgentState, RunState

TINY = scaling.Sizes(
    counts=(8,),
    host_steps=100,
    env_steps=128,
    seed_steps=100,
    games=(scaling.CARTPOLE,),
    frames=1_000,
    batch_sizes=(4, 8),
    learnt=20,
    repeats=2,
)
IMAGES = latency.Shape((8, 8, 2), ((4, 3, 1),), (8,), 3, (4,), 1_000)


@pytest.fixture(scope="module")
def kept():
    """What is kept after each count, as JSON."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(scaling.SHAPES, "Nature", IMAGES)
        scaling.measure_sizes(TINY, lambda measured: found.append(json.loads(json.dumps(measured))))
    return found


def points(kept, name):
    return kept[-1]["series"][name]["points"]


def test_steps_and_updates_keep_their_ratio_whatever_the_count(kept):
    (host,) = points(kept, "host loop, CartPole")
    assert (host["count"], host["steps"], host["updates"]) == (8, 96, 24)
    (several,) = points(kept, "compiled loop, environments, CartPole")
    # Seven rows come before the row that completes the first batch of 64.
    assert (several["count"], several["steps"], several["updates"]) == (8, 128, (128 - 7 * 8) // 4)
    (many,) = points(kept, "compiled loop, seeds, CartPole")
    assert (many["count"], many["steps"], many["updates"]) == (8, 8 * 100, 8 * (100 - 60) // 4)


def test_a_host_loop_with_few_environments_learns_every_fourth_transition():
    point = scaling.host_loop(2, 27, 2)
    assert (point["steps"], point["updates"]) == (24, 6)


def test_updates_count_by_batch_size_and_store_nothing(kept):
    for dtype in ("float32", "bfloat16"):
        done = [(one["count"], one["updates"], one["steps"]) for one in points(kept, f"Nature updates, {dtype}")]
        assert done == [(4, 5, 0), (8, 2, 0)]


def test_spreads_and_times_are_positive_and_ordered(kept):
    for series in kept[-1]["series"].values():
        for one in series["points"]:
            assert 0 < one["min"] <= one["median"] <= one["max"] and one["compile_seconds"] > 0


def test_replays_are_those_that_the_sizes_allow(kept):
    (many,) = points(kept, "compiled loop, seeds, CartPole")
    row = 2 * 4 * 4 + 4 + 4 + 4 + 1  # Two observations, action, reward, discount, last.
    assert many["replay_bytes"] == 8 * (100 * row + 2 * 4)
    (several,) = points(kept, "compiled loop, environments, CartPole")
    assert several["replay_bytes"] == points(kept, "host loop, CartPole")[0]["replay_bytes"] == 50_000 * row + 2 * 4
    for one in points(kept, "Nature updates, float32"):
        assert 1_000 * 8 * 8 < one["replay_bytes"] < 1_000 * (8 * 8 + 20)


def test_everything_is_kept_count_by_count(kept, capsys):
    counts = [sum(len(series["points"]) for series in measured["series"].values()) for measured in kept]
    assert counts == [1, 2, 3, 4, 5, 6, 7]
    assert kept[0]["device"] and kept[0]["sizes"]["learnt"] == 20
    curves = scaling.curves(kept[-1])
    assert curves["Nature updates, bfloat16"][0] == [4, 8] and list(curves) == list(kept[-1]["series"])
    assert curves["host loop, CartPole"] == ([8], [points(kept, "host loop, CartPole")[0]["median"]])
    scaling.show(kept[-1])
    shown = capsys.readouterr().out
    assert all(name in shown for name in curves) and "MinAtar Breakout is left out: on accelerators only" in shown


def test_the_replay_of_the_updates_is_full():
    agent = scaling.convolutional_agent(IMAGES, None, 4)
    state = jax.eval_shape(agent.init, jax.random.key(0), jnp.zeros((scaling.FILLERS, 8, 8, 2), jnp.uint8))
    empty = agent.init(jax.random.key(0), jnp.zeros((scaling.FILLERS, 8, 8, 2), jnp.uint8))._replace(memory=())
    memory = scaling.full_replay(agent, empty, IMAGES)
    assert jax.tree.map(jnp.shape, memory) == jax.tree.map(lambda leaf: leaf.shape, state.memory)
    assert np.all(np.asarray(memory.frames).any(axis=(2, 3)))  # Each frame was written.
    # Of the frames of an environment the first stack of 2, and the newest successor, begin no transition.
    assert 1_000 - 3 * scaling.FILLERS <= int(memory.size) <= 1_000


def test_a_compiled_run_is_traced_once_and_gets_other_keys():
    traced, seen = [], []

    def run(key):
        traced.append(key)
        jax.debug.callback(lambda data: seen.append(int(data[-1])), jax.random.key_data(key))
        zero = jnp.zeros((), jnp.int32)
        return Result(RunState(AgentState((), zero, key, zero, zero + 8, zero + 2), (), (), ()), {})

    point = scaling._compiled(run, 1, [jax.random.key(seed) for seed in (3, 5, 4)])
    jax.effects_barrier()
    assert len(traced) == 1 and seen == [3, 5, 4]
    assert (point["steps"], point["updates"], point["replay_bytes"]) == (8, 2, 4)


def test_a_point_counts_by_the_second_what_it_is_told_to():
    done = [scaling.Done(40, 10, seconds) for seconds in (2.0, 1.0, 4.0)]
    by_steps, by_updates = scaling.point(4, 3.0, done, 5), scaling.point(4, 3.0, done, 5, "updates")
    assert (by_steps["median"], by_steps["min"], by_steps["max"]) == (20.0, 10.0, 40.0)
    assert (by_updates["median"], by_updates["min"], by_updates["max"]) == (5.0, 2.5, 10.0)
    with pytest.raises(AssertionError, match="with 4 differ in what they did"):
        scaling.point(4, 3.0, [*done, scaling.Done(44, 11, 1.0)], 5)


# What is chosen.


def test_accelerators_get_more_of_everything_but_what_is_quick():
    cpu, gpu, tpu, quick = (scaling.sizes(*which) for which in (("cpu",), ("gpu",), ("tpu",), ("cpu", True)))
    assert cpu.counts == (1, 16, 128, 1024) and gpu.counts == (*cpu.counts, 4096) and gpu == tpu
    assert cpu.batch_sizes == (32, 128) and gpu.batch_sizes == (32, 128, 512, 1024, 4096)
    assert (cpu.frames, gpu.frames) == (20_000, 1_000_000)
    assert cpu.repeats == gpu.repeats == quick.repeats == 3
    assert (cpu.games, gpu.games) == ((scaling.CARTPOLE,), (scaling.CARTPOLE, scaling.MINATAR))
    assert quick == scaling.sizes("gpu", True)
    assert quick.games == cpu.games and max(quick.counts) < 128 and quick.seed_steps < cpu.seed_steps


@pytest.mark.parametrize("which", [("cpu",), ("gpu",), ("cpu", True)], ids=str)
def test_the_sizes_fit_every_count(which):
    chosen = scaling.sizes(*which)
    assert min(chosen.learnt // size for size in chosen.batch_sizes) >= 1
    observations = {
        scaling.CARTPOLE: gymnasium.spaces.Box(-1, 1, (4,), np.float32),
        scaling.MINATAR: gymnasium.spaces.Box(0, 1, (10, 10, 4), np.bool_),
    }
    for name in chosen.games:
        space, options = observations[name], scaling.GAMES[name].options
        agent = dqn((space, gymnasium.spaces.Discrete(2)), **options)
        for count in chosen.counts:
            cadence = agent.cadence(count)
            assert cadence.updates * 4 == cadence.rows * count
            assert chosen.host_steps // (cadence.rows * count) >= 1
            jax.eval_shape(agent.init, jax.random.key(0), jnp.zeros((count, *space.shape), space.dtype))  # Raises if a replay is too small.
            assert chosen.seed_steps >= 4 * options["batch_size"]


def test_what_is_left_out_is_named_with_the_reason(monkeypatch):
    assert scaling.missing(scaling.sizes("cpu")) == {"MinAtar Breakout": "on accelerators only, and not where it has to be quick"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert scaling.missing(scaling.sizes("gpu")) == {"MinAtar Breakout": "it needs pgx: pip install 'dqn_jax[pgx]'"}
    assert not [name for name in scaling.plan(scaling.sizes("gpu")) if "MinAtar" in name]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert scaling.missing(scaling.sizes("gpu")) == {}
    assert [name for name in scaling.plan(scaling.sizes("gpu")) if "MinAtar" in name] == [
        "compiled loop, environments, MinAtar Breakout",
        "compiled loop, seeds, MinAtar Breakout",
    ]


def test_each_series_measures_its_own_game(monkeypatch):
    for name in ("environments", "seeds"):
        monkeypatch.setattr(scaling, name, lambda game, count, steps, repeats: (game.env_id, count, steps))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    chosen = scaling.sizes("gpu")
    found = {name: list(points) for name, (axis, _, points) in scaling.plan(chosen).items() if name.startswith("compiled loop")}
    assert list(found) == [f"compiled loop, {axis}, {game}" for game in scaling.GAMES for axis in ("environments", "seeds")]
    for name, asked in found.items():
        steps = chosen.seed_steps if "seeds" in name else chosen.env_steps
        game = next(game for title, game in scaling.GAMES.items() if name.endswith(title))
        assert asked == [(game.env_id, count, steps) for count in chosen.counts]


def test_one_seed_runs_without_a_lane_of_its_own():
    one, two = (scaling.seeds(scaling.GAMES[scaling.CARTPOLE], count, 100, 1) for count in (1, 2))
    assert (one["count"], one["steps"], one["updates"]) == (1, 100, 10)
    assert (two["steps"], two["updates"], two["replay_bytes"]) == (200, 20, 2 * one["replay_bytes"])


def test_spread_measures_seeds_alone():
    nothing = TINY._replace(counts=())
    assert [*scaling.measure_sizes(nothing._replace(batch_sizes=(4,)), seeds_only=True)["series"]] == ["compiled loop, seeds, CartPole"]


def test_work_that_would_measure_nothing_is_refused():
    with pytest.raises(ValueError, match=r"6 steps of 8 environment.* hold no update, one falls due every 8"):
        scaling.host_loop(8, 6, 1)
    with pytest.raises(ValueError, match="every 4 transitions does not fit 6 environments"):
        scaling.host_loop(6, 100, 1)
    with pytest.raises(ValueError, match="64 steps of a seed are too few, learning begins after 64"):
        scaling.seeds(scaling.GAMES[scaling.CARTPOLE], 10, 64, 1)
    with pytest.raises(ValueError, match="batch of 8 learns from more than 7"):
        next(scaling.updates(IMAGES, None, (4, 8), 7, 1))


def test_the_command_writes_what_it_measures(monkeypatch, tmp_path):
    monkeypatch.setattr(scaling, "sizes", lambda backend, quick: TINY._replace(counts=(), batch_sizes=(4,), learnt=4))
    monkeypatch.setitem(scaling.SHAPES, "Nature", IMAGES)
    monkeypatch.setattr(scaling, "DTYPES", {"bfloat16": jnp.bfloat16})
    monkeypatch.setattr("sys.argv", ["scaling", "--quick", "--out", str(tmp_path / "out.json")])
    scaling.main()
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["inline"] is False and written["machine"]["versions"]["jax"]
    assert [one["updates"] for one in written["series"]["Nature updates, bfloat16"]["points"]] == [1]
