"""Both drivers learn the values of environments that can fail for one reason only."""

import jax
import numpy as np
import pytest
from probe_envs import N_STEP_PROBES, PROBES

import dqn_jax
from dqn_jax import DQN

OPTIONS = {
    "hidden": (16,),
    "learning_rate": 1e-2,
    # Huber's loss would forgive a minority of wrong targets: it finds something like their median, this one their mean.
    "loss": "mse",
    "batch_size": 32,
    "capacity": 1000,
    "replay_start_size": 32,
    "update_interval": 1,
    "target_update_interval": 20,
    "tau": 1.0,
    "epsilon": 0.5,
}
STEPS = 2500
CASES = {
    **{name: (probe, 1) for name, probe in PROBES.items()},
    **{f"{name}, 3 steps": (probe, 3) for name, probe in N_STEP_PROBES.items()},
}


def assert_learnt(agent, learner, probe, network):
    observations = np.array(list(probe.values), np.float32)[:, None]
    values = np.asarray(network.apply(learner.params, observations))
    wanted = np.array(list(probe.values.values()))
    np.testing.assert_allclose(values, wanted, rtol=0.1, atol=0.1)
    clear = np.abs(wanted[:, 0] - wanted[:, 1]) > 0.5
    np.testing.assert_array_equal(np.asarray(agent.exploit(learner, observations))[clear], wanted.argmax(axis=1)[clear])


def options_for(n_steps, gamma):
    network = dqn_jax.networks.QNetwork(2, (16,))
    return {**OPTIONS, "n_steps": n_steps, "gamma": gamma, "network": network}


@pytest.mark.parametrize(("name", "num_envs"), [*((name, 1) for name in CASES), ("truncation", 4), ("truncation, 3 steps", 4)])
def test_compiled(name, num_envs):
    probe, n_steps = CASES[name]
    options = {**options_for(n_steps, probe.gamma), "update_interval": num_envs}
    agent = dqn_jax.dqn(probe.env, **options)
    result = jax.jit(dqn_jax.train(agent, probe.env, num_envs=num_envs, num_steps=STEPS * num_envs, history_length=1).run)(
        jax.random.key(1)
    )
    assert_learnt(agent, result.state.learner, probe, options["network"])


def play(agent, probe, steps):
    """Plays a probe through the step-by-step interface."""
    reset, step = jax.jit(probe.env.reset), jax.jit(probe.env.step)
    keys = jax.random.split(jax.random.key(2), steps + 1)
    state, observation = reset(keys[0])
    reward = 0.0
    for key in keys[1:]:
        action = agent.act_and_train(np.asarray(observation), reward)
        state, result = step(key, state, action)
        observation, reward = result.observation, float(result.reward)
        if result.terminated or result.truncated:
            agent.stop_episode_and_train(np.asarray(result.next_observation), reward, terminated=bool(result.terminated))


BOTH_DRIVERS = [
    "action for the observation",
    "termination",
    "truncation",
    "truncation, 3 steps",
    "discounting over windows and a tail, 3 steps",
]


@pytest.mark.parametrize("name", BOTH_DRIVERS)
def test_step_by_step(name):
    probe, n_steps = CASES[name]
    options = options_for(n_steps, probe.gamma)
    agent = DQN(probe.env, seed=1, **options)
    play(agent, probe, STEPS)
    assert_learnt(agent.agent, agent.state.learner, probe, options["network"])


@pytest.mark.parametrize("n_steps", [1, 3])
def test_the_truncation_probe_tells_the_two_ends_apart(n_steps):
    # Handing the same ends in as terminations must give another value: else the probe above proves nothing.
    probe = PROBES["truncation"]
    options = options_for(n_steps, probe.gamma)
    agent = DQN(probe.env, seed=1, **options)
    for _ in range(STEPS // 10):
        for _ in range(10):
            agent.act_and_train(np.ones(1, np.float32), 1.0)
        agent.stop_episode_and_train(np.ones(1, np.float32), 1.0, terminated=True)
    values = np.asarray(options["network"].apply(agent.state.learner.params, np.ones((1, 1), np.float32)))
    assert (values < 9).all() and (values > 5).all()
