"""Temporal-difference targets and losses: one equation per function, one stream of experience, no batch axis.

Callers ``jax.vmap``. No discount factor appears here: ``discount`` is data, already multiplied into each row, and 0 where the
episode terminated, so every target reads ``reward + discount * value``. A TD error is target minus prediction.
"""

import chex
import jax
import jax.numpy as jnp


def n_step(reward: chex.Array, discount: chex.Array, last: chex.Array) -> tuple[chex.Array, chex.Array]:
    r"""Folds a window of raw rows into one reward and one discount.

    .. math:: R = \sum_{k=0}^{K} \Big(\prod_{j<k} d_j\Big) r_k, \qquad D = \prod_{k=0}^{K} d_k

    where ``K`` is the first row with ``last``, or the end of the window: the discount is the product actually travelled, right for
    tails shorter than n. Sutton, "Learning to predict by the methods of temporal differences" (1988); Hessel et al., "Rainbow"
    (2018), equation for the truncated n-step return.

    Args:
      reward: ``[n]``, or a scalar for a window of one row.
      discount: ``[n]``, the discount factor times 0 where the episode terminated.
      last: ``[n]`` bool, the episode (or what is known of it) ends at this row.

    Returns:
      The scalar reward and the scalar discount that multiplies the value of the successor of row ``K``.

    Raises:
      AssertionError: at trace time, if the three shapes differ or have more than one axis.
    """
    reward, discount, last = map(jnp.atleast_1d, (reward, discount, last))
    chex.assert_rank([reward, discount, last], 1)
    chex.assert_equal_shape([reward, discount, last])
    ended_before = jnp.cumsum(last) - last > 0  # [n]
    discount = jnp.where(ended_before, 1.0, discount)
    travelled = jnp.cumprod(discount)  # [n]
    before = jnp.concatenate([jnp.ones_like(travelled[:1]), travelled[:-1]])  # [n]
    return jnp.sum(jnp.where(ended_before, 0.0, before * reward)), travelled[-1]


def q_learning(q: chex.Array, action: chex.Array, reward: chex.Array, discount: chex.Array, q_next: chex.Array) -> chex.Array:
    r"""TD error of Q-learning: :math:`r + d \max_a q'(a) - q(a)`. Watkins and Dayan, "Q-learning" (1992).

    Args:
      q: ``[A]`` values of the observation.
      action: scalar integer.
      reward: scalar.
      discount: scalar.
      q_next: ``[A]`` values of the successor, from the target network.

    Returns:
      The scalar TD error; no gradient flows through the target.
    """
    return double_q_learning(q, action, reward, discount, q_next, q_next)


def double_q_learning(
    q: chex.Array, action: chex.Array, reward: chex.Array, discount: chex.Array, q_next: chex.Array, q_select: chex.Array
) -> chex.Array:
    r"""TD error of double Q-learning: :math:`r + d\, q'(\arg\max_a s(a)) - q(a)`.

    Van Hasselt, Guez and Silver, "Deep reinforcement learning with double Q-learning" (2016), equation 4.

    Args:
      q: ``[A]`` values of the observation.
      action: scalar integer.
      reward: scalar.
      discount: scalar.
      q_next: ``[A]`` values of the successor from the target network: they value the action.
      q_select: ``[A]`` values of the successor from the online network: they choose it.

    Returns:
      The scalar TD error; no gradient flows through the target.

    Raises:
      AssertionError: at trace time, on other ranks, or if the three value vectors differ in length.
    """
    chex.assert_rank([q, action, reward, discount, q_next, q_select], [1, 0, 0, 0, 1, 1])
    chex.assert_equal_shape([q, q_next, q_select])
    target = reward + discount * q_next[jnp.argmax(q_select)]
    return jax.lax.stop_gradient(target) - q[action]


def squared(td_error: chex.Array) -> chex.Array:
    """The squared error, elementwise. Its gradient is twice Huber's near zero."""
    return jnp.square(td_error)


def huber(td_error: chex.Array) -> chex.Array:
    """Huber's loss with threshold 1, elementwise: ``x**2 / 2`` inside, ``|x| - 1/2`` outside.

    Its gradient is the TD error clipped to [-1, 1], as in Mnih et al., "Human-level control" (2015), Methods.
    """
    size = jnp.abs(td_error)
    inside = jnp.minimum(size, 1.0)
    return 0.5 * jnp.square(inside) + (size - inside)


def gae(
    reward: chex.Array, discount: chex.Array, last: chex.Array, value: chex.Array, next_value: chex.Array, lambda_: chex.Numeric
) -> chex.Array:
    r"""Generalised advantage estimation, over a stream that may hold many episodes.

    .. math:: \delta_t = r_t + d_t v(o'_t) - v(o_t), \qquad A_t = \delta_t + d_t \lambda (1 - l_t) A_{t+1}

    The sum is cut where an episode ended, for whatever reason, and at the end of the stream; the value of the true successor stands in
    for what follows, unless the episode terminated there (:math:`d_t = 0`). Schulman et al., "High-dimensional continuous control using
    generalized advantage estimation" (2016), equation 16.

    Args:
      reward: ``[T]``.
      discount: ``[T]``, the discount factor times 0 where the episode terminated.
      last: ``[T]`` bool, the episode ended here.
      value: ``[T]`` of the observations.
      next_value: ``[T]`` of the true successors.
      lambda_: in [0, 1]: 0 is the TD error, 1 the discounted return less the value.

    Returns:
      The advantages ``[T]``; with ``value`` they add up to the lambda-returns.

    Raises:
      AssertionError: at trace time, if the five shapes differ or have not one axis.
    """
    chex.assert_rank([reward, discount, last, value, next_value], 1)
    chex.assert_equal_shape([reward, discount, last, value, next_value])
    td_error = reward + discount * next_value - value
    carried = discount * lambda_ * (1.0 - last)

    def back(following: chex.Array, row: tuple[chex.Array, chex.Array]) -> tuple[chex.Array, chex.Array]:
        advantage = row[0] + row[1] * following
        return advantage, advantage

    return jax.lax.scan(back, jnp.zeros_like(td_error[0]), (td_error, carried), reverse=True)[1]


def lambda_return(reward: chex.Array, discount: chex.Array, last: chex.Array, next_value: chex.Array, lambda_: chex.Numeric) -> chex.Array:
    r"""Lambda-returns, over a stream that may hold many episodes.

    .. math:: G_t = r_t + d_t \big((1 - \lambda_t)\, v'_t + \lambda_t G_{t+1}\big),
       \qquad \lambda_t = \lambda \text{ where the episode goes on in row } t + 1, \text{ else } 0

    With :math:`v'_t = \max_a q(o'_t, a)` these are the targets of Peng's Q(lambda): actions that were not greedy do not cut the sum. At
    every end and at the end of the stream the value of the true successor stands in for what follows, unless the episode terminated there
    (:math:`d_t = 0`). Peng and Williams, "Incremental multi-step Q-learning" (1996); Gallici et al., "Simplifying deep temporal difference
    learning" (2024), section 3; Daley and Amato, "Reconciling lambda-returns with experience replay" (2019), the recursive form.

    Args:
      reward: ``[T]``.
      discount: ``[T]``, the discount factor times 0 where the episode terminated.
      last: ``[T]`` bool, the episode ended here.
      next_value: ``[T]`` of the true successors.
      lambda_: in [0, 1]: 0 is the one-step target, 1 the discounted return up to the end of the episode or of the stream.

    Returns:
      The returns ``[T]``.

    Raises:
      AssertionError: at trace time, if the four shapes differ or have not one axis.
    """
    chex.assert_rank([reward, discount, last, next_value], 1)
    chex.assert_equal_shape([reward, discount, last, next_value])
    trust = lambda_ * (1.0 - last)  # [T]

    def back(following: chex.Array, row: tuple[chex.Array, ...]) -> tuple[chex.Array, chex.Array]:
        reward, discount, next_value, trust = row
        total = reward + discount * ((1.0 - trust) * next_value + trust * following)
        return total, total

    # Behind the last row nothing is known but the value of its successor.
    return jax.lax.scan(back, next_value[-1], (reward, discount, next_value, trust), reverse=True)[1]
