r"""SAC: learn the value of acting well and at random, and a policy that is as random as a given entropy asks.

With :math:`v(o) = E_{a \sim \pi}[\min_i q_i(o, a) - \alpha \log \pi(a | o)]`, an update moves the twin critics down the gradient of
:math:`(R + D\, \bar v(o') - q_i(o, a))^2`, where :math:`\bar v` uses the target critics; then the policy up that of :math:`v(o)`; then
:math:`\log \alpha` down that of :math:`\log \alpha\, (H - \bar H)`, :math:`H` the policy's entropy and :math:`\bar H` its target; last the
target critics a part of the way to the critics.

Haarnoja et al., "Soft actor-critic algorithms and applications" (2018), equations 5, 7, 9 and 18, for actions of numbers (``sac``).
Christodoulou, "Soft actor-critic for discrete action settings" (2019), for numbered actions (``discrete_sac``), whose expectations are
exact sums.

Differs from the papers in:
  1. Truncated episodes bootstrap; only terminated ones do not.
  2. Returns may span n steps; rewards on the way carry no entropy, the value at their end does.
  3. The temperature is kept between bounds. For numbered actions the paper's target, 0.98 of the largest entropy, is often out of reach,
     and the temperature then grows without end; where the policy stays more random than its target, it falls without end, and would take as
     long to come back. Where actions are forbidden, the target is a share of what the allowed ones can have.
  4. The temperature is learnt through its logarithm by a gradient that does not shrink with it (equation 18 has ``alpha (H - target)``),
     as in Dopamine and SB3. Adam, whose second moment remembers larger gradients, otherwise makes a falling temperature fall slower.
  5. Where a replay weighs what it hands out, the weights correct the critics only; policy and temperature are learnt for what was drawn.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from dqn_jax import distributions, finite, policies, returns
from dqn_jax.types import Algorithm, Batch, Decision, Feedback, Transition

MIN_TEMPERATURE = 1e-4  # An entropy of a few nats is then worth less than a thousandth of a reward of 1.


class SACState(NamedTuple):
    """What SAC learns.

    Attributes:
      actor: the policy's parameters.
      critics: of both critics, ``[2, ...]``.
      target_critics: likewise.
      log_temperature: a scalar.
      actor_opt, critic_opt, temperature_opt: states of the optimizers.
    """

    actor: Any
    critics: Any
    target_critics: Any
    log_temperature: chex.Array
    actor_opt: Any
    critic_opt: Any
    temperature_opt: Any


class Optimizers(NamedTuple):
    """One optax transformation for each thing that SAC learns."""

    actor: optax.GradientTransformation
    critic: optax.GradientTransformation
    temperature: optax.GradientTransformation


class _Head(NamedTuple):
    """What the two kinds of actions do not share. A policy is seen through K actions of it: one that was drawn, or all that there are.

    Attributes:
      noise: ``(key, num) -> noise [num, ...]``.
      sample: ``(outputs, mask, noise, at_random) -> action`` of one observation, for the environment; ``at_random`` asks for a uniform one.
      mode: ``(outputs, mask) -> action``.
      propose: ``(outputs [B, P], mask, noise [B, ...]) -> (actions, weight [B, K], log_prob [B, K])``; weights sum to 1.
      values: ``(params, observation, actions) -> [B, K]`` by one critic.
      taken: ``(params, observation, action [B, ...]) -> [B]`` by one critic, of an action as the environment took it.
      target: ``(mask) -> `` the entropy to aim at, a scalar or ``[B]``.
      init: ``(key, observation) -> params`` of one critic.
    """

    noise: Callable[..., chex.Array]
    sample: Callable[..., chex.Array]
    mode: Callable[..., chex.Array]
    propose: Callable[..., tuple[Any, chex.Array, chex.Array]]
    values: Callable[..., chex.Array]
    taken: Callable[..., chex.Array]
    target: Callable[..., chex.Numeric]
    init: Callable[..., Any]


def sac(
    actor: Any,
    critic: Any,
    optimizers: Optimizers,
    *,
    low: chex.Array,
    high: chex.Array,
    target_entropy: float | None = None,
    warmup: int = 0,
    tau: chex.Numeric = 0.005,
    initial_temperature: chex.Numeric = 1.0,
    max_temperature: chex.Numeric = 10.0,
    reward_scale: chex.Numeric = 1.0,
    finite_changes: bool = False,
) -> Algorithm:
    """The SAC algorithm for actions of D numbers between bounds.

    Args:
      actor: anything with ``init(key, observation)`` and ``apply(params, observation) -> [B, 2 D]``: see ``distributions.tanh_normal``.
      critic: anything with ``init(key, observation, action)`` and ``apply(params, observation, action [B, D]) -> [B]``; the action it sees
        is in [-1, 1]. Two of it are made.
      optimizers: optax transformations.
      low, high: bounds of the action, finite; their shape is the action's.
      target_entropy: of the policy over actions in [-1, 1], in nats; by default -D.
      warmup: transitions stored before which actions are uniform.
      tau: how far the target critics go to the critics after each update.
      initial_temperature, max_temperature: where the temperature begins, and what it never exceeds; it never falls below
        MIN_TEMPERATURE, 1e-4.
      reward_scale: factor of the rewards.
      finite_changes: whether the optimizers make finite changes of finite gradients, as Adam with an epsilon does. Only these are looked at
        then, which costs less than to look through all that was learnt.

    Returns:
      An ``Algorithm`` whose learner is a ``SACState``.

    Raises:
      ValueError: on a negative warmup, or a temperature that does not begin in [MIN_TEMPERATURE, max_temperature].
    """
    low, high = jnp.asarray(low, jnp.float32), jnp.asarray(high, jnp.float32)
    num_dims = low.size

    def to_env(action: chex.Array) -> chex.Array:
        """From [-1, 1] to the bounds; the clip undoes a rounding that would leave them."""
        return jnp.clip(low + (action.reshape(low.shape) + 1.0) * 0.5 * (high - low), low, high)

    def noise(key: chex.PRNGKey, num: int) -> chex.Array:
        return jax.random.normal(key, (num, num_dims))

    def sample(outputs: chex.Array, mask: None, noise: chex.Array, at_random: chex.Array) -> chex.Array:
        # A normal number's place in its distribution is uniform: one draw serves both.
        uniform = jax.lax.erf(noise * 0.5**0.5)
        return to_env(jnp.where(at_random, uniform, distributions.tanh_normal(outputs, noise)[0]))

    def mode(outputs: chex.Array, mask: None) -> chex.Array:
        return to_env(distributions.tanh_normal(outputs, jnp.zeros(num_dims))[0])

    def propose(outputs: chex.Array, mask: None, noise: chex.Array) -> tuple[chex.Array, chex.Array, chex.Array]:
        action, log_prob = jax.vmap(distributions.tanh_normal)(outputs, noise)  # [B, D], [B]
        return action, jnp.ones((len(log_prob), 1)), log_prob[:, None]

    def values(params: Any, observation: chex.ArrayTree, action: chex.Array) -> chex.Array:
        return critic.apply(params, observation, action)[:, None]  # [B, 1]

    def taken(params: Any, observation: chex.ArrayTree, action: chex.Array) -> chex.Array:
        inside = 2.0 * (action - low) / (high - low) - 1.0  # [B, ...]
        return critic.apply(params, observation, inside.reshape(len(inside), num_dims))  # [B]

    def init(key: chex.PRNGKey, observation: chex.ArrayTree) -> Any:
        return critic.init(key, observation, jnp.zeros((jax.tree.leaves(observation)[0].shape[0], num_dims)))

    goal = -float(num_dims) if target_entropy is None else target_entropy
    head = _Head(noise, sample, mode, propose, values, taken, lambda mask: goal, init)
    return _soft_actor_critic(actor, head, optimizers, warmup, tau, initial_temperature, max_temperature, reward_scale, finite_changes)


def discrete_sac(
    actor: Any,
    critic: Any,
    optimizers: Optimizers,
    *,
    num_actions: int,
    target_entropy: float | None = None,
    warmup: int = 0,
    tau: chex.Numeric = 0.005,
    initial_temperature: chex.Numeric = 1.0,
    max_temperature: chex.Numeric = 10.0,
    reward_scale: chex.Numeric = 1.0,
    finite_changes: bool = False,
) -> Algorithm:
    """The SAC algorithm for A numbered actions.

    Args:
      actor: anything with ``init(key, observation)`` and ``apply(params, observation) -> [B, A]``, the logits.
      critic: anything with the same two functions, whose outputs are values. Two of it are made.
      num_actions: A.
      target_entropy: as a share of the largest entropy that the allowed actions can have, in [0, 1]; by default 0.7 where there are up
        to four actions, else 0.89.
      optimizers, warmup, tau, initial_temperature, max_temperature, reward_scale, finite_changes: as for ``sac``.

    Returns:
      An ``Algorithm`` whose learner is a ``SACState``.

    Raises:
      ValueError: as ``sac``.
    """
    policy = distributions.categorical(num_actions)
    share = (0.7 if num_actions <= 4 else 0.89) if target_entropy is None else target_entropy

    def sample(logits: chex.Array, mask: chex.Array | None, noise: chex.Array, at_random: chex.Array) -> chex.Array:
        return policy.sample(jnp.where(at_random, 0.0, logits), mask, noise)

    def propose(logits: chex.Array, mask: chex.Array | None, noise: chex.Array) -> tuple[tuple[()], chex.Array, chex.Array]:
        del noise  # All actions are there: nothing is drawn.
        log_prob = distributions.log_probabilities(logits, mask)  # [B, A]
        return (), jnp.exp(log_prob), log_prob

    def values(params: Any, observation: chex.ArrayTree, actions: tuple[()]) -> chex.Array:
        return critic.apply(params, observation)  # [B, A]

    def taken(params: Any, observation: chex.ArrayTree, action: chex.Array) -> chex.Array:
        return jnp.take_along_axis(critic.apply(params, observation), action[:, None], axis=1)[:, 0]  # [B]

    def target(mask: chex.Array | None) -> chex.Numeric:
        allowed = num_actions if mask is None else jnp.maximum(jnp.sum(mask, axis=-1), 1)  # [B]
        return share * jnp.log(allowed)

    head = _Head(policy.noise, sample, policy.mode, propose, values, taken, target, critic.init)
    return _soft_actor_critic(actor, head, optimizers, warmup, tau, initial_temperature, max_temperature, reward_scale, finite_changes)


def _soft_actor_critic(
    actor: Any,
    head: _Head,
    optimizers: Optimizers,
    warmup: int,
    tau: chex.Numeric,
    initial_temperature: chex.Numeric,
    max_temperature: chex.Numeric,
    reward_scale: chex.Numeric,
    finite_changes: bool,
) -> Algorithm:
    if warmup < 0:
        raise ValueError(f"warmup must be at least 0, got {warmup}")
    swept = isinstance(initial_temperature, jax.core.Tracer) or isinstance(max_temperature, jax.core.Tracer)  # Nobody can check these here.
    if not swept and not MIN_TEMPERATURE <= initial_temperature <= max_temperature:
        raise ValueError(
            f"initial_temperature must be in [{MIN_TEMPERATURE}, max_temperature], got {initial_temperature} and {max_temperature}"
        )

    def init(key: chex.PRNGKey, observation: chex.ArrayTree) -> SACState:
        observation = policies.split_mask(observation)[0]
        key_actor, key_critics = jax.random.split(key)
        params = actor.init(key_actor, observation)
        critics = jax.vmap(lambda key: head.init(key, observation))(jax.random.split(key_critics))
        log_temperature = jnp.log(jnp.asarray(initial_temperature, jnp.float32))
        # A real copy: the same buffer twice in a donated state is an error.
        targets = jax.tree.map(jnp.copy, critics)
        states = (o.init(p) for o, p in zip(optimizers, (params, critics, log_temperature), strict=True))
        return SACState(params, critics, targets, log_temperature, *states)

    def noise(learner: SACState, key: chex.PRNGKey, num: int) -> chex.Array:
        del learner
        return head.noise(key, num)  # [N, ...]

    def explore(learner: SACState, observation: chex.ArrayTree, noise: chex.Array, step: chex.Array) -> Decision:
        observation, mask = policies.split_mask(observation)
        sample = jax.vmap(head.sample, in_axes=(0, None if mask is None else 0, 0, None))
        return Decision(sample(actor.apply(learner.actor, observation), mask, noise, step < warmup))

    def exploit(learner: SACState, observation: chex.ArrayTree) -> chex.Array:
        observation, mask = policies.split_mask(observation)
        return jax.vmap(head.mode, in_axes=(0, None if mask is None else 0))(actor.apply(learner.actor, observation), mask)

    def soft_value(
        params: Any, critics: Any, temperature: chex.Array, observation: chex.ArrayTree, noise: chex.Array
    ) -> tuple[chex.Array, chex.Array]:
        """The value ``[B]`` of acting by the policy, its entropy's worth included, and an estimate ``[B]`` of the entropy."""
        observation, mask = policies.split_mask(observation)
        actions, weight, log_prob = head.propose(actor.apply(params, observation), mask, noise)
        q = jnp.min(jax.vmap(head.values, in_axes=(0, None, None))(critics, observation, actions), axis=0)  # [B, K]
        # What has probability 0 has no say; its logarithm is a number so large that a multiple of it may be infinite.
        log_prob = jnp.where(weight > 0, log_prob, 0.0)
        return jnp.sum(weight * (q - temperature * log_prob), axis=1), -jnp.sum(weight * log_prob, axis=1)

    def critic_loss(
        critics: Any, t: Transition, target: chex.Array, weight: chex.Array
    ) -> tuple[chex.Array, tuple[chex.Array, chex.Array]]:
        observation = policies.split_mask(t.observation)[0]
        q = jax.vmap(head.taken, in_axes=(0, None, None))(critics, observation, t.action)  # [2, B]
        chex.assert_equal_shape([q[0], target, weight])
        td_error = target - q
        return 0.5 * jnp.sum(jnp.mean(weight * returns.squared(td_error), axis=1)), (td_error, q)

    def actor_loss(params: Any, learner: SACState, t: Transition, noise: chex.Array) -> tuple[chex.Array, chex.Array]:
        value, entropy = soft_value(params, learner.critics, jnp.exp(learner.log_temperature), t.observation, noise)
        return -jnp.mean(value), entropy

    def learn(learner: SACState, batch: Batch, key: chex.PRNGKey, step: chex.Array) -> tuple[SACState, Feedback]:
        del step
        before = learner
        t = batch.transition
        reward, discount = jax.vmap(returns.n_step)(t.reward, t.discount, t.last)  # [B]
        noise_next, noise_now = (head.noise(k, len(reward)) for k in jax.random.split(key))  # [B, ...]
        weight = jnp.broadcast_to(batch.weight, reward.shape)
        temperature = jnp.exp(learner.log_temperature)

        next_value, _ = soft_value(learner.actor, learner.target_critics, temperature, t.next_observation, noise_next)
        target = reward_scale * reward + discount * next_value  # [B]
        (c_loss, (td_error, q)), c_grads = jax.value_and_grad(critic_loss, has_aux=True)(learner.critics, t, target, weight)
        changes, critic_opt = optimizers.critic.update(c_grads, learner.critic_opt, learner.critics)
        learner = learner._replace(critics=optax.apply_updates(learner.critics, changes), critic_opt=critic_opt)

        (a_loss, entropy), a_grads = jax.value_and_grad(actor_loss, has_aux=True)(learner.actor, learner, t, noise_now)
        changes, actor_opt = optimizers.actor.update(a_grads, learner.actor_opt, learner.actor)
        learner = learner._replace(actor=optax.apply_updates(learner.actor, changes), actor_opt=actor_opt)

        surplus = jnp.mean(entropy - head.target(policies.split_mask(t.observation)[1]))
        # The surplus is the gradient of log alpha (H - target) with respect to log alpha.
        change, temperature_opt = optimizers.temperature.update(surplus, learner.temperature_opt, learner.log_temperature)
        log_temperature = jnp.clip(learner.log_temperature + change, jnp.log(MIN_TEMPERATURE), jnp.log(max_temperature))
        targets = optax.incremental_update(learner.critics, learner.target_critics, tau)
        learner = learner._replace(log_temperature=log_temperature, temperature_opt=temperature_opt, target_critics=targets)
        metrics = {"loss": c_loss, "actor_loss": a_loss, "q": jnp.mean(q), "entropy": jnp.mean(entropy), "temperature": temperature}
        feedback = Feedback(jnp.mean(jnp.abs(td_error), axis=0), metrics, gradient=(c_grads, a_grads))
        if not finite_changes:
            return learner, feedback  # Whoever calls looks through it: see assemble.
        sound = finite.is_sound(c_loss, c_grads) & finite.is_sound(a_loss, a_grads) & jnp.isfinite(surplus)
        return finite.choose(sound, learner, before), feedback._replace(finite=sound)

    return Algorithm(init, noise, explore, exploit, learn)
