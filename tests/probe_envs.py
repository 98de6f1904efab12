"""Tiny environments written in JAX. Each asks for one thing more than those above it, so the first that fails says what is broken.

An observation is one number in [-1, 1]; actions are 0 and 1. ``VALUES`` of a probe gives the action values that must be learnt, as
``{observation: (value of action 0, value of action 1)}``.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces

import dqn_jax
from dqn_jax.envs import with_auto_reset

OBSERVATIONS = spaces.Box(-1, 1, (1,), np.float32)
ACTIONS = spaces.Discrete(2)
NO = jnp.zeros((), jnp.bool_)


PUSHES = spaces.Box(-1, 3, (1,), np.float32)


class Probe(NamedTuple):
    """An environment, the discount factor to learn it with, and the values that come out where everything is right."""

    env: dqn_jax.Env
    gamma: float
    values: dict[float, tuple[float, float]]


def _number(value: Any) -> jax.Array:
    return jnp.reshape(jnp.asarray(value, jnp.float32), (1,))


class Aim(NamedTuple):
    """An environment whose actions are numbers, and the one that is best for each observation."""

    env: dqn_jax.Env
    best: dict[float, float]


def _one_step(reward: Any, random_start: bool, actions: spaces.Space = ACTIONS) -> dqn_jax.Env:
    """Episodes of one step; ``reward(observation, action)`` is paid, and the successor looks like the start."""

    def reset(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        start = jnp.where(jax.random.bernoulli(key), 1.0, -1.0) if random_start else jnp.ones(())
        return start, _number(start)

    def transition(key: jax.Array, start: jax.Array, action: jax.Array) -> tuple[Any, ...]:
        return start, _number(start), reward(start, action), ~NO, NO

    return with_auto_reset(reset, transition, OBSERVATIONS, actions, None)


def _chain(length: int) -> dqn_jax.Env:
    """Observations from -1 up to 0 in equal steps; the last step pays 1 and terminates, the others pay nothing."""

    def look(place: jax.Array) -> jax.Array:
        return _number(-1.0 + place / length)

    def reset(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros((), jnp.int32), look(jnp.zeros((), jnp.int32))

    def transition(key: jax.Array, place: jax.Array, action: jax.Array) -> tuple[Any, ...]:
        done = place + 1 >= length
        return place + 1, look(place + 1), jnp.where(done, 1.0, 0.0), done, NO

    return with_auto_reset(reset, transition, OBSERVATIONS, ACTIONS, None)


def _endless(time_limit: int) -> dqn_jax.Env:
    """One observation, a reward of 1 in every step, for ever; only the time limit ends an episode."""

    def reset(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros(()), _number(1.0)

    def transition(key: jax.Array, nothing: jax.Array, action: jax.Array) -> tuple[Any, ...]:
        return nothing, _number(1.0), jnp.ones(()), NO, NO

    return with_auto_reset(reset, transition, OBSERVATIONS, ACTIONS, time_limit)


def images(time_limit: int | None) -> dqn_jax.Env:
    """Random images like MinAtar's and three actions; every step pays 1, and only the time limit ends an episode."""
    space = spaces.Box(0, 1, (10, 10, 4), np.bool_)

    def look(key: jax.Array) -> jax.Array:
        return jax.random.bernoulli(key, 0.5, space.shape)

    def transition(key: jax.Array, nothing: jax.Array, action: jax.Array) -> tuple[Any, ...]:
        return nothing, look(key), jnp.ones(()), NO, NO

    return with_auto_reset(lambda key: (jnp.zeros(()), look(key)), transition, space, spaces.Discrete(3), time_limit)


def chain_probe(length: int, gamma: float) -> Probe:
    """The value of a reward that lies ``length`` steps ahead."""
    values = [gamma ** (length - 1 - place) for place in range(length)]
    return Probe(_chain(length), gamma, {-1.0 + place / length: (value, value) for place, value in enumerate(values)})


PROBES = {
    # Loss and optimizer move the value to the reward.
    "constant value": Probe(_one_step(lambda start, action: 1.0, False), 0.0, {1.0: (1.0, 1.0)}),
    # The network sees the observation, and the reward is stored beside the right one.
    "value of the observation": Probe(_one_step(lambda start, action: start, True), 0.0, {-1.0: (-1.0, -1.0), 1.0: (1.0, 1.0)}),
    # The value moves at the action that was taken.
    "choice of the action": Probe(_one_step(lambda start, action: 2.0 * action - 1.0, False), 0.0, {1.0: (-1.0, 1.0)}),
    # Both at once.
    "action for the observation": Probe(
        _one_step(lambda start, action: start * (2.0 * action - 1.0), True), 0.0, {-1.0: (1.0, -1.0), 1.0: (-1.0, 1.0)}
    ),
    # What follows a termination is not worth anything: bootstrapping would give 2.
    "termination": Probe(_one_step(lambda start, action: 1.0, False), 0.5, {1.0: (1.0, 1.0)}),
    # A reward one step ahead is discounted once.
    "discounting": chain_probe(2, 0.5),
    # What follows a truncation is worth as much as anything: without bootstrapping about 7 would come out.
    "truncation": Probe(_endless(10), 0.95, {1.0: (20.0, 20.0)}),
}

# Windows longer than what is left of an episode, and windows that end inside one.
N_STEP_PROBES = {
    "discounting over a tail shorter than the window": chain_probe(2, 0.5),
    "discounting over windows and a tail": chain_probe(5, 0.8),
    "termination": PROBES["termination"],
    "truncation": PROBES["truncation"],
}

# The action moves along the slope of what it pays, and is scaled to its bounds; each number is some way off their middle.
AIM = Aim(_one_step(lambda start, action: -jnp.square(action[0] - (1.5 + 0.5 * start)), True, PUSHES), {-1.0: 1.0, 1.0: 2.0})
