"""check_env: each fault is found in an environment that has it and no other, and none in sound ones."""

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode

import dqn_jax
from dqn_jax import check_env

BOX = spaces.Box(-1, 1, (3,), np.float32)


class Sound(gymnasium.Env):
    """A walk of random length: sound, until a subclass has a fault."""

    observation_space, action_space = BOX, spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.end = 0, int(self.np_random.integers(5, 50))
        return self.look(), {}

    def look(self):
        return self.np_random.uniform(-1, 1, 3).astype(np.float32)

    def step(self, action):
        self.time += 1
        return self.look(), self.pay(action), self.time >= self.end, False, {}

    def pay(self, action):
        return float(action)


def faulty(**members):
    return type("Faulty", (Sound,), members)()


def old_reset(self):
    gymnasium.Env.reset(self)
    self.time, self.end = 0, 9
    return self.look(), {}


def always(value, place):
    def step(self, action):
        outcome = list(Sound.step(self, action))
        outcome[place] = value
        return tuple(outcome)

    return step


def fixed_length(self, action):
    outcome = list(Sound.step(self, action))
    outcome[2] = self.time >= 20
    return tuple(outcome)


def breaks(self, action):
    if self.time == 3:
        raise RuntimeError("the cable is out")
    return Sound.step(self, action)


ANYTHING = np.random.default_rng(0)
FAULTS = {
    "a text observation": (faulty(observation_space=spaces.Text(5)), "error", "observation space", "FlattenObservation"),
    "a graph of actions": (faulty(action_space=spaces.Tuple([BOX, BOX])), "error", "no agent takes the spaces", "dqn: "),
    "actions from 1": (faulty(action_space=spaces.Discrete(2, start=1)), "error", "no agent takes the spaces", "TransformAction"),
    "a wrong shape": (faulty(look=lambda self: np.zeros(2, np.float32)), "error", "what reset returns is refused", "(3,)"),
    "no number": (faulty(look=lambda self: np.full(3, np.nan, np.float32)), "error", "nan", "reset"),
    "a word": (faulty(look=lambda self: np.array(["a", "b", "c"])), "error", "dtype", "float32"),
    "reset without a seed": (faulty(reset=old_reset), "error", "reset(seed=...) raised TypeError", "seed and options"),
    "reset without info": (faulty(reset=lambda self, **_: Sound.reset(self)[0]), "error", "reset returns ndarray", "(observation, info)"),
    "the old step": (faulty(step=lambda self, a: Sound.step(self, a)[:4]), "error", "step returns tuple of 4", "truncated where time did"),
    "a reward that is an array": (faulty(pay=lambda self, a: np.zeros((2,))), "error", "reward has shape (2,)", "real, finite number"),
    "a reward that is none": (faulty(pay=lambda self, a: None), "error", "reward has dtype object", "real, finite number"),
    "an infinite reward": (faulty(pay=lambda self, a: np.inf), "error", "reward is inf", "real, finite number"),
    "terminated is a number": (faulty(step=always(2, 2)), "error", "terminated is 2", "True or False as terminated"),
    "truncated is a word": (faulty(step=always("no", 3)), "error", "truncated is 'no'", "True or False as truncated"),
    "it raises": (faulty(step=breaks), "error", "step 4 (step 4 of its episode) raised RuntimeError: the cable is out", "mend"),
    "large rewards": (faulty(pay=lambda self, a: 1e6), "warning", "rewards reach 1e+06", "scale"),
    "no reward": (faulty(pay=lambda self, a: 0.0), "warning", "rewards were 0", "rnd"),
    "large observations": (
        faulty(observation_space=spaces.Box(-np.inf, np.inf, (3,), np.float32), look=lambda self: Sound.look(self) * 1e6),
        *("warning", "observations reach", "normalise"),
    ),
    "no end": (faulty(step=always(False, 2)), "warning", "no episode ended within 1,000 steps", "TimeLimit"),
    "a time limit that terminates": (faulty(step=fixed_length), "warning", "terminated after exactly 20 steps", "truncated"),
    "chance of its own": (faulty(pay=lambda self, a: ANYTHING.random()), "warning", "bring something else at step 1", "np_random"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_nothing_else(name, capsys):
    env, severity, problem, remedy = FAULTS[name]
    (finding,) = check_env(env)
    assert finding.severity == severity and problem in finding.problem, finding
    assert remedy in finding.remedy or remedy in finding.problem, finding
    assert str(finding) in capsys.readouterr().out


class Masked(Sound):
    observation_space = spaces.Dict({"observation": BOX, "action_mask": spaces.MultiBinary(2)})

    def look(self):
        return {"observation": Sound.look(self), "action_mask": np.array([1, 0], np.int8)}

    def step(self, action):
        assert action == 0
        return Sound.step(self, action)

    def pay(self, action):
        return 1.0


class Images(Sound):
    observation_space = spaces.Box(0, 255, (10, 10, 3), np.uint8)

    def look(self):
        return self.np_random.integers(0, 256, (10, 10, 3)).astype(np.uint8)


def vector(mode):
    return gymnasium.make_vec("CartPole-v1", 2, vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode})


SOUND = {
    "a walk": Sound,
    "CartPole": lambda: gymnasium.make("CartPole-v1"),
    "Acrobot": lambda: gymnasium.make("Acrobot-v1"),
    "Pendulum": lambda: gymnasium.make("Pendulum-v1"),
    "FrozenLake": lambda: gymnasium.make("FrozenLake-v1", success_rate=1.0, map_name="4x4"),
    "masked": Masked,
    "images": Images,
    "vector": lambda: vector(AutoresetMode.SAME_STEP),
    "JAX CartPole": lambda: dqn_jax.make("phys2d/CartPole-v1"),
    "JAX Pendulum": lambda: dqn_jax.make("phys2d/Pendulum-v0"),
}


@pytest.mark.parametrize("name", SOUND)
def test_nothing_is_found_in_sound_environments(name, capsys):
    assert check_env(SOUND[name](), steps=3_000) == []
    assert "nothing found in 3,000 steps" in capsys.readouterr().out


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
def test_a_reset_mode_that_does_not_serve_is_found_with_the_argument_to_pass(mode):
    (finding,) = check_env(vector(mode), show=False)
    assert finding.severity == "error" and "SAME_STEP" in finding.remedy


def test_what_is_no_environment():
    (finding,) = check_env("CartPole-v1", show=False)
    assert finding.severity == "error" and "gymnasium.make" in finding.remedy


class Leaves(Sound):
    def look(self):
        return 2 * super().look()


def test_observations_that_leave_their_space_are_found():
    (finding,) = check_env(Leaves(), show=False)
    assert finding.severity == "warning" and "observations leave their space in" in finding.problem


class Impatient(Sound):
    """Ends by itself, and is ended by a clock which it does not tell from that."""

    def reset(self, *, seed=None, options=None):
        answer = super().reset(seed=seed)
        self.end = min(self.end, 20)
        return answer


def test_a_clock_that_ends_some_episodes_is_found():
    (finding,) = check_env(Impatient(), show=False)
    assert "terminated after exactly 20 steps, and none was longer" in finding.problem and "truncated" in finding.remedy


class Picky(gymnasium.Env):
    """Allows one action at a time, and raises at any other."""

    observation_space = spaces.Dict({"observation": spaces.Box(-1, 1, (2,)), "action_mask": spaces.Box(0, 1, (3,), np.int8)})
    action_space = spaces.Discrete(3)

    def seen(self):
        self.allowed = int(self.np_random.integers(3))
        return {"observation": np.zeros(2, np.float32), "action_mask": np.eye(3, dtype=np.int8)[self.allowed]}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length = 0
        return self.seen(), {}

    def step(self, action):
        if action != self.allowed:
            raise RuntimeError(f"{action} is not allowed")
        self.length += 1
        return self.seen(), 1.0, self.length == 5 + self.allowed, False, {}


def test_masks_are_heeded_in_vectors_too():
    envs = gymnasium.vector.SyncVectorEnv([Picky] * 3, autoreset_mode=AutoresetMode.SAME_STEP)
    assert [finding for finding in check_env(envs, show=False) if finding.severity == "error"] == []


def test_what_raises_in_a_reset_or_in_jax_is_a_finding():
    def broken(self, **words):
        raise RuntimeError("no level")

    envs = gymnasium.vector.SyncVectorEnv([type("Broken", (Picky,), {"reset": broken})], autoreset_mode=AutoresetMode.SAME_STEP)
    cartpole = dqn_jax.make("phys2d/CartPole-v1")
    for env, says in (
        (envs, "reset(seed=...) raised RuntimeError: no level"),
        (cartpole._replace(reset=broken), "reset raised"),
        (cartpole._replace(step=broken), "step 1 raised"),
    ):
        (finding,) = check_env(env, show=False)
        assert finding.severity == "error" and says in finding.problem
