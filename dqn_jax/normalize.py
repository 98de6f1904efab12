"""Running mean and variance as state: what has been seen so far, folded in a batch at a time, exactly."""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

EPSILON = 1e-8  # Added to a variance, which is 0 for what never changes.


class Moments(NamedTuple):
    """The mean and variance of all that was folded in.

    Attributes:
      count: how many values that was, float32.
      mean: a pytree like one value; zeros before the first.
      variance: likewise, divided by the count; ones before the first, so that ``normalize`` then changes nothing.
    """

    count: chex.Array
    mean: chex.ArrayTree
    variance: chex.ArrayTree


def moments(example: chex.ArrayTree) -> Moments:
    """Of nothing yet.

    Args:
      example: one value, any pytree of arrays. What is not a float in it (images of bytes, choices, masks) is left as it is by
        everything here.
    """

    def filled(leaf: chex.Array, value: float) -> chex.Array:
        return jnp.full(leaf.shape if _is_float(leaf) else (), value, jnp.float32)

    return Moments(
        jnp.zeros(()), jax.tree.map(lambda leaf: filled(leaf, 0.0), example), jax.tree.map(lambda leaf: filled(leaf, 1.0), example)
    )


def fold(state: Moments, values: chex.ArrayTree, axes: tuple[int, ...] = (0,)) -> Moments:
    """With more values, as if all had been there from the start; the pairwise update of Chan, Golub and LeVeque (1979).

    Args:
      state: the moments so far.
      values: like the example, with leading axes.
      axes: the leading axes, all of which count.
    """
    number = math.prod(jax.tree.leaves(values)[0].shape[axis] for axis in axes)
    total = state.count + number
    before, now = state.count / total, number / total

    def mean(leaf: chex.Array, old: chex.Array) -> chex.Array:
        return old + (jnp.mean(leaf, axes) - old) * now if _is_float(leaf) else old

    def variance(leaf: chex.Array, old_mean: chex.Array, old: chex.Array) -> chex.Array:
        if not _is_float(leaf):
            return old
        between = jnp.square(jnp.mean(leaf, axes) - old_mean) * before * now
        return old * before + jnp.var(leaf, axes) * now + between

    return Moments(total, jax.tree.map(mean, values, state.mean), jax.tree.map(variance, values, state.mean, state.variance))


def normalize(state: Moments, values: chex.ArrayTree, clip: float = 10.0) -> chex.ArrayTree:
    """``values``, with any leading axes, less the mean and over the deviation, no further than ``clip`` from zero."""

    def one(leaf: chex.Array, mean: chex.Array, variance: chex.Array) -> chex.Array:
        return jnp.clip((leaf - mean) * jax.lax.rsqrt(variance + EPSILON), -clip, clip) if _is_float(leaf) else leaf

    return jax.tree.map(one, values, state.mean, state.variance)


def _is_float(leaf: chex.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)
