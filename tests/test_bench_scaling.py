"""The benchmark of many at once: what it counts is what was done. How fast anything is, is not asserted."""

import importlib.util
import json

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probe_envs import images

from dqn_jax.bench import games, scaling
from dqn_jax.bench.compiled_loops import Outcome
from dqn_jax.bench.settings import options
from dqn_jax.presets.dqn import dqn

CARTPOLE, BREAKOUT = games.CARTPOLE, games.BREAKOUT
TINY = games.Sizes(counts=(8,), host_steps=100, games={CARTPOLE: games.Amount((8,), 128, 100, True)}, repeats=2)
HOST, SEVERAL, MANY = "host loop, CartPole", "compiled loop, environments, CartPole", "compiled loop, seeds, CartPole"
PEER = MANY + ", PureJaxRL style"


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """The points of each series that the command writes, from a run of everything, a little of it."""
    out = tmp_path_factory.mktemp("scaling") / "out.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "sizes", lambda backend, quick: TINY)
        patch.setattr(scaling, "EVALUATED", 4)
        patch.setattr(scaling, "EPISODES", 1)
        patch.setattr("sys.argv", ["scaling", "--quick", "--out", str(out)])
        scaling.main()
    written = json.loads(out.read_text())
    assert written["inline"] is False and written["spread"] is False and written["sizes"]["repeats"] == 2
    assert written["sizes"]["games"] == {CARTPOLE: {"counts": [8], "env_steps": 128, "seed_steps": 100, "with_peer": True}}
    assert written["left_out"] == {BREAKOUT: "--quick or --only leaves it out"}
    return {name: one["points"] for name, one in written["series"].items()}


def test_steps_and_updates_keep_their_ratio_whatever_the_count(series):
    (host,), (several,), (many,), (peer,) = (series[name] for name in (HOST, SEVERAL, MANY, PEER))
    assert (host["count"], host["steps"], host["updates"]) == (8, 96, 24)
    # Seven rows come before the row that completes the first batch of 64.
    assert (several["count"], several["steps"], several["updates"]) == (8, 128, (128 - 7 * 8) // 4)
    assert (many["count"], many["steps"], many["updates"]) == (8, 8 * 100, 8 * (100 - 60) // 4)
    assert (peer["count"], peer["steps"], peer["updates"]) == (8, 8 * 100, 8 * (100 - 60) // 4)


def test_the_peer_is_compared_and_both_show_what_they_learnt(series):
    (many,), (peer,) = series[MANY], series[PEER]
    assert 0 < peer["ratio"]["min"] <= peer["ratio"]["median"] <= peer["ratio"]["max"]
    assert many["return"] >= 8 and peer["return"] >= 8  # No CartPole falls sooner.


def test_spreads_and_times_are_positive_and_ordered(series):
    for (one,) in series.values():
        assert 0 < one["min"] <= one["median"] <= one["max"] and one["compile_seconds"] > 0


def test_replays_are_those_that_the_sizes_allow(series):
    row = 2 * 4 * 4 + 4 + 4 + 4 + 1  # Two observations, action, reward, discount, last.
    assert series[MANY][0]["replay_bytes"] == 8 * (100 * row + 2 * 4)
    assert series[PEER][0]["replay_bytes"] is None
    assert series[SEVERAL][0]["replay_bytes"] == series[HOST][0]["replay_bytes"] == 50_000 * row + 2 * 4


def test_a_host_loop_with_few_environments_learns_every_fourth_transition():
    (point,) = scaling.host_loop(2, 27, 2).values()
    assert (point["steps"], point["updates"]) == (24, 6)


def test_a_compiled_run_is_traced_once_and_gets_other_keys():
    traced, seen = [], []

    def run(key):
        traced.append(key)
        jax.debug.callback(lambda data: seen.append(int(data[-1])), jax.random.key_data(key))
        zero = jnp.zeros((), jnp.int32)
        return Outcome({"w": jax.random.key_data(key)[-1]}, zero + 2, zero + 8, ())

    contender = scaling.compiled(run, [jax.random.key(seed) for seed in (3, 5, 4)], 7, lambda params: float(params["w"]))
    done = [contender.measure(number) for number in range(3)]
    jax.effects_barrier()
    assert len(traced) == 1 and seen == [3, 5, 4] and contender.replay_bytes == 7
    assert {(one.steps, one.updates) for one in done} == {(8, 2)} and contender.returns() == 4.0


def test_ours_and_the_peer_make_the_same_steps_where_these_are_rounded():
    points = scaling.seeds(CARTPOLE, 1, 102, 1, True)
    assert [one["steps"] for one in points.values()] == [104, 104]
    assert [*points] == [MANY, PEER] and all(one["return"] > 0 for one in points.values())  # One seed is evaluated, too.


# What is chosen.


def test_accelerators_get_larger_counts_and_what_is_quick_has_little():
    cpu, gpu, tpu, quick = (games.sizes(*which) for which in (("cpu",), ("gpu",), ("tpu",), ("cpu", True)))
    assert cpu.counts == (1, 16, 128, 1024) and gpu.counts == (1, 128, 1024, 4096) and gpu == tpu
    assert cpu.repeats == gpu.repeats == quick.repeats == 3
    assert [*cpu.games] == [*gpu.games] == [CARTPOLE, BREAKOUT] and [*quick.games] == [CARTPOLE]
    assert [cpu.games[name].with_peer for name in cpu.games] == [False, True]  # For CartPole there is the section loops.
    assert all(amount.with_peer and amount.counts == gpu.counts for amount in gpu.games.values())
    assert quick == games.sizes("gpu", True)
    assert max(quick.counts) < 128 and quick.games[CARTPOLE].seed_steps < cpu.games[CARTPOLE].seed_steps


@pytest.mark.parametrize("which", [("cpu",), ("gpu",), ("cpu", True)], ids=str)
def test_the_sizes_fit_every_count(which):
    chosen = games.sizes(*which)
    observations = {
        CARTPOLE: gymnasium.spaces.Box(-1, 1, (4,), np.float32),
        BREAKOUT: gymnasium.spaces.Box(0, 1, (10, 10, 4), np.bool_),
    }
    host = dqn((observations[CARTPOLE], gymnasium.spaces.Discrete(2)), **options(games.GAMES[CARTPOLE].setting))
    assert all(chosen.host_steps // (host.cadence(count).rows * count) >= 1 for count in chosen.counts)
    for name, amount in chosen.games.items():
        space, setting = observations[name], games.GAMES[name].setting
        agent = dqn((space, gymnasium.spaces.Discrete(2)), **options(setting))
        for count in amount.counts:
            cadence = agent.cadence(count)
            assert cadence.updates * 4 == cadence.rows * count
            jax.eval_shape(agent.init, jax.random.key(0), jnp.zeros((count, *space.shape), space.dtype))  # Raises if a replay is too small.
            assert amount.seed_steps >= 4 * setting.batch_size


def test_what_is_left_out_is_named_with_the_reason(monkeypatch):
    assert games.missing(games.sizes("cpu", True)) == {BREAKOUT: "--quick or --only leaves it out"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert games.missing(games.sizes("gpu")) == {BREAKOUT: "it needs pgx: pip install 'dqn_jax[pgx]'"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert games.missing(games.sizes("gpu")) == {}


@pytest.mark.parametrize(("is_there", "names"), [(object(), [CARTPOLE, BREAKOUT]), (None, [CARTPOLE])], ids=["pgx", "no pgx"])
def test_each_series_measures_its_own_game(monkeypatch, is_there, names):
    for name in ("environments", "seeds"):
        monkeypatch.setattr(scaling, name, lambda game, count, steps, repeats, with_peer=None: (game, count, steps))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: is_there)
    chosen = games.sizes("gpu")
    host, *compiled = scaling.plan(chosen)
    assert (host.axis, host.unit) == ("environments", "steps per second")
    asked = [(group.axis, list(group.points)) for group in compiled]
    assert asked == [
        (axis, [(game, count, steps) for count in chosen.games[game].counts])
        for game in names
        for axis, steps in (("environments", chosen.games[game].env_steps), ("seeds", chosen.games[game].seed_steps))
    ]


def test_spread_measures_seeds_alone(monkeypatch):
    monkeypatch.setattr(scaling.series, "measure", lambda groups, measured, keep: [group.axis for group in groups])
    assert scaling.measure_sizes(TINY, seeds_only=True) == ["seeds"]
    assert scaling.measure_sizes(TINY) == ["environments", "environments", "seeds"]


def test_convolutions_of_flax_are_told_apart_from_the_loop(monkeypatch):
    monkeypatch.setattr(scaling, "make", lambda env_id: images(20))
    monkeypatch.setattr(scaling, "EPISODES", 2)
    first, *peers = points = scaling.seeds(BREAKOUT, 2, 100, 1, True)
    assert peers == [f"{first}, PureJaxRL style", f"{first}, PureJaxRL style, our convolutions"]
    assert {(one["steps"], one["updates"]) for one in points.values()} == {(200, 2 * (100 - 32 + 4) // 4)}
    # A step pays 1, and the time limit ends every episode.
    assert all(1 <= one["return"] <= 20 for one in points.values())


@pytest.mark.parametrize(
    ("only", "counts"), [((CARTPOLE, BREAKOUT), (1, 16, 128, 1024)), ((CARTPOLE,), (1, 16, 128, 1024)), ((BREAKOUT,), ())]
)
def test_one_game_is_measured_where_it_alone_is_asked_for(monkeypatch, only, counts):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    chosen = games.selected(games.sizes("cpu"), only)
    assert (chosen.counts, (*chosen.games,)) == (counts, only)
    assert (*scaling.Options().only,) == (*games.GAMES,)


def test_a_game_whose_package_is_missing_is_nothing_to_measure(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"nothing is left to measure: .*Breakout: it needs pgx"):
        games.selected(games.sizes("cpu"), (BREAKOUT,))
    assert (*games.selected(games.sizes("cpu"), (CARTPOLE, BREAKOUT)).games,) == (CARTPOLE, BREAKOUT)  # It is said that it is left out.


def test_nothing_to_measure_is_an_error_of_one_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["scaling", "--quick", "--only", BREAKOUT])
    with pytest.raises(SystemExit, match="nothing is left to measure: CartPole: --quick or --only leaves it out; Breakout"):
        scaling.main()


def test_work_that_would_measure_nothing_is_refused():
    with pytest.raises(ValueError, match=r"6 steps of 8 environment.* hold no update, one falls due every 8"):
        scaling.host_loop(8, 6, 1)
    with pytest.raises(ValueError, match="every 4 transitions does not fit 6 environments"):
        scaling.host_loop(6, 100, 1)
    with pytest.raises(ValueError, match="64 steps of a seed are too few, learning begins after 64"):
        scaling.seeds(CARTPOLE, 10, 64, 1, False)
