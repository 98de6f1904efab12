"""Choosing an action from values, in two pure halves: draw the noise, then choose with it.

The noise is apart from the choice because in a program as small as one step of a host loop a random draw costs more than the
network: a loop draws the noise of many steps in one call and hands it in.
"""

import chex
import jax
import jax.numpy as jnp

from dqn_jax.types import Masked


def split_mask(observation: chex.ArrayTree) -> tuple[chex.ArrayTree, chex.Array | None]:
    """The observation proper and its action mask ``[..., A]``, or None where every action is allowed."""
    if isinstance(observation, Masked):
        return observation.observation, observation.action_mask
    return observation, None


def mask_values(values: chex.Array, mask: chex.Array | None) -> chex.Array:
    """Puts forbidden actions at the lowest finite value, so that no maximum picks them.

    Finite, because a terminated successor may allow nothing and ``0 * -inf`` is not a number.

    Args:
      values: ``[..., A]`` values or logits, after any reduction over atoms or quantiles.
      mask: ``[..., A]``, true where allowed, or None.
    """
    if mask is None:
        return values
    chex.assert_equal_shape([values, mask])
    return jnp.where(mask, values, jnp.finfo(values.dtype).min)


def epsilon_greedy_noise(key: chex.PRNGKey, num: int) -> chex.Array:
    """What ``num`` epsilon-greedy choices draw: ``[num, 2]`` uniform numbers, one to decide, one to choose."""
    return jax.random.uniform(key, (num, 2))


def epsilon_greedy(values: chex.Array, mask: chex.Array | None, noise: chex.Array, epsilon: chex.Numeric) -> chex.Array:
    """With probability epsilon any allowed action, each equally likely; else the allowed action of the highest value.

    Args:
      values: ``[A]``.
      mask: ``[A]``, or None.
      noise: ``[2]`` from ``epsilon_greedy_noise``.
      epsilon: scalar in [0, 1].

    Returns:
      The action, an int32 scalar.
    """
    chex.assert_rank([values, noise], 1)
    greedy = jnp.argmax(mask_values(values, mask))
    if mask is None:
        anything = jnp.minimum(jnp.floor(noise[1] * values.shape[0]), values.shape[0] - 1)
    else:
        # The k-th allowed action, k uniform: the first place where k + 1 allowed ones have been passed.
        anything = jnp.argmax(jnp.cumsum(mask) > jnp.floor(noise[1] * jnp.sum(mask)))
    return jnp.where(noise[0] < epsilon, anything, greedy).astype(jnp.int32)
