"""The benchmark's loops do what their setting says, and equally much of it."""

import shutil
import subprocess

import gymnasium
import jax
import numpy as np
import pytest

from dqn_jax.bench import compiled_loops, host_loops, libtorch, loops, peers
from dqn_jax.bench.settings import DECK, PLAIN, epsilon_at, options
from dqn_jax.envs import make
from dqn_jax.options import PRESETS, dqn_options

STEPS = 400
SMALL = PLAIN._replace(hidden=(8,), batch_size=8, capacity=150, warmup=100, target_interval=50)
# When step 400 has been made and is not stored yet: the updates due at 100, 104, ... 396.
UPDATES = 75


def updates_at_the_last_step(make_loop, setting):
    seen = []
    env = loops.Clock(gymnasium.make("CartPole-v1"), {STEPS: lambda: seen.append(loop.updates())})
    loop = make_loop(env, setting, STEPS, 0)
    loop.run()
    assert loop.greedy(np.zeros(4, np.float32)) in (0, 1)
    return seen[0]


def test_the_deck_is_its_preset():
    assert options(DECK) == PRESETS["deck"]


def test_every_setting_is_a_set_of_options():
    dqn_options(**options(PLAIN))
    assert options(PLAIN)["update_interval"] == PLAIN.interval


def test_epsilon_falls_in_a_line_and_stays():
    assert [epsilon_at(DECK, step) for step in (0, 25_000, 50_000, 90_000)] == pytest.approx([0.5, 0.3, 0.1, 0.1])


@pytest.mark.parametrize("make_loop", [host_loops.ours, host_loops.numpy_replay])
def test_host_loops_make_the_same_updates(make_loop):
    assert updates_at_the_last_step(make_loop, SMALL) == UPDATES


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("package", "make_loop"),
    [("torch", peers.torch_eager), ("stable_baselines3", peers.sb3), ("stable_baselines3", peers.cleanrl_style), ("pfrl", peers.pfrl)],
)
def test_loops_of_other_packages_make_the_same_updates(package, make_loop):
    pytest.importorskip(package)
    assert updates_at_the_last_step(make_loop, SMALL) == UPDATES


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("package", "make_loop"), [("torch", peers.torch_eager), ("pfrl", peers.pfrl)])
def test_n_steps_and_double_change_no_count(package, make_loop):
    pytest.importorskip(package)
    # PFRL counts windows that are complete: by 102 there are a hundred of them.
    assert UPDATES - updates_at_the_last_step(make_loop, SMALL._replace(n_steps=3, double=True)) == (package == "pfrl")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["ours", "purejaxrl-style", "rejax"])
def test_compiled_loops_make_the_same_updates(name):
    if name in loops.NEEDS:
        pytest.importorskip(loops.NEEDS[name])
    env = make("phys2d/CartPole-v1", polemass_length=0.05)
    steps = compiled_loops.compiled_steps(env, SMALL, STEPS)
    outcome = jax.jit(loops.COMPILED[name](env, SMALL, steps))(jax.random.key(0))
    assert int(outcome.steps) == steps
    assert int(outcome.updates) == (steps - 100) // 4 + 1


@pytest.mark.parametrize("make_loop", [host_loops.numpy_replay, peers.cleanrl_style])
def test_host_loops_refuse_what_they_cannot_do(make_loop):
    if make_loop is peers.cleanrl_style:
        pytest.importorskip("stable_baselines3")
    for setting in (DECK, PLAIN._replace(double=True)):
        with pytest.raises(ValueError, match="one-step targets"):
            make_loop(gymnasium.make("CartPole-v1"), setting, STEPS, 0)


def test_compiled_loops_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match="one-step targets"):
        compiled_loops.purejaxrl_style(make("phys2d/CartPole-v1"), DECK, STEPS)
    pytest.importorskip("rejax")
    with pytest.raises(ValueError, match="one-step returns"):
        peers.rejax(make("phys2d/CartPole-v1"), DECK, STEPS)


def test_sb3_refuses_double():
    pytest.importorskip("stable_baselines3")
    with pytest.raises(ValueError, match="Double DQN"):
        peers.sb3(gymnasium.make("CartPole-v1"), PLAIN._replace(double=True), STEPS, 0)


@pytest.mark.parametrize("n_steps", [1, 3])
def test_windows_stop_at_an_episodes_end_and_at_the_newest_row(n_steps):
    setting = SMALL._replace(n_steps=n_steps, capacity=7, batch_size=64, gamma=0.5)
    replay, rng = peers.WindowReplay(setting, 0), np.random.default_rng(1)
    made = []
    for number in range(40):
        reward, terminated, truncated = float(rng.normal()), rng.random() < 0.15, rng.random() < 0.15
        row = (np.full(4, number, np.float32), number, reward, np.full(4, number + 0.5, np.float32), terminated, terminated or truncated)
        replay.add(*row)
        made.append(row)
        for observation, action, total, discount, successor in zip(*replay.sample(), strict=True):
            begin = int(action)
            window = made[begin : begin + n_steps]
            ends = [i for i, row in enumerate(window) if row[5]]
            window = window[: ends[0] + 1] if ends else window
            assert number - begin < 7 and observation[0] == begin
            assert total == pytest.approx(sum(0.5**i * row[2] for i, row in enumerate(window)), abs=1e-5)
            assert discount == (0.0 if window[-1][4] else 0.5 ** len(window))
            assert successor[0] == window[-1][3][0]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    pytest.importorskip("torch")
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    folder = tmp_path_factory.mktemp("libtorch")
    binary = libtorch.build(folder)
    assert libtorch.build(folder) == binary and len(list(folder.iterdir())) == 1
    return binary


def trace(program, state, actions):
    text = " ".join(map(repr, [*map(float, state), *actions]))
    done = subprocess.run([str(program), "--trace"], input=text, capture_output=True, text=True, check=True)
    rows = np.array([line.split() for line in done.stdout.splitlines()], float)
    return rows[:, :4], rows[:, 4:].astype(bool)


@pytest.mark.parametrize("is_balanced", [True, False])
def test_the_programs_environment_is_gymnasiums(program, is_balanced):
    env = gymnasium.make("CartPole-v1")
    observation, _ = env.reset(seed=3)
    state = env.unwrapped.state
    actions, observations, endings = [], [], [(False, False)]
    while not any(endings[-1]):
        x, x_dot, theta, theta_dot = observation
        actions.append(int(0.1 * x + 0.2 * x_dot + theta + 0.5 * theta_dot > 0) if is_balanced else 1)
        observation, _, terminated, truncated, _ = env.step(actions[-1])
        observations.append(observation)
        endings.append((terminated, truncated))
    assert len(actions) == 500 if is_balanced else len(actions) < 20
    found, found_endings = trace(program, state, actions)
    np.testing.assert_allclose(found, observations, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(found_endings, endings[1:])


@pytest.mark.parametrize("setting", [SMALL, SMALL._replace(n_steps=3, double=True)])
def test_the_program_makes_the_same_updates(program, setting):
    result = libtorch.run(program, setting, STEPS, 200, 0)
    assert result["updates"] == 50
    assert result["steps_per_second"] > 0 and result["cpu_us_per_step"] > 0 and len(result["returns"]) == 20
    assert list(result["memory_mib"]) == ["start", "built", "first_update", "end"]
    for quantity in ("act", "step", "step_with_update", "update"):
        quantiles = result["latency_us"][quantity]
        assert 0 < quantiles["p50"] <= quantiles["p95"] <= quantiles["p99"]


def test_where_every_step_learns_there_is_no_quiet_step(program):
    assert libtorch.run(program, SMALL._replace(interval=1), STEPS, 200, 0)["latency_us"]["step"] is None


def test_the_program_says_what_it_misses(program):
    done = subprocess.run([str(program), "--hidden", "8"], capture_output=True, text=True)
    assert done.returncode == 2 and "--epsilon is missing" in done.stderr
    with pytest.raises(ValueError, match="window"):
        libtorch.run(program, SMALL, 100, 100, 0)


def test_what_cannot_be_built_says_why(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    source = tmp_path / "broken.cpp"
    source.write_text("int main() { return nothing; }")
    if shutil.which("g++") is not None:
        with pytest.raises(RuntimeError, match=r"could not build broken.cpp(.|\n)*nothing"):
            libtorch.build(tmp_path / "built", source)
        assert not list((tmp_path / "built").iterdir())
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match=r"no g\+\+"):
        libtorch.build(tmp_path, source)


def test_without_torch_there_is_no_program(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install torch"):
        libtorch.build(tmp_path)
