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


def project(support: chex.Array, places: chex.Array, mass: chex.Array) -> chex.Array:
    r"""Moves mass from any places to the atoms of an even support, so that its mean stays, within the ends of the support.

    .. math:: m_i = \sum_j p_j \Big[1 - \frac{|\,[y_j]_{z_1}^{z_K} - z_i|}{\Delta z}\Big]_0^1

    Each mass goes to the two atoms beside its place, the nearer the more; what lies beyond an end goes to that end. Bellemare, Dabney and
    Munos, "A distributional perspective on reinforcement learning" (2017), equation 7.

    Args:
      support: ``[K]`` atoms, evenly spaced, ascending, at least two.
      places: ``[M]``.
      mass: ``[M]``.

    Returns:
      The mass of each atom, ``[K]``; its sum is that of ``mass``.

    Raises:
      AssertionError: at trace time, on other ranks, or if there are not as many places as masses.
    """
    chex.assert_rank([support, places, mass], 1)
    chex.assert_equal_shape([places, mass])
    # In units of the distance between two atoms. Counted from the first atom and clipped there, so that no mass is rounded away.
    atom = jnp.arange(support.shape[0], dtype=support.dtype)
    place = (places - support[0]) * (atom[-1] / (support[-1] - support[0]))
    distance = jnp.abs(jnp.clip(place, 0.0, atom[-1]) - atom[:, None])  # [K, M]
    return jnp.maximum(1.0 - distance, 0.0) @ mass


def cross_entropy(logits: chex.Array, mass: chex.Array) -> chex.Array:
    r"""Cross-entropy of a distribution given by its logits against the masses of a target: :math:`-\sum_i m_i \log p_i`.

    Args:
      logits: ``[K]``.
      mass: ``[K]``; no gradient flows through it.

    Returns:
      A scalar: up to the target's own entropy, the Kullback-Leibler divergence between the two.
    """
    chex.assert_rank([logits, mass], 1)
    chex.assert_equal_shape([logits, mass])
    return -jnp.sum(jax.lax.stop_gradient(mass) * jax.nn.log_softmax(logits))


def quantile_huber(quantile: chex.Array, fraction: chex.Array, target: chex.Array) -> chex.Array:
    r"""How badly numbers fit as quantiles of a sample of targets.

    .. math:: \sum_i \frac{1}{M} \sum_j |\tau_i - 1\{y_j < \theta_i\}|\, \ell(y_j - \theta_i)

    with Huber's loss :math:`\ell` of threshold 1. Dabney et al., "Distributional reinforcement learning with quantile regression"
    (2018), equation 10: summed over the quantiles, averaged over the targets.

    Args:
      quantile: ``[N]`` predictions :math:`\theta`.
      fraction: ``[N]``, which quantile each is, in [0, 1].
      target: ``[M]``; no gradient flows through it.

    Returns:
      A scalar.
    """
    chex.assert_rank([quantile, fraction, target], 1)
    chex.assert_equal_shape([quantile, fraction])
    error = jax.lax.stop_gradient(target)[None] - quantile[:, None]  # [N, M]
    slope = jnp.abs(fraction[:, None] - (error < 0.0))
    return jnp.sum(slope * huber(error)) / target.shape[0]


def soft_policy(values: chex.Array, temperature: chex.Numeric) -> tuple[chex.Array, chex.Array]:
    r"""The policy that is the softer the higher the temperature: :math:`\pi \propto \exp(q / \tau)`, and :math:`\tau \log \pi`.

    Args:
      values: ``[A]``, forbidden actions at the lowest finite value.
      temperature: scalar, above 0.

    Returns:
      Probabilities ``[A]`` and scaled log-probabilities ``[A]``, finite also where an action has no chance: sums over the policy are, too.
    """
    chex.assert_rank(values, 1)
    log_policy = jax.nn.log_softmax((values - jnp.max(values)) / temperature)
    return jnp.exp(log_policy), jnp.maximum(temperature * log_policy, jnp.finfo(log_policy.dtype).min)


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
