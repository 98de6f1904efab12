r"""PPO: play a while, learn from that a few times over, throw it away.

Advantages :math:`A` and value targets :math:`R = A + v` come from the whole rollout, by the values as they were; then each minibatch moves
the parameters :math:`\theta` down the gradient of

.. math:: -\min\big(\rho A, \mathrm{clip}(\rho, 1 \pm c) A\big) + \tfrac{1}{2} k_v (v_\theta - R)^2 - k_e H(\pi_\theta),
   \qquad \rho = \pi_\theta(a | o) / \pi_{old}(a | o).

Schulman, Wolski, Dhariwal, Radford and Klimov, "Proximal policy optimization algorithms" (2017), equations 7 and 9; the advantages of
Schulman et al. (2016). The details that make it work are those of Engstrom et al., "Implementation matters in deep policy gradients"
(2020), and Andrychowicz et al., "What matters for on-policy deep actor-critic methods?" (2021).

Differs from the paper in:
  1. Truncated episodes bootstrap from the true final observation; only terminated ones do not.
  2. Advantages are normalised in each minibatch, unless asked otherwise; the value target is made of what they were before.
  3. The value may be clipped as the ratio is, the policy's movement may end the learning from a rollout early, observations may be
     normalised and rewards scaled by what was seen so far: each an option.
  4. Observations are normalised by what earlier rollouts held, the first rollout not at all; rewards by what has come up to and with the
     rollout itself.
  5. Where the agent pays itself for what is new (``curiosity``), that is a second stream of rewards with a value of its own, which does not
     end with an episode, as in Burda et al., "Exploration by random network distillation" (2018), section 2.3.
  6. The behaviour's log-probability is the one noted when the action was chosen: the first row of a rollout was chosen before the update
     that precedes it. Ratios are bounded, both ways: a row far beyond, such as that one may become, moves the value and by its entropy
     the policy, and has no say in whether its action was good.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from dqn_jax import minibatches, normalize, policies, returns
from dqn_jax.distributions import Distribution
from dqn_jax.normalize import Moments
from dqn_jax.types import Algorithm, Batch, Decision, Feedback, Transition

MAX_LOG_RATIO = 3.0  # Beyond it, at a ratio of 20, an action says too little about the policy as it is to be learnt from.


class PPOState(NamedTuple):
    """What PPO learns.

    Attributes:
      params: of policy and value.
      opt_state: the optimizer's.
      observations: moments of the observations, or () where they are not normalised.
      returns: for scaling rewards, the moments of the discounted sums of rewards so far in each episode, or ().
      running: these sums in the episodes that are going on, ``[N]``, each already discounted to the next row, or (). What is cut off
        exactly between two rollouts goes on here: the row that is then marked has been learnt from.
    """

    params: Any
    opt_state: Any
    observations: Moments | tuple[()]
    returns: Moments | tuple[()]
    running: chex.Array | tuple[()]


class Rollout(NamedTuple):
    """What a minibatch is made of, ``[T N, ...]``, then ``[B, ...]``; values and their targets for each of V streams of rewards."""

    observation: chex.ArrayTree
    action: chex.Array
    log_prob: chex.Array
    advantage: chex.Array
    value: chex.Array
    value_target: chex.Array


def ppo(
    network: Any,
    distribution: Distribution,
    optimizer: optax.GradientTransformation,
    *,
    to_action: Any = None,
    epochs: int = 4,
    minibatch_size: int = 256,
    clip: chex.Numeric = 0.2,
    gae_lambda: chex.Numeric = 0.95,
    value_coef: chex.Numeric = 0.5,
    entropy_coef: chex.Numeric = 0.01,
    extrinsic_coef: chex.Numeric = 1.0,
    intrinsic_coef: chex.Numeric | None = None,
    value_clip: chex.Numeric | None = None,
    target_kl: chex.Numeric | None = None,
    normalize_advantage: bool = True,
    normalize_observation: bool = False,
    scale_reward: bool = False,
) -> Algorithm:
    """The PPO algorithm. It learns from whole rollouts: batches of ``[T, N, ...]``, oldest row first.

    Args:
      network: anything with ``init(key, observation)`` and ``apply(params, observation) -> (outputs [B, P], value [B])``, values ``[B, 2]``
        where there is an ``intrinsic_coef``; with ``Masked`` observations it sees the observation proper.
      distribution: what the outputs mean.
      optimizer: an optax transformation; put gradient clipping and a schedule of the learning rate in its chain. It is asked
        ``epochs T N / minibatch_size`` times a rollout.
      to_action: from what the distribution draws ``[D]`` to what the environment takes, for example a clip to its bounds; the ratio is
        of what was drawn.
      epochs: times that each row is learnt from.
      minibatch_size: rows B in a minibatch; it must divide ``T N``. Advantages of a single row, normalised, are 0: take more.
      clip: how far a ratio may leave 1 and still be rewarded for it.
      gae_lambda: of the advantages, in [0, 1].
      value_coef, entropy_coef: weights of the value's and the entropy's part of the loss.
      extrinsic_coef: weight of the environment's advantage.
      intrinsic_coef: weight of the advantage of what ``curiosity.curious`` puts into the extras of a rollout: ``intrinsic_reward`` and
        ``intrinsic_discount``, ``[T, N]``; None where there is no such thing.
      value_clip: how far a value may leave what it was and still be rewarded for it, or None.
      target_kl: an estimate of how far the policy has moved, in nats, at which the rest of the rollout is left alone, or None. What is
        left alone does not ask the optimizer, and metrics end with the minibatch that showed it; a further one, ``learnt``, is the share of
        minibatches that were learnt from.
      normalize_advantage: whether the advantages of a minibatch are shifted to mean 0 and scaled to deviation 1.
      normalize_observation: whether floats among the observations are normalised by their moments, and clipped to 10 deviations. The
        moments of a rollout are folded in after learning from it, and stay as they are while the agent acts.
      scale_reward: whether rewards are divided by the deviation of their discounted sums, and clipped to 10, as in OpenAI's baselines.

    Returns:
      An ``Algorithm`` whose learner is a ``PPOState``.

    Raises:
      ValueError: if a count is below one; from ``init``, if the network's values are not as many; when tracing ``learn``, if the rollout
        does not divide into minibatches.
    """
    minibatches.require_sizes(epochs, minibatch_size)
    num_streams = 1 if intrinsic_coef is None else 2

    def seen(learner: PPOState, observation: chex.ArrayTree) -> tuple[chex.ArrayTree, chex.Array | None]:
        observation, mask = policies.split_mask(observation)
        if isinstance(learner.observations, Moments):
            observation = normalize.normalize(learner.observations, observation)
        return observation, mask

    def init(key: chex.PRNGKey, observation: chex.ArrayTree) -> PPOState:
        observation = policies.split_mask(observation)[0]
        params = network.init(key, observation)
        num_envs = jax.tree.leaves(observation)[0].shape[0]
        shape = jax.eval_shape(network.apply, params, observation)[1].shape
        wanted = [num_envs, 2] if num_streams == 2 else [num_envs]
        if [*shape] not in (wanted, [num_envs, num_streams]):
            raise ValueError(f"the network gives values {[*shape]}, expected {wanted}: with curiosity a network gives two, else one")
        one = jax.tree.map(lambda leaf: leaf[0], observation)
        return PPOState(
            params,
            optimizer.init(params),
            normalize.moments(one) if normalize_observation else (),
            normalize.moments(jnp.zeros(())) if scale_reward else (),
            jnp.zeros(num_envs) if scale_reward else (),
        )

    def noise(learner: PPOState, key: chex.PRNGKey, num: int) -> chex.Array:
        del learner
        return distribution.noise(key, num)  # [N, ...]

    def explore(learner: PPOState, observation: chex.ArrayTree, noise: chex.Array, step: chex.Array) -> Decision:
        del step
        observation, mask = seen(learner, observation)
        outputs, _ = network.apply(learner.params, observation)  # [N, P]
        drawn = _each(distribution.sample, outputs, mask, noise)  # [N, ...]
        log_prob = _each(distribution.log_prob, outputs, mask, drawn)  # [N]
        if to_action is None:
            return Decision(drawn, {"log_prob": log_prob})
        return Decision(jax.vmap(to_action)(drawn), {"log_prob": log_prob, "drawn": drawn})

    def exploit(learner: PPOState, observation: chex.ArrayTree) -> chex.Array:
        observation, mask = seen(learner, observation)
        mode = _each(distribution.mode, network.apply(learner.params, observation)[0], mask)  # [N, ...]
        return mode if to_action is None else jax.vmap(to_action)(mode)

    def scaled(learner: PPOState, t: Transition) -> tuple[PPOState, chex.Array]:
        """Rewards ``[T, N]`` over the deviation of their discounted sums, these ones included."""
        if not isinstance(learner.returns, Moments):
            return learner, t.reward

        def forward(running: chex.Array, row: tuple[chex.Array, ...]) -> tuple[chex.Array, chex.Array]:
            reward, discount, last = row
            total = running + reward
            return total * discount * (1.0 - last), total

        running, totals = jax.lax.scan(forward, learner.running, (t.reward, t.discount, t.last))
        moments = normalize.fold(learner.returns, totals, axes=(0, 1))
        reward = jnp.clip(t.reward * jax.lax.rsqrt(moments.variance + normalize.EPSILON), -10.0, 10.0)
        return learner._replace(returns=moments, running=running), reward

    def value_of(learner: PPOState, observation: chex.ArrayTree, shape: tuple[int, ...]) -> chex.Array:
        """Values ``[T, N, V]`` of observations ``[T, N, ...]``."""
        rows = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), observation)  # [T N, ...]
        value = minibatches.in_minibatches(lambda part: network.apply(learner.params, seen(learner, part)[0])[1], rows, minibatch_size)
        return value.reshape(*shape, num_streams)

    def prepare(learner: PPOState, t: Transition, reward: chex.Array) -> Rollout:
        value, next_value = (value_of(learner, each, reward.shape) for each in (t.observation, t.next_observation))  # [T, N, V]
        over_envs = jax.vmap(returns.gae, in_axes=(1, 1, 1, 1, 1, None), out_axes=1)
        advantages = over_envs(reward, t.discount, t.last, value[..., 0], next_value[..., 0], gae_lambda)[..., None]  # [T, N, V]
        advantage = extrinsic_coef * advantages[..., 0]  # [T, N]
        if intrinsic_coef is not None:
            # What there is still to see does not end with an episode: the next row follows, be it of a new one.
            following = jnp.concatenate([value[1:, :, 1], next_value[-1:, :, 1]])
            bonus, discount = t.extras["intrinsic_reward"], t.extras["intrinsic_discount"]
            urge = over_envs(bonus, discount, jnp.zeros_like(t.last), value[..., 1], following, gae_lambda)
            advantages = jnp.stack([advantages[..., 0], urge], axis=-1)
            advantage = advantage + intrinsic_coef * urge
        action = t.action if to_action is None else t.extras["drawn"]
        rows = Rollout(t.observation, action, t.extras["log_prob"], advantage, value, advantages + value)
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), rows)  # [T N, ...]

    def minibatch_loss(params: Any, learner: PPOState, rows: Rollout) -> tuple[chex.Array, dict[str, chex.Array]]:
        observation, mask = seen(learner, rows.observation)
        outputs, value = network.apply(params, observation)  # [B, P], [B] or [B, V]
        value = value.reshape(-1, num_streams)  # [B, V]
        log_ratio = _each(distribution.log_prob, outputs, mask, rows.action) - rows.log_prob  # [B]
        log_ratio = jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)
        ratio = jnp.exp(log_ratio)
        advantage = rows.advantage  # [B]
        if normalize_advantage:
            advantage = (advantage - jnp.mean(advantage)) / (jnp.std(advantage) + normalize.EPSILON)
        policy_loss = -jnp.mean(jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage))
        value_error = returns.squared(value - rows.value_target)
        if value_clip is not None:
            near = rows.value + jnp.clip(value - rows.value, -value_clip, value_clip)
            value_error = jnp.maximum(value_error, returns.squared(near - rows.value_target))
        value_loss = 0.5 * jnp.mean(jnp.sum(value_error, axis=1))
        entropy = jnp.mean(_each(distribution.entropy, outputs, mask))
        loss = policy_loss + value_coef * value_loss - entropy_coef * entropy
        return loss, {
            "loss": loss,
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "entropy": entropy,
            # Schulman, "Approximating KL divergence" (2020): his third estimator, never negative; of the bounded ratio, so that no single
            # row ends the learning from a rollout, and too low where the policy has moved far.
            "kl": jnp.mean(ratio - 1 - log_ratio),
            "clipped": jnp.mean(jnp.abs(ratio - 1) > clip),
        }

    def learn(learner: PPOState, batch: Batch, key: chex.PRNGKey, step: chex.Array) -> tuple[PPOState, Feedback]:
        del step
        t = batch.transition
        chex.assert_rank([t.reward, t.discount, t.last], 2)  # [T, N]
        learner, reward = scaled(learner, t)
        rollout = prepare(learner, t, reward)

        def minibatch(carry: tuple[Any, ...], rows: Rollout) -> tuple[tuple[Any, ...], dict[str, chex.Array]]:
            params, opt_state, going = carry
            grads, metrics = jax.grad(minibatch_loss, has_aux=True)(params, learner, rows)
            if target_kl is None:
                changes, opt_state = optimizer.update(grads, opt_state, params)
                return (optax.apply_updates(params, changes), opt_state, going), metrics
            going = going & (metrics["kl"] <= target_kl)
            changes, moved = optimizer.update(grads, opt_state, params)
            new = optax.apply_updates(params, changes), moved
            kept = jax.tree.map(lambda new, old: jnp.where(going, new, old), new, (params, opt_state))
            return (*kept, going), {**metrics, "learnt": going.astype(jnp.float32)}

        going = jnp.ones((), jnp.bool_)
        carry = learner.params, learner.opt_state, going
        carry, metrics = minibatches.repeat(minibatch, carry, rollout, key, epochs=epochs, minibatch_size=minibatch_size)
        params, opt_state, _ = carry
        if isinstance(learner.observations, Moments):
            proper = policies.split_mask(t.observation)[0]
            learner = learner._replace(observations=normalize.fold(learner.observations, proper, axes=(0, 1)))
        wanted, was = rollout.value_target[:, 0], rollout.value[:, 0]
        explained = 1.0 - jnp.var(wanted - was) / (jnp.var(wanted) + normalize.EPSILON)
        means = {name: jnp.mean(values) for name, values in metrics.items()}
        if target_kl is not None:
            looked_at = jnp.ones(metrics["learnt"].size).at[1:].set(metrics["learnt"].ravel()[:-1])
            means |= {name: jnp.average(values.ravel(), weights=looked_at) for name, values in metrics.items() if name != "learnt"}
        means["explained_variance"] = explained
        return learner._replace(params=params, opt_state=opt_state), Feedback((), means)

    return Algorithm(init, noise, explore, exploit, learn)


def _each(function: Any, outputs: chex.Array, mask: chex.Array | None, *others: chex.Array) -> chex.Array:
    """A distribution's function over a batch ``[B, ...]``."""
    return jax.vmap(function, in_axes=(0, None if mask is None else 0, *(0 for _ in others)))(outputs, mask, *others)
