"""Atari through ale-py: true successors, what the image replay keeps, which rewards are learnt and which reported, the command line."""

import csv
import json
import sys

import gymnasium
import jax
import numpy as np
import pytest

import dqn_jax
from dqn_jax import atari, cli
from dqn_jax import play as play_loops
from dqn_jax.bench import atari as bench
from dqn_jax.footprint import num_bytes
from dqn_jax.presets.replay import storage_of

ale_py = pytest.importorskip("ale_py")

SAME_STEP = gymnasium.vector.AutoresetMode.SAME_STEP
TINY = {"img_height": 20, "img_width": 20}
SMALL = {"encoder": "flat", "hidden": (8,), "batch_size": 4, "update_interval": 3}


def play(envs, rows, seed=0):
    """Random play: yields the observation acted on, and what ``step`` returned."""
    random = np.random.default_rng(seed)
    observation, _ = envs.reset(seed=seed)
    for _ in range(rows):
        step = envs.step(random.integers(0, envs.single_action_space.n, envs.num_envs))
        yield observation, step
        observation = step[0]


# Episodes and their ends.


def test_true_successors():
    seen = {"terminated": 0, "apart": 0}
    for before, (observation, _, terminated, truncated, infos) in play(atari.make_vec("ALE/Breakout-v5", 3, noop_max=1), 450):
        ended = terminated | truncated
        kept = observation.copy()
        successor = dqn_jax.true_successors(observation, infos, ended)
        np.testing.assert_array_equal(observation, kept)
        np.testing.assert_array_equal(successor[:, :-1], before[:, 1:])
        np.testing.assert_array_equal(successor[~ended], observation[~ended])
        assert not observation[ended, :-1].any() and observation[ended, -1].any(axis=(1, 2)).all()  # A stack begins with black frames.
        seen["terminated"] += terminated.sum()
        seen["apart"] += 0 < ended.sum() < 3
        if ended.any():
            with pytest.raises(ValueError, match="do not say which environments ended"):
                dqn_jax.true_successors(observation, infos)
    assert seen["terminated"] >= 5 and seen["apart"] >= 3


def test_the_settings_are_those_of_version_5():
    spec = atari.make_vec("ALE/Pong-v5", 2).spec
    assert spec.kwargs["repeat_action_probability"] == 0.25 and spec.kwargs["frameskip"] == 4
    assert spec.kwargs["max_num_frames_per_episode"] == 108_000
    changed = atari.make_vec("ALE/Pong-v5", 2, repeat_action_probability=0.0, img_height=36, img_width=36, stack_num=2)
    assert changed.spec.kwargs["repeat_action_probability"] == 0.0
    assert changed.reset()[0].shape == (2, 2, 36, 36)


def test_the_time_limit_counts_frames_and_truncates():
    for length, (_, (_, _, terminated, truncated, _)) in enumerate(
        play(atari.make_vec("ALE/Pong-v5", 2, max_num_frames_per_episode=80), 60), 1
    ):
        assert not terminated.any()
        assert truncated.tolist() == [length % 20 == 0] * 2


def test_threads_do_not_change_what_is_played():
    one, many = (play(atari.make_vec("ALE/Breakout-v5", 4, num_threads=threads, **TINY), 200) for threads in (1, 4))
    ends = 0
    for (_, (first, rewards, *_)), (_, (second, same, terminated, *_)) in zip(one, many, strict=True):
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(rewards, same)
        ends += terminated.sum()
    assert ends >= 2


def test_one_game_is_the_vector_of_one():
    one, several = (make("ALE/Breakout-v5", *n, max_num_frames_per_episode=120) for make, n in ((atari.make, ()), (atari.make_vec, (1,))))
    assert one.reset(seed=2**32 - 1)[0].shape == (4, 84, 84)  # A seed as Gymnasium allows it.
    observation, _ = one.reset(seed=5)
    following, _ = several.reset(seed=5)
    np.testing.assert_array_equal(observation, following[0])
    random, ends = np.random.default_rng(1), 0
    for _ in range(100):
        action = int(random.integers(4))
        observation, reward, terminated, truncated, info = one.step(action)
        following, rewards, terminations, truncations, infos = several.step(np.array([action]))
        ended = terminations | truncations
        np.testing.assert_array_equal(observation, dqn_jax.true_successors(following, infos, ended)[0])
        assert (reward, terminated, truncated) == (rewards[0], terminations[0], truncations[0])
        assert info["lives"] == infos["lives"][0]
        if terminated or truncated:
            ends += 1
            np.testing.assert_array_equal(one.reset()[0], following[0])
    assert ends == 3
    observation, info = one.reset()  # In the middle of an episode.
    assert info["episode_frame_number"] < 31 and not observation[:-1].any()


def test_pictures_are_what_the_agent_sees_and_take_no_memory_of_their_own():
    env = atari.make("ALE/Pong-v5", render_mode="rgb_array")
    observation, _ = env.reset(seed=0)
    picture = env.render()
    assert picture.shape == (84, 84, 3) and picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, np.stack([observation[-1]] * 3, axis=-1))
    assert np.shares_memory(picture, observation)  # Whoever records keeps the frames of an episode, up to 27,000.


# What an agent keeps and learns from.


class Spy:
    """Hands everything to an agent, or where there is none acts at random, and notes what it was told."""

    def __init__(self, num_actions, agent=None):
        self.agent, self.random, self.num_actions = agent, np.random.default_rng(0), num_actions
        self.rewards, self.seen = [], []

    def batch_act_and_train(self, observation, reward=None, terminated=None, truncated=None, successor=None):
        self.rewards.append(reward)
        self.seen.append((observation.copy(), successor, terminated, truncated))
        if self.agent is None:
            return self.random.integers(0, self.num_actions, len(observation))
        return self.agent.batch_act_and_train(observation, reward, terminated, truncated, successor)

    def act_and_train(self, observation, reward):
        self.rewards.append(reward)
        return int(self.random.integers(self.num_actions))

    def stop_episode_and_train(self, observation, reward, terminated):
        self.rewards.append(reward)


def test_the_image_replay_keeps_what_was_acted_on():
    envs = ale_py.AtariVectorEnv("breakout", 3, autoreset_mode=SAME_STEP, max_num_frames_per_episode=720, **TINY)
    options = {**SMALL, "frames": "stack_first", "capacity": 3_000, "replay_start_size": 300, "n_steps": 1}
    agent = dqn_jax.DQN(envs, **options)
    spy = Spy(4, agent)
    loop = play_loops.PlayBatch(spy, envs, 3, lambda reward: reward)
    ended = [len(loop.step()) for _ in range(400)]
    assert sum(ended) >= 5 and 1 in ended, "episodes must end, some of them alone"
    assert agent.get_statistics()["n_updates"] > 100
    storage, memory = storage_of(dqn_jax.DQNOptions(**options), envs.single_observation_space), agent.state.memory
    assert memory.sizes.tolist() == [400] * 3
    numbers = np.arange(3 * 400).reshape(3, 400)  # One environment after the other, the oldest first.
    windows = jax.jit(lambda state, number: storage.window(state, storage.slot(state, number)))
    for column in range(3):
        window = jax.device_get(windows(memory, numbers[column]))
        for row, ((observation, *_), (_, successor, terminated, truncated)) in enumerate(zip(spy.seen, spy.seen[1:], strict=False)):
            np.testing.assert_array_equal(window.observation[row], observation[column])
            np.testing.assert_array_equal(window.next_observation[row], successor[column])
            assert window.discount[row, 0] == 1 - terminated[column]
            assert window.last[row, 0] == (terminated | truncated)[column] or row == 399  # A window ends at the write head, too.


@pytest.mark.parametrize("num_envs", [1, 2])
@pytest.mark.parametrize("clipped", [True, False])
def test_rewards_are_clipped_for_the_agent_and_returns_are_scores(num_envs, clipped):
    env_args = {"max_num_frames_per_episode": 240, "reward_clipping": clipped}
    if num_envs == 1:
        env, loop = atari.make("ALE/Carnival-v5", **env_args), play_loops.Play
        spy = Spy(env.action_space.n)
    else:
        env, loop = atari.make_vec("ALE/Carnival-v5", num_envs, **env_args), play_loops.PlayBatch
        spy = Spy(env.single_action_space.n)
    playing = loop(spy, env, 0, atari.learnt_reward(env_args))
    returns = [score for _ in range(121) for score, _ in playing.step()]
    assert len(returns) == 2 * num_envs
    learnt = np.concatenate([np.ravel(reward) for reward in spy.rewards if reward is not None])
    assert max(returns) >= 20, "what is shot pays 20 points or more"
    assert learnt.max() == 1 if clipped else learnt.sum() >= sum(returns)


def test_the_preset_fits_a_stack_of_frames():
    space = atari.make_vec("ALE/Pong-v5", 1).single_observation_space
    agent = dqn_jax.dqn((space, gymnasium.spaces.Discrete(6)), **dqn_jax.PRESETS["atari"])
    state = jax.eval_shape(agent.init, jax.random.key(0), jax.ShapeDtypeStruct((8, *space.shape), space.dtype))
    assert state.memory.frames.shape == (25_000, 8, 84, 84)
    assert num_bytes(state) < 1.5e9


# The command line.


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs the console script in an empty folder; returns its exit status, the object that it printed, and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        capsys.readouterr()
        try:
            cli.main([*map(str, words), "--json"])
            status = 0
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, json.loads(out.splitlines()[-1]) if out else None, err

    return run


TRAIN = ["--encoder", "flat", "--hidden", 8, "--steps", 400, "--eval-episodes", 1]
for argument in ("img_height=20", "img_width=20", "max_num_frames_per_episode=120"):
    TRAIN += ["--env-arg", argument]
ALGORITHMS = {
    "dqn, 8 games": ["--preset", "atari", "--num-envs", 8, "--capacity", 2_000, "--replay-start-size", 200],
    "ppo, 1 game": ["--algo", "ppo", "--rollout-length", 100, "--batch-size", 50, "--epochs", 1],
}


def noting(method, told):
    """The method, which also notes the highest reward that it is told."""

    def noted(agent, observation, *outcome):
        told.append(np.max(outcome[0]) if outcome else 0.0)
        return method(agent, observation, *outcome)

    return noted


@pytest.mark.parametrize("words", ALGORITHMS.values(), ids=ALGORITHMS)
def test_a_run_trains_resumes_evaluates_and_is_loaded(words, command, monkeypatch):
    told = []
    for name in ("act_and_train", "batch_act_and_train"):
        monkeypatch.setattr(dqn_jax.OnlineAgent, name, noting(getattr(dqn_jax.OnlineAgent, name), told))
    status, summary, err = command("train", "ALE/Carnival-v5", *words, *TRAIN, "--name", "one")
    assert status == 0, err
    assert summary["complete"] and summary["steps"] == 400 and summary["updates"] > 0
    status, longer, err = command("train", "--resume", "runs/one", "--steps", 1200)
    assert status == 0, err
    assert longer["steps"] == 1200 and longer["updates"] > summary["updates"]
    with open("runs/one/metrics.csv", newline="") as file:
        ended = [row for row in csv.DictReader(file) if float(row["episodes"])]
    assert {float(row["length"]) for row in ended} == {30}
    scores = [float(row["return"]) * float(row["episodes"]) for row in ended]
    assert max(scores) > 0 and all(score % 10 == 0 for score in scores)  # What is shot pays 20 points or more,
    assert max(told) == 1  # of which the agent learns no more than 1.
    status, played, err = command("eval", "runs/one", "--episodes", 2)
    assert status == 0, err
    assert len(played["returns"]) == 2 and all(score % 10 == 0 for score in played["returns"])
    envs = ale_py.AtariVectorEnv("carnival", 2, autoreset_mode=SAME_STEP, **TINY)
    agent = dqn_jax.load_run("runs/one", envs)
    assert envs.action_space.contains(np.asarray(agent.batch_act(envs.reset(seed=0)[0]), np.int64))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ALE/Pnog-v5"], "Did you mean: `Pong`"),
        (
            ["PongNoFrameskip-v4"],
            "PongNoFrameskip-v4 is not preprocessed as agents need it (small grey pictures, in stacks): take ALE/Pong-v5",
        ),
        (["SpaceInvaders-v0"], "take ALE/SpaceInvaders-v5"),
        (["ALE/Pong-v5", "--env-arg", "batch_size=3"], "ALE/Pong-v5 does not take batch_size: all games step together"),
        (["ALE/Pong-v5", "--env-arg", "life_loss_info=true"], "no true successor where a life is lost; episodic_life=true"),
        (["ALE/Pong-v5", "--env-arg", "game=breakout"], "ALE/Pong-v5 does not take game: the id names it"),
        (["ALE/Pong-v5", "--env-arg", "grayscale=false"], "no network here takes stacks of colour pictures"),
        (["ALE/Pong-v5", "--env-arg", "stack_num=0"], "stack_num must be a whole number of at least 1, got 0"),
        (["ALE/Pong-v5", "--env-arg", "reward_clipping=no"], "reward_clipping must be true or false, got 'no'"),
        (["ALE/Pong-v5", "--env-arg", "repeat_action_probability=7"], "repeat_action_probability must be in [0, 1], got 7"),
        (["ALE/Pong-v5", "--env-arg", "stickiness=0"], "unexpected keyword argument 'stickiness'"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(words, message, command):
    gymnasium.register_envs(ale_py)  # From then on Gymnasium knows the old ids, too.
    status, _, err = command("train", *words)
    assert status == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line and "Traceback" not in err


def test_ale_py_missing_is_said(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "ale_py", None)
    status, _, err = command("train", "ALE/Pong-v5")
    assert status == 2
    assert "error: ALE/Pong-v5 needs ale-py: pip install 'dqn_jax[atari]'" in err


def test_a_window_is_refused():
    with pytest.raises(ValueError, match="cannot be shown in a window, render_mode='human'"):
        atari.make("ALE/Pong-v5", render_mode="human")


@pytest.mark.parametrize(("words", "inline"), [([], False), (["--encoder", "flat", "--frames", "stack_first"], True)])
def test_convolutions_get_all_threads(words, inline, monkeypatch, tmp_path):
    chosen = []
    monkeypatch.setattr(cli, "compute_inline", lambda: chosen.append("inline"))
    monkeypatch.setattr(cli, "train", lambda task, folder, **how: {})
    cli.main([*map(str, ["train", "ALE/Pong-v5", *words, "--folder", tmp_path, "--json"])])
    assert chosen == ["inline"] * inline


def test_the_benchmark_measures_three_things():
    envs = atari.make_vec("ALE/Pong-v5", 3, **TINY)
    agent = dqn_jax.DQN(envs, **SMALL, frames="stack_first", capacity=1_000, replay_start_size=6)
    measured = bench.measure(agent, envs, 3, 2)
    assert set(measured) == {"overlapped", "waited", "games alone"}
    assert all(0 < kind["min"] <= kind["max"] for kind in measured.values())
    assert agent.get_statistics()["t"] >= 3 * (32 + 2 * 2 * 2)
