"""The state of environments as data: what is read goes on as if it had never stopped, and what cannot be read is named."""

import collections
import dataclasses
import enum
import functools
import json
import random

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from dqn_jax import env_state
from dqn_jax.env_state import NotCapturable
from dqn_jax.runs import HostRuns, Task

SAME_STEP = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}


def in_another(made, env):
    """A new environment that stands where ``env`` does, by way of a file."""
    captured = json.loads(json.dumps(env_state.capture(env)))
    other = made()
    other.reset(seed=99)
    env_state.restore(other, captured)
    return other


def walk(env, actions):
    seen = []
    for action in actions:
        observation, reward, terminated, truncated, _ = env.step(action)
        seen.append((np.array(observation), np.array(reward), np.array(terminated), np.array(truncated)))
        if np.ndim(terminated) == 0 and (terminated or truncated):
            seen.append((np.array(env.reset()[0]),))
    return seen


def sync():
    return gymnasium.make_vec("CartPole-v1", 3, vectorization_mode="sync", vector_kwargs=SAME_STEP)


def stacked():
    return gymnasium.wrappers.FrameStackObservation(gymnasium.wrappers.NormalizeObservation(gymnasium.make("CartPole-v1")), 3)


MADE = {
    name: functools.partial(gymnasium.make, name) for name in ("CartPole-v1", "Acrobot-v1", "Pendulum-v1", "FrozenLake-v1", "Blackjack-v1")
}
MADE |= {"sync": sync, "stacked": stacked}


@pytest.mark.parametrize("name", MADE)
def test_an_environment_goes_on(name):
    env = MADE[name]()
    env.reset(seed=3)
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(80)]
    walk(env, actions[:37])
    other = in_another(MADE[name], env)
    for one, same in zip(walk(env, actions[37:]), walk(other, actions[37:]), strict=True):
        for left, right in zip(one, same, strict=True):
            np.testing.assert_array_equal(left, right)


# Environments as people write them.


class Phase(enum.Enum):
    CLIMB = 1
    LAND = 2


@dataclasses.dataclass(frozen=True)
class Weather:
    wind: float


class Enemy:
    def __init__(self, place):
        self.place = place


class Written(gymnasium.Env):
    """Holds ``thing``, which ``make`` gives, and changes it by ``change``."""

    observation_space, action_space = spaces.Box(-1e9, 1e9, (1,)), spaces.Discrete(2)

    def __init__(self, make, change):
        self.thing, self.change = make(), change

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.change(self)
        return np.zeros(1, np.float32), 0.0, False, False, {}


def itself():
    ring = [1]
    ring.append(ring)
    return ring


def counted(env):
    env.thing["seen"] += 1


def blown(env):
    object.__setattr__(env.thing, "wind", env.thing.wind + 1)


def drawn(env):
    env.number = env.thing.random()


KEPT = {
    "a defaultdict": (lambda: collections.defaultdict(int), counted, lambda env: env.thing["new"] + env.thing["seen"]),
    "an OrderedDict": (
        lambda: collections.OrderedDict(a=1, b=2),
        lambda env: env.thing.update(c=3),
        lambda env: (env.thing.move_to_end("a"), list(env.thing.items())),
    ),
    "a deque": (lambda: collections.deque([1.0], maxlen=3), lambda env: env.thing.append(2.0), lambda env: (env.thing.maxlen, *env.thing)),
    "a frozen dataclass": (lambda: Weather(0.0), blown, lambda env: env.thing.wind),
    "a list that holds itself": (
        itself,
        lambda env: env.thing.insert(0, 2),
        lambda env: (len(env.thing), env.thing[0], env.thing[-1] is env.thing),
    ),
    "an enum": (lambda: Phase.CLIMB, lambda env: setattr(env, "thing", Phase.LAND), lambda env: env.thing),
    "Python's random": (lambda: random.Random(0), drawn, lambda env: env.thing.random()),
    "NumPy's random": (lambda: np.random.default_rng(0), drawn, lambda env: env.thing.random()),
    "objects": (
        lambda: [Enemy(0), Enemy(5)],
        lambda env: setattr(env.thing[0], "place", 7),
        lambda env: [each.place for each in env.thing],
    ),
    "a simulated clock": (lambda: None, lambda env: setattr(env, "clock", getattr(env, "clock", 0) + 1), lambda env: env.clock),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept(name):
    make, change, show = KEPT[name]
    env = Written(make, change)
    env.reset(seed=0)
    for _ in range(3):
        env.step(0)
    before = show(Written(make, change)) if name != "a simulated clock" else None
    other = in_another(lambda: Written(make, change), env)
    shown = show(env)
    assert show(other) == shown and shown != before


def views():
    state = np.zeros(4)
    return [state, state[:2]]


REFUSED = {
    "memory of C": (lambda: memoryview(b""), "Written.thing is a memoryview"),
    "slots": (lambda: type("Slotted", (), {"__slots__": ("hidden", "__dict__")})(), "Written.thing is a Slotted"),
    "a kind of random.Random": (lambda: type("Dice", (random.Random,), {})(0), "Written.thing is a Dice"),
    "another generator": (lambda: np.random.Generator(np.random.MT19937(0)), "Written.thing is a Generator"),
    "keys of an enum": (lambda: {Phase.LAND: 1}, "Written.thing is a dict whose keys"),
    "two views": (views, r"Written.thing\[1\] shares memory"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_named(name):
    make, said = REFUSED[name]
    env = Written(make, lambda env: None)
    env.reset(seed=0)
    with pytest.raises(NotCapturable, match=said):
        env_state.capture(env)


def test_a_window_is_passed_over_and_what_follows_it_is_not():
    env = Written(dict, counted)
    shared, numbers = [1], np.arange(3)
    env.screen, env.later = [shared, numbers, memoryview(b"")], [shared, numbers]  # The first two are written before the third cannot be.
    other = in_another(lambda: env, env)
    assert other.later[0] == [1] and other.later[1].tolist() == [0, 1, 2]


def test_code_that_was_another_is_noticed():
    env = Written(lambda: min, lambda env: None)
    captured = env_state.capture(env)
    with pytest.raises(ValueError, match=r"Written.thing is not the code that it was .*min, now max"):
        env_state.restore(Written(lambda: max, lambda env: None), captured)


def test_a_changed_model_of_mujoco_is_noticed():
    pytest.importorskip("mujoco")
    env, other = (gymnasium.make("InvertedPendulum-v5") for _ in range(2))
    for each in (env, other):
        each.reset(seed=0)
    captured = env_state.capture(env)
    env_state.restore(other, captured)
    other.unwrapped.model.body_mass[1] *= 2
    with pytest.raises(ValueError, match="model is not the model that it was"):
        env_state.restore(other, captured)


# In a run.


class Foreign(Written):
    """One more number than a new one has."""

    def __init__(self):
        super().__init__(list, lambda env: env.thing.append(Enemy(1)))


TASK = Task("Foreign-v0", {}, 200, 0, 1, 1, 1, {"hidden": (4,), "replay_start_size": 20, "batch_size": 4, "capacity": 50})


@pytest.fixture
def runs(monkeypatch):
    def make():
        monkeypatch.setattr("dqn_jax.runs.make_env", lambda env, **args: gymnasium.wrappers.TimeLimit(Foreign(), 10))
        made = HostRuns(TASK)
        made.compile()
        return made

    return make


def test_what_cannot_be_put_back_begins_new_episodes(runs):
    one, other = runs(), runs()
    for _ in range(12):
        one.advance()
    world = json.loads(json.dumps(one.world()))
    said = other.restore(one.state(), one.steps, world)
    assert "could not be put back" in said and "Enemy" in said
    assert other.steps == one.steps == 24
    for _ in range(12):
        other.advance()


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (lambda self: 1 / 0, "could not be read (ZeroDivisionError"),
        (lambda self: np.zeros(5_000_000), "its state takes 53 MB, more than 34"),
        (lambda self: {}, None),
    ],
)
def test_a_world_that_cannot_be_kept_is_told_and_loses_nothing_else(runs, method, said, monkeypatch):
    made = runs()
    made.advance()
    monkeypatch.setattr(Foreign, "get_env_state", method, raising=False)
    assert (made.world() is None) == (said is not None)
    assert made.lost is None if said is None else said in made.lost
