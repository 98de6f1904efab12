"""Loops that are compiled whole, the environment included; ``peers.py`` has those that need another package."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from dqn_jax.algorithms.dqn import DQNState
from dqn_jax.bench.host_loops import q_loss
from dqn_jax.bench.settings import Setting, epsilon_at, options, require_plain_targets
from dqn_jax.networks import ConvQNetwork, QNetwork
from dqn_jax.presets.dqn import dqn, dqn_options
from dqn_jax.presets.reading import q_network
from dqn_jax.training import evaluate, train
from dqn_jax.types import AgentState, Env

MOST_STEPS = 1_000  # Of a greedy episode, where the environment sets no limit.


class Outcome(NamedTuple):
    """What a compiled run gives back.

    What a program does not return, the compiler does not compute: the record is here so that it is paid for.

    Attributes:
      params: of the greedy policy, in the form of this package's network for the environment.
      updates: how many updates made them.
      steps: how many transitions.
      history: the loop's own record of the run, of any form.
    """

    params: Any
    updates: chex.Array
    steps: chex.Array
    history: Any


def compiled_steps(env: Env, setting: Setting, steps: int) -> int:
    """The steps of a compiled run: what is asked for, rounded up as this package rounds it."""
    return train(dqn(env, **options(setting)), env, num_steps=steps).num_steps


def ours(env: Env, setting: Setting, steps: int) -> Callable[[chex.PRNGKey], Outcome]:
    """This package's compiled loop."""
    training = train(dqn(env, **options(setting)), env, num_steps=steps)

    def run(key: chex.PRNGKey) -> Outcome:
        result = training.run(key)
        return Outcome(result.state.learner.params, result.state.updates, result.state.step, result.history)

    return run


class FlaxQNetwork(nn.Module):
    """``dqn_jax.networks.ConvQNetwork`` as one writes it with ``flax.linen.Conv``; the parameters are the same.

    Attributes:
      num_actions: the number A of actions.
      convolutions: (filters, kernel size, stride) of each.
      hidden: width of each hidden layer after them.
      image: from a batch of observations to images ``[B, H, W, C]`` of float32.
    """

    num_actions: int
    convolutions: Sequence[tuple[int, int, int]]
    hidden: Sequence[int]
    image: Callable[[chex.ArrayTree], chex.Array]

    @nn.compact
    def __call__(self, observation: chex.ArrayTree) -> chex.Array:
        """The values ``[B, A]`` of a batch of observations ``[B, ...]``."""
        x = self.image(observation)  # [B, H, W, C]
        for filters, size, stride in self.convolutions:
            x = nn.relu(nn.Conv(filters, (size, size), stride, padding="VALID")(x))
        x = x.reshape(x.shape[0], -1)
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.num_actions)(x)


def our_network(env: Env, setting: Setting) -> QNetwork | ConvQNetwork:
    """The network that the preset builds for a setting."""
    return q_network(dqn_options(**options(setting)), env.observation_space, int(env.action_space.n))  # type: ignore[attr-defined]


def ordinary_network(env: Env, setting: Setting) -> QNetwork | FlaxQNetwork:
    """The same, but its convolutions, where it has any, are flax's."""
    ours = our_network(env, setting)
    if isinstance(ours, ConvQNetwork):
        return FlaxQNetwork(ours.num_actions, ours.convolutions, ours.hidden, ours.image)
    return ours


class Carry(NamedTuple):
    """What the scan of ``purejaxrl_style`` carries."""

    params: Any
    target_params: Any
    opt_state: Any
    replay: tuple[Any, ...]
    env_state: Any
    observation: chex.Array
    key: chex.PRNGKey
    steps: chex.Array
    updates: chex.Array


def purejaxrl_style(env: Env, setting: Setting, steps: int, network: Any = None) -> Callable[[chex.PRNGKey], Outcome]:
    """After PureJaxRL's dqn: one scan over environment steps, keys split in the carry, counters that decide by ``cond`` when to learn.

    Args:
      env, setting, steps: as for ``ours``.
      network: for the environment's observations and actions; by default ``ordinary_network``.

    Raises:
      ValueError: on n-step returns or Double DQN.
    """
    require_plain_targets(setting, "purejaxrl-style")
    network, optimizer = network or ordinary_network(env, setting), optax.adam(setting.learning_rate)

    def step(carry: Carry, _: None) -> tuple[Carry, tuple[Any, ...]]:
        key, key_coin, key_action, key_step, key_batch = jax.random.split(carry.key, 5)
        greedy = jnp.argmax(network.apply(carry.params, carry.observation[None])[0])
        anything = jax.random.randint(key_action, (), 0, network.num_actions)
        action = jnp.where(jax.random.uniform(key_coin) < epsilon_at(setting, carry.steps), anything, greedy).astype(jnp.int32)
        env_state, result = env.step(key_step, carry.env_state, action)
        row = (carry.observation, action, result.reward, result.next_observation, result.terminated.astype(jnp.float32))
        replay = jax.tree.map(lambda stored, new: stored.at[carry.steps % setting.capacity].set(new), carry.replay, row)
        stored = carry.steps + 1

        def learn() -> tuple[Any, ...]:
            rows = jax.random.randint(key_batch, (setting.batch_size,), 0, jnp.minimum(stored, setting.capacity))
            batch = jax.tree.map(lambda leaf: leaf[rows], replay)
            gradient = jax.value_and_grad(lambda params: q_loss(network, setting.gamma, params, carry.target_params, batch)[0])
            loss, grads = gradient(carry.params)
            changes, opt_state = optimizer.update(grads, carry.opt_state)
            return optax.apply_updates(carry.params, changes), opt_state, carry.updates + 1, loss

        is_due = (stored >= setting.warmup) & (stored % setting.interval == 0)
        params, opt_state, updates, loss = jax.lax.cond(
            is_due, learn, lambda: (carry.params, carry.opt_state, carry.updates, jnp.zeros(()))
        )
        target_params = jax.lax.cond(stored % setting.target_interval == 0, lambda: params, lambda: carry.target_params)
        following = Carry(params, target_params, opt_state, replay, env_state, result.observation, key, stored, updates)
        return following, (loss, result.reward, result.terminated | result.truncated)

    def run(key: chex.PRNGKey) -> Outcome:
        key, key_params, key_reset = jax.random.split(key, 3)
        env_state, observation = env.reset(key_reset)
        params = network.init(key_params, observation[None])
        row = (observation, jnp.zeros((), jnp.int32), jnp.zeros(()), observation, jnp.zeros(()))
        replay = jax.tree.map(lambda leaf: jnp.zeros((setting.capacity, *leaf.shape), leaf.dtype), row)
        # Counters that begin as constants stay the same for all seeds, so that vmap leaves each cond a cond.
        zero = jnp.zeros((), jnp.int32)
        carry = Carry(params, params, optimizer.init(params), replay, env_state, observation, key, zero, zero)
        carry, history = jax.lax.scan(step, carry, None, length=steps)
        return Outcome(carry.params, carry.updates, carry.steps, history)

    return run


def greedy_returns(env: Env, setting: Setting, params: Any, key: chex.PRNGKey, episodes: int) -> chex.Array:
    """Returns of greedy episodes ``[episodes]`` with the parameters that all compiled contenders share; without the environment's limit
    of an episode, what it has come to after MOST_STEPS."""
    nothing: Any = ()
    state = AgentState(DQNState(params, *[nothing] * 3), *[nothing] * 5)
    return evaluate(dqn(env, **options(setting)), env, num_episodes=episodes, max_steps=env.time_limit or MOST_STEPS)(state, key)
