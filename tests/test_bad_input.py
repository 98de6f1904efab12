"""Every bad input: the kind of the error, what its message names, and an agent that is as it was."""

import subprocess
import sys

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gymnasium import spaces
from linear_networks import action_value, linear, policy_and_value

import dqn_jax
from dqn_jax import DQN, PPO, PQN, SAC, CheckpointError, Masked, footprint
from dqn_jax.algorithms.sac import Optimizers
from dqn_jax.networks import Network

PLAIN = (spaces.Box(-np.inf, np.inf, (3,), np.float32), spaces.Discrete(2))
IMAGE = (spaces.Box(0, 255, (4, 4), np.uint8), spaces.Discrete(2))
CHOICE = (spaces.Discrete(5), spaces.Discrete(2))
TREE = (
    spaces.Dict({"a": spaces.Box(-1, 1, (2,), np.float32), "b": spaces.Tuple((spaces.Discrete(3), spaces.MultiBinary(2)))}),
    spaces.Discrete(2),
)
MASKED = (spaces.Dict({"observation": spaces.Box(-1, 1, (2,), np.float32), "action_mask": spaces.MultiBinary(2)}), spaces.Discrete(2))


def _first(observation):
    return jax.tree.leaves(observation)[0].reshape(len(jax.tree.leaves(observation)[0]), -1)[:, :1].astype(jnp.float32)


# It reads one number of any observation: what is tested here happens in front of the network.
NETWORK = Network(lambda key, o: {"w": jnp.ones((1, 2))}, lambda params, o: _first(o) @ params["w"])
SMALL = {
    "network": NETWORK,
    "optimizer": optax.sgd(1e-6),
    "batch_size": 4,
    "capacity": 32,
    "replay_start_size": 4,
    "update_interval": 4,
    "epsilon": 0.1,
}

GOOD = {
    "plain": (PLAIN, np.zeros(3, np.float32)),
    "image": (IMAGE, np.zeros((4, 4), np.uint8)),
    "choice": (CHOICE, 1),
    "tree": (TREE, {"a": np.zeros(2, np.float32), "b": (1, np.zeros(2, np.int8))}),
    "masked": (MASKED, {"observation": np.zeros(2, np.float32), "action_mask": np.ones(2, np.int8)}),
}


@pytest.fixture(scope="module")
def agents():
    """One agent for each kind of observation, with a step pending and some learning done."""
    made = {}
    for name, (both, good) in GOOD.items():
        made[name] = DQN(both, **SMALL)
        for _ in range(6):
            made[name].act_and_train(good, 1.0)
    return made


@pytest.fixture(scope="module")
def four():
    agent = DQN(PLAIN, num_envs=4, **SMALL)
    zeros = np.zeros((4, 3), np.float32)
    agent.batch_act_and_train(zeros)
    for _ in range(3):
        agent.batch_act_and_train(zeros, np.ones(4), np.zeros(4, bool), np.zeros(4, bool))
    return agent


def unchanged_by(agent, call, go_on):
    """Whether a call that raises leaves state, statistics and phase as they were, and the agent going on."""

    def looks():
        return dqn_jax.digest(agent.state), repr(agent.get_statistics())

    before = looks()
    with pytest.raises(Exception) as caught:
        call()
    assert looks() == before
    steps = agent.get_statistics()["t"]
    go_on()
    assert agent.get_statistics()["t"] == steps + agent.num_envs  # The step that was pending is pending still: this call stored it.
    return caught


def check(caught, kind, message):
    assert caught.type is kind, f"{caught.type.__name__}: {caught.value}"
    assert message in str(caught.value)


NAN, INF = float("nan"), float("inf")
ZEROS = np.zeros(3, np.float32)
OBSERVATIONS = [
    ("plain", np.zeros(4, np.float32), ValueError, "observation has shape (4,), the agent was built for (3,)"),
    ("plain", np.zeros((1, 3), np.float32), ValueError, "observation has shape (1, 3)"),
    ("plain", np.float32(0), ValueError, "observation has shape ()"),
    ("plain", np.array([0, NAN, 0], np.float32), ValueError, "observation[1] is nan"),
    ("plain", np.array([0, 0, -INF], np.float32), ValueError, "observation[2] is -inf"),
    ("plain", np.array([NAN, 0, INF], np.float32), ValueError, "2 of 3 entries"),
    ("plain", np.array([0, 1e300, 0]), ValueError, "observation[1] is 1e+300"),
    ("plain", np.array([0, NAN, 0], np.float16), ValueError, "observation[1] is nan"),
    ("plain", np.zeros(3, np.int64), TypeError, "observation has dtype int64, expected float32"),
    ("plain", np.zeros(3, np.complex64), TypeError, "complex64"),
    ("plain", np.array(["a", "b", "c"]), TypeError, "observation has dtype <U1"),
    ("plain", np.array([None, 0, 0]), TypeError, "observation has dtype object"),
    ("plain", None, ValueError, "observation has shape ()"),
    ("plain", {"a": ZEROS}, ValueError, "observation has shape ()"),
    ("image", np.zeros((4, 4), np.float32), TypeError, "observation has dtype float32, expected uint8"),
    ("image", np.full((4, 4), 300), ValueError, "values that uint8 cannot hold"),
    ("image", np.full((4, 4), -1, np.int16), ValueError, "values that uint8 cannot hold"),
    ("image", np.zeros((4, 4, 1), np.uint8), ValueError, "observation has shape (4, 4, 1)"),
    ("choice", 5, ValueError, "observation is 5, outside Discrete(5)"),
    ("choice", -1, ValueError, "observation is -1, outside Discrete(5)"),
    ("choice", 1.0, TypeError, "observation has dtype float64"),
    ("choice", np.zeros(5), ValueError, "observation has shape (5,)"),
    (
        "tree",
        {"a": np.zeros(2, np.float32)},
        TypeError,
        "observation must be a dict with the keys ['a', 'b'], got a dict with the keys ['a']",
    ),
    ("tree", np.zeros(2, np.float32), TypeError, "observation must be a dict"),
    ("tree", {"a": np.zeros(2, np.float32), "b": (1,)}, TypeError, "observation['b'] must be a tuple of 2"),
    ("tree", {"a": np.zeros(2, np.float32), "b": (3, np.zeros(2, np.int8))}, ValueError, "observation['b'][0] is 3"),
    ("tree", {"a": np.array([0, NAN], np.float32), "b": (1, np.zeros(2, np.int8))}, ValueError, "observation['a'][1] is nan"),
    ("masked", np.zeros(2, np.float32), TypeError, "observation must be a Masked or a dict"),
    ("masked", {"observation": np.zeros(2, np.float32)}, TypeError, "observation must be a Masked or a dict"),
    ("masked", Masked(np.zeros(2, np.float32), np.ones(3, bool)), ValueError, "observation['action_mask'] has shape (3,), expected (2,)"),
    ("masked", Masked(np.zeros(2, np.float32), np.ones(2)), TypeError, "observation['action_mask'] has dtype float64"),
    ("masked", Masked(np.zeros(2, np.float32), np.zeros(2, bool)), ValueError, "action_mask allows no action"),
]


@pytest.mark.parametrize(("name", "bad", "kind", "message"), OBSERVATIONS)
def test_bad_observation(agents, name, bad, kind, message):
    agent, good = agents[name], GOOD[name][1]

    def go_on():
        agent.act_and_train(good, 1.0)

    check(unchanged_by(agent, lambda: agent.act_and_train(bad, 1.0), go_on), kind, message)
    check(unchanged_by(agent, lambda: agent.act(bad), go_on), kind, message)
    if "allows no action" not in message:  # What a terminated episode may end on.
        check(unchanged_by(agent, lambda: agent.stop_episode_and_train(bad, 1.0), go_on), kind, message)


def test_a_truncated_episode_may_not_end_where_everything_is_forbidden(agents):
    # Its value is bootstrapped, and there is none: with the lowest finite number in its place the target would be -3e38.
    agent, good = agents["masked"], GOOD["masked"][1]
    nothing = Masked(np.zeros(2, np.float32), np.zeros(2, bool))

    def go_on():
        agent.act_and_train(good, 1.0)

    check(unchanged_by(agent, lambda: agent.stop_episode_and_train(nothing, 1.0, terminated=False), go_on), ValueError, "action_mask")


REWARDS = [
    (NAN, ValueError, "reward is nan"),
    (-INF, ValueError, "reward is -inf"),
    (np.float64(1e300), ValueError, "reward is 1e+300"),
    (np.float16(np.inf), ValueError, "reward is inf"),
    (np.ones(1), ValueError, "reward has shape (1,), expected ()"),
    ([1.0, 2.0], ValueError, "reward has shape (2,), expected ()"),
    (None, TypeError, "reward has dtype object"),
    ("1", TypeError, "reward has dtype <U1"),
    (1j, TypeError, "reward has dtype complex128"),
]


@pytest.mark.parametrize(("bad", "kind", "message"), REWARDS)
def test_bad_reward(agents, bad, kind, message):
    agent = agents["plain"]

    def go_on():
        agent.act_and_train(ZEROS, 1.0)

    check(unchanged_by(agent, lambda: agent.act_and_train(ZEROS, bad), go_on), kind, message)
    check(unchanged_by(agent, lambda: agent.stop_episode_and_train(ZEROS, bad), go_on), kind, message)


@pytest.mark.parametrize("good", [1, True, 0.5, np.float64(2), np.int8(3), np.float16(4), jnp.float32(5), np.array(6)])
def test_rewards_of_every_scalar_kind_are_taken(agents, good):
    agents["plain"].act_and_train(ZEROS, good)
    state = agents["plain"].state.memory
    assert float(state.rows.reward[(int(state.cursor) - 1) % 32, 0]) == float(good)


def test_observations_of_every_real_kind_are_taken(agents):
    agent = agents["plain"]
    for good in (
        [0.1, 0.2, 0.3],
        (0.1, 0.2, 0.3),
        np.array([0.1, 0.2, 0.3]),
        jnp.array([0.1, 0.2, 0.3]),
        np.array([0.1, 0.2, 0.3], np.float16),
    ):
        agent.act_and_train(good, 1.0)
    agent.act(np.full(3, 1e30, np.float32))  # Large, and finite all the same.


FLAGS = [(bad, TypeError, f"terminated is {bad!r}, expected True or False") for bad in (1, 0, None, "True", np.float32(1))]


@pytest.mark.parametrize(("bad", "kind", "message"), [*FLAGS, ([True], ValueError, "terminated has shape (1,)")])
def test_bad_terminated(agents, bad, kind, message):
    agent = agents["plain"]
    caught = unchanged_by(agent, lambda: agent.stop_episode_and_train(ZEROS, 1.0, bad), lambda: agent.act_and_train(ZEROS, 1.0))
    check(caught, kind, message)


def test_stopping_without_an_episode(agents):
    agent = agents["choice"]
    agent.stop_episode_and_train(1, 1.0)
    before = dqn_jax.digest(agent.state)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no episode is open: call act_and_train"):
            agent.stop_episode_and_train(1, 1.0)
    assert dqn_jax.digest(agent.state) == before
    agent.act_and_train(1, 1.0)


F4, Z4 = np.zeros(4, bool), np.zeros((4, 3), np.float32)
BATCHES = [
    ((Z4[:3], np.ones(4), F4, F4), ValueError, "observation has shape (3, 3), the agent was built for (4, 3)"),
    ((Z4, np.ones((4, 1)), F4, F4), ValueError, "reward has shape (4, 1), expected (4,)"),
    ((Z4, 1.0, F4, F4), ValueError, "reward has shape (), expected (4,)"),
    ((Z4, np.array([0, 0, NAN, 0]), F4, F4), ValueError, "reward is"),
    ((Z4, None, F4, F4), ValueError, "reward has shape (), expected (4,)"),
    ((Z4, np.ones(4), None, F4), TypeError, "terminated is None"),
    ((Z4, np.ones(4), np.zeros(4), F4), TypeError, "terminated is"),
    ((Z4, np.ones(4), False, F4), ValueError, "terminated has shape (), expected (4,)"),
    ((Z4, np.ones(4), F4, np.zeros(4, int)), TypeError, "truncated is"),
    ((Z4, np.ones(4), ~F4, F4), ValueError, "next_observation was not given"),
    ((Z4, np.ones(4), F4, ~F4), ValueError, "next_observation was not given"),
    ((Z4, np.ones(4), ~F4, F4, Z4[0]), ValueError, "observation has shape (3,)"),
    ((Z4, np.ones(4), ~F4, F4, Z4 * NAN), ValueError, "observation[0, 0] is nan"),
    ((Z4 + INF, np.ones(4), F4, F4), ValueError, "observation[0, 0] is inf"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), BATCHES)
def test_bad_batch(four, arguments, kind, message):
    def go_on():
        four.batch_act_and_train(Z4, np.ones(4), F4, F4)

    check(unchanged_by(four, lambda: four.batch_act_and_train(*arguments), go_on), kind, message)


def test_scalar_methods_of_an_agent_of_four(four):
    def go_on():
        four.batch_act_and_train(Z4, np.ones(4), F4, F4)

    for call in (lambda: four.act_and_train(ZEROS, 1.0), lambda: four.stop_episode_and_train(ZEROS, 1.0)):
        check(unchanged_by(four, call, go_on), RuntimeError, "built for 4 environments: use batch_act_and_train")


def test_a_batch_may_not_be_truncated_where_everything_is_forbidden():
    agent = DQN(MASKED, num_envs=2, **SMALL)
    good = Masked(np.zeros((2, 2), np.float32), np.ones((2, 2), bool))
    nothing = good._replace(action_mask=np.array([[True, True], [False, False]]))
    no, yes = np.zeros(2, bool), np.array([False, True])
    agent.batch_act_and_train(good)

    def go_on():
        agent.batch_act_and_train(good, np.ones(2), no, no)

    check(unchanged_by(agent, lambda: agent.batch_act_and_train(good, np.ones(2), no, yes, nothing), go_on), ValueError, "action_mask")
    check(unchanged_by(agent, lambda: agent.batch_act_and_train(nothing, np.ones(2), no, no), go_on), ValueError, "action_mask")
    agent.batch_act_and_train(good, np.ones(2), yes, no, nothing)  # Terminated: there is no value.


FLOAT_BOX = spaces.Box(-1, 1, (2,), np.float32)
CONSTRUCTION = [
    ((PLAIN[0], FLOAT_BOX), ValueError, "DQN needs a Discrete action space, got Box(-1.0, 1.0, (2,), float32)"),
    ((PLAIN[0], spaces.MultiDiscrete([2, 2])), ValueError, "DQN needs a Discrete action space"),
    ((PLAIN[0], spaces.Discrete(3, start=1)), NotImplementedError, "actions must start at 0, got Discrete(3, start=1)"),
    ((spaces.Text(5), PLAIN[1]), NotImplementedError, "observation space Text"),
    ((spaces.Sequence(FLOAT_BOX), PLAIN[1]), NotImplementedError, "is not supported; supported are Box, Discrete"),
    ((spaces.Dict({"a": spaces.Graph(FLOAT_BOX, None)}), PLAIN[1]), NotImplementedError, "observation space Graph"),
    ((PLAIN[0],), TypeError, "expected an environment or the pair"),
    (
        "CartPole-v1",
        TypeError,
        "expected an environment or the pair (observation_space, action_space), got str 'CartPole-v1': make it with",
    ),
    ((4, 2), TypeError, "expected an environment or the pair"),
]


@pytest.mark.parametrize(("both", "kind", "message"), CONSTRUCTION)
@pytest.mark.parametrize("build", [DQN, dqn_jax.dqn])
def test_bad_spaces(both, kind, message, build):
    with pytest.raises(Exception) as caught:
        build(both, **SMALL)
    check(caught, kind, message)


def test_a_mask_of_another_length_than_the_actions():
    both = (spaces.Dict({"observation": FLOAT_BOX, "action_mask": spaces.MultiBinary(3)}), spaces.Discrete(2))
    with pytest.raises(ValueError, match=r"action_mask.*3.*2"):
        DQN(both, **SMALL)


def test_vector_environment_and_num_envs_that_differ():
    mode = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
    envs = gymnasium.make_vec("CartPole-v1", 2, vectorization_mode="sync", vector_kwargs=mode)
    with pytest.raises(ValueError, match="num_envs is 3, the vector environment has 2"):
        DQN(envs, num_envs=3)


OPTIONS = [
    ({"bath_size": 4}, TypeError, "no option 'bath_size': did you mean batch_size?"),
    ({"lerning_rate": 1e-3}, TypeError, "did you mean learning_rate?"),
    ({"zzz": 1}, TypeError, "no option 'zzz': the options are adam_epsilon, alpha, batch_size, "),
    ({"batch_size": 33}, ValueError, "batch_size 33 exceeds capacity 32"),
    ({"replay_start_size": 33}, ValueError, "replay_start_size 33 exceeds capacity 32"),
    ({"n_steps": 33}, ValueError, "n_steps 33 exceeds capacity 32"),
    ({"gamma": 1.5}, ValueError, "gamma must be in [0, 1], got 1.5"),
    ({"gamma": -0.1}, ValueError, "gamma"),
    ({"gamma": NAN}, ValueError, "gamma"),
    ({"gamma": "high"}, TypeError, "gamma must be a number, got 'high'"),
    ({"gamma": True}, TypeError, "gamma must be a number, got True"),
    ({"gamma": None}, TypeError, "gamma"),
    ({"learning_rate": 0}, ValueError, "learning_rate must be in (0, inf), got 0"),
    ({"learning_rate": -1.0}, ValueError, "learning_rate"),
    ({"learning_rate": INF}, ValueError, "learning_rate"),
    ({"learning_rate": "1e-3"}, TypeError, "learning_rate must be a number"),
    ({"tau": 0}, ValueError, "tau must be in (0, 1], got 0"),
    ({"tau": 1.1}, ValueError, "tau"),
    ({"tau": "x"}, TypeError, "tau"),
    ({"max_grad_norm": 0}, ValueError, "max_grad_norm"),
    ({"max_grad_norm": "x"}, TypeError, "max_grad_norm"),
    ({"n_steps": 0}, ValueError, "n_steps must be at least 1, got 0"),
    ({"n_steps": 2.0}, TypeError, "n_steps must be a whole number, got 2.0"),
    ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
    ({"batch_size": True}, TypeError, "batch_size"),
    ({"capacity": 0}, ValueError, "capacity"),
    ({"capacity": 1e4}, TypeError, "capacity must be a whole number, got 10000.0"),
    ({"replay_start_size": -1}, ValueError, "replay_start_size must be at least 0, got -1"),
    ({"replay_start_size": "4"}, TypeError, "replay_start_size"),
    (
        {"replay_start_size": 3, "update_interval": 1},
        ValueError,
        "batch_size 4 exceeds the 3 transitions stored when learning starts",
    ),
    ({"prioritized": "yes"}, TypeError, "prioritized must be True or False, got 'yes'"),
    ({"prioritized": True, "alpha": 1.5}, ValueError, "alpha must be in [0, 1], got 1.5"),
    ({"prioritized": True, "alpha": NAN}, ValueError, "alpha"),
    ({"prioritized": True, "beta": -0.1}, ValueError, "beta must be in [0, 1], got -0.1"),
    ({"prioritized": True, "beta": (0.4, 1.1, 10)}, ValueError, "beta's end must be in [0, 1], got 1.1"),
    ({"prioritized": True, "beta": "0.4"}, TypeError, "beta"),
    ({"frames": "yes"}, ValueError, "frames must be one of 'off', 'single', 'stack_first', 'stack_last', got 'yes'"),
    ({"frames": "single"}, TypeError, "stores images of uint8 or bool, the observation space is Box"),
    ({"prioritized": True, "n_steps": 33}, ValueError, "n_steps 33 exceeds capacity 32"),
    ({"encoder": "resnet"}, ValueError, "encoder must be one of 'auto', 'flat', 'nature', 'minatar', got 'resnet'"),
    ({"network": None, "encoder": "nature"}, ValueError, "an image has two or three axes"),
    ({"capacity": 10**11}, MemoryError, "bytes are needed"),
    ({"update_interval": 0}, ValueError, "update_interval"),
    ({"update_interval": 0.5}, TypeError, "update_interval"),
    ({"updates_per_interval": 0}, ValueError, "updates_per_interval"),
    ({"updates_per_interval": None}, TypeError, "updates_per_interval"),
    ({"target_update_interval": 0}, ValueError, "target_update_interval"),
    ({"target_update_interval": 1.5}, TypeError, "target_update_interval"),
    ({"network": None, "hidden": ()}, ValueError, "hidden is empty"),
    ({"network": None, "hidden": (0,)}, ValueError, "hidden must be at least 1, got 0"),
    ({"network": None, "hidden": (8.0,)}, TypeError, "hidden must be a whole number, got 8.0"),
    ({"network": None, "hidden": 64}, TypeError, "hidden"),
    ({"network": None, "hidden": "64"}, TypeError, "hidden"),
    ({"network": "mlp"}, TypeError, "network"),
    ({"optimizer": "adam"}, TypeError, "optimizer"),
    ({"loss": "l1"}, ValueError, "loss must be one of 'huber', 'mse', got 'l1'"),
    ({"double": "no"}, TypeError, "double"),
    ({"epsilon": 1.5}, ValueError, "epsilon must be in [0, 1], got 1.5"),
    ({"epsilon": "0.1"}, TypeError, "epsilon"),
    ({"epsilon": [None]}, ValueError, "epsilon must be (start, end, steps between)"),
    ({"distribution": "c52"}, ValueError, "distribution must be one of 'off', 'c51', 'qrdqn', 'iqn', got 'c52'"),
    ({"num_atoms": 1}, ValueError, "num_atoms must be at least 2, got 1"),
    ({"v_min": 10.0, "v_max": 10.0}, ValueError, "v_min must be below v_max, got 10.0 and 10.0"),
    ({"v_max": NAN}, ValueError, "v_max"),
    ({"num_quantiles": 0}, ValueError, "num_quantiles must be at least 1, got 0"),
    ({"num_quantiles": 1.5}, TypeError, "num_quantiles"),
    ({"dueling": 1}, TypeError, "dueling must be True or False, got 1"),
    ({"dueling": True}, ValueError, "leave them out, or the network"),  # The options of these tests have one.
    ({"noisy": 0}, ValueError, "noisy must be in (0, inf), got 0"),
    ({"noisy": True}, TypeError, "noisy"),
    ({"network": None, "noisy": 0.5, "epsilon": 0.1}, ValueError, "noisy layers explore by themselves: leave epsilon out"),
    ({"munchausen": -0.1}, ValueError, "munchausen must be in [0, 1], got -0.1"),
    ({"munchausen": 0.9, "munchausen_temperature": 0.0}, ValueError, "munchausen_temperature"),
    ({"munchausen": 0.9, "n_steps": 3}, ValueError, "munchausen pays for every step, and with n_steps=3"),
    ({"adam_epsilon": 0.0}, ValueError, "adam_epsilon"),
    ({"epsilon": (1.0, 0.1)}, ValueError, "epsilon must be (start, end, steps between)"),
    ({"epsilon": (2.0, 0.1, 10)}, ValueError, "epsilon's start"),
    ({"epsilon": (1.0, -0.1, 10)}, ValueError, "epsilon's end"),
    ({"epsilon": (1.0, 0.1, 10.5)}, TypeError, "epsilon's steps"),
    ({"epsilon": (1.0, 0.1, -1)}, ValueError, "epsilon's steps"),
    ({"num_envs": 3}, ValueError, "every 4 transitions does not fit 3 environments"),
    ({"num_envs": 0}, ValueError, "num_envs must be at least 1, got 0"),
    ({"num_envs": -1}, ValueError, "num_envs must be at least 1, got -1"),
    ({"num_envs": 2.0}, TypeError, "num_envs"),
    ({"num_envs": 64}, ValueError, "capacity 32 leaves 0 rows for each of 64 environments"),
    ({"seed": "one"}, TypeError, "seed"),
    ({"seed": 0.5}, TypeError, "seed"),
]


@pytest.mark.parametrize(("options", "kind", "message"), OPTIONS)
def test_bad_option(options, kind, message):
    with pytest.raises(Exception) as caught:
        DQN(PLAIN, **{**SMALL, **options})
    check(caught, kind, message)


def test_a_replay_larger_than_the_memory_is_refused_in_bytes_before_anything_is_allocated(monkeypatch):
    env = dqn_jax.make("phys2d/CartPole-v1")
    agent = dqn_jax.dqn(env)
    monkeypatch.setattr(footprint, "device_bytes", lambda: 7_000)
    monkeypatch.setattr(jax, "jit", None)  # Whatever allocates is compiled.
    # Of each transition two observations, action, reward, discount and whether it is the last; beside them what is learnt, and counters.
    with pytest.raises(MemoryError, match=r"^7,4\d{2} bytes are needed .* has 7,000"):
        DQN(PLAIN, **{**SMALL, "capacity": 200})
    with pytest.raises(MemoryError, match="lower capacity, or, for images, keep each once"):
        dqn_jax.train(agent, env, num_steps=10)


def test_what_this_machine_has_is_known():
    assert 10**8 < footprint.device_bytes() < 10**14


IMAGES = {
    "colours called a stack": ((3, 4, 4), "stack_first", lambda n: np.full((3, 4, 4), 5 * n) + np.arange(3)[:, None, None]),
    "newest frame first": ((2, 4, 4), "stack_first", lambda n: np.full((2, 4, 4), n) - np.arange(2)[:, None, None]),
    "the wrong axis": ((4, 4, 2), "stack_first", lambda n: np.full((4, 4, 2), n) + np.arange(2)),
}


@pytest.mark.parametrize("name", IMAGES)
def test_a_stack_that_is_none_is_refused(name):
    shape, frames, see = IMAGES[name]
    both = spaces.Box(0, 255, shape, np.uint8), spaces.Discrete(2)
    agent = DQN(both, **{**SMALL, "frames": frames})
    stack = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    agent.act_and_train(see(1).astype(np.uint8), 0.0)
    caught = unchanged_by(
        agent,
        lambda: agent.act_and_train(see(2).astype(np.uint8), 0.0),
        lambda: agent.act_and_train(np.concatenate([see(1)[1:], stack[:1]]).astype(np.uint8), 0.0),
    )
    check(caught, ValueError, "no stacked frames, oldest first")


@pytest.mark.parametrize(("shape", "frames"), [((4, 84, 84), "stack_last"), ((84, 84, 3), "stack_first")])
def test_a_side_of_an_image_is_not_taken_for_a_stack(shape, frames):
    with pytest.raises(ValueError, match=f"'{frames}' takes axis .* 84 long, for a stack of frames"):
        DQN((spaces.Box(0, 255, shape, np.uint8), spaces.Discrete(2)), frames=frames)


def test_successors_that_differ_from_what_follows_are_refused_where_frames_are_shared():
    agent = DQN((spaces.Box(0, 255, (4, 4), np.uint8), spaces.Discrete(2)), num_envs=2, **{**SMALL, "frames": "single"})
    one, other, no = np.zeros((2, 4, 4), np.uint8), np.ones((2, 4, 4), np.uint8), np.zeros(2, bool)
    agent.batch_act_and_train(one)
    agent.batch_act_and_train(one, np.ones(2), ~no, no, other)  # Both ended: what follows is another episode.
    caught = unchanged_by(
        agent,
        lambda: agent.batch_act_and_train(one, np.ones(2), no, no, other),
        lambda: agent.batch_act_and_train(one, np.ones(2), no, no, one),
    )
    check(caught, ValueError, "next_observation differs from observation where no episode ended")


def test_a_stack_is_taken():
    both = spaces.Box(0, 255, (2, 4, 4), np.uint8), spaces.Discrete(2)
    agent = DQN(both, **{**SMALL, "frames": "stack_first"})
    for number in range(6):
        agent.act_and_train(np.full((2, 4, 4), number, np.uint8) + np.arange(2, dtype=np.uint8)[:, None, None], 0.0)
    assert agent.get_statistics()["t"] == 5


@pytest.mark.parametrize(("interval", "num_envs", "nearest"), [(4, 6, "4 and 8"), (8, 3, "2 and 4"), (3, 2, "1 and 3")])
def test_a_period_that_does_not_fit_names_both_numbers_and_the_nearest(interval, num_envs, nearest):
    agent = dqn_jax.dqn(PLAIN, **{**SMALL, "update_interval": interval})
    with pytest.raises(ValueError, match=f"every {interval} transitions does not fit {num_envs} environments.*nearest.* {nearest}"):
        agent.cadence(num_envs)
    legal = [int(word) for word in nearest.split(" and ")]
    assert all(agent.cadence(number).updates >= 1 for number in legal)


def _write(path, content):
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def saved(agents, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "agent"
    agents["plain"].save(path)
    return path.read_bytes()


def other_checkpoint(path, both=PLAIN, **options):
    DQN(both, **{**SMALL, **options}).save(path)
    return path


WIDER = Network(lambda key, o: {"w": jnp.ones((2, 2))}, lambda params, o: _first(o) @ params["w"][:1])
CHECKPOINTS = {
    "missing": (lambda path, saved: path / "nowhere", FileNotFoundError, "no checkpoint at"),
    "folder": (lambda path, saved: path, FileNotFoundError, "no checkpoint at"),
    "empty": (lambda path, saved: _write(path / "x", b""), CheckpointError, "is not a checkpoint"),
    "foreign": (
        lambda path, saved: _write(path / "x", b"PK\x03\x04 some archive of another program" * 9),
        CheckpointError,
        "is not a checkpoint",
    ),
    "text": (lambda path, saved: _write(path / "x", b"{}"), CheckpointError, "is not a checkpoint"),
    "truncated": (lambda path, saved: _write(path / "x", saved[:-7]), CheckpointError, "damaged"),
    "cut in the header": (lambda path, saved: _write(path / "x", saved[:200]), CheckpointError, "damaged"),
    "longer": (lambda path, saved: _write(path / "x", saved + b"\0" * 8), CheckpointError, "damaged"),
    "another network": (lambda path, saved: other_checkpoint(path / "x", network=WIDER), CheckpointError, "does not fit this agent"),
    "another capacity": (
        lambda path, saved: other_checkpoint(path / "x", capacity=16),
        CheckpointError,
        ".memory.rows.reward: got ((16, 1)",
    ),
    "another optimizer": (
        lambda path, saved: other_checkpoint(path / "x", optimizer=optax.adam(1e-3)),
        CheckpointError,
        "expected nothing",
    ),
    "another space": (lambda path, saved: other_checkpoint(path / "x", both=CHOICE), CheckpointError, "does not fit this agent"),
    "more environments": (
        lambda path, saved: other_checkpoint(path / "x", num_envs=4),
        CheckpointError,
        "num_envs: saved with 4, this agent has 1",
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bad_checkpoint(agents, saved, tmp_path, name):
    make, kind, message = CHECKPOINTS[name]
    agent, path = agents["plain"], make(tmp_path, saved)
    caught = unchanged_by(agent, lambda: agent.load(path), lambda: agent.act_and_train(ZEROS, 1.0))
    check(caught, kind, message)


def test_a_flipped_bit_anywhere_is_noticed(agents, saved, tmp_path):
    agent, path = agents["plain"], tmp_path / "flipped"
    rng = np.random.default_rng(0)
    header = 8 + int.from_bytes(saved[:8], "little")
    places = [*rng.integers(0, header, 150).tolist(), *rng.integers(header, len(saved), 100).tolist()]
    before, wrong = dqn_jax.digest(agent.state), []
    for place in places:
        damaged = bytearray(saved)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            agent.load(path)
            wrong.append((place, "loaded", bytes(damaged[place - 20 : place + 20])))
            break
        except CheckpointError:
            pass
        except Exception as error:
            wrong.append((place, repr(error), bytes(damaged[place - 20 : place + 20])))
    assert not wrong, wrong[:5]
    assert dqn_jax.digest(agent.state) == before
    agent.act_and_train(ZEROS, 1.0)


def test_a_state_of_another_agent_is_refused(agents):
    state = agents["plain"].state
    with pytest.raises(ValueError, match=r"(?s)does not fit this agent of 1 environment.*memory.rows.*got .*, expected "):
        DQN.from_state(PLAIN, state, **{**SMALL, "capacity": 16})
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)
    with pytest.raises(ValueError, match=r"pass one seed of it \(result.seed\(0\).state\)"):
        DQN.from_state(PLAIN, stacked, **SMALL)


def test_what_another_algorithm_learnt_is_refused_by_name(agents, tmp_path):
    path = tmp_path / "dqn"
    agents["plain"].save(path)
    agent = PPO(PLAIN, **ROLLOUT)
    with pytest.raises(CheckpointError, match=r"holds an agent of the class DQN, and this is a PPO: load it with a DQN$"):
        agent.load(path)
    with pytest.raises(ValueError, match="the state holds a DQNState, and this agent learns a PPOState: hand it to an agent of the algo"):
        PPO.from_state(PLAIN, agents["plain"].state, **ROLLOUT)


@pytest.mark.parametrize("build", [dqn_jax.dqn, dqn_jax.ppo, dqn_jax.pqn, dqn_jax.sac])
def test_the_pure_agents_say_where_seed_and_environments_go(build):
    with pytest.raises(TypeError, match=r"no option 'num_envs': it goes to dqn_jax.train\(agent, env, num_envs=...\), or to"):
        build(PLAIN, num_envs=4)
    with pytest.raises(TypeError, match=r"no option 'seed': it goes into the key of training.run"):
        build(PLAIN, seed=1)


@pytest.mark.parametrize(("space", "entropy"), [(FLOAT_BOX, 3.0), (spaces.Box(-1, 1, (), np.float32), 0.7)])
def test_an_entropy_beyond_that_of_a_uniform_policy_is_refused(space, entropy):
    with pytest.raises(ValueError, match=r"target_entropy must be in \(-inf, "):
        SAC((PLAIN[0], space), target_entropy=entropy, **REPLAY)


def test_bounds_whose_distance_is_beyond_32_bits_are_refused():
    with pytest.raises(ValueError, match="unbounded, or too wide for 32 bits"):
        SAC((PLAIN[0], spaces.Box(-3e38, 3e38, (1,), np.float64)), **REPLAY)


# PPO, PQN and SAC: what they do not share with DQN.

ROLLOUT = {"network": policy_and_value(2), "optimizer": optax.sgd(1e-6), "rollout_length": 4, "batch_size": 4}
REPLAY = {"actor": linear(2), "critic": linear(2), "batch_size": 4, "capacity": 32, "replay_start_size": 4}
INTEGERS = spaces.Box(-1, 1, (2,), np.int32)
TUPLE = spaces.Tuple((spaces.Discrete(2), FLOAT_BOX))
OTHER_ACTIONS = [
    (
        "SAC",
        spaces.Box(-np.inf, np.inf, (2,)),
        ValueError,
        "Box(-inf, inf, (2,), float32) is unbounded, or too wide for 32 bits: give it bounds with",
    ),
    ("SAC", spaces.Box(np.float32([-1, -1]), np.float32([1, np.inf])), ValueError, "is unbounded"),
    ("SAC", spaces.Box(np.float32([0, 1]), np.float32([1, 1])), ValueError, "needs a low bound below its high bound, got Box([0. 1.]"),
    ("SAC", INTEGERS, ValueError, "SAC needs a Box of floats or a Discrete action space, got Box(-1, 1, (2,), int32)"),
    ("SAC", spaces.MultiDiscrete([2, 2]), ValueError, "got MultiDiscrete([2 2]): PPO serves MultiDiscrete"),
    ("SAC", spaces.MultiBinary(2), ValueError, "got MultiBinary(2)"),
    ("SAC", TUPLE, ValueError, "got Tuple(Discrete(2), Box"),
    ("SAC", spaces.Discrete(3, start=1), NotImplementedError, "actions must start at 0, got Discrete(3, start=1)"),
    ("PQN", FLOAT_BOX, ValueError, "PQN needs a Discrete action space, got Box"),
    ("PQN", spaces.Discrete(3, start=1), NotImplementedError, "actions must start at 0, got Discrete(3, start=1)"),
    ("PPO", TUPLE, NotImplementedError, "PPO has no distribution for the action space Tuple(Discrete(2), Box"),
    ("PPO", spaces.Dict({"a": FLOAT_BOX}), NotImplementedError, "PPO has no distribution for the action space Dict"),
    ("PPO", INTEGERS, NotImplementedError, "it knows Discrete, MultiDiscrete and Box of floats"),
    ("PPO", spaces.MultiBinary(2), NotImplementedError, "PPO has no distribution for the action space MultiBinary(2)"),
    ("PPO", spaces.MultiDiscrete([2, 3], start=[1, 0]), NotImplementedError, "a MultiDiscrete must be one row of choices that start at 0"),
    ("PPO", spaces.MultiDiscrete([[2, 3], [2, 3]]), NotImplementedError, "a MultiDiscrete must be one row of choices that start at 0"),
    ("PPO", spaces.Discrete(3, start=1), NotImplementedError, "actions must start at 0, got Discrete(3, start=1)"),
]


@pytest.mark.parametrize(("algorithm", "actions", "kind", "message"), OTHER_ACTIONS)
def test_actions_that_an_algorithm_does_not_serve(algorithm, actions, kind, message):
    for build in {"SAC": (SAC, dqn_jax.sac), "PQN": (PQN, dqn_jax.pqn), "PPO": (PPO, dqn_jax.ppo)}[algorithm]:
        with pytest.raises(Exception) as caught:
            build((PLAIN[0], actions))
        check(caught, kind, message)


@pytest.mark.parametrize("build", [PPO, dqn_jax.ppo, SAC, dqn_jax.sac])
def test_a_mask_goes_with_numbered_actions_and_has_one_entry_for_each(build):
    other = [FLOAT_BOX, *([spaces.MultiDiscrete([2, 2])] if build in (PPO, dqn_jax.ppo) else [])]
    for actions in other:
        with pytest.raises(ValueError, match=r"an action mask is for numbered actions \(Discrete\): take it out of Dict"):
            build((MASKED[0], actions))
    with pytest.raises(ValueError, match=r"action_mask has shape \(2,\), there are 3 actions"):
        build((MASKED[0], spaces.Discrete(3)))


def test_a_rollout_that_does_not_divide_is_refused_with_the_numbers_before_anything_is_played():
    said = r"a rollout of 5 steps of 3 environment\(s\), 15 transitions, does not divide into minibatches of 4: choose"
    with pytest.raises(ValueError, match=said):
        PPO(PLAIN, num_envs=3, **{**ROLLOUT, "rollout_length": 5})
    env = dqn_jax.make("phys2d/CartPole-v1")
    agent = dqn_jax.ppo(env, **{**ROLLOUT, "rollout_length": 5})  # It will do for four.
    with pytest.raises(ValueError, match=said):
        dqn_jax.train(agent, env, num_envs=3, num_steps=100)
    dqn_jax.train(agent, env, num_envs=4, num_steps=100)


def test_a_rollout_of_pqn_and_a_mask_must_fit_too():
    with pytest.raises(ValueError, match=r"5 steps of 3 environment\(s\), 15 transitions, does not divide into minibatches of 4"):
        PQN(PLAIN, num_envs=3, rollout_length=5, batch_size=4)
    with pytest.raises(ValueError, match=r"action_mask has shape \(2,\), there are 3 actions"):
        PQN((MASKED[0], spaces.Discrete(3)))


def test_a_sac_agent_too_needs_environments_that_fit_its_interval():
    with pytest.raises(ValueError, match=r"every 4 transitions does not fit 3 environments.*nearest.* 2 and 4"):
        SAC(PLAIN, num_envs=3, **{**REPLAY, "update_interval": 4})


PPO_OPTIONS = [
    ({"bath_size": 4}, TypeError, "PPO has no option 'bath_size': did you mean batch_size?"),
    ({"rolout_length": 4}, TypeError, "did you mean rollout_length?"),
    ({"clip_range": 0.2}, TypeError, "did you mean clip?"),
    ({"ent_coef": 0.1}, TypeError, "did you mean entropy_coef?"),
    ({"n_epochs": 3}, TypeError, "did you mean epochs?"),
    ({"minibatch_size": 4}, TypeError, "did you mean batch_size?"),
    ({"num_minibatches": 4}, TypeError, "PPO has no option 'num_minibatches': batch_size is the transitions in a minibatch"),
    ({"vf_coef": 0.5}, TypeError, "give value_coef; half of the squared error is weighed"),
    ({"anneal_lr": True}, TypeError, "give learning_rate=(start, 0.0, transitions)"),
    ({"stats_window_size": 4}, TypeError, "PPO has no option 'stats_window_size': the options are"),
    ({"zzz": 1}, TypeError, "PPO has no option 'zzz': the options are activation, batch_size, bonus_clip, "),
    ({"rollout_length": 0}, ValueError, "rollout_length must be at least 1, got 0"),
    ({"rollout_length": 4.0}, TypeError, "rollout_length must be a whole number, got 4.0"),
    ({"batch_size": 0}, ValueError, "batch_size must be at least 2"),
    ({"batch_size": True}, TypeError, "batch_size must be a whole number, got True"),
    ({"batch_size": 3}, ValueError, "4 transitions, does not divide into minibatches of 3"),
    ({"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
    ({"epochs": 2.5}, TypeError, "epochs must be a whole number, got 2.5"),
    ({"gamma": 1.5}, ValueError, "gamma must be in [0, 1], got 1.5"),
    ({"gae_lambda": 1.5}, ValueError, "gae_lambda must be in [0, 1], got 1.5"),
    ({"gae_lambda": None}, TypeError, "gae_lambda must be a number, got None"),
    ({"clip": 0}, ValueError, "clip must be in (0, inf), got 0"),
    ({"clip": None}, TypeError, "clip must be a number, got None: ratios never exceed 20, so 20 clips none"),
    ({"clip": "x"}, TypeError, "clip must be a number, got 'x'"),
    ({"value_clip": 0.0}, ValueError, "value_clip must be in (0, inf), got 0.0"),
    ({"value_coef": -1}, ValueError, "value_coef must be in [0, inf), got -1"),
    ({"entropy_coef": -0.1}, ValueError, "entropy_coef"),
    ({"entropy_coef": NAN}, ValueError, "entropy_coef"),
    ({"entropy_coef": "x"}, TypeError, "entropy_coef must be a number, got 'x'"),
    ({"target_kl": -1}, ValueError, "target_kl must be in (0, inf), got -1"),
    ({"max_grad_norm": 0}, ValueError, "max_grad_norm"),
    ({"normalize_observation": "yes"}, TypeError, "normalize_observation must be True or False, got 'yes'"),
    ({"scale_reward": None}, TypeError, "scale_reward must be True or False, got None"),
    ({"shared": "yes"}, TypeError, "shared must be True, False or None, got 'yes'"),
    ({"shared": 1}, TypeError, "shared must be True, False or None, got 1"),
    ({"n_steps": 8}, TypeError, "PPO has no option 'n_steps': did you mean rollout_length?"),
    ({"ent_coef": 0.1}, TypeError, "did you mean entropy_coef?"),
    ({"clip_range": 0.1}, TypeError, "did you mean clip?"),
    ({"activation": "gelu"}, ValueError, "activation must be one of 'auto', 'tanh', 'relu', got 'gelu'"),
    ({"encoder": "resnet"}, ValueError, "encoder must be one of 'auto', 'flat', 'nature', 'minatar', got 'resnet'"),
    ({"learning_rate": 0}, ValueError, "learning_rate must be in (0, inf), got 0"),
    ({"learning_rate": "x"}, TypeError, "learning_rate must be a number, got 'x'"),
    ({"learning_rate": (1e-3, 0.0)}, ValueError, "learning_rate must be (start, end, steps between), a number or a schedule"),
    ({"learning_rate": (1e-3, -1.0, 10)}, ValueError, "learning_rate's end must be in [0, inf), got -1.0"),
    ({"learning_rate": (1e-3, 0.0, 10.5)}, TypeError, "learning_rate's steps must be a whole number, got 10.5"),
    ({"hidden": ()}, ValueError, "hidden is empty"),
    ({"curiosity": "icm"}, ValueError, "curiosity must be one of 'off', 'rnd', 'snd-v', 'snd-std', 'snd-vic', got 'icm'"),
    ({"intrinsic_gamma": 1.5}, ValueError, "intrinsic_gamma must be in [0, 1], got 1.5"),
    ({"intrinsic_coef": -1}, ValueError, "intrinsic_coef must be in [0, inf), got -1"),
    ({"extrinsic_coef": None}, TypeError, "extrinsic_coef must be a number, got None"),
    ({"curiosity_learning_rate": 0}, ValueError, "curiosity_learning_rate must be in (0, inf), got 0"),
    ({"curiosity_epochs": 0}, ValueError, "curiosity_epochs must be at least 1, got 0"),
    ({"curiosity_channels": 0}, ValueError, "curiosity_channels must be at least 1, got 0"),
    ({"predictor_share": 0}, ValueError, "predictor_share must be in (0, 1], got 0"),
    ({"predictor_mask": "elements"}, ValueError, "predictor_mask must be one of 'rows', 'features', got 'elements'"),
    ({"bonus_on": "state"}, ValueError, "bonus_on must be one of 'successor', 'observation', got 'state'"),
    ({"bonus_scale": 0}, ValueError, "bonus_scale must be in (0, inf), got 0"),
    ({"bonus_clip": "x"}, TypeError, "bonus_clip must be a number, got 'x'"),
    ({"curiosity": "rnd", "network": policy_and_value(2)}, ValueError, "values [1], expected [1, 2]: with curiosity a network gives two"),
    ({"hidden": 64}, TypeError, "hidden must be a tuple of widths, got 64"),
    ({"network": "mlp"}, TypeError, "network must have the functions init and apply, got 'mlp'"),
    ({"optimizer": "adam"}, TypeError, "optimizer must have the functions init and update, got 'adam'"),
    ({"num_envs": 0}, ValueError, "num_envs must be at least 1, got 0"),
    ({"seed": 0.5}, TypeError, "seed must be a whole number, got 0.5"),
]
PQN_OPTIONS = [
    ({"bath_size": 4}, TypeError, "PQN has no option 'bath_size': did you mean batch_size?"),
    ({"lambd": 0.5}, TypeError, "PQN has no option 'lambd': did you mean q_lambda?"),
    ({"gae_lambda": 0.5}, TypeError, "PQN has no option 'gae_lambda': did you mean q_lambda?"),
    ({"n_epochs": 3}, TypeError, "did you mean epochs?"),
    ({"end_e": 0.1}, TypeError, "did you mean epsilon?"),
    ({"capacity": 4}, TypeError, "PQN has no option 'capacity': the options are batch_size, encoder, epochs, epsilon, "),
    ({"rollout_length": 0}, ValueError, "rollout_length must be at least 1, got 0"),
    ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
    ({"batch_size": 3}, ValueError, "4 transitions, does not divide into minibatches of 3"),
    ({"epochs": 2.5}, TypeError, "epochs must be a whole number, got 2.5"),
    ({"gamma": 1.5}, ValueError, "gamma must be in [0, 1], got 1.5"),
    ({"q_lambda": -0.1}, ValueError, "q_lambda must be in [0, 1], got -0.1"),
    ({"q_lambda": None}, TypeError, "q_lambda must be a number, got None"),
    ({"epsilon": 1.5}, ValueError, "epsilon must be in [0, 1], got 1.5"),
    ({"epsilon": (1.0, 0.1)}, ValueError, "epsilon must be (start, end, steps between), a number or a schedule"),
    ({"learning_rate": 0}, ValueError, "learning_rate must be in (0, inf), got 0"),
    ({"learning_rate": (1e-3, -1.0, 10)}, ValueError, "learning_rate's end must be in [0, inf), got -1.0"),
    ({"max_grad_norm": 0}, ValueError, "max_grad_norm must be in (0, inf), got 0"),
    ({"layer_norm": 1}, TypeError, "layer_norm must be True or False, got 1"),
    ({"encoder": "resnet"}, ValueError, "encoder must be one of 'auto', 'flat', 'nature', 'minatar', got 'resnet'"),
    ({"hidden": ()}, ValueError, "hidden is empty"),
    ({"network": "mlp"}, TypeError, "network must have the functions init and apply, got 'mlp'"),
    ({"optimizer": "adam"}, TypeError, "optimizer must have the functions init and update, got 'adam'"),
    ({"num_envs": 0}, ValueError, "num_envs must be at least 1, got 0"),
]
CURIOUS_OPTIONS = [
    ({"curiosity": "icm"}, ValueError, "curiosity must be one of 'off', 'rnd', 'snd-v', 'snd-std', 'snd-vic', got 'icm'"),
    ({"curiosity": "rnd", "n_steps": 3}, ValueError, "curiosity='rnd' pays for every step, and with n_steps=3 the replay gives only"),
    (
        {"curiosity": "snd-vic", "n_steps": 1, "batch_size": 1},
        ValueError,
        "curiosity='snd-vic' compares the rows of a batch with one another",
    ),
    ({"curiosity": "snd-v", "intrinsic_coef": -1}, ValueError, "intrinsic_coef must be in [0, inf), got -1"),
    ({"curiosity_learning_rate": 0}, ValueError, "curiosity_learning_rate must be in (0, inf), got 0"),
    ({"curiosity_channels": 0}, ValueError, "curiosity_channels must be at least 1, got 0"),
    ({"intrinsic_gamma": 0.9}, TypeError, "has no option 'intrinsic_gamma'"),
]
SAC_OPTIONS = [
    ({"bath_size": 4}, TypeError, "SAC has no option 'bath_size': did you mean batch_size?"),
    ({"buffer_size": 4}, TypeError, "did you mean capacity?"),
    ({"learning_starts": 4}, TypeError, "did you mean replay_start_size?"),
    ({"critic_lerning_rate": 1e-3}, TypeError, "did you mean critic_learning_rate?"),
    ({"epsilon": 0.1}, TypeError, "SAC has no option 'epsilon': the options are actor, alpha, batch_size, "),
    ({"frames": "single"}, TypeError, "SAC has no option 'frames'"),
    ({"gamma": NAN}, ValueError, "gamma"),
    ({"tau": 0}, ValueError, "tau must be in (0, 1], got 0"),
    ({"learning_rate": (1e-3, 0.0, 10)}, TypeError, "learning_rate must be a number, got (0.001, 0.0, 10)"),
    ({"critic_learning_rate": 0}, ValueError, "critic_learning_rate must be in (0, inf), got 0"),
    ({"critic_learning_rate": "x"}, TypeError, "critic_learning_rate must be a number, got 'x'"),
    ({"initial_temperature": 0}, ValueError, "initial_temperature must be in (0, inf), got 0"),
    ({"initial_temperature": 11.0}, ValueError, "initial_temperature must be in [0.0001, max_temperature], got 11.0 and 10.0"),
    ({"ent_coef": 0.1}, TypeError, "did you mean initial_temperature?"),
    ({"q_lr": 0.1}, TypeError, "did you mean critic_learning_rate?"),
    ({"target_network_frequency": 1}, TypeError, "SAC has no option 'target_network_frequency': the options are"),
    ({"target_update_interval": 1}, TypeError, "did you mean tau?"),
    ({"alpha": 0.2}, ValueError, "alpha=0.2 is how much priorities count, and prioritized is False: give prioritized=True, or"),
    ({"initial_temperature": None}, TypeError, "initial_temperature must be a number, got None"),
    ({"max_temperature": "x"}, TypeError, "max_temperature must be a number, got 'x'"),
    ({"reward_scale": 0}, ValueError, "reward_scale must be in (0, inf), got 0"),
    ({"reward_scale": INF}, ValueError, "reward_scale"),
    ({"target_entropy": 2.0}, ValueError, "target_entropy must be in [0, 1], got 2.0"),
    ({"target_entropy": -1.0}, ValueError, "target_entropy must be in [0, 1], got -1.0"),
    ({"target_entropy": NAN}, ValueError, "target_entropy"),
    ({"target_entropy": "auto"}, TypeError, "target_entropy must be a number, got 'auto'"),
    ({"max_grad_norm": 0}, ValueError, "max_grad_norm"),
    ({"n_steps": 0}, ValueError, "n_steps must be at least 1, got 0"),
    ({"n_steps": 33}, ValueError, "n_steps 33 exceeds capacity 32"),
    ({"batch_size": 33}, ValueError, "batch_size 33 exceeds capacity 32"),
    ({"replay_start_size": 3, "update_interval": 1}, ValueError, "batch_size 4 exceeds the 3 transitions stored when learning starts"),
    ({"prioritized": "yes"}, TypeError, "prioritized must be True or False, got 'yes'"),
    ({"prioritized": True, "beta": (0.4, 1.1, 10)}, ValueError, "beta's end must be in [0, 1], got 1.1"),
    ({"encoder": "resnet"}, ValueError, "encoder must be one of"),
    ({"hidden": (0,)}, ValueError, "hidden must be at least 1, got 0"),
    ({"actor": "mlp"}, TypeError, "actor must have the functions init and apply, got 'mlp'"),
    ({"critic": 3}, TypeError, "critic must have the functions init and apply, got 3"),
    ({"optimizers": optax.adam(1e-3)}, TypeError, "optimizers must be dqn_jax.algorithms.sac.Optimizers(actor=, critic=, temperature=)"),
    ({"optimizers": (optax.adam(1e-3),) * 3}, TypeError, "optimizers must be dqn_jax.algorithms.sac.Optimizers("),
    ({"optimizers": Optimizers(optax.adam(1e-3), 3, 4)}, TypeError, "optimizers.critic must have the functions init and update, got 3"),
    ({"capacity": 10**11}, MemoryError, "bytes are needed"),
    ({"num_envs": 64}, ValueError, "capacity 32 leaves 0 rows for each of 64 environments"),
]


@pytest.mark.parametrize(("options", "kind", "message"), PPO_OPTIONS)
def test_bad_option_of_ppo(options, kind, message):
    with pytest.raises(Exception) as caught:
        PPO(PLAIN, **{**ROLLOUT, **options})
    check(caught, kind, message)


@pytest.mark.parametrize(("options", "kind", "message"), PQN_OPTIONS)
def test_bad_option_of_pqn(options, kind, message):
    with pytest.raises(Exception) as caught:
        PQN(PLAIN, **{**ROLLOUT, "network": linear(2), **options})
    check(caught, kind, message)


@pytest.mark.parametrize(("options", "kind", "message"), SAC_OPTIONS)
def test_bad_option_of_sac(options, kind, message):
    with pytest.raises(Exception) as caught:
        SAC(PLAIN, **{**REPLAY, **options})
    check(caught, kind, message)


@pytest.mark.parametrize(("options", "kind", "message"), CURIOUS_OPTIONS)
@pytest.mark.parametrize("agent", [DQN, SAC])
def test_bad_curiosity_of_a_replay_agent(agent, options, kind, message):
    with pytest.raises(Exception) as caught:
        agent(PLAIN, **{"batch_size": 4, "capacity": 32, "replay_start_size": 4, **options})
    check(caught, kind, message)


@pytest.mark.parametrize("agent", [dqn_jax.dqn, dqn_jax.ppo, dqn_jax.sac])
def test_curiosity_cannot_see_more_channels_than_there_are(agent):
    pictures = spaces.Box(0, 255, (4, 84, 84), np.uint8), spaces.Discrete(3)
    replay = {} if agent is dqn_jax.ppo else {"n_steps": 1, "capacity": 1_000}
    with pytest.raises(
        ValueError, match=r"curiosity_channels=5 exceeds the 4 channels of the images of Box\(0, 255, \(4, 84, 84\), uint8\)"
    ):
        agent(pictures, curiosity="rnd", curiosity_channels=5, **replay)
    with pytest.raises(ValueError, match=r"curiosity_channels=1 is for images, and the networks see Box.* as a vector: give None"):
        agent(pictures, curiosity="rnd", curiosity_channels=1, encoder="flat", **replay)


def test_images_and_actions_of_numbers_need_networks_of_ones_own():
    pictures = spaces.Box(0, 255, (84, 84, 4), np.uint8), FLOAT_BOX
    with pytest.raises(NotImplementedError, match="is an image: give encoder='flat', or an actor and a critic of your own"):
        SAC(pictures, capacity=1_000)


def test_only_floats_can_be_normalised():
    with pytest.raises(ValueError, match=r"normalize_observation is for observations of floats, and .* holds none: leave it out"):
        PPO(CHOICE, normalize_observation=True)


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
@pytest.mark.parametrize("kind", [PPO, SAC])
def test_actions_are_of_the_spaces_own_kind_of_number_and_within_its_bounds(kind, dtype):
    # Neither end is a number of float32: what is rounded there lies outside.
    box = spaces.Box(np.array([0.1, -0.3], dtype), np.array([0.7, 0.9], dtype), dtype=dtype)
    far = linear(5, lambda outputs: (outputs[:, :4] * jnp.array([1e3, 1e3, 0, 0]), outputs[:, 4]))
    options = {**ROLLOUT, "network": far} if kind is PPO else NUMBERS | {"actor": linear(4)}
    agent = kind((PLAIN[0], box), **options)
    several, stepped = kind((PLAIN[0], box), num_envs=2, **options), [np.stack([ZEROS, ZEROS + 1e3])]
    for _ in range(6):
        given = (
            agent.act_and_train(ZEROS + 1e3, 0.0),
            agent.act(ZEROS + 1e3),
            *several.batch_act_and_train(*stepped),
            *several.batch_act(np.stack([ZEROS, ZEROS + 1e3])),
        )
        assert all(box.contains(action) and action.dtype == dtype for action in given), given
        stepped = [stepped[0], np.zeros(2), np.zeros(2, bool), np.zeros(2, bool)]


class Choices(gymnasium.Env):
    """Two choices a step; episodes of three."""

    observation_space, action_space = spaces.Box(-1, 1, (3,), np.float32), spaces.MultiDiscrete([4, 3])

    def reset(self, *, seed=None, options=None):
        self.time = 0
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.time += 1
        return np.full(3, self.time / 3, np.float32), float(action.sum()), self.time == 3, False, {}


NUMBERS = {**REPLAY, "actor": linear(2), "critic": action_value()}
WORLDS = {
    "PPO, CartPole": (PPO, "CartPole-v1", ROLLOUT),
    "PPO, Pendulum": (PPO, "Pendulum-v1", ROLLOUT),
    "PPO, choices": (PPO, Choices, {**ROLLOUT, "network": policy_and_value(7)}),
    "PQN, CartPole": (PQN, "CartPole-v1", {**ROLLOUT, "network": linear(2)}),
    "SAC, CartPole": (SAC, "CartPole-v1", REPLAY),
    "SAC, Pendulum": (SAC, "Pendulum-v1", NUMBERS),
}


@pytest.mark.parametrize("name", WORLDS)
def test_actions_are_as_the_environment_takes_them(name):
    kind, world, options = WORLDS[name]
    env = gymnasium.make(world) if isinstance(world, str) else world()
    agent = kind(env, **options)
    reward, (observation, _) = 0.0, env.reset(seed=0)
    for _ in range(12):
        action, greedy = agent.act_and_train(observation, reward), agent.act(observation)
        for given in (action, greedy):
            assert env.action_space.contains(given), given
            assert type(given) is (int if isinstance(env.action_space, spaces.Discrete) else np.ndarray)
        observation, reward, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            agent.stop_episode_and_train(observation, reward, terminated)
            observation, _ = env.reset()
    assert agent.get_statistics()["n_updates"] >= 2
    env.close()


@pytest.mark.parametrize("name", ["PPO, CartPole", "PPO, Pendulum", "PQN, CartPole", "SAC, CartPole", "SAC, Pendulum"])
def test_bad_observations_and_rewards_leave_these_agents_as_they_were(name):
    kind, world, options = WORLDS[name]
    both = PLAIN[0], gymnasium.make(world).action_space
    agent = kind(both, **options)
    for _ in range(6):
        agent.act_and_train(ZEROS, 1.0)

    def go_on():
        agent.act_and_train(ZEROS, 1.0)

    for call, error, message in (
        (lambda: agent.act_and_train(np.array([0, NAN, 0], np.float32), 1.0), ValueError, "observation[1] is nan"),
        (lambda: agent.act_and_train(np.zeros(4, np.float32), 1.0), ValueError, "observation has shape (4,)"),
        (lambda: agent.act_and_train(ZEROS, INF), ValueError, "reward is inf"),
        (lambda: agent.act(np.zeros(3, np.int64)), TypeError, "observation has dtype int64"),
        (lambda: agent.stop_episode_and_train(ZEROS, 1.0, 1), TypeError, "terminated is 1"),
    ):
        check(unchanged_by(agent, call, go_on), error, message)


# What JAX leaves to its users.


def test_a_key_that_is_no_typed_key_is_refused():
    agent = dqn_jax.dqn(PLAIN)
    for key in (jax.random.PRNGKey(0), jnp.zeros(2, jnp.uint32)):
        with pytest.raises(TypeError, match=r"the key is a uint32\[2\]: pass jax.random.key\(seed\)"):
            agent.init(key, jnp.zeros((1, 3)))
    env = dqn_jax.make("phys2d/CartPole-v1")
    with pytest.raises(TypeError, match=r"pass jax\.random\.key"):
        dqn_jax.train(dqn_jax.dqn(env), env, num_steps=2_000).run(jax.random.PRNGKey(0))


def test_more_steps_than_counters_hold_are_refused():
    env = dqn_jax.make("phys2d/CartPole-v1")
    with pytest.raises(ValueError, match="num_steps must be below 2\\^31"):
        dqn_jax.train(dqn_jax.dqn(env), env, num_steps=2**31)


def test_a_donated_state_used_again_raises():
    env = dqn_jax.make("phys2d/CartPole-v1")
    training = dqn_jax.train(dqn_jax.dqn(env, capacity=64, replay_start_size=32, batch_size=8), env, num_steps=100, history_length=2)
    run = jax.jit(training.init)(jax.random.key(0))
    advance = jax.jit(training.advance, donate_argnums=0)
    advance(run)
    with pytest.raises((RuntimeError, ValueError), match="deleted or donated"):
        advance(run)


ELSEWHERE = """
import jax
jax.config.update("jax_num_cpu_devices", 2)
import numpy as np, dqn_jax
from gymnasium import spaces
both = (spaces.Box(-1, 1, (3,), np.float32), spaces.Discrete(2))
options = {"hidden": (8,), "capacity": 64, "replay_start_size": 8, "batch_size": 4, "update_interval": 4}

def fed(agent, steps, place=lambda x: x):
    for t in range(steps):
        agent.act_and_train(place(np.full(3, t / 100, np.float32)), 1.0)
    return dqn_jax.digest(agent.state)

second = jax.devices()[1]
home, guest, wide = (dqn_jax.DQN(both, **options) for _ in range(3))
assert fed(home, 30) == fed(guest, 30, lambda x: jax.device_put(x, second))  # What comes from another device is taken.
moved = dqn_jax.DQN.from_state(both, jax.device_put(home.state, second), **options)
assert fed(moved, 30) == fed(dqn_jax.DQN.from_state(both, home.state, **options), 30)  # And an agent may live there.
fed(wide, 30)
kinds = lambda: [leaf.dtype for leaf in jax.tree.leaves(wide.state)]
before = kinds()
with jax.enable_x64(True):  # Switched on later, or by somebody else: the state keeps its dtypes.
    fed(wide, 30)
    assert kinds() == before
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(dqn_jax.PPO(both, hidden=(8,)).state)} <= {"bool", "float32", "int32", "key<fry>"}
"""


def test_other_devices_and_64_bits_do_no_harm():
    done = subprocess.run([sys.executable, "-c", ELSEWHERE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
