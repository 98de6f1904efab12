"""Random sequences of calls, good and bad, of the host driver: it does what a slow model does, or raises what the model says, and goes on.

Each sequence is also played by a twin that gets the good calls alone and is neither asked, saved nor set back: both must end alike, bit for
bit, parameters included.
"""

import collections
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import strategies as st

from dqn_jax import DQN, checkpoint

PER_ENV = 5  # Rows that the replay keeps of each environment.
BOX = spaces.Box(-1e6, 1e6, (2,), np.float32)
WARMUP = 3  # Rows before the first update.


def make(num_envs):
    options = {"hidden": (4,), "batch_size": 2, "capacity": PER_ENV * num_envs, "epsilon": 0.5, "n_steps": 2, "target_update_interval": 4}
    interval = {"replay_start_size": WARMUP * num_envs, "update_interval": num_envs}
    return DQN((BOX, spaces.Discrete(3)), num_envs=num_envs, **options, **interval)


Row = collections.namedtuple("Row", "number action reward discount successor last")


class Model:
    """What the driver promises, one row of N transitions at a time."""

    def __init__(self, num_envs):
        self.num_envs = num_envs
        self.rows = collections.deque(maxlen=PER_ENV)
        self.pending = None  # Number of the observation, actions.
        self.uncut = True
        self.t = self.episodes = self.updates = 0

    def begin(self, number, actions):
        """An act_and_train without a step that awaits its outcome, or what follows once that has been taken in."""
        if self.pending is None and self.uncut:
            self.cut()
        self.decide(number, actions)

    def decide(self, number, actions):
        self.pending = number, actions
        if max(0, self.t // self.num_envs - (WARMUP - 1)) > self.updates:
            self.updates += 1

    def cut(self):
        if self.rows:
            self.rows[-1] = self.rows[-1]._replace(last=(True,) * self.num_envs)
        self.uncut = False

    def take_in(self, successor, reward, terminated, last):
        number, actions = self.pending
        discount = tuple(0.0 if ended else 1.0 for ended in terminated)
        self.rows.append(Row(number, tuple(actions), (reward,) * self.num_envs, discount, successor, tuple(last)))
        self.pending = None
        self.t += self.num_envs
        self.episodes += sum(last)

    def drop(self):
        self.pending, self.uncut = None, True

    def copy(self):
        other = Model(self.num_envs)
        other.__dict__.update({**self.__dict__, "rows": self.rows.copy()})
        return other


def see(number, num_envs=None):
    """An observation that carries a number."""
    one = np.array([number, -number], np.float32)
    return one if num_envs is None else np.stack([one + 1000 * i for i in range(num_envs)])


BAD_OBSERVATIONS = {
    "shape": (lambda good: good[..., :1], ValueError),
    "more": (lambda good: np.stack([good] * 2), ValueError),
    "nan": (lambda good: np.full_like(good, np.nan), ValueError),
    "infinite": (lambda good: np.full_like(good, -np.inf), ValueError),
    "words": (lambda good: np.full(good.shape, "x"), TypeError),
    "complex": (lambda good: good + 1j, TypeError),
}
BAD_REWARDS = {"nan": (math.nan, ValueError), "infinite": (math.inf, ValueError), "word": ("much", TypeError), "none": (None, TypeError)}
BAD_FLAGS = {"number": (2, TypeError), "word": ("yes", TypeError)}
# Mostly good, so that sequences come to learn.
OBSERVATION = st.sampled_from(["good"] * 30 + [*BAD_OBSERVATIONS])
REWARD = st.sampled_from(["good"] * 30 + [*BAD_REWARDS])
FLAG = st.sampled_from([True, False] * 8 + [*BAD_FLAGS])
ENDS = st.lists(st.sampled_from(["goes on"] * 4 + ["terminated", "truncated"]), min_size=3, max_size=3)
SUCCESSOR = st.sampled_from(["given"] * 8 + ["left out"] * 4 + ["bad"])
ARGUMENTS = {"train": (OBSERVATION, REWARD), "end": (OBSERVATION, REWARD, FLAG), "batch": (OBSERVATION, REWARD, ENDS, SUCCESSOR)}
OTHERS = ["stop", "stop", "act", "statistics", "state", "save", "load", "note", "set back", "repr"]


def operations(names):
    """Lists of calls with their arguments."""
    call = st.sampled_from(names).flatmap(lambda name: st.tuples(st.just(name), *ARGUMENTS.get(name, ())))
    return st.one_of(st.lists(call, max_size=10), st.lists(call, min_size=20, max_size=40))


ONE = operations(["train"] * 30 + ["end"] * 5 + OTHERS)
THREE = operations(["batch"] * 30 + ["train", "end"] + OTHERS)


class Player:
    """Plays a sequence on an agent, and beside it on the model and the twin."""

    def __init__(self, agent, twin, blank, folder):
        self.agent, self.twin, self.blank, self.folder = agent, twin, blank, folder
        self.lead = None if agent.num_envs == 1 else agent.num_envs

    def play(self, operations):
        for each in (self.agent, self.twin):
            each.restore(jax.tree.map(jnp.array, self.blank))
        self.model, self.number = Model(self.agent.num_envs), 0
        self.good = []  # Calls for the twin: it plays them at the end, since to be set back takes some away.
        self.noted = self.saved = None
        for name, *arguments in operations:
            self.number += 1
            getattr(self, name.replace(" ", "_"))(*arguments)
            self.compare_counts()
        self.compare_rows()
        for call in self.good:
            call(self.twin)
        assert checkpoint.digest(self.agent.run_state.agent) == checkpoint.digest(self.twin.run_state.agent)

    def expect(self, error, call):
        """Makes a call that must raise; what it must not change shows in the comparisons."""
        with pytest.raises(error) as raised:
            call()
        assert type(raised.value) is error and str(raised.value)

    def observation(self, kind):
        good = see(self.number, self.lead)
        return (good, None) if kind == "good" else (BAD_OBSERVATIONS[kind][0](good), BAD_OBSERVATIONS[kind][1])

    def reward(self, kind):
        value, error = (float(self.number), None) if kind == "good" else BAD_REWARDS[kind]
        return value, error

    # Calls of one environment.

    def train(self, observation_kind, reward_kind):
        observation, wrong = self.observation(observation_kind)
        reward, wrong_reward = self.reward(reward_kind)
        call = lambda agent: agent.act_and_train(observation, reward)  # noqa: E731
        if self.lead is not None:
            return self.expect(RuntimeError, lambda: call(self.agent))
        if error := wrong or (wrong_reward if self.model.pending else None):
            return self.expect(error, lambda: call(self.agent))
        self.done(call, lambda: (reward, (False,), (False,), self.number))

    def end(self, observation_kind, reward_kind, terminated=True):
        observation, wrong = self.observation(observation_kind)
        reward, wrong_reward = self.reward(reward_kind)
        flag, wrong_flag = (terminated, None) if isinstance(terminated, bool) else BAD_FLAGS[terminated]
        call = lambda agent: agent.stop_episode_and_train(observation, reward, flag)  # noqa: E731
        missing = RuntimeError if self.model.pending is None else None
        error = (RuntimeError if self.lead is not None else None) or wrong or wrong_flag or wrong_reward or missing
        if error:
            return self.expect(error, lambda: call(self.agent))
        call(self.agent)
        self.good.append(call)
        self.model.take_in(self.number, reward, (flag,), (True,))

    # Calls of several.

    def batch(self, observation_kind, reward_kind, ends, successor_kind):
        observation, wrong = self.observation(observation_kind)
        reward, wrong_reward = self.reward(reward_kind)
        rewards = np.full(self.lead, reward) if wrong_reward is not TypeError else [reward] * self.lead
        terminated, truncated = (np.array([end == name for end in ends]) for name in ("terminated", "truncated"))
        true = see(self.number + 500, self.lead)
        successor = {"given": true, "left out": None, "bad": true[:, :1]}[successor_kind]
        call = lambda agent: agent.batch_act_and_train(observation, rewards, terminated, truncated, successor)  # noqa: E731
        last = tuple(bool(ended) for ended in terminated | truncated)
        missing = ValueError if successor_kind == "bad" or (successor_kind == "left out" and any(last)) else None
        if error := wrong or ((wrong_reward or missing) if self.model.pending else None):
            return self.expect(error, lambda: call(self.agent))
        number = self.number if successor is None else self.number + 500
        self.done(call, lambda: (reward, tuple(map(bool, terminated)), last, number))

    def done(self, call, outcome):
        """A call that chooses: the model follows."""
        had_pending = self.model.pending is not None
        actions = np.atleast_1d(call(self.agent))
        self.good.append(call)
        assert ((actions >= 0) & (actions < 3)).all()
        if had_pending:
            reward, terminated, last, successor = outcome()
            self.model.take_in(successor, reward, terminated, last)
            self.model.decide(self.number, actions)
        else:
            self.model.begin(self.number, actions)

    def stop(self):
        self.agent.stop_episode()
        self.good.append(lambda agent: agent.stop_episode())
        self.model.drop()

    # What changes nothing, or goes back.

    def act(self):
        act = self.agent.act if self.lead is None else self.agent.batch_act
        np.testing.assert_array_equal(act(see(self.number, self.lead)), act(see(self.number, self.lead)))

    def statistics(self):
        self.agent.get_statistics()

    def repr(self):
        assert f"t={self.model.t}" in repr(self.agent)

    def state(self):
        assert int(self.agent.state.step) == self.model.t

    def save(self):
        self.agent.save(self.folder / "agent")
        self.saved = self.model.copy(), list(self.good)

    def load(self):
        if self.saved is None:
            return self.expect(FileNotFoundError, lambda: self.agent.load(self.folder / "nothing"))
        self.agent.load(self.folder / "agent")
        self.model, self.good = self.saved[0].copy(), list(self.saved[1])

    def note(self):
        self.noted = self.agent.run_state, self.model.copy(), list(self.good)

    def set_back(self):
        if self.noted is not None:
            run, model, good = self.noted
            self.agent.restore(jax.tree.map(jnp.array, run))
            self.model, self.good = model.copy(), list(good)

    # Comparing.

    def compare_counts(self):
        stepper = self.agent._stepper  # What get_statistics tells, without storing the rows that wait: that would hide a fault.
        assert (stepper.step, stepper.episodes, stepper.updates) == (self.model.t, self.model.episodes, self.model.updates)
        assert (stepper.pending is None) == (self.model.pending is None)

    def compare_rows(self):
        memory = jax.device_get(self.agent.state.memory)
        count = int(memory.filled)
        order = np.arange(count) if count < PER_ENV else (np.arange(count) + int(memory.cursor)) % PER_ENV
        assert count == len(self.model.rows)
        for place, row in zip(order, self.model.rows, strict=True):
            got = jax.tree.map(lambda leaf, place=place: leaf[place], memory.rows)
            np.testing.assert_array_equal(got.observation, see(row.number, self.agent.num_envs))
            np.testing.assert_array_equal(got.next_observation, see(row.successor, self.agent.num_envs))
            np.testing.assert_array_equal(got.action, row.action)
            np.testing.assert_array_equal(got.reward, np.float32(row.reward))
            np.testing.assert_array_equal(got.discount, row.discount)
            np.testing.assert_array_equal(got.last, row.last)


@pytest.fixture(scope="module", params=[1, 3])
def player(request, tmp_path_factory):
    agent, twin = make(request.param), make(request.param)
    agent.compile()
    twin.compile()
    return Player(agent, twin, agent.run_state, tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize("count", [200, pytest.param(5_000, marks=pytest.mark.slow)])
def test_random_sequences(player, count):
    played = []

    @hypothesis.settings(
        max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(ONE if player.lead is None else THREE)
    def play(operations):
        player.play(operations)
        played.append((len(operations), player.model.updates))

    play()
    steps, updates = np.sum(played, axis=0)
    print(f"{len(played)} sequences, {steps} calls, {updates} updates")
    assert len(played) >= count and updates > count
