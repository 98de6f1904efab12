"""The command line as its user meets it: what it prints, what it leaves in the run's folder, how it stops, goes on and refuses."""

import csv
import json
import re
import shutil
import signal
from pathlib import Path

import gymnasium
import jax
import numpy as np
import pytest

import dqn_jax
from dqn_jax import cli, envs
from dqn_jax.play import play_greedily
from dqn_jax.runs import CompiledRuns, HostRuns

STEPS = 600
TINY = ["--steps", STEPS, "--replay-start-size", 100, "--update-interval", 4, "--batch-size", 64, "--hidden", 8, "--eval-episodes", 2]
HOST, COMPILED = "CartPole-v1", "phys2d/CartPole-v1"
SUMMARY = {
    *("algo", "env", "steps", "seeds", "eval_return", "online_return", "eval_iqm", "eval_interval", "online_iqm", "online_interval"),
    *("steps_per_second", "compile_seconds", "peak_memory_mb", "updates", "state_sha256", "run"),
}


@pytest.fixture(scope="module", params=[HOST, COMPILED], ids=["host", "compiled"])
def finished(request, tmp_path_factory):
    """A complete run of each driver: its folder, for looking only, and the command that made it."""
    folder = tmp_path_factory.mktemp("runs")
    command = ["train", request.param, *TINY, "--seeds", 3 if request.param == COMPILED else 1, "--folder", folder, "--name", "finished"]
    cli.main([str(word) for word in command])
    return folder / "finished", command[:-4]


@pytest.fixture
def dqn_jax_command(tmp_path, monkeypatch, capsys):
    """Runs the console script in an empty folder. Returns the exit status and both streams, as printed by this command alone."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        capsys.readouterr()
        try:
            cli.main([str(word) for word in words])
            status = 0
        except SystemExit as stop:
            status = stop.code
        streams = capsys.readouterr()
        return status, streams.out, streams.err

    return run


@pytest.fixture
def summary_of(dqn_jax_command):
    """Runs a command that must succeed with --json; returns the object that it prints."""

    def run(*words):
        status, out, err = dqn_jax_command(*words, "--json")
        assert status == 0, err
        return json.loads(out.splitlines()[-1])

    return run


def stop_after(monkeypatch, runs, chunks, act):
    """Lets ``act()`` happen within the chunk of this number, and never again."""
    advance, left = runs.advance, [chunks]

    def and_then(self):
        left[0] -= 1
        if left[0] == 0:
            act()
        return advance(self)

    monkeypatch.setattr(runs, "advance", and_then)


# What a run prints and leaves behind.


def test_the_last_line_is_one_json_object(finished, dqn_jax_command):
    _, command = finished
    status, out, err = dqn_jax_command(*command, "--name", "again", "--json")
    assert status == 0
    assert len(out.splitlines()) == 1, "what is not a result belongs on standard error"
    summary = json.loads(out, parse_constant=pytest.fail)  # NaN and Infinity are not JSON.
    assert set(summary) >= SUMMARY
    seeds = summary["seeds"]
    assert (summary["algo"], summary["env"], summary["run"]) == ("dqn", command[1], "runs/again")
    assert len(summary["eval_return"]) == len(summary["online_return"]) == seeds
    assert summary["complete"] and summary["steps"] >= STEPS
    # One update for every four transitions beyond the warm-up. The newest transition of a compiled run is still pending.
    assert summary["updates"] in ((summary["steps"] - 100) // 4, (summary["steps"] - 100) // 4 + 1)
    assert summary["steps_per_second"] > 0 and summary["compile_seconds"] > 0 and summary["peak_memory_mb"] > 50
    low, high = summary["eval_interval"]
    assert low <= summary["eval_iqm"] <= high
    assert re.fullmatch("[0-9a-f]{64}", summary["state_sha256"])
    assert "device:" in err and "Traceback" not in err


def test_the_same_command_gives_the_same_state(finished, summary_of):
    folder, command = finished
    before = json.loads((folder / "summary.json").read_text())
    again = summary_of(*command, "--name", "again")
    assert again["state_sha256"] == before["state_sha256"]
    assert again["eval_return"] == before["eval_return"] and again["online_return"] == before["online_return"]
    other = summary_of(*command, "--name", "other", "--seed", 7)
    assert other["state_sha256"] != before["state_sha256"]


def test_seeds_differ_from_one_another(finished):
    folder, _ = finished
    seeds = json.loads((folder / "summary.json").read_text())["seeds"]
    with open(folder / "metrics.csv", newline="") as file:
        final = [row for row in csv.DictReader(file)][-seeds:]
    assert len({row["q"] for row in final}) == seeds


def test_run_folder(finished):
    folder, _ = finished
    summary = json.loads((folder / "summary.json").read_text())
    assert sorted(path.name for path in folder.iterdir()) == [
        "best.safetensors",
        "config.json",
        "curve.png",
        "last.safetensors",
        "metrics.csv",
        "previous.safetensors",
        "summary.json",
    ]
    config = json.loads((folder / "config.json").read_text())
    assert config["steps"] == STEPS and config["options"]["hidden"] == [8] and config["options"]["gamma"] == dqn_jax.DQNOptions().gamma
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["steps"]) for row in rows]
    assert steps == sorted(steps) and steps[-1] == summary["steps"]
    assert [row["seed"] for row in rows[: summary["seeds"]]] == [str(seed) for seed in range(summary["seeds"])]
    evaluated = [float(row["eval_return"]) for row in rows[-summary["seeds"] :]]
    assert evaluated == summary["eval_return"], "the last row is evaluated with the final parameters"
    best = np.nanmax(np.array([float(row["eval_return"]) for row in rows]).reshape(-1, summary["seeds"]), axis=0)
    assert summary["best_eval_return"] == best.tolist()
    assert {"loss", "epsilon", "return", "length", "episodes", "refused"} <= set(rows[0])


def test_people_get_a_summary_that_says_what_to_do_next(finished, dqn_jax_command, tmp_path):
    folder, command = finished
    shutil.copytree(folder, tmp_path / "copy")
    status, out, _ = dqn_jax_command("train", "--resume", "copy")
    assert status == 0
    assert command[1] in out and "dqn-jax eval copy" in out
    assert "nan" not in out


def test_several_environments_feed_one_agent(summary_of):
    summary = summary_of("train", HOST, *TINY, "--num-envs", 2, "--name", "two")
    assert summary["steps"] == STEPS and summary["updates"] > 0
    assert json.loads(Path("runs/two/config.json").read_text())["num_envs"] == 2


def test_a_preset_is_recorded_and_flags_override_it(summary_of):
    words = ["--preset", "deck", "--gamma", 0.5, "--hidden", 8, "--steps", 64, "--eval-episodes", 1]
    summary_of("train", HOST, *words, "--name", "deck")
    options = json.loads(Path("runs/deck/config.json").read_text())["options"]
    assert options["gamma"] == 0.5 and options["hidden"] == [8]
    assert options["n_steps"] == 3 and options["double"] is False and options["epsilon"] == [0.5, 0.1, 50_000]


# Environment arguments.


def made_env(monkeypatch, command, *words):
    """The environment that a command would train in."""
    tasks = []
    monkeypatch.setattr(cli, "train", lambda task, folder, **how: tasks.append(task) or {})
    status, _, err = command("train", *words, "--json")
    assert status == 0, err
    return envs.make(tasks[0].env, **tasks[0].env_args)


@pytest.mark.parametrize("size", [4, 6])
def test_env_arg_reaches_gymnax(size, dqn_jax_command, monkeypatch):
    pytest.importorskip("gymnax")
    env = made_env(monkeypatch, dqn_jax_command, "gymnax/DeepSea-bsuite", "--env-arg", f"size={size}")
    assert env.observation_space.shape == (size, size)


def test_env_arg_reaches_phys2d(dqn_jax_command, monkeypatch):
    def pole(*words):
        env = made_env(monkeypatch, dqn_jax_command, COMPILED, *words)
        state, _ = env.reset(jax.random.key(0))
        return env.step(jax.random.key(1), state, 1)[1].observation

    assert not np.array_equal(pole(), pole("--env-arg", "polemass_length=0.05"))


# Stopping and going on.


@pytest.mark.parametrize(
    ("finished", "runs", "number"),
    [(HOST, HostRuns, signal.SIGTERM), (COMPILED, CompiledRuns, signal.SIGINT)],
    ids=["host", "compiled"],
    indirect=["finished"],
)
def test_interrupt_and_resume(finished, runs, number, dqn_jax_command, summary_of, monkeypatch):
    folder, command = finished
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stop_after(patch, runs, 3, lambda: signal.raise_signal(number))
        status, out, err = dqn_jax_command(*command, "--name", "stopped", "--json")
    assert status == 128 + number and "Traceback" not in err
    assert signal.getsignal(number) is handler
    stopped = json.loads(out)
    assert stopped["complete"] is False and 0 < stopped["steps"] < STEPS
    assert len(stopped["eval_return"]) == stopped["seeds"]

    resumed = summary_of("train", "--resume", "runs/stopped")
    whole = json.loads((folder / "summary.json").read_text())
    assert resumed["complete"] is True and resumed["steps"] == whole["steps"] and resumed["updates"] == whole["updates"]
    for name in ("state_sha256", "eval_return", "best_eval_return", "online_return"):
        assert resumed[name] == whole[name], name
    assert Path("runs/stopped/metrics.csv").read_text() == (folder / "metrics.csv").read_text()
    steps = [int(row["steps"]) for row in csv.DictReader(Path("runs/stopped/metrics.csv").read_text().splitlines())]
    assert sorted(set(steps)) == list(dict.fromkeys(steps)), "the rows go on where they stopped, none twice"
    assert steps[0] < stopped["steps"] < steps[-1] == resumed["steps"]


@pytest.mark.parametrize("words", [("--seeds", 2), ("--num-envs", 4, "--prioritized"), ("--algo", "ppo", "--rollout-length", 64)], ids=str)
def test_a_run_that_stopped_ends_as_one_that_did_not(words, dqn_jax_command, summary_of, monkeypatch):
    command = ["train", HOST, *(TINY if "ppo" not in words else ["--steps", STEPS, "--hidden", 8, "--eval-episodes", 2]), *words]
    whole = summary_of(*command, "--name", "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, HostRuns, 37, lambda: signal.raise_signal(signal.SIGINT))
        dqn_jax_command(*command, "--name", "stopped")
    resumed = summary_of("train", "--resume", "runs/stopped")
    assert resumed["state_sha256"] == whole["state_sha256"]
    assert Path("runs/stopped/metrics.csv").read_text() == Path("runs/whole/metrics.csv").read_text()


def test_what_cannot_be_captured_is_named_and_begins_anew(dqn_jax_command, summary_of, monkeypatch):
    class Foreign(gymnasium.Wrapper):
        def __init__(self, env):
            super().__init__(env)
            self.engine = memoryview(b"")

    monkeypatch.setattr("dqn_jax.runs.make_env", lambda env, **args: Foreign(gymnasium.make(env, **args)))
    with monkeypatch.context() as patch:
        stop_after(patch, HostRuns, 3, lambda: signal.raise_signal(signal.SIGINT))
        dqn_jax_command("train", HOST, *TINY, "--name", "stopped")
    status, _, err = dqn_jax_command("train", "--resume", "runs/stopped")
    assert status == 0 and "begin new episodes" in err and "Foreign.engine is a memoryview" in err


def test_what_was_learnt_survives_an_environment_that_raises(dqn_jax_command, summary_of, monkeypatch):
    def fail():
        raise RuntimeError("the simulator is gone")

    with monkeypatch.context() as patch:
        stop_after(patch, HostRuns, 30, fail)
        with pytest.raises(RuntimeError, match="the simulator is gone"):
            dqn_jax_command("train", HOST, *TINY, "--name", "broken")
    with monkeypatch.context() as patch:
        patch.setattr(gymnasium.wrappers.TimeLimit, "step", lambda self, action: fail())
        with pytest.raises(RuntimeError, match="the simulator is gone") as raised:
            dqn_jax_command("train", HOST, *TINY, "--name", "dead")
    assert raised.value.__notes__ == ["in the run of seed 0, after about 0 steps"]
    assert len(Path("runs/broken/metrics.csv").read_text().splitlines()) == 1 + 29
    resumed = summary_of("train", "--resume", "runs/broken")
    assert resumed["complete"] is True and resumed["steps"] == STEPS


@pytest.mark.parametrize("finished", [HOST], ids=["host"], indirect=True)
def test_resuming_a_complete_run_says_so(finished, dqn_jax_command, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    status, _, err = dqn_jax_command("train", "--resume", folder)
    assert status == 0 and "steps already: to go on, ask for more in all with --steps" in err
    before = (folder / "config.json").read_text()
    status, _, err = dqn_jax_command("train", "--resume", folder, "--steps", 50)
    assert status == 2 and "steps already: ask for as many in all, or more, with --steps" in err
    assert (folder / "config.json").read_text() == before


def test_resume_goes_beyond_the_end(finished, summary_of, tmp_path):
    shutil.copytree(finished[0], tmp_path / "longer")
    summary = summary_of("train", "--resume", "longer", "--steps", STEPS + 100)
    assert summary["complete"] is True and summary["steps"] >= STEPS + 100
    assert json.loads(Path("longer/config.json").read_text())["steps"] == STEPS + 100


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_rollback(finished, damage, dqn_jax_command, summary_of, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "damaged")
    last = folder / "last.safetensors"
    last.write_bytes(last.read_bytes()[:-100]) if damage == "cut" else last.unlink()
    status, out, err = dqn_jax_command("train", "--resume", folder)
    assert status == 2 and out == "" and "last.safetensors" in err and "add --rollback" in err
    status, _, err = dqn_jax_command("train", "--resume", folder, "--rollback")
    assert status == 0 and re.search(r"rolled back to step \d+", err)
    rolled = json.loads((folder / "summary.json").read_text())
    whole = json.loads((finished[0] / "summary.json").read_text())
    assert rolled["complete"] and rolled["state_sha256"] == whole["state_sha256"]  # It has made the lost steps again.
    assert (folder / "metrics.csv").read_text() == (finished[0] / "metrics.csv").read_text()


@pytest.mark.parametrize("finished", [HOST], ids=["host"], indirect=True)
def test_a_configuration_that_was_changed_is_refused_where_it_stands(finished, dqn_jax_command, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    config["options"]["gamma"] = 0.5
    (folder / "config.json").write_text(json.dumps(config))
    status, _, err = dqn_jax_command("train", "--resume", folder, "--steps", STEPS + 50)
    assert status == 2 and re.search(r"config.json says something else than the checkpoint: gamma: \S+ -> 0.5", err)


class Own(gymnasium.Wrapper):
    """Rewards of a generator of its own, which no reset seeds."""

    def __init__(self, env):
        super().__init__(env)
        self.own = np.random.default_rng(3)

    def step(self, action):
        observation, _, *rest = self.env.step(action)
        return observation, float(self.own.random()), *rest


def test_evaluations_do_not_hang_on_those_before(dqn_jax_command, summary_of, monkeypatch):
    monkeypatch.setattr("dqn_jax.runs.make_env", lambda env, **args: Own(gymnasium.make(env, **args)))
    whole = summary_of("train", HOST, *TINY, "--name", "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, HostRuns, 37, lambda: signal.raise_signal(signal.SIGTERM))
        dqn_jax_command("train", HOST, *TINY, "--name", "stopped")
    resumed = summary_of("train", "--resume", "runs/stopped")
    assert resumed["state_sha256"] == whole["state_sha256"] and resumed["eval_return"] == whole["eval_return"]
    assert Path("runs/stopped/metrics.csv").read_text() == Path("runs/whole/metrics.csv").read_text()


def test_an_option_that_ruined_a_run_is_changed_before_it_did(dqn_jax_command, summary_of):
    assert dqn_jax_command("train", HOST, *TINY, "--steps", 4 * STEPS, "--name", "good")[0] == 0
    status, _, err = dqn_jax_command("train", "--fork", "runs/good", "--learning-rate", 1e30, "--steps", 8 * STEPS, "--name", "ruined")
    assert status == 2 and "updates of 20 calls in a row were refused" in err
    assert "an earlier update has ruined it" in err and "--rollback" in err
    mended = ("--fork", "runs/ruined", "--rollback", "--learning-rate", 1e-3, "--name", "mended")
    assert summary_of("train", *mended)["complete"]


@pytest.mark.parametrize("finished", [HOST], ids=["host"], indirect=True)
@pytest.mark.parametrize(
    ("name", "content", "says"),
    [("metrics.csv", b"steps,seed\n1", "begins anew"), ("metrics.csv", b"\xff\xfe", "begins anew"), ("best.safetensors", b"", "is lost")],
)
def test_what_can_be_spared_is_told_and_spared(finished, name, content, says, dqn_jax_command, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "damaged")
    (folder / name).write_bytes(content)
    status, _, err = dqn_jax_command("train", "--resume", folder, "--steps", STEPS + 50)
    assert status == 0 and "warning: " in err and says in err


@pytest.mark.parametrize("finished", [HOST], ids=["host"], indirect=True)
@pytest.mark.parametrize("content", ["", "{", "[]", '{"env": "CartPole-v1"}', '"a"'])
def test_a_configuration_that_is_none_is_refused(finished, content, dqn_jax_command, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "damaged")
    (folder / "config.json").write_text(content)
    for words in (("train", "--resume", folder), ("train", "--fork", folder), ("eval", folder)):
        status, out, err = dqn_jax_command(*words)
        assert status == 2 and out == "" and "config.json" in err and "Traceback" not in err


def test_fork(finished, dqn_jax_command, summary_of, tmp_path):
    words = ("--fork", finished[0], "--learning-rate", 0.1, "--gamma=0.5", "--steps", STEPS + 200, "--name", "other", "--folder", tmp_path)
    status, _, err = dqn_jax_command("train", *words)
    assert status == 0 and f"forked from {finished[0]} at step" in err
    assert re.search(r"learning_rate: \S+ -> 0.1", err) and re.search(r"gamma: \S+ -> 0.5", err) and "hidden" not in err
    config = json.loads((tmp_path / "other/config.json").read_text())
    assert config["forked_from"]["run"] == str(finished[0]) and config["options"]["hidden"] == [8]
    forked = json.loads((tmp_path / "other/summary.json").read_text())
    whole = json.loads((finished[0] / "summary.json").read_text())
    assert forked["seeds"] == whole["seeds"] and forked["updates"] > whole["updates"]
    longer = summary_of("train", "--resume", tmp_path / "other", "--steps", STEPS + 300)
    assert longer["updates"] > forked["updates"]
    assert json.loads((tmp_path / "other/config.json").read_text())["forked_from"] == config["forked_from"]


def test_a_fork_that_cannot_be_leaves_nothing_behind(finished, dqn_jax_command, tmp_path):
    steps = json.loads((finished[0] / "summary.json").read_text())["steps"]
    for words, says in (
        (("--num-envs", 4, "--steps", STEPS + 200), "something gives arrays another shape: .*num_envs: 1 -> 4"),
        ((), f"has made {steps:,} steps already: ask for more in all with --steps"),
        (("--hidden", 16), r"Dense_0.*\b8,?\).*\b16,?\)"),
        (("--seed", 5, "--steps", STEPS + 200), "leave out --seed"),
    ):
        status, _, err = dqn_jax_command("train", f"--fork={finished[0]}", *words, "--name", "other", "--folder", tmp_path)
        assert status == 2 and re.search(says, err)
        assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_takes_no_options_of_its_own(finished, dqn_jax_command):
    for words in (("--n-steps", 5), ("--gamma", 0.99), ("--curiosity=off",), ("--algo", "dqn")):
        status, _, err = dqn_jax_command("train", "--resume", finished[0], *words)
        assert status == 2 and f"leave out {words[0].partition('=')[0]}" in err and "--fork" in err
    status, _, err = dqn_jax_command("train", HOST, "--resume", finished[0])
    assert status == 2 and "leave out CartPole-v1" in err
    status, _, err = dqn_jax_command("train", "--fork", finished[0], "--preset", "deck")
    assert status == 2 and "leave out --preset" in err
    status, _, err = dqn_jax_command("train", HOST, "--rollback")
    assert status == 2 and "--resume RUN" in err


# Looking at a run.


def test_eval(finished, dqn_jax_command, summary_of):
    folder, command = finished
    status, out, _ = dqn_jax_command("eval", folder, "--episodes", 3)
    assert status == 0 and re.search(r"mean return \d+\.\d over 3 greedy episodes", out)
    result = summary_of("eval", folder, "--episodes", 3)
    assert result["env"] == command[1] and len(result["returns"]) == 3
    assert result["mean"] == pytest.approx(np.mean(result["returns"]))
    assert summary_of("eval", folder, "--episodes", 3) == result


@pytest.mark.parametrize("finished", [COMPILED], ids=["compiled"], indirect=True)
def test_eval_of_one_seed_in_another_environment(finished, dqn_jax_command, summary_of):
    folder, _ = finished
    result = summary_of("eval", folder, "--seed", 2, "--env", HOST, "--episodes", 2)
    assert result["env"] == HOST and len(result["returns"]) == 2
    status, _, err = dqn_jax_command("eval", folder, "--seed", 3)
    assert status == 2 and "no seed 3" in err


@pytest.mark.parametrize("words", [("eval",), ("train", "--resume")], ids=["eval", "resume"])
@pytest.mark.parametrize("finished", [HOST], ids=["host"], indirect=True)
def test_a_run_cannot_name_a_module_to_import(finished, words, dqn_jax_command, tmp_path):
    shutil.copytree(finished[0], tmp_path / "foreign")
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')")
    config = tmp_path / "foreign/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "env": "trap:CartPole-v1"}))
    status, out, err = dqn_jax_command(*words, "foreign")
    assert status == 2 and out == ""
    assert "trap:CartPole-v1" in err and "Traceback" not in err


# What is refused.


REFUSED = [
    ([], "train"),
    (["train"], "name an environment"),
    (["train", HOST, "--gama", 0.9], "--gamma"),
    (["train", HOST, "--gamma", "much"], "--gamma"),
    (["train", HOST, "--gamma", 2], "gamma must be in [0, 1]"),
    (["train", HOST, "--batch-size", 0], "batch_size must be at least 1"),
    (["train", HOST, "--loss", "l1"], "huber"),
    (["train", HOST, "--epsilon", 1, 2, 3], "epsilon's end"),
    (["train", HOST, "--preset", "dek"], "deck"),
    (["train", HOST, "--algo", "a2c"], "dqn"),
    (["train", "Pendulum-v1"], "use PPO (--algo ppo), or SAC (--algo sac)"),
    (["train", HOST, "--algo", "ppo", "--ent-coef", 0.01], "ppo has no option --ent-coef: did you mean entropy_coef?"),
    (["train", HOST, "--algo", "dqn", "--curiosity-epochs", 2], "dqn has no option --curiosity-epochs: it is one of ppo"),
    (["train", HOST, "--gae-lambda", 0.9, "--algo", "sac"], "sac has no option --gae-lambda: it is one of ppo"),
    (["train", HOST, "--num_minibatches=4", "--algo", "ppo"], "ppo has no option --num_minibatches: batch_size is the transitions in a"),
    (["train", HOST, "--algo", "ppo", "--preset", "cartpole"], "mujoco"),
    (["train", HOST, "--algo", "ppo", "--replay-start-size", 10], "--replay-start-size"),
    (["train", HOST, "--algo", "ppo", "--rollout-length", 100, "--batch-size", 64], "does not divide"),
    (["train", HOST, "--algo", "ppo", "--steps", 500], "--rollout-length"),
    (["train", HOST, "--algo", "c51", "--distribution", "iqn"], "--algo c51 is DQN with --distribution c51, got iqn"),
    (["train", HOST, "--algo", "pqn", "--curiosity", "rnd"], "PQN has neither a second value nor a replay"),
    (["train", "PongNoFrameskip-v4"], "ALE/Pong-v5"),  # Whether or not a test before this one registered it: see test_atari.py.
    (["train", HOST, "--steps", 0], "steps"),
    (["train", HOST, "--steps", -5], "steps"),
    (["train", HOST, "--seeds", 0], "seeds"),
    (["train", COMPILED, "--seeds", 0], "seeds"),
    (["train", HOST, "--num-envs", 0], "--num-envs"),
    (["train", COMPILED, "--num-envs", 0], "--num-envs"),
    (["train", HOST, "--num-envs", 3, "--update-interval", 4], "2 and 4"),
    (["train", HOST, "--eval-episodes", 0], "--eval-episodes"),
    (["train", COMPILED, "--eval-episodes", 0], "--eval-episodes"),
    (["train", HOST, "--seed", -1], "seed"),
    (["train", "NoSuch-v0"], "NoSuch"),
    (["train", "CartPole"], "CartPole"),
    (["train", "phys2d/NoSuch-v0"], "NoSuch"),
    (["train", "Pendulum-v1"], "Discrete"),
    (["train", HOST, "--env-arg", "size"], "NAME=VALUE"),
    (["train", HOST, "--env-arg", "size=4"], "size"),
    (["train", COMPILED, "--env-arg", "size=4"], "polemass_length"),
    (["train", "--resume", "nothing"], "no run at nothing"),
    (["eval", "nothing"], "no run at nothing"),
]


@pytest.mark.parametrize(("words", "says"), REFUSED, ids=[" ".join(map(str, words)) or "nothing" for words, _ in REFUSED])
def test_refused_with_one_message_and_nothing_left_behind(words, says, dqn_jax_command, tmp_path):
    status, out, err = dqn_jax_command(*words)
    assert status == 2 and out == ""
    assert says in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("finished", [HOST], ids=["host"], indirect=True)
def test_an_existing_run_is_not_written_over(finished, dqn_jax_command, tmp_path):
    shutil.copytree(finished[0], tmp_path / "runs/taken")
    before = {path.name: path.read_bytes() for path in (tmp_path / "runs/taken").iterdir()}
    status, _, err = dqn_jax_command("train", HOST, *TINY, "--name", "taken")
    assert status == 2 and "--resume runs/taken" in err
    assert {path.name: path.read_bytes() for path in (tmp_path / "runs/taken").iterdir()} == before


@pytest.mark.parametrize("finished", [HOST], ids=["host"], indirect=True)
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_resume_from_a_damaged_checkpoint_is_refused(finished, damage, dqn_jax_command, tmp_path):
    shutil.copytree(finished[0], tmp_path / "damaged")
    last = tmp_path / "damaged/last.safetensors"
    last.write_bytes(last.read_bytes()[:-100]) if damage == "cut" else last.unlink()
    status, out, err = dqn_jax_command("train", "--resume", "damaged")
    assert status == 2 and out == ""
    assert "last.safetensors" in err and "Traceback" not in err


@pytest.mark.parametrize("finished", [HOST], ids=["host"], indirect=True)
@pytest.mark.parametrize(
    "words",
    [("--episodes", 0), ("--seed", 1), ("--seed", -1), ("--env", "Acrobot-v1"), ("--env", "NoSuch-v0")],
    ids=lambda words: " ".join(map(str, words)),
)
def test_eval_refuses(finished, words, dqn_jax_command):
    status, out, err = dqn_jax_command("eval", finished[0], *words)
    assert status == 2 and out == ""
    assert "error: " in err and "Traceback" not in err


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the warning is for those who compute on the CPU by mistake")
@pytest.mark.parametrize("installed", [True, False])
def test_an_unused_gpu_is_pointed_out(installed, dqn_jax_command, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/nvidia-smi" if installed and name == "nvidia-smi" else None)
    monkeypatch.setattr(Path, "exists", lambda path: False)
    _, _, err = dqn_jax_command("train", "NoSuch-v0")
    assert ("dqn_jax[cuda]" in err) is installed


@pytest.mark.parametrize(
    ("words", "choice"),
    [
        ([HOST], "inline"),
        ([HOST, "--hidden", 512, "--batch-size", 512], None),
        ([HOST, "--seeds", 4], "inline"),  # They take turns.
        (["phys2d/CartPole-v1"], "inline"),
        (["phys2d/CartPole-v1", "--seeds", 3], "inline"),  # The two cores cannot share them.
        (["phys2d/CartPole-v1", "--seeds", 127], None),
        (["phys2d/CartPole-v1", "--seeds", 128], "device per core"),
    ],
)
def test_threads_suit_the_work(words, choice, monkeypatch, tmp_path):
    chosen = []
    monkeypatch.setattr(cli, "usable_cores", lambda: 2)
    monkeypatch.setattr(cli, "compute_inline", lambda: chosen.append("inline"))
    monkeypatch.setattr(cli, "device_per_core", lambda: chosen.append("device per core"))
    monkeypatch.setattr(cli, "train", lambda task, folder, **how: {})
    cli.main([*map(str, ["train", *words, "--folder", tmp_path, "--json"])])
    assert chosen == ([] if choice is None else [choice])


def test_a_run_becomes_an_agent(finished, summary_of):
    folder, command = finished
    seed = 2 if COMPILED in command else 0
    env = gymnasium.make(HOST)
    agent = dqn_jax.load_run(folder, env, seed=seed)
    played = summary_of("eval", folder, "--episodes", 3, "--seed", seed, "--env", HOST)["returns"]
    assert [play_greedily(agent.act, env, 20_000 + seed + episode) for episode in range(3)] == played
    agent.act_and_train(env.reset(seed=0)[0], 0.0)
    assert agent.get_statistics()["replay_size"] == 0
    with pytest.raises(ValueError, match="there is no seed 3"):
        dqn_jax.load_run(folder, env, seed=3)
    with pytest.raises(FileNotFoundError, match="no run at"):
        dqn_jax.load_run(folder / "nowhere", env)
    with pytest.raises(dqn_jax.CheckpointError, match=f"(?s)trained in {command[1]}; .*does not fit this agent"):
        dqn_jax.load_run(folder, gymnasium.make("Acrobot-v1"))


def test_steps_that_end_before_learning_starts_are_refused(dqn_jax_command):
    code, _, err = dqn_jax_command("train", "CartPole-v1", "--steps", "1000")
    assert code == 2
    assert "--steps 1000 end before learning starts: ask for more than --replay-start-size 1000" in err


@pytest.mark.parametrize(("text", "value"), [("False", False), ("true", True), ("0.1", 0.1), ("word", "word")])
def test_values_of_env_args(text, value):
    assert cli._parse_env_arg(f"name={text}") == ("name", value)


# The other algorithms.

ROLLOUTS = ["--algo", "ppo", "--batch-size", 50, "--epochs", 2, "--hidden", 8, "--eval-episodes", 2, "--steps", 600]
OTHERS = {
    "ppo, host": (["CartPole-v1", *ROLLOUTS, "--rollout-length", 100], dqn_jax.PPO, "explained_variance"),
    "ppo, curious": (["CartPole-v1", *ROLLOUTS, "--rollout-length", 100, "--curiosity", "rnd"], dqn_jax.PPO, "intrinsic_reward"),
    "sac, curious": (
        ["CartPole-v1", "--algo", "sac", "--hidden", 8, *TINY[:8], "--eval-episodes", 2, "--curiosity", "snd-v"],
        dqn_jax.SAC,
        "predictor_loss",
    ),
    "ppo, compiled": (["phys2d/Pendulum-v0", *ROLLOUTS, "--rollout-length", 25, "--num-envs", 4], dqn_jax.PPO, "explained_variance"),
    "pqn, compiled": (
        ["phys2d/CartPole-v1", "--algo", "pqn", *ROLLOUTS[2:], "--rollout-length", 25, "--num-envs", 4],
        dqn_jax.PQN,
        "epsilon",
    ),
    "sac, host": (["Pendulum-v1", "--algo", "sac", "--hidden", 8, *TINY[:8], "--eval-episodes", 2], dqn_jax.SAC, "temperature"),
}


@pytest.mark.parametrize(("words", "kind", "metric"), OTHERS.values(), ids=OTHERS)
def test_another_algorithm_trains_resumes_evaluates_and_is_loaded(words, kind, metric, dqn_jax_command, summary_of):
    summary = summary_of("train", *words, "--name", "one")
    assert summary["algo"] == words[2] and summary["updates"] > 0 and summary["complete"]
    with open(Path(summary["run"]) / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert np.isfinite(float(rows[-1][metric])) and ("epsilon" in rows[-1]) == (kind is dqn_jax.PQN)
    again = summary_of("train", *words, "--name", "two")
    assert again["state_sha256"] == summary["state_sha256"]
    longer = summary_of("train", "--resume", summary["run"], "--steps", 800)
    assert longer["steps"] == 800 and longer["updates"] > summary["updates"]
    evaluated = summary_of("eval", summary["run"], "--episodes", 2)
    assert len(evaluated["returns"]) == 2
    env = gymnasium.make(words[0])
    agent = dqn_jax.load_run(summary["run"], env, num_envs=4 if "--num-envs" in words else None)
    assert type(agent) is kind and env.action_space.contains(agent.act(env.observation_space.sample()))
