"""The benchmark's loops do what their setting says, and equally much of it."""

import dataclasses
import shutil
import subprocess

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probe_envs import images

from dqn_jax import networks
from dqn_jax.bench import compiled_loops, host_loops, libtorch, loops, one_loop, peers, torch_loops
from dqn_jax.bench.settings import DECK, PLAIN, PLAIN_IMAGES, epsilon_at, options, require_plain_targets
from dqn_jax.envs import make
from dqn_jax.presets.dqn import dqn, dqn_options
from dqn_jax.presets.dqn_sets import PRESETS

STEPS = 400
SMALL = PLAIN._replace(hidden=(8,), batch_size=8, capacity=150, warmup=100, target_interval=50)
# When step 400 has been made and is not stored yet: the updates due at 100, 104, ... 396.
UPDATES = 75


def updates_at_the_last_step(make_loop, setting):
    seen = []
    env = one_loop.Clock(gymnasium.make("CartPole-v1"), {STEPS: lambda: seen.append(loop.updates())})
    loop = host_loops.HostLoop(*make_loop(env, setting, STEPS, 0))
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


def test_epsilon_without_jax_is_the_same():
    for step in (0, 25_000, 50_000, 90_000):
        assert torch_loops.epsilon_at(DECK, step) == epsilon_at(DECK, step)


@pytest.mark.parametrize("make_loop", [host_loops.ours, host_loops.numpy_replay])
def test_host_loops_make_the_same_updates(make_loop):
    assert updates_at_the_last_step(make_loop, SMALL) == UPDATES


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("package", "make_loop"),
    [
        ("torch", torch_loops.torch_eager),
        ("stable_baselines3", torch_loops.sb3),
        ("stable_baselines3", peers.cleanrl_style),
        ("pfrl", torch_loops.pfrl),
    ],
)
def test_loops_of_other_packages_make_the_same_updates(package, make_loop):
    pytest.importorskip(package)
    assert updates_at_the_last_step(make_loop, SMALL) == UPDATES


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("package", "make_loop"), [("torch", torch_loops.torch_eager), ("pfrl", torch_loops.pfrl)])
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
    outcome = jax.jit(one_loop.COMPILED[name](env, SMALL, steps))(jax.random.key(0))
    assert int(outcome.steps) == steps
    assert int(outcome.updates) == (steps - 100) // 4 + 1


def test_others_convolutions_are_ours():
    env, setting = images(None), PLAIN_IMAGES
    network = compiled_loops.ordinary_network(env, setting)
    observation = jax.random.bernoulli(jax.random.key(0), 0.5, (5, 10, 10, 4))
    params = network.init(jax.random.key(1), observation)
    ours = compiled_loops.our_network(env, setting)
    assert isinstance(network, compiled_loops.FlaxQNetwork) and ours.convolutions == networks.MINATAR
    np.testing.assert_allclose(network.apply(params, observation), ours.apply(params, observation), rtol=1e-4, atol=1e-5)
    state = dqn(env, **options(setting._replace(warmup=32, capacity=64))).init(jax.random.key(1), observation[:1])
    assert jax.tree.map(jnp.shape, state.learner.params) == jax.tree.map(jnp.shape, params)


@pytest.mark.parametrize("time_limit", [None, 20])
def test_compiled_loops_of_images_make_the_same_updates_and_are_evaluated(monkeypatch, time_limit):
    monkeypatch.setattr(compiled_loops, "MOST_STEPS", 30)
    env = images(time_limit)
    setting = PLAIN_IMAGES._replace(hidden=(8,), batch_size=8, warmup=40, capacity=64)
    for make_loop in (compiled_loops.ours, compiled_loops.purejaxrl_style):
        outcome = jax.jit(make_loop(env, setting, 80))(jax.random.key(0))
        assert (int(outcome.steps), int(outcome.updates)) == (80, 11)
        returns = compiled_loops.greedy_returns(env, setting, outcome.params, jax.random.key(1), 4)
        np.testing.assert_array_equal(returns, np.full(4, time_limit or 30))  # A step pays 1, and nothing else ends an episode.


def test_the_plain_settings_are_plain():
    preset = PRESETS["minatar"]
    assert PLAIN_IMAGES._replace(hidden=(), n_steps=0) == PLAIN._replace(
        hidden=(), n_steps=0, **{name: preset[name] for name in ("batch_size", "capacity", "epsilon")}, warmup=5_000, target_interval=1_000
    )
    for setting in (PLAIN, PLAIN_IMAGES):
        require_plain_targets(setting, "anybody")


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
        torch_loops.sb3(gymnasium.make("CartPole-v1"), PLAIN._replace(double=True), STEPS, 0)


@pytest.mark.parametrize("n_steps", [1, 3])
def test_windows_stop_at_an_episodes_end_and_at_the_newest_row(n_steps):
    setting = SMALL._replace(n_steps=n_steps, capacity=7, batch_size=64, gamma=0.5)
    replay, rng = torch_loops.WindowReplay(setting, 0), np.random.default_rng(1)
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


def test_a_piece_of_work_names_its_setting_and_its_window():
    deck, plain, *_ = loops.FULL
    assert deck.setting == DECK and plain.setting == PLAIN
    assert loops.SHORT[0].setting == DECK
    assert deck.title == "host loop, the deck's setting, an update every 8 steps, steps 2,000 to 12,000"
    late = one_loop.Work("host", 1, 30_000, begin=20_000)
    assert late in loops.FULL and late.setting == PLAIN._replace(interval=1)
    assert late.title == "host loop, the plain setting, an update every 1 steps, steps 20,000 to 30,000, after exploration"
    assert one_loop.Work("compiled", 4, 20_000, 16).title.endswith("16 seeds, 20,000 steps each")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["ours", "torch", "sb3", "pfrl"])
def test_in_the_decks_window_all_make_the_same_updates(name):
    if name in loops.NEEDS:
        pytest.importorskip(loops.NEEDS[name])
    result = one_loop.measure_host(name, one_loop.Work("host", DECK.interval, 360, begin=200, deck=True), 0, evaluate=False)
    assert result["updates"] == 20 and result["steps_per_second"] > 0


def test_who_cannot_do_a_setting_is_left_out_and_said_so(capsys):
    deck, plain = one_loop.Work("host", 8, 4_000, deck=True), one_loop.Work("host", 8, 4_000)
    assert all(loops.able(name, plain) for name in [*one_loop.HOST, one_loop.LIBTORCH])
    assert capsys.readouterr().out == ""
    assert [name for name in loops.CONTENDERS if loops.able(name, deck)] == ["ours", "torch", "sb3", "pfrl", "libtorch"]
    said = capsys.readouterr().out.splitlines()
    assert [line.removeprefix(f"{deck.title}: ") for line in said] == [
        f"{name} is left out: it has no n-step returns" for name in ("cleanrl-style", "numpy-replay")
    ]
    assert [name for name in loops.CONTENDERS if loops.able(name, one_loop.Work("compiled", 4, 5_000, 16))] == ["ours", "purejaxrl-style"]
    assert not loops.able("rejax", one_loop.Work("compiled", 4, 5_000, deck=True))


@pytest.mark.parametrize(("name", "what"), [(name, what) for name, lacking in loops.LACKS.items() for what in lacking])
def test_what_a_contender_lacks_its_loop_refuses(name, what):
    if name in loops.NEEDS:
        pytest.importorskip(loops.NEEDS[name])
    setting = {loops.N_STEPS: SMALL._replace(n_steps=3), loops.DOUBLE: SMALL._replace(double=True)}[what]
    with pytest.raises(ValueError, match=r"one-step|Double DQN"):
        if name in one_loop.HOST:
            one_loop.HOST[name](gymnasium.make("CartPole-v1"), setting, STEPS, 0)
        else:
            one_loop.COMPILED[name](make("phys2d/CartPole-v1"), setting, STEPS)


def test_contenders_are_chosen_by_name(monkeypatch, capsys):
    assert loops.chosen(("numpy-replay", "ours")) == ["ours", "numpy-replay"]
    with pytest.raises(ValueError, match=r"no contender numpy, sb4: --only takes ours, cleanrl-style, .*libtorch, purejaxrl-style, rejax"):
        loops.chosen(("numpy", "ours", "sb4"))
    assert capsys.readouterr().out == ""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert loops.chosen(()) == ["ours", "numpy-replay", "purejaxrl-style"]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 6 and "sb3 is skipped: stable_baselines3 is not installed" in said
    assert "libtorch is skipped: torch is not installed" in said


def test_every_other_round_goes_backwards_and_who_fails_is_left_out(monkeypatch):
    asked = []

    def apart(name, work, seed, evaluate=False):
        asked.append(name)
        if name == "torch" and len(asked) > 3:
            raise RuntimeError("torch failed on its second run")
        return {"steps_per_second": 2.0, "cpu_us_per_step": 1.0, "others_cores": None, "updates": 5, "returns": [1.0]}

    monkeypatch.setattr(loops, "apart", apart)
    names = ["ours, inline", "ours", "torch"]
    found = loops.measure(one_loop.Work("host", 4, 4_000), names, 3, 9_000, {})
    assert asked == [*names, *names[::-1], *names[:2], "ours, inline"]  # The last one shows that it learns.
    assert found["failed"] == {"torch": "torch failed on its second run"}
    assert [line["contender"] for line in found["summary"]] == names[:2] and len(found["measurements"]) == 6
    with pytest.raises(RuntimeError, match="nobody could do it\ntorch failed"):
        loops.measure(one_loop.Work("host", 4, 4_000), ["torch"], 1, 9_000, {})


def test_ways_to_compute_are_told_by_the_names():
    one, many = one_loop.Work("compiled", 4, 5_000), one_loop.Work("compiled", 4, 5_000, 16)
    assert loops.in_each_way(["ours", "torch"], one, is_cpu=True) == ["ours, inline", "ours", "torch"]
    assert loops.in_each_way(["ours"], many, is_cpu=True) == ["ours, a device per core", "ours, inline", "ours"]
    assert loops.in_each_way(["ours"], many, is_cpu=False) == ["ours"]
    names = loops.in_each_way(["ours", "cleanrl-style"], many, is_cpu=True)
    assert [one_loop.without_way(name) for name in names] == [(who, way) for who in ("ours", "cleanrl-style") for way in one_loop.SET_UP]


def test_windows_of_one_setting_share_the_learning_runs(monkeypatch):
    asked = []

    def apart(name, work, seed, evaluate=False):
        asked.append((name, work.steps, evaluate))
        return {"steps_per_second": 2.0, "cpu_us_per_step": 1.0, "others_cores": None, "updates": 5, "returns": [float(len(asked))]}

    monkeypatch.setattr(loops, "apart", apart)
    learnt = {}
    names = ["ours, inline", "ours", "torch"]
    early, late = one_loop.Work("host", 4, 4_000), one_loop.Work("host", 4, 6_000, begin=5_000)
    first = loops.measure(early, names, 1, 9_000, learnt)
    assert asked == [(name, 4_000, False) for name in names] + [("ours, inline", 9_000, True), ("torch", 9_000, True)]
    asked.clear()
    second = loops.measure(late, names, 1, 9_000, learnt)
    assert asked == [(name, 6_000, False) for name in names]
    assert [line["return_mean"] for line in second["summary"]] == [line["return_mean"] for line in first["summary"]] == [4.0, 4.0, 5.0]
    loops.measure(dataclasses.replace(late, interval=1), names, 1, 9_000, learnt)
    assert [name for name, _, evaluate in asked if evaluate] == ["ours, inline", "torch"]
    assert "ours, times as fast" in loops.table(first)
