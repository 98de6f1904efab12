"""What the numbers that a network gives for an action stand for: its value, atoms of a distribution of returns, or quantiles of one.

A head says how these outputs become values, and how they learn from what followed. A successor's distribution may be that of one action
or an average over actions, as a soft policy wants it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from dqn_jax import returns


class Learnt(NamedTuple):
    """What one transition teaches.

    Attributes:
      loss: scalar.
      priority: how much there was to learn, a scalar of at least 0.
      metrics: scalars by name.
    """

    loss: chex.Array
    priority: chex.Array
    metrics: dict[str, chex.Array]


class Head(NamedTuple):
    """How a network's outputs stand for values.

    Attributes:
      draw: ``(key, num) -> inputs``: what the network takes beside ``num`` observations to make the predictions that are learnt: a tuple,
        empty or of fractions ``[num, N]``.
      fixed: the same for all else, choices and targets, without a draw: a tuple, empty or of fractions ``[N]``.
      values: from outputs, with any axes before those of one action, to as many values.
      distribution: from outputs, likewise, to what may be averaged over actions, of the same shape: masses, whose average is the mixture,
        or quantiles one by one, whose average has the right mean only (as in Munchausen-IQN).
      loss: ``(outputs, inputs, reward, discount, following) -> Learnt`` of one transition, callers ``jax.vmap``: outputs and inputs are
        those of the action taken, ``following`` is the ``distribution`` of what followed. No gradient flows through that.
    """

    draw: Callable[[chex.PRNGKey, int], tuple[chex.Array, ...]]
    fixed: tuple[np.ndarray, ...]
    values: Callable[[chex.Array], chex.Array]
    distribution: Callable[[chex.Array], chex.Array]
    loss: Callable[..., Learnt]


def expected(loss: str = "huber") -> Head:
    """One number per action: the expected return. Its priority is the size of the TD error.

    Args:
      loss: "huber" or "mse", of the TD error.

    Raises:
      ValueError: if ``loss`` is unknown.
    """
    losses = {"huber": returns.huber, "mse": returns.squared}
    if loss not in losses:
        raise ValueError(f"loss must be one of {sorted(losses)}, got {loss!r}")

    def learn(q: chex.Array, inputs: Any, reward: chex.Array, discount: chex.Array, following: chex.Array) -> Learnt:
        chex.assert_rank([q, reward, discount, following], 0)
        td_error = jax.lax.stop_gradient(reward + discount * following) - q
        return Learnt(losses[loss](td_error), jnp.abs(td_error), {})

    return Head(_nothing, (), _same, _same, learn)


def categorical(support: chex.Array) -> Head:
    """K logits per action: the masses of a distribution of returns on fixed atoms (C51). Its priority is the loss, the cross-entropy;
    Rainbow's is the Kullback-Leibler divergence, smaller by the target's own entropy.

    Bellemare, Dabney and Munos, "A distributional perspective on reinforcement learning" (2017), algorithm 1. The metric
    ``clipped_mass`` is the part of the targets that lies beyond the ends of the support.

    Args:
      support: ``[K]`` atoms, evenly spaced, ascending.
    """

    def learn(logits: chex.Array, inputs: Any, reward: chex.Array, discount: chex.Array, following: chex.Array) -> Learnt:
        chex.assert_rank([reward, discount], 0)
        places = reward + discount * support  # [K]
        loss = returns.cross_entropy(logits, returns.project(support, places, following))
        slack = 1e-3 * (support[1] - support[0])  # An atom that stays at an end is not to count as beyond it by rounding.
        beyond = (places < support[0] - slack) | (places > support[-1] + slack)
        return Learnt(loss, loss, {"clipped_mass": jnp.sum(beyond * following)})

    return Head(_nothing, (), lambda logits: jax.nn.softmax(logits) @ support, jax.nn.softmax, learn)


def quantiles(num: int) -> Head:
    """N numbers per action: the quantiles of returns at the middles of N equal parts (QR-DQN). Its priority is the loss.

    Dabney et al., "Distributional reinforcement learning with quantile regression" (2018), algorithm 1.

    Args:
      num: N.
    """
    fractions = middles(num)  # [N]

    def learn(quantile: chex.Array, inputs: Any, reward: chex.Array, discount: chex.Array, following: chex.Array) -> Learnt:
        return _quantile_loss(quantile, fractions, reward, discount, following)

    return Head(_nothing, (), _mean, _same, learn)


def implicit_quantiles(num: int) -> Head:
    """Quantiles at fractions that the network is asked for (IQN). Its priority is the loss.

    Dabney et al., "Implicit quantile networks for distributional reinforcement learning" (2018), equation 3. Differs from the paper in:
    only the fractions of predictions are drawn; targets and choices are made of the quantiles at the middles of as many equal parts,
    which estimate the same integrals without a draw. (The paper draws N = N' = 64, and K = 32 to choose by.)

    Args:
      num: N, fractions drawn for each transition, and the number of middles.
    """

    def draw(key: chex.PRNGKey, batch: int) -> tuple[chex.Array, ...]:
        return (jax.random.uniform(key, (batch, num)),)

    def learn(quantile: chex.Array, inputs: Any, reward: chex.Array, discount: chex.Array, following: chex.Array) -> Learnt:
        (fractions,) = inputs  # [N]
        return _quantile_loss(quantile, fractions, reward, discount, following)

    return Head(draw, (middles(num),), _mean, _same, learn)


def middles(num: int) -> np.ndarray:
    """The middles ``[num]`` of as many equal parts of [0, 1]."""
    return ((np.arange(num) + 0.5) / num).astype(np.float32)


def _quantile_loss(quantile: chex.Array, fraction: chex.Array, reward: chex.Array, discount: chex.Array, following: chex.Array) -> Learnt:
    chex.assert_rank([reward, discount], 0)
    loss = returns.quantile_huber(quantile, fraction, reward + discount * following)
    return Learnt(loss, loss, {})


def _nothing(key: chex.PRNGKey, num: int) -> tuple[chex.Array, ...]:
    return ()


def _same(outputs: chex.Array) -> chex.Array:
    return outputs


def _mean(outputs: chex.Array) -> chex.Array:
    return jnp.mean(outputs, axis=-1)
