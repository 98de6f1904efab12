r"""DQN and its family: learn the value of each action from replayed transitions, act epsilon-greedily on it.

One update moves the parameters :math:`\theta` down the gradient of

.. math:: \frac{1}{B} \sum_i w_i\, \ell\big(R_i + D_i\, x_{\theta^-}(o'_i, a^*_i),\; x_\theta(o_i, a_i)\big),

where :math:`R, D` fold the n-step window, :math:`\theta^-` are the target parameters and :math:`a^*` is the best action by
:math:`\theta` (double) or by :math:`\theta^-`. What :math:`x` and the loss :math:`\ell` are is the head's business (``heads``): a value
and the squared or Huber loss of the TD error, or a distribution of returns (C51, QR-DQN, IQN). With Munchausen's bonus what follows is
averaged over a soft policy. Whether the network is dueling or noisy is the network's business (``value_networks``).

Mnih et al., "Human-level control through deep reinforcement learning" (2015). Van Hasselt, Guez and Silver, "Deep reinforcement
learning with double Q-learning" (2016), equation 4. Hessel et al., "Rainbow" (2018). Vieillard, Pietquin and Geist, "Munchausen
reinforcement learning" (2020).

Differs from the papers in:
  1. Truncated episodes bootstrap; only terminated ones do not.
  2. The optimizer is the caller's (Mnih et al.: centred RMSProp), and so is the clipping of gradients.
  3. The target refresh may also be partial (``tau``), as in Lillicrap et al. (2015); it follows the update at which the number of
     stored transitions has crossed a multiple of the interval.
  4. Returns may span n steps, without off-policy correction, as in Rainbow.
  5. Munchausen's bonus goes with any head, where the paper has it with values and IQN's quantiles.
  6. A noisy network draws one noise for each row of decisions, which all environments of the row share; ``exploit`` draws none.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from dqn_jax import finite, heads, policies, returns
from dqn_jax.heads import Head, Learnt
from dqn_jax.types import Algorithm, Batch, Decision, Feedback, Transition

HUBER = heads.expected()
LOG_POLICY_MIN = -1.0  # l_0 in Vieillard et al.: the scaled log-probability that Munchausen's bonus is cut at.


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


class Munchausen(NamedTuple):
    """A soft policy, and a bonus for what it thinks likely; Vieillard et al. (2020), equation 2.

    Attributes:
      weight: alpha of the bonus; the paper's is 0.9, and 0 leaves the soft policy (Soft-DQN).
      temperature: tau of the policy, in units of reward; the paper's is 0.03.
    """

    weight: chex.Numeric = 0.9
    temperature: chex.Numeric = 0.03


def dqn(
    network: Any,
    optimizer: optax.GradientTransformation,
    *,
    epsilon: chex.Numeric | Callable[[chex.Array], chex.Numeric],
    head: Head = HUBER,
    double: bool = True,
    munchausen: Munchausen | None = None,
    target_update_interval: int = 500,
    tau: chex.Numeric = 1.0,
    finite_changes: bool = False,
) -> Algorithm:
    """The DQN algorithm.

    Args:
      network: anything with ``init(key, observation)`` and ``apply(params, observation) -> [B, A]``, or ``[B, A, ...]`` as the head has
        it; where the head asks for fractions, they follow the observation. If it also has ``draw_noise(params, key)`` and that is not
        empty, what it drew goes into ``apply`` as ``noise``; without it the network is to give its mean. With ``Masked`` observations it
        sees the observation proper.
      optimizer: an optax transformation; put gradient clipping in its chain.
      epsilon: probability of a random action, or a schedule of the number of stored transitions.
      head: what the network's outputs stand for; see ``heads``.
      double: whether the online network chooses the bootstrap action; unused with ``munchausen``, whose policy is the target network's.
      munchausen: a soft policy with a bonus, for windows of one step, or None.
      target_update_interval: stored transitions between two refreshes of the target network; 1 means after every update.
      tau: how far a refresh moves the target to the online parameters; 1 copies them.
      finite_changes: whether the optimizer makes finite changes of finite gradients, as Adam with an epsilon does. Only these are looked at
        then, which costs less than to look through all that was learnt.

    Returns:
      An ``Algorithm`` whose learner is a ``DQNState``.

    Raises:
      ValueError: if the interval is below one; from ``learn``, if ``munchausen`` is given a window of several steps.
    """
    if target_update_interval < 1:
        raise ValueError(f"target_update_interval must be at least 1, got {target_update_interval}")
    draw_layers = getattr(network, "draw_noise", lambda params, key: ())

    def outputs_of(params: Any, observation: chex.ArrayTree, layers: Any, inputs: tuple[Any, ...] = head.fixed) -> chex.Array:
        noise = {"noise": layers} if layers else {}
        return network.apply(params, policies.split_mask(observation)[0], *inputs, **noise)  # [B, A, ...]

    def values_of(outputs: chex.Array, observation: chex.ArrayTree) -> chex.Array:
        _, mask = policies.split_mask(observation)
        return policies.mask_values(head.values(outputs), mask)  # [B, A]

    def q_values(params: Any, observation: chex.ArrayTree, layers: Any = ()) -> chex.Array:
        return values_of(outputs_of(params, observation, layers), observation)  # [B, A]

    def init(key: chex.PRNGKey, observation: chex.ArrayTree) -> DQNState:
        params = network.init(key, policies.split_mask(observation)[0], *head.fixed)
        # A real copy: the same buffer twice in a donated state is an error.
        return DQNState(params, jax.tree.map(jnp.copy, params), optimizer.init(params), jnp.zeros((), jnp.int32))

    def noise(learner: DQNState, key: chex.PRNGKey, num: int) -> tuple[chex.Array, Any]:
        # [N, 2], and the layers' own.
        return policies.epsilon_greedy_noise(key, num), draw_layers(learner.params, jax.random.fold_in(key, 1))

    def explore(learner: DQNState, observation: chex.ArrayTree, noise: tuple[chex.Array, Any], step: chex.Array) -> Decision:
        draws, layers = noise
        values = q_values(learner.params, observation, layers)  # [N, A]
        _, mask = policies.split_mask(observation)
        chance = epsilon(step) if callable(epsilon) else epsilon
        return Decision(jax.vmap(policies.epsilon_greedy, in_axes=(0, None if mask is None else 0, 0, None))(values, mask, draws, chance))

    def exploit(learner: DQNState, observation: chex.ArrayTree) -> chex.Array:
        return jnp.argmax(q_values(learner.params, observation), axis=-1).astype(jnp.int32)  # [N]

    def best_follows(params: Any, target_params: Any, t: Transition, target: Any, select: Any) -> chex.Array:
        """The distribution of what the target network expects after the best action of the successor, ``[B, ...]``."""
        outputs = outputs_of(target_params, t.next_observation, target)  # [B, A, ...]
        values = q_values(params, t.next_observation, select) if double else values_of(outputs, t.next_observation)  # [B, A]
        return head.distribution(_of_action(outputs, jnp.argmax(values, axis=-1)))  # Chosen first: it may be dear.

    def policy_follows(target_params: Any, t: Transition, target: Any, soft: Munchausen) -> tuple[chex.Array, chex.Array, chex.Array]:
        """As ``best_follows``, averaged over the target network's soft policy; that policy's entropy, scaled by the temperature, and the
        bonus of the action taken, ``[B]`` each.
        """
        policy_of = jax.vmap(lambda values: returns.soft_policy(values, soft.temperature))
        outputs = outputs_of(target_params, t.next_observation, target)  # [B, A, ...]
        policy, scaled_log = policy_of(values_of(outputs, t.next_observation))  # [B, A] each
        following = jax.vmap(lambda policy, each: jnp.tensordot(policy, each, 1))(policy, head.distribution(outputs))  # [B, ...]
        _, before = policy_of(q_values(target_params, t.observation, target))  # [B, A]
        bonus = soft.weight * jnp.clip(_of_action(before, t.action), LOG_POLICY_MIN, 0.0)
        return following, -jnp.sum(policy * scaled_log, axis=-1), bonus

    def batch_loss(params: Any, target_params: Any, batch: Batch, layers: list[Any], inputs: tuple[Any, ...]) -> tuple[chex.Array, Any]:
        t, (online, target, select) = batch.transition, layers
        if munchausen is not None and t.reward.shape[1:] not in ((), (1,)):
            raise ValueError(f"munchausen pays for every step, got windows of {t.reward.shape[1]}: let the storage have n_steps=1")
        reward, discount = jax.vmap(returns.n_step)(t.reward, t.discount, t.last)  # [B]
        if munchausen is None:
            following = best_follows(params, target_params, t, target, select)  # [B, ...]
        else:
            following, entropy, bonus = policy_follows(target_params, t, target, munchausen)
            reward = reward + bonus + discount * entropy
        chosen = _of_action(outputs_of(params, t.observation, online, inputs), t.action)  # [B, ...]
        learnt: Learnt = jax.vmap(head.loss)(chosen, inputs, reward, discount, following)
        weight = jnp.broadcast_to(batch.weight, learnt.loss.shape)  # Refuses [B, 1], which would multiply into [B, B].
        metrics = {"q": head.values(chosen), **learnt.metrics}  # [B] each
        return jnp.mean(weight * learnt.loss), (learnt.priority, jax.tree.map(jnp.mean, metrics))

    def refresh(learner: DQNState, step: chex.Array) -> Any:
        moved = optax.incremental_update(learner.params, learner.target_params, tau)
        if target_update_interval == 1:
            return moved
        crossed = step // target_update_interval > learner.step // target_update_interval
        return jax.tree.map(lambda new, old: jnp.where(crossed, new, old), moved, learner.target_params)

    def descended(learner: DQNState, grads: Any, step: chex.Array) -> DQNState:
        changes, opt_state = optimizer.update(grads, learner.opt_state, learner.params)
        learner = learner._replace(params=optax.apply_updates(learner.params, changes), opt_state=opt_state)
        return learner._replace(target_params=refresh(learner, step), step=jnp.asarray(step, jnp.int32))

    def learn(learner: DQNState, batch: Batch, key: chex.PRNGKey, step: chex.Array) -> tuple[DQNState, Feedback]:
        key_inputs, *keys = jax.random.split(key, 4)
        layers = [draw_layers(learner.params, each) for each in keys]  # Of prediction, target and choice: three noises, apart.
        inputs = head.draw(key_inputs, batch.transition.action.shape[0])
        gradient = jax.value_and_grad(batch_loss, has_aux=True)
        (value, (priority, metrics)), grads = gradient(learner.params, learner.target_params, batch, layers, inputs)
        feedback = Feedback(priority, {"loss": value, **metrics}, gradient=grads)
        if not finite_changes:
            return descended(learner, grads, step), feedback  # Whoever calls looks through it: see assemble.
        sound = finite.is_sound(value, grads)
        learner = finite.learn_if(sound, lambda learner: descended(learner, grads, step), learner)
        return learner, feedback._replace(finite=sound)

    return Algorithm(init, noise, explore, exploit, learn)


def _of_action(values: chex.Array, action: chex.Array) -> chex.Array:
    """Of ``values [B, A, ...]`` those of the actions ``[B]``."""
    return jax.vmap(lambda values, action: values[action])(values, action)
