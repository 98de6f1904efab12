"""Real learning on real environments, with the default options: several seeds, thresholds with room for noise. Slow."""

import gymnasium
import jax
import numpy as np
import pytest

import dqn_jax
from dqn_jax import DQN
from dqn_jax.statistics import bootstrap_interval, iqm

pytestmark = pytest.mark.slow


def learn_step_by_step(seed, num_steps):
    """Trains the default agent on CartPole-v1 through the step-by-step interface."""
    env = gymnasium.make("CartPole-v1")
    agent = DQN(env, seed=seed)
    observation, reward = env.reset(seed=seed)[0], 0.0
    for _ in range(num_steps):
        observation, reward, terminated, truncated, _ = env.step(agent.act_and_train(observation, reward))
        if terminated or truncated:
            agent.stop_episode_and_train(observation, reward, terminated=terminated)
            observation, reward = env.reset()[0], 0.0
    return agent


def greedy_return(agent, num_episodes, seed):
    """The mean return of greedy episodes."""
    env = gymnasium.make("CartPole-v1")
    returns = []
    for episode in range(num_episodes):
        observation, total, over = env.reset(seed=seed + episode)[0], 0.0, False
        while not over:
            observation, reward, terminated, truncated, _ = env.step(agent.act(observation))
            total, over = total + reward, terminated or truncated
        returns.append(total)
    return float(np.mean(returns))


def test_cartpole_step_by_step():
    scores = {seed: greedy_return(learn_step_by_step(seed, 50_000), 20, 10_000) for seed in range(200, 210)}
    values = np.array(list(scores.values()))
    print(scores, "IQM", iqm(values), bootstrap_interval(values))
    assert sum(values >= 475) >= 8, scores


def compiled_scores(num_seeds, num_steps):
    """Greedy returns ``[seeds]`` of the default agent on phys2d's CartPole with CartPole-v1's dynamics."""
    env = dqn_jax.make("phys2d/CartPole-v1", polemass_length=0.05)
    agent = dqn_jax.dqn(env)
    keys = jax.random.split(jax.random.key(200), num_seeds)
    result = jax.jit(jax.vmap(dqn_jax.train(agent, env, num_steps=num_steps).run))(keys)
    returns = jax.jit(jax.vmap(dqn_jax.evaluate(agent, env, num_episodes=20)))(result.state, jax.random.split(jax.random.key(7), num_seeds))
    return np.asarray(returns).mean(axis=1)


def test_cartpole_compiled():
    scores = compiled_scores(num_seeds=32, num_steps=100_000)
    print(np.sort(scores), "IQM", iqm(scores), bootstrap_interval(scores))
    assert iqm(scores) >= 475, np.sort(scores)
