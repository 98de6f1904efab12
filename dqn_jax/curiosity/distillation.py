r"""What is new to an agent is what it cannot predict: a bonus from the error of distilling one network into another.

With features :math:`f` of a *target* network and :math:`\hat f_\theta` of a *predictor*, seeing :math:`o` is worth

.. math:: b(o) = \frac{1}{K} \sum_k \big(f_k(o) - \hat f_{\theta,k}(o)\big)^2,

and :math:`\theta` moves down its gradient on what was seen, so that the bonus of what is seen often falls. Where the target stays as it
was initialised that is RND (``rnd.py``); where it learns, too, by a loss of its own, it is SND (``snd.py``). The two losses never reach
one another's network.

Burda, Edwards, Storkey and Klimov, "Exploration by random network distillation" (2018); Pechac, Chovanec and Farkas, "Self-supervised
network distillation" (2023).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from dqn_jax import normalize, policies
from dqn_jax.normalize import Moments
from dqn_jax.types import Curiosity, Transition

OBSERVATION_CLIP = 5.0  # Deviations: Burda et al. (2018), section 2.4.


class DistillationState(NamedTuple):
    """What a curiosity of this kind has learnt.

    Attributes:
      target, predictor: parameters of the two networks.
      target_opt, predictor_opt: states of their optimizers, () for a target that does not learn.
      observations: moments of the observations, or () where they are not normalised.
      bonuses: moments of what the bonus is scaled by: in rollouts its discounted sums, else the bonus itself; () where it is not scaled.
      running: these sums, ``[N]``; they know no episodes.
    """

    target: Any
    predictor: Any
    target_opt: Any
    predictor_opt: Any
    observations: Moments | tuple[()]
    bonuses: Moments | tuple[()]
    running: chex.Array


class TargetLearning(NamedTuple):
    """How a target learns.

    Attributes:
      loss: ``(params, now [B, ...], following [B, ...], key) -> (scalar, metrics)``; observations as the networks see them, and their
        successors.
      optimizer: an optax transformation.
    """

    loss: Callable[..., tuple[chex.Array, Any]]
    optimizer: optax.GradientTransformation


def distillation(
    target: Any,
    predictor: Any,
    optimizer: optax.GradientTransformation,
    *,
    learning: TargetLearning | None = None,
    see: Callable[[chex.ArrayTree], chex.ArrayTree] = lambda observation: observation,
    bonus_on_successor: bool = True,
    normalize_observation: bool = False,
    scale: chex.Numeric | None = None,
    clip: chex.Numeric | None = None,
    discount: chex.Numeric = 0.99,
    share: chex.Numeric | None = None,
    mask_features: bool = False,
    epochs: int = 1,
    minibatch_size: int | None = None,
) -> Curiosity:
    """A curiosity that pays for what a predictor does not know of a target.

    Args:
      target, predictor: anything with ``init(key, rows)`` and ``apply(params, rows) -> features [B, K]``, of the same K.
      optimizer: of the predictor, an optax transformation.
      learning: how the target learns; None leaves it as it was initialised.
      see: from observations ``[B, ...]``, action masks taken off, to what the networks see: floats, of an image the newest frame.
      bonus_on_successor: whether a transition is paid for its successor, else for its observation.
      normalize_observation: whether what the networks see is normalised by its moments and clipped to 5 deviations. The moments are those
        of earlier batches, at first those of the first batch itself.
      scale: factor of the bonus; None divides it by a running measure of its size instead: in rollouts by the deviation of its discounted
        sums in each environment, which run on through the ends of episodes; in batches from a replay by its root mean square. The batch
        at hand is included.
      clip: the most that a bonus is, or None.
      discount: of these sums.
      share: share of the rows, drawn anew for each minibatch, from which the predictor learns; of the numbers in their features, with
        ``mask_features``. None for all.
      epochs: times that each row is learnt from.
      minibatch_size: rows B of a minibatch; it must divide the rows; None for all rows at once.

    Returns:
      A ``Curiosity``. Its metrics are ``predictor_loss``, ``feature_spread`` (the mean over the target's features of their deviation over
      the rows: where it falls to 0 the target tells nothing apart) and those of the target's loss.

    Raises:
      ValueError: if a count is below one; when tracing ``learn``, if the rows do not divide into minibatches.
    """
    if epochs < 1 or (minibatch_size is not None and minibatch_size < 1):
        raise ValueError(f"epochs and minibatch_size must be at least 1, got {epochs} and {minibatch_size}")

    def proper(observation: chex.ArrayTree) -> chex.ArrayTree:
        return see(policies.split_mask(observation)[0])

    def init(key: chex.PRNGKey, observation: chex.ArrayTree) -> DistillationState:
        key_target, key_predictor = jax.random.split(key)
        rows = proper(observation)
        num_envs = jax.tree.leaves(rows)[0].shape[0]
        target_params, predictor_params = target.init(key_target, rows), predictor.init(key_predictor, rows)
        return DistillationState(
            target_params,
            predictor_params,
            () if learning is None else learning.optimizer.init(target_params),
            optimizer.init(predictor_params),
            normalize.moments(jax.tree.map(lambda leaf: leaf[0], rows)) if normalize_observation else (),
            normalize.moments(jnp.zeros(())) if scale is None else (),
            jnp.zeros(num_envs),
        )

    def rows_of(t: Transition, successor: bool) -> chex.ArrayTree:
        """What the networks would see without normalisation, ``[B, ...]``, of a rollout all rows in one."""
        observation = t.next_observation if successor else t.observation
        lead = t.reward.ndim
        return proper(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[lead:]), observation))

    def seen(state: DistillationState, rows: chex.ArrayTree) -> chex.ArrayTree:
        if not isinstance(state.observations, Moments):
            return rows
        first, begun = normalize.fold(state.observations, rows), state.observations[0] > 0  # [0] is the count.
        used = jax.tree.map(lambda new, old: jnp.where(begun, old, new), first, state.observations)
        return normalize.normalize(used, rows, OBSERVATION_CLIP)

    def error(state: DistillationState, t: Transition) -> chex.Array:
        """The bonus of each transition as it comes, of the shape of its reward."""
        rows = seen(state, rows_of(t, bonus_on_successor))
        return _squared_error(target.apply(state.target, rows), predictor.apply(state.predictor, rows)).reshape(t.reward.shape)

    def scaled(state: DistillationState, bonus: chex.Array) -> tuple[DistillationState, chex.Array]:
        """With the bonuses taken in; and these over their size."""
        if not isinstance(state.bonuses, Moments):
            return state, bonus * scale
        if bonus.ndim == 1:
            moments = normalize.fold(state.bonuses, bonus)
            size = moments.variance + jnp.square(moments.mean)  # Alike bonuses have no deviation.
            return state._replace(bonuses=moments), bonus * jax.lax.rsqrt(size + normalize.EPSILON)

        def forward(running: chex.Array, row: chex.Array) -> tuple[chex.Array, chex.Array]:
            running = discount * running + row
            return running, running

        running, sums = jax.lax.scan(forward, state.running, bonus)  # [N], [T, N]
        moments = normalize.fold(state.bonuses, sums, axes=(0, 1))
        return state._replace(bonuses=moments, running=running), bonus * jax.lax.rsqrt(moments.variance + normalize.EPSILON)

    def reward(state: DistillationState, t: Transition) -> chex.Array:
        bonus = scaled(state, error(state, t))[1]
        return bonus if clip is None else jnp.clip(bonus, 0.0, clip)

    def predictor_loss(params: Any, state: DistillationState, rows: chex.ArrayTree, key: chex.PRNGKey) -> chex.Array:
        features = target.apply(state.target, rows)  # [B, K]
        if share is None:
            return jnp.mean(_squared_error(features, predictor.apply(params, rows)))
        shape = features.shape if mask_features else (features.shape[0], 1)
        kept = jnp.broadcast_to(jax.random.bernoulli(key, share, shape), features.shape)  # [B, K]
        squares = jnp.square(features - predictor.apply(params, rows))
        return jnp.sum(kept * squares) / jnp.maximum(jnp.sum(kept), 1)

    def minibatch(
        state: DistillationState, inputs: tuple[chex.ArrayTree, chex.ArrayTree, chex.ArrayTree, chex.PRNGKey]
    ) -> tuple[DistillationState, dict[str, chex.Array]]:
        paid, now, following, key = inputs
        key_mask, key_target = jax.random.split(key)
        loss, grads = jax.value_and_grad(predictor_loss)(state.predictor, state, paid, key_mask)
        changes, predictor_opt = optimizer.update(grads, state.predictor_opt, state.predictor)
        state = state._replace(predictor=optax.apply_updates(state.predictor, changes), predictor_opt=predictor_opt)
        metrics = {"predictor_loss": loss}
        if learning is not None:
            grads, target_metrics = jax.grad(learning.loss, has_aux=True)(state.target, now, following, key_target)
            changes, target_opt = learning.optimizer.update(grads, state.target_opt, state.target)
            state = state._replace(target=optax.apply_updates(state.target, changes), target_opt=target_opt)
            metrics |= target_metrics
        return state, metrics

    def learn(state: DistillationState, t: Transition, key: chex.PRNGKey) -> tuple[DistillationState, dict[str, chex.Array]]:
        num_rows = t.reward.size
        size = minibatch_size or num_rows
        if num_rows % size:
            raise ValueError(f"{num_rows} transitions do not divide into minibatches of {size}")
        raw = rows_of(t, bonus_on_successor)
        paid = seen(state, raw)  # [T N, ...]
        pair = () if learning is None else (seen(state, rows_of(t, False)), seen(state, rows_of(t, True)))
        features = target.apply(state.target, paid)
        new = scaled(state, error(state, t))[0]

        def one(new: DistillationState, inputs: tuple[chex.Array, chex.PRNGKey]) -> tuple[DistillationState, dict[str, chex.Array]]:
            index, key = inputs
            taken, now_and_following = jax.tree.map(lambda leaf: leaf[index], (paid, pair))
            return minibatch(new, (taken, *(now_and_following or ((), ())), key))

        key_order, key_rows = jax.random.split(key)
        orders = jnp.argsort(jax.random.bits(key_order, (epochs, num_rows), jnp.uint32), axis=1).reshape(-1, size)
        new, metrics = jax.lax.scan(one, new, (orders, jax.random.split(key_rows, len(orders))))
        if isinstance(state.observations, Moments):
            new = new._replace(observations=normalize.fold(state.observations, raw))
        return new, {**jax.tree.map(jnp.mean, metrics), "feature_spread": jnp.mean(jnp.std(features, axis=0))}

    return Curiosity(init, reward, learn)


def _squared_error(features: chex.Array, predicted: chex.Array) -> chex.Array:
    """The mean ``[B]`` over K features of their squared error."""
    return jnp.mean(jnp.square(features - predicted), axis=1)
