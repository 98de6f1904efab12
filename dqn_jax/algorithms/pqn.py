r"""PQN: play a while in many environments, learn the values of actions from that a few times over, throw it away.

Neither a replay nor a target network: the targets :math:`G`, Q(lambda) by the values as they are, come once from the whole rollout, then
each minibatch moves the parameters :math:`\theta` down the gradient of

.. math:: \frac{1}{2B} \sum_i \big(G_i - q_\theta(o_i, a_i)\big)^2, \qquad
   G_t = R_t + D_t \big((1 - \lambda) \max_a q(o'_t, a) + \lambda G_{t+1}\big).

What keeps this stable is the normalisation of the network's layers (``networks.QNetwork(..., layer_norm=True)``), and what the rollout
has of variety: many environments, and an epsilon that falls slowly.

Gallici, Fellows, Ellis, Pou, Masmitja, Foerster and Martin, "Simplifying deep temporal difference learning" (2024), algorithm 1.

Differs from the paper in:
  1. Truncated episodes bootstrap from the true final observation; only terminated ones do not.
  2. The optimizer is the caller's (the paper: RAdam behind a clip of the gradient's norm), and so is the network.
  3. The values in the targets are computed when learning starts, not kept from when the actions were chosen: the same numbers, but for
     the first row of a rollout, which was chosen before the update that precedes it, and whose value no target here needs.
  4. Epsilon is a schedule of the transitions stored, so it also falls within a rollout.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from dqn_jax import minibatches, policies, returns
from dqn_jax.types import Algorithm, Batch, Decision, Feedback, Transition


class PQNState(NamedTuple):
    """What PQN learns.

    Attributes:
      params: the network's parameters.
      opt_state: the optimizer's.
    """

    params: Any
    opt_state: Any


class Rollout(NamedTuple):
    """What a minibatch is made of, ``[T N, ...]``, then ``[B, ...]``."""

    observation: chex.ArrayTree
    action: chex.Array
    target: chex.Array


def pqn(
    network: Any,
    optimizer: optax.GradientTransformation,
    *,
    epsilon: chex.Numeric | Callable[[chex.Array], chex.Numeric],
    lambda_: chex.Numeric = 0.65,
    epochs: int = 2,
    minibatch_size: int = 128,
) -> Algorithm:
    """The PQN algorithm. It learns from whole rollouts: batches of ``[T, N, ...]``, oldest row first.

    Args:
      network: anything with ``init(key, observation)`` and ``apply(params, observation) -> [B, A]``, of normalised layers; with ``Masked``
        observations it sees the observation proper.
      optimizer: an optax transformation; put gradient clipping and a schedule of the learning rate in its chain. It is asked
        ``epochs T N / minibatch_size`` times a rollout.
      epsilon: probability of a random action, or a schedule of the number of stored transitions.
      lambda_: of the targets, in [0, 1]: 0 bootstraps after one step, 1 at the ends of episodes and of the rollout only.
      epochs: times that each row is learnt from.
      minibatch_size: rows B in a minibatch; it must divide ``T N``.

    Returns:
      An ``Algorithm`` whose learner is a ``PQNState``.

    Raises:
      ValueError: if a count is below one; when tracing ``learn``, if the rollout does not divide into minibatches.
    """
    minibatches.require_sizes(epochs, minibatch_size)

    def q_values(params: Any, observation: chex.ArrayTree) -> chex.Array:
        observation, mask = policies.split_mask(observation)
        return policies.mask_values(network.apply(params, observation), mask)  # [B, A]

    def init(key: chex.PRNGKey, observation: chex.ArrayTree) -> PQNState:
        params = network.init(key, policies.split_mask(observation)[0])
        return PQNState(params, optimizer.init(params))

    def noise(learner: PQNState, key: chex.PRNGKey, num: int) -> chex.Array:
        del learner
        return policies.epsilon_greedy_noise(key, num)  # [N, 2]

    def explore(learner: PQNState, observation: chex.ArrayTree, noise: chex.Array, step: chex.Array) -> Decision:
        values = q_values(learner.params, observation)  # [N, A]
        _, mask = policies.split_mask(observation)
        chance = epsilon(step) if callable(epsilon) else epsilon
        return Decision(jax.vmap(policies.epsilon_greedy, in_axes=(0, None if mask is None else 0, 0, None))(values, mask, noise, chance))

    def exploit(learner: PQNState, observation: chex.ArrayTree) -> chex.Array:
        return jnp.argmax(q_values(learner.params, observation), axis=-1).astype(jnp.int32)  # [N]

    def prepare(learner: PQNState, t: Transition) -> Rollout:
        def best(observation: chex.ArrayTree) -> chex.Array:
            return jnp.max(q_values(learner.params, observation), axis=-1)  # [B]

        # The one pass over the rollout that targets need. Where an episode goes on the successor is the next row's observation; where it
        # ended no row holds it, and that may be anywhere.
        observation, action, successor = jax.tree.map(_rows_in_one, (t.observation, t.action, t.next_observation))  # [T N, ...]
        next_value = minibatches.in_minibatches(best, successor, minibatch_size).reshape(t.reward.shape)  # [T, N]
        over_envs = jax.vmap(returns.lambda_return, in_axes=(1, 1, 1, 1, None), out_axes=1)
        return Rollout(observation, action, _rows_in_one(over_envs(t.reward, t.discount, t.last, next_value, lambda_)))

    def minibatch_loss(params: Any, rows: Rollout) -> tuple[chex.Array, dict[str, chex.Array]]:
        q = jnp.take_along_axis(q_values(params, rows.observation), rows.action[:, None], axis=1)[:, 0]  # [B]
        loss = 0.5 * jnp.mean(returns.squared(rows.target - q))
        return loss, {"loss": loss, "q": jnp.mean(q)}

    def minibatch(learner: PQNState, rows: Rollout) -> tuple[PQNState, dict[str, chex.Array]]:
        grads, metrics = jax.grad(minibatch_loss, has_aux=True)(learner.params, rows)
        changes, opt_state = optimizer.update(grads, learner.opt_state, learner.params)
        return PQNState(optax.apply_updates(learner.params, changes), opt_state), metrics

    def learn(learner: PQNState, batch: Batch, key: chex.PRNGKey, step: chex.Array) -> tuple[PQNState, Feedback]:
        del step
        t = batch.transition
        chex.assert_rank([t.reward, t.discount, t.last], 2)  # [T, N]
        rollout = prepare(learner, t)
        learner, metrics = minibatches.repeat(minibatch, learner, rollout, key, epochs=epochs, minibatch_size=minibatch_size)
        return learner, Feedback((), jax.tree.map(jnp.mean, metrics))

    return Algorithm(init, noise, explore, exploit, learn)


def _rows_in_one(leaf: chex.Array) -> chex.Array:
    """``[T, N, ...]`` as ``[T N, ...]``."""
    return leaf.reshape(-1, *leaf.shape[2:])
