"""Distributions over actions, as records of pure functions of what an actor network puts out: one stream, no batch axis.

A draw takes its noise as an argument, for the reason given in ``policies.py``. Callers ``jax.vmap``.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from dqn_jax.policies import mask_values

LOG_STD_RANGE = (-5.0, 2.0)  # Of the squashed normal: a network's output goes there smoothly.


class Distribution(NamedTuple):
    """How an actor's outputs ``[P]`` become an action.

    Attributes:
      num_outputs: P, an int.
      noise: ``(key, num) -> noise [num, ...]``: all that ``num`` draws take.
      sample: ``(outputs [P], mask [A] or None, noise) -> action``, drawn.
      mode: ``(outputs [P], mask [A] or None) -> action``, the likeliest.
      log_prob: ``(outputs [P], mask [A] or None, action) -> scalar``, the logarithm of its probability, or density.
      entropy: ``(outputs [P], mask [A] or None) -> scalar``, in nats.
    """

    num_outputs: int
    noise: Callable[[chex.PRNGKey, int], chex.Array]
    sample: Callable[[chex.Array, chex.Array | None, chex.Array], chex.Array]
    mode: Callable[[chex.Array, chex.Array | None], chex.Array]
    log_prob: Callable[[chex.Array, chex.Array | None, chex.Array], chex.Array]
    entropy: Callable[[chex.Array, chex.Array | None], chex.Array]


def categorical(num_actions: int) -> Distribution:
    """One of A actions; the outputs are logits ``[A]``. A forbidden action is never drawn and adds nothing to the entropy."""

    def noise(key: chex.PRNGKey, num: int) -> chex.Array:
        return jax.random.gumbel(key, (num, num_actions))

    def sample(logits: chex.Array, mask: chex.Array | None, noise: chex.Array) -> chex.Array:
        # The largest of logits plus Gumbel noise is drawn in proportion to exp(logits).
        return jnp.argmax(mask_values(logits + noise, mask)).astype(jnp.int32)

    def mode(logits: chex.Array, mask: chex.Array | None) -> chex.Array:
        return jnp.argmax(mask_values(logits, mask)).astype(jnp.int32)

    def log_prob(logits: chex.Array, mask: chex.Array | None, action: chex.Array) -> chex.Array:
        return log_probabilities(logits, mask)[action]

    def entropy(logits: chex.Array, mask: chex.Array | None) -> chex.Array:
        log_probability = log_probabilities(logits, mask)
        return -expectation(log_probability, log_probability)

    return Distribution(num_actions, noise, sample, mode, log_prob, entropy)


def log_probabilities(logits: chex.Array, mask: chex.Array | None) -> chex.Array:
    """Of each of the actions ``[A]``; of forbidden ones a huge negative number, never -inf, so that gradients stay finite."""
    return jax.nn.log_softmax(mask_values(logits, mask))


def expectation(log_probability: chex.Array, values: chex.Array) -> chex.Array:
    """The mean of values ``[A]`` under probabilities given by their logarithms ``[A]``: what has probability 0 adds 0."""
    probability = jnp.exp(log_probability)
    return jnp.sum(jnp.where(probability > 0, probability * values, 0.0))


def multi_categorical(sizes: tuple[int, ...]) -> Distribution:
    """One choice in each of several branches, independent of one another given the outputs, which are their logits one after the other.

    Args:
      sizes: choices in each branch.
    """
    branches = [categorical(size) for size in sizes]
    ends, nothing = np.cumsum(sizes)[:-1], [None] * len(sizes)

    def split(joined: chex.Array) -> list[chex.Array]:
        return jnp.split(joined, ends)

    def noise(key: chex.PRNGKey, num: int) -> chex.Array:
        return jax.random.gumbel(key, (num, sum(sizes)))

    def sample(logits: chex.Array, mask: chex.Array | None, noise: chex.Array) -> chex.Array:
        _refuse_mask(mask)
        return jnp.stack([one.sample(*given) for one, *given in zip(branches, split(logits), nothing, split(noise), strict=True)])

    def mode(logits: chex.Array, mask: chex.Array | None) -> chex.Array:
        _refuse_mask(mask)
        return jnp.stack([one.mode(*given) for one, *given in zip(branches, split(logits), nothing, strict=True)])

    def log_prob(logits: chex.Array, mask: chex.Array | None, action: chex.Array) -> chex.Array:
        _refuse_mask(mask)
        return sum(one.log_prob(*given) for one, *given in zip(branches, split(logits), nothing, action, strict=True))

    def entropy(logits: chex.Array, mask: chex.Array | None) -> chex.Array:
        _refuse_mask(mask)
        return sum(one.entropy(*given) for one, *given in zip(branches, split(logits), nothing, strict=True))

    return Distribution(sum(sizes), noise, sample, mode, log_prob, entropy)


def normal(num_dims: int) -> Distribution:
    """Independent normals in D dimensions; the outputs are D means and D logarithms of standard deviations. Without bounds."""

    def noise(key: chex.PRNGKey, num: int) -> chex.Array:
        return jax.random.normal(key, (num, num_dims))

    def sample(outputs: chex.Array, mask: chex.Array | None, noise: chex.Array) -> chex.Array:
        _refuse_mask(mask)
        mean, log_std = jnp.split(outputs, 2)
        return mean + jnp.exp(log_std) * noise

    def mode(outputs: chex.Array, mask: chex.Array | None) -> chex.Array:
        _refuse_mask(mask)
        return jnp.split(outputs, 2)[0]

    def log_prob(outputs: chex.Array, mask: chex.Array | None, action: chex.Array) -> chex.Array:
        _refuse_mask(mask)
        mean, log_std = jnp.split(outputs, 2)
        return jnp.sum(_log_normal((action - mean) * jnp.exp(-log_std)) - log_std)

    def entropy(outputs: chex.Array, mask: chex.Array | None) -> chex.Array:
        _refuse_mask(mask)
        return jnp.sum(jnp.split(outputs, 2)[1] + 0.5 * math.log(2 * math.pi * math.e))

    return Distribution(2 * num_dims, noise, sample, mode, log_prob, entropy)


def tanh_normal(outputs: chex.Array, noise: chex.Array) -> tuple[chex.Array, chex.Array]:
    r"""Draws from a normal squashed into (-1, 1), with the logarithm of the density of what was drawn.

    .. math:: a = \tanh u, \qquad \log \pi(a) = \log N(u) - \sum_i 2 (\log 2 - u_i - \mathrm{softplus}(-2 u_i))

    where the sum is :math:`\log(1 - \tanh^2 u)` in a form that holds its precision at the edges, where ``a`` itself rounds to 1 and can
    no more be turned back into ``u``. Haarnoja et al., "Soft actor-critic algorithms and applications" (2018), appendix C.

    Args:
      outputs: ``[2 D]`` of the actor: means, then what the logarithms of the deviations are made of, put into ``LOG_STD_RANGE`` by a tanh.
      noise: ``[D]``, standard normal; zeros give the mode of the normal.

    Returns:
      The action ``[D]``, and a scalar.
    """
    mean, raw = jnp.split(outputs, 2)
    low, high = LOG_STD_RANGE
    log_std = low + 0.5 * (high - low) * (jnp.tanh(raw) + 1.0)
    u = mean + jnp.exp(log_std) * noise  # [D]
    squash = 2.0 * (math.log(2.0) - u - jax.nn.softplus(-2.0 * u))  # [D]
    return jnp.tanh(u), jnp.sum(_log_normal(noise) - log_std - squash)


def _log_normal(standard: chex.Array) -> chex.Array:
    return -0.5 * (jnp.square(standard) + math.log(2 * math.pi))


def _refuse_mask(mask: chex.Array | None) -> None:
    if mask is not None:
        raise ValueError("an action mask is for a single choice among numbered actions (Discrete)")
