"""PPO's loops, the environments compiled in: this package's, and one in the style of PureJaxRL. ``peers.py`` has rejax's.

All make the same steps and as many updates of the same network: ``rollouts`` times, NUM_ENVS environments play LENGTH steps, which are
learnt from EPOCHS times in MINIBATCHES parts, without a schedule of the learning rate. What each does otherwise stands in
``peers.DIFFERENCES``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from dqn_jax.algorithms.ppo import PPOState
from dqn_jax.networks import ActorCritic
from dqn_jax.presets.ppo import ppo
from dqn_jax.training import evaluate, train
from dqn_jax.types import Agent, AgentState, Env

NUM_ENVS, LENGTH, EPOCHS, MINIBATCHES = 64, 128, 4, 8
GAMMA, LAMBDA, CLIP, RATE, ENTROPY, VALUE, GRAD_NORM = 0.99, 0.95, 0.2, 5e-4, 0.01, 0.5, 0.5
ROLLOUT = NUM_ENVS * LENGTH


def network_of(env: Env) -> ActorCritic:
    """The network that all loops train: policy and value apart, 2x64 with tanh."""
    return ActorCritic(int(env.action_space.n))


def ours(env: Env, rollouts: int) -> Callable[[chex.PRNGKey], tuple[Any, chex.Array]]:
    """This package's loop: from a key to parameters and steps made."""
    training = train(_agent(env), env, num_steps=rollouts * ROLLOUT, num_envs=NUM_ENVS, history_length=rollouts)

    def run(key: chex.PRNGKey) -> tuple[Any, chex.Array]:
        state = training.run(key).state
        return state.learner.params, state.step

    return run


def greedy_return(env: Env, params: Any, key: chex.PRNGKey, episodes: int) -> chex.Array:
    """The mean return of greedy episodes, a scalar."""
    play = evaluate(_agent(env), env, num_episodes=episodes, max_steps=env.time_limit or 2_500)
    return play(AgentState(PPOState(params, (), (), (), ()), *[()] * 5), key).mean()  # type: ignore[arg-type]


def _agent(env: Env) -> Agent:
    return ppo(
        env,
        network=network_of(env),
        optimizer=_optimizer(),
        rollout_length=LENGTH,
        batch_size=ROLLOUT // MINIBATCHES,
        epochs=EPOCHS,
        gamma=GAMMA,
        gae_lambda=LAMBDA,
        clip=CLIP,
        value_clip=CLIP,
        entropy_coef=ENTROPY,
        value_coef=VALUE,
    )


def _optimizer() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(GRAD_NORM), optax.adam(RATE, eps=1e-5))


class Row(NamedTuple):
    """What the scan of ``purejaxrl_style`` keeps of a step."""

    done: chex.Array
    action: chex.Array
    value: chex.Array
    reward: chex.Array
    log_prob: chex.Array
    observation: chex.Array


def purejaxrl_style(env: Env, rollouts: int) -> Callable[[chex.PRNGKey], tuple[Any, chex.Array]]:
    """After PureJaxRL's ppo: value and policy at every step, keys split in the carry, every episode's end taken for a termination, in each
    epoch the whole rollout shuffled and then cut into minibatches.
    """
    network, optimizer = network_of(env), _optimizer()

    def rollout_step(carry: Any, _: None) -> tuple[Any, Row]:
        params, env_state, observation, key = carry
        key, key_action, key_step = jax.random.split(key, 3)
        logits, value = network.apply(params, observation)
        action = jax.random.categorical(key_action, logits)
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), action[:, None], axis=1)[:, 0]
        env_state, step = jax.vmap(env.step)(jax.random.split(key_step, NUM_ENVS), env_state, action)
        row = Row(step.terminated | step.truncated, action, value, step.reward, log_prob, observation)
        return (params, env_state, step.observation, key), row

    def advantages(rows: Row, last_value: chex.Array) -> chex.Array:
        def back(carry: Any, row: Row) -> tuple[Any, chex.Array]:
            following, next_value = carry
            going = 1.0 - row.done
            delta = row.reward + GAMMA * next_value * going - row.value
            following = delta + GAMMA * LAMBDA * going * following
            return (following, row.value), following

        return jax.lax.scan(back, (jnp.zeros_like(last_value), last_value), rows, reverse=True)[1]

    def loss(params: Any, rows: Row, advantage: chex.Array, target: chex.Array) -> chex.Array:
        logits, value = network.apply(params, rows.observation)
        log_probs = jax.nn.log_softmax(logits)
        log_prob = jnp.take_along_axis(log_probs, rows.action[:, None], axis=1)[:, 0]
        near = rows.value + jnp.clip(value - rows.value, -CLIP, CLIP)
        value_loss = 0.5 * jnp.mean(jnp.maximum(jnp.square(value - target), jnp.square(near - target)))
        ratio = jnp.exp(log_prob - rows.log_prob)
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        policy_loss = -jnp.mean(jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantage))
        entropy = -jnp.mean(jnp.sum(jnp.exp(log_probs) * log_probs, axis=1))
        return policy_loss + VALUE * value_loss - ENTROPY * entropy

    def minibatch(carry: Any, part: Any) -> tuple[Any, chex.Array]:
        params, opt_state = carry
        value, grads = jax.value_and_grad(loss)(params, *part)
        changes, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, changes), opt_state), value

    def update(carry: Any, _: None) -> tuple[Any, chex.Array]:
        params, opt_state, env_state, observation, key = carry
        (_, env_state, observation, key), rows = jax.lax.scan(rollout_step, (params, env_state, observation, key), None, LENGTH)
        advantage = advantages(rows, network.apply(params, observation)[1])
        flat = jax.tree.map(lambda leaf: leaf.reshape(ROLLOUT, *leaf.shape[2:]), (rows, advantage, advantage + rows.value))

        def epoch(carry: Any, _: None) -> tuple[Any, chex.Array]:
            learnt, key = carry
            key, key_order = jax.random.split(key)
            order = jax.random.permutation(key_order, ROLLOUT)
            parts = jax.tree.map(lambda leaf: leaf[order].reshape(MINIBATCHES, -1, *leaf.shape[1:]), flat)
            learnt, losses = jax.lax.scan(minibatch, learnt, parts)
            return (learnt, key), losses

        ((params, opt_state), key), losses = jax.lax.scan(epoch, ((params, opt_state), key), None, EPOCHS)
        return (params, opt_state, env_state, observation, key), losses.mean()

    def run(key: chex.PRNGKey) -> tuple[Any, chex.Array]:
        key, key_params, key_reset = jax.random.split(key, 3)
        env_state, observation = jax.vmap(env.reset)(jax.random.split(key_reset, NUM_ENVS))
        params = network.init(key_params, observation)
        carry, _ = jax.lax.scan(update, (params, optimizer.init(params), env_state, observation, key), None, rollouts)
        return carry[0], jnp.asarray(rollouts * ROLLOUT)

    return run
