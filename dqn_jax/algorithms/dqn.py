r"""DQN: learn the value of each action from replayed transitions, act epsilon-greedily on it.

One update moves the parameters :math:`\theta` down the gradient of

.. math:: \frac{1}{B} \sum_i w_i\, \ell\big(R_i + D_i\, q_{\theta^-}(o'_i, a^*_i) - q_\theta(o_i, a_i)\big),

where :math:`R, D` fold the n-step window, :math:`\theta^-` are the target parameters, :math:`a^*` is the best action by
:math:`\theta` (double) or by :math:`\theta^-`, and :math:`\ell` is the squared or Huber loss.

Mnih et al., "Human-level control through deep reinforcement learning" (2015). Van Hasselt, Guez and Silver, "Deep reinforcement
learning with double Q-learning" (2016).

Differs from the paper in:
  1. Truncated episodes bootstrap; only terminated ones do not.
  2. The optimizer is the caller's (the paper: centred RMSProp), and so is the clipping of gradients.
  3. The target refresh may also be partial (``tau``), as in Lillicrap et al. (2015); it follows the update at which the number of
     stored transitions has crossed a multiple of the interval.
  4. Returns may span n steps, without off-policy correction, as in Rainbow (Hessel et al., 2018).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from dqn_jax import policies, returns
from dqn_jax.types import Algorithm, Batch, Decision, Feedback


class DQNState(NamedTuple):
    """What DQN learns.

    Attributes:
      params: the online network's parameters.
      target_params: the target network's.
      opt_state: the optimizer's.
      step: transitions stored when it last learnt, int32; the target refresh counts from here.
    """

    params: Any
    target_params: Any
    opt_state: Any
    step: chex.Array


def dqn(
    network: Any,
    optimizer: optax.GradientTransformation,
    *,
    epsilon: chex.Numeric | Callable[[chex.Array], chex.Numeric],
    loss: str = "huber",
    double: bool = True,
    target_update_interval: int = 500,
    tau: chex.Numeric = 1.0,
) -> Algorithm:
    """The DQN algorithm.

    Args:
      network: anything with ``init(key, observation)`` and ``apply(params, observation) -> [B, A]``; with ``Masked`` observations it
        sees the observation proper.
      optimizer: an optax transformation; put gradient clipping in its chain.
      epsilon: probability of a random action, or a schedule of the number of stored transitions.
      loss: "huber" or "mse", of the TD error.
      double: whether the online network chooses the bootstrap action.
      target_update_interval: stored transitions between two refreshes of the target network; 1 means after every update.
      tau: how far a refresh moves the target to the online parameters; 1 copies them.

    Returns:
      An ``Algorithm`` whose learner is a ``DQNState``.

    Raises:
      ValueError: if ``loss`` is unknown or the interval is below one.
    """
    losses = {"huber": returns.huber, "mse": returns.squared}
    if loss not in losses:
        raise ValueError(f"loss must be one of {sorted(losses)}, got {loss!r}")
    if target_update_interval < 1:
        raise ValueError(f"target_update_interval must be at least 1, got {target_update_interval}")

    def q_values(params: Any, observation: chex.ArrayTree) -> chex.Array:
        observation, mask = policies.split_mask(observation)
        return policies.mask_values(network.apply(params, observation), mask)  # [B, A]

    def init(key: chex.PRNGKey, observation: chex.ArrayTree) -> DQNState:
        params = network.init(key, policies.split_mask(observation)[0])
        # A real copy: the same buffer twice in a donated state is an error.
        return DQNState(params, jax.tree.map(jnp.copy, params), optimizer.init(params), jnp.zeros((), jnp.int32))

    def noise(learner: DQNState, key: chex.PRNGKey, num: int) -> chex.Array:
        del learner
        return policies.epsilon_greedy_noise(key, num)  # [N, 2]

    def explore(learner: DQNState, observation: chex.ArrayTree, noise: chex.Array, step: chex.Array) -> Decision:
        values = q_values(learner.params, observation)  # [N, A]
        _, mask = policies.split_mask(observation)
        chance = epsilon(step) if callable(epsilon) else epsilon
        return Decision(jax.vmap(policies.epsilon_greedy, in_axes=(0, None if mask is None else 0, 0, None))(values, mask, noise, chance))

    def exploit(learner: DQNState, observation: chex.ArrayTree) -> chex.Array:
        return jnp.argmax(q_values(learner.params, observation), axis=-1).astype(jnp.int32)  # [N]

    def batch_loss(params: Any, target_params: Any, batch: Batch) -> tuple[chex.Array, tuple[chex.Array, chex.Array]]:
        t = batch.transition
        reward, discount = jax.vmap(returns.n_step)(t.reward, t.discount, t.last)  # [B]
        q = q_values(params, t.observation)  # [B, A]
        q_next = q_values(target_params, t.next_observation)  # [B, A]
        q_select = q_values(params, t.next_observation) if double else q_next  # [B, A]
        td_error = jax.vmap(returns.double_q_learning)(q, t.action, reward, discount, q_next, q_select)  # [B]
        weight = jnp.broadcast_to(batch.weight, td_error.shape)  # Refuses [B, 1], which would multiply into [B, B].
        return jnp.mean(weight * losses[loss](td_error)), (td_error, q)

    def refresh(learner: DQNState, step: chex.Array) -> Any:
        moved = optax.incremental_update(learner.params, learner.target_params, tau)
        if target_update_interval == 1:
            return moved
        crossed = step // target_update_interval > learner.step // target_update_interval
        return jax.tree.map(lambda new, old: jnp.where(crossed, new, old), moved, learner.target_params)

    def learn(learner: DQNState, batch: Batch, key: chex.PRNGKey, step: chex.Array) -> tuple[DQNState, Feedback]:
        del key
        gradient = jax.value_and_grad(batch_loss, has_aux=True)
        (value, (td_error, q)), grads = gradient(learner.params, learner.target_params, batch)
        changes, opt_state = optimizer.update(grads, learner.opt_state, learner.params)
        learner = learner._replace(params=optax.apply_updates(learner.params, changes), opt_state=opt_state)
        learner = learner._replace(target_params=refresh(learner, step), step=jnp.asarray(step, jnp.int32))
        chosen = jnp.take_along_axis(q, batch.transition.action[:, None], axis=1)  # [B, 1]
        return learner, Feedback(jnp.abs(td_error), {"loss": value, "q": jnp.mean(chosen)})

    return Algorithm(init, noise, explore, exploit, learn)
