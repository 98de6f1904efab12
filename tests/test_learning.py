"""Real learning on real environments, with the default options: several seeds, thresholds with room for noise. Slow."""

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dqn_jax
from dqn_jax import DQN, envs
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


def deep_sea(size, right_is):
    """bsuite's DeepSea: right at every step finds the treasure, and which action means right differs from field to field."""

    def see(place):
        return jax.nn.one_hot(place[0] * size + place[1], size**2)  # Below the last row nothing.

    def reset(key):
        place = jnp.zeros(2, jnp.int32)
        return place, see(place)

    def transition(key, place, action):
        row, column = place
        right = action == right_is[row, column]
        treasure = right & (column == size - 1)
        successor = jnp.stack([row + 1, jnp.clip(column + jnp.where(right, 1, -1), 0, size - 1)])
        return successor, see(successor), treasure - 0.01 / size * right, row == size - 1, jnp.zeros((), bool)

    spaces = gymnasium.spaces.Box(0, 1, (size**2,)), gymnasium.spaces.Discrete(2)
    return envs.with_auto_reset(reset, transition, *spaces, None)


def steps_to_solve(size, num_steps, num_seeds, **options):
    """Steps until the greedy policy finds the treasure, for each seed; twice ``num_steps`` where it never does."""
    env = deep_sea(size, jnp.asarray(np.random.default_rng(0).integers(2, size=(size, size))))
    # Behaviour is random throughout, so the same seed sees the same with every replay.
    common = {"epsilon": 1.0, "gamma": 0.99, "n_steps": 1, "batch_size": 32, "update_interval": 16, "replay_start_size": 100, "tau": 0.1}
    agent = dqn_jax.dqn(env, **common, capacity=num_steps, **options)
    training = dqn_jax.train(agent, env, num_steps=num_steps, history_length=400)
    play = dqn_jax.evaluate(agent, env, num_episodes=1, max_steps=size)

    def point(run, _):
        run, _ = training.advance(run)
        return run, (run.agent.step, play(run.agent, jax.random.key(0))[0])

    def curve(key):
        return jax.lax.scan(point, training.init(key), None, length=training.num_points)[1]

    steps, found = map(np.asarray, jax.jit(jax.vmap(curve))(jax.random.split(jax.random.key(100), num_seeds)))
    solved = found > 0.5
    return np.where(solved.any(axis=1), steps[0][solved.argmax(axis=1)], 2 * num_steps)


@pytest.mark.parametrize(("size", "num_steps"), [(8, 30_000), (10, 100_000)])
def test_prioritized_replay_finds_the_treasure_earlier(size, num_steps):
    uniform = steps_to_solve(size, num_steps, num_seeds=32)
    prioritized = steps_to_solve(size, num_steps, num_seeds=32, prioritized=True, beta=(0.4, 1.0, num_steps))
    for name, steps in (("uniform", uniform), ("prioritized", prioritized)):
        print(size, name, np.sort(steps), "IQM", iqm(steps), bootstrap_interval(steps))
    earlier, later = np.sum(prioritized < uniform), np.sum(prioritized > uniform)
    print("earlier on", earlier, "later on", later, "of 32 seeds")
    assert iqm(prioritized) < iqm(uniform) and earlier > later


def share_that_finds_the_treasure(size, curiosity, episodes=10_000, num_seeds=10):
    """Of PPO agents, each in a sea of its own, those whose returns end near the most possible, 0.99."""
    num_envs = 64
    options = dqn_jax.PPO_PRESETS["deepsea"] | {"rollout_length": size, "batch_size": size * num_envs // 4, "curiosity": curiosity}

    def final_return(key):
        key_sea, key_run = jax.random.split(key)
        env = deep_sea(size, jax.random.randint(key_sea, (size, size), 0, 2))
        training = dqn_jax.train(dqn_jax.ppo(env, **options), env, num_steps=episodes * size, num_envs=num_envs, history_length=10)
        return training.run(key_run).history["return"][-1]

    returns = np.asarray(jax.jit(jax.vmap(final_return))(jax.random.split(jax.random.key(200), num_seeds)))
    print(size, curiosity, np.round(np.sort(returns), 2))
    return np.mean(returns > 0.9)


@pytest.mark.parametrize(("size", "curiosity"), [(20, "rnd"), (14, "snd-v"), (14, "snd-std"), (14, "snd-vic")])
def test_curiosity_finds_the_treasure(size, curiosity):
    assert share_that_finds_the_treasure(size, curiosity) >= 0.9


def test_without_curiosity_the_treasure_stays_where_it_is():
    assert share_that_finds_the_treasure(14, "off") <= 0.1


FAMILY = {
    "dueling": {"dueling": True},
    "noisy": {"noisy": 0.5},
    "munchausen": {"munchausen": 0.9, "n_steps": 1},
    "c51": dqn_jax.C51_PRESETS["default"],
    "qrdqn": dqn_jax.QRDQN_PRESETS["default"],
    "iqn": dqn_jax.IQN_PRESETS["default"],
    "rainbow": dqn_jax.RAINBOW_PRESETS["default"],
}


@pytest.mark.parametrize("options", FAMILY.values(), ids=FAMILY)
def test_the_family_catches_the_ball(options):
    pytest.importorskip("gymnax")
    env = dqn_jax.make("gymnax/Catch-bsuite")
    agent = dqn_jax.dqn(env, **options)
    keys = jax.random.split(jax.random.key(200), 5)
    result = jax.jit(jax.vmap(dqn_jax.train(agent, env, num_steps=30_000).run))(keys)
    scores = np.asarray(jax.jit(jax.vmap(dqn_jax.evaluate(agent, env, num_episodes=100)))(result.state, keys)).mean(axis=1)
    print(scores, "IQM", iqm(scores), bootstrap_interval(scores))
    assert np.sum(scores >= 0.95) >= 4
