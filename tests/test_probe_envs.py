"""Both drivers learn the values of environments that can fail for one reason only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_networks import action_value, linear, policy_and_value
from probe_envs import AIM, N_STEP_PROBES, PROBES, PUSHES

import dqn_jax
from dqn_jax import DQN
from dqn_jax.networks import Network

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


# PPO, PQN and SAC. Their networks see a constant beside the observation: every probe can then be learnt by linear ones.


def affine(network):
    def seen(observation):
        return jnp.concatenate([observation, jnp.ones_like(observation)], axis=-1)

    return Network(
        lambda key, observation, *action: network.init(key, seen(observation), *action),
        lambda params, observation, *action: network.apply(params, seen(observation), *action),
    )


def trained(build, env, steps, num_envs=4, **options):
    """An agent, and the learner that a compiled run of it ends with."""
    agent = build(env, **options)
    training = dqn_jax.train(agent, env, num_envs=num_envs, num_steps=steps, history_length=1)
    return agent, jax.jit(training.run)(jax.random.key(1)).state.learner


def on_policy(env, num_outputs, gamma, learning_rate=0.05):
    """PPO: the agent, its learner and its values as a function of observations."""
    network = affine(policy_and_value(num_outputs))
    options = {"network": network, "rollout_length": 32, "batch_size": 64, "epochs": 4, "learning_rate": learning_rate, "gamma": gamma}
    agent, learner = trained(dqn_jax.ppo, env, 16_000, **options)
    return agent, learner, lambda observations: np.asarray(network.apply(learner.params, observations)[1])


def soft(env, actor, critic, gamma, **options):
    """SAC whose temperature only falls, so that values are those of a greedy policy; as ``on_policy``, a value for each critic."""
    critic = affine(critic)
    few = {"capacity": 1_000, "replay_start_size": 32, "batch_size": 32, "update_interval": 4, "learning_rate": 2e-2, "tau": 0.05}
    agent, learner = trained(dqn_jax.sac, env, 16_000, actor=affine(actor), critic=critic, gamma=gamma, **few, **options)

    def values(*inputs):
        return np.asarray(jax.vmap(lambda params: critic.apply(params, *inputs))(learner.critics))

    return agent, learner, values


@pytest.mark.parametrize("name", ["action for the observation", "discounting", "truncation"])
def test_ppo(name):
    probe = PROBES[name]
    agent, learner, values = on_policy(probe.env, 2, probe.gamma)
    observations, wanted = np.array(list(probe.values), np.float32)[:, None], np.array(list(probe.values.values()))
    np.testing.assert_allclose(values(observations), wanted.max(axis=1), rtol=0.1, atol=0.1)
    if name == "action for the observation":
        np.testing.assert_array_equal(agent.exploit(learner, observations), wanted.argmax(axis=1))


@pytest.mark.parametrize("name", ["action for the observation", "discounting", "truncation"])
def test_pqn(name):
    probe, network = PROBES[name], affine(linear(2))
    options = {"network": network, "rollout_length": 32, "batch_size": 64, "learning_rate": 0.05, "epsilon": 0.5}
    agent, learner = trained(dqn_jax.pqn, probe.env, 16_000, gamma=probe.gamma, **options)
    assert_learnt(agent, learner, probe, network)


@pytest.mark.parametrize(
    ("name", "n_steps"), [("action for the observation", 1), ("truncation", 1), ("discounting over windows and a tail", 3)]
)
def test_sac_of_numbered_actions(name, n_steps):
    probe = {**PROBES, **N_STEP_PROBES}[name]
    agent, learner, values = soft(probe.env, linear(2), linear(2), probe.gamma, n_steps=n_steps, target_entropy=0.0)
    observations, wanted = np.array(list(probe.values), np.float32)[:, None], np.array(list(probe.values.values()))
    greedy = np.asarray(agent.exploit(learner, observations))
    np.testing.assert_array_equal(np.take_along_axis(wanted, greedy[:, None], axis=1)[:, 0], wanted.max(axis=1))
    # What the policy has ceased to do keeps the value that it had.
    for q in values(observations):
        np.testing.assert_allclose(np.take_along_axis(q, greedy[:, None], axis=1)[:, 0], wanted.max(axis=1), rtol=0.1, atol=0.1)


def test_truncation_with_actions_of_numbers():
    probe = PROBES["truncation"]
    env, one = probe.env._replace(action_space=PUSHES), np.ones((1, 1), np.float32)
    _, _, values = on_policy(env, 2, probe.gamma)
    np.testing.assert_allclose(values(one), 20, rtol=0.1)
    agent, learner, values = soft(env, linear(2), action_value(), probe.gamma, target_entropy=-20.0)
    np.testing.assert_allclose(values(one, (agent.exploit(learner, one) - 1) / 2), 20, rtol=0.1)


def by_products(key, observation, action):
    del key
    return {"w": jnp.zeros(observation.shape[-1] * (action.shape[-1] + 1) + action.shape[-1])}


def value_by_products(params, observation, action):
    products = [observation, jnp.square(action), observation * action]
    return jnp.concatenate(products, axis=-1) @ params["w"]


# A value that is a parabola of the action; where its top is depends on the observation.
PARABOLA = Network(by_products, value_by_products)


@pytest.mark.parametrize("algorithm", ["ppo", "sac"])
def test_a_number_for_the_observation(algorithm):
    if algorithm == "ppo":
        agent, learner, _ = on_policy(AIM.env, 2, 0.0, learning_rate=0.01)
    else:
        # As random as by default: a policy that hardly varies fills the replay with what says nothing of the parabola's shape.
        agent, learner, _ = soft(AIM.env, linear(2), PARABOLA, 0.0, target_entropy=-1.0)
    observations = np.array(list(AIM.best), np.float32)[:, None]
    np.testing.assert_allclose(agent.exploit(learner, observations)[:, 0], list(AIM.best.values()), atol=0.15)
