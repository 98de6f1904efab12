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

from dqn_jax import minibatches, normalize, policies
from dqn_jax.normalize import Moments
from dqn_jax.types import Curiosity, Transition

OBSERVATION_CLIP = 5.0  # Deviations: Burda et al. (2018), section 2.4.


class DistillationState(NamedTuple):
    """What a curiosity of this kind has learnt.

    Attributes:
      target, predictor: parameters of the two networks.
      target_opt, predictor_opt: states of their optimizers, () for a target that does not learn.
      observations: moments of the observations, or () where they are not normalised.
      bonuses: moments of what the bonus is divided by: its discounted sums, or the bonus itself; () where it has a fixed factor.
      running: these sums, ``[N]``, which know no episodes, or ().
    """

    target: Any
    predictor: Any
    target_opt: Any
    predictor_opt: Any
    observations: Moments | tuple[()]
    bonuses: Moments | tuple[()]
    running: chex.Array | tuple[()]


class TargetLearning(NamedTuple):
    """How a target learns.

    Attributes:
      loss: ``(params, now [B, ...], following [B, ...], key) -> (scalar, metrics)``; observations as the networks see them, and their
        successors.
      optimizer: an optax transformation.
      rows: of a minibatch that the loss is given at most; None for all.
    """

    loss: Callable[..., tuple[chex.Array, Any]]
    optimizer: optax.GradientTransformation
    rows: int | None = None


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
    discount: chex.Numeric | None = None,
    clip: chex.Numeric | None = None,
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
      scale: factor of the bonus; None divides it by a running measure of its size instead, the batch at hand included.
      discount: for rollouts: this measure is the deviation of the bonus's discounted sums in each environment, which run on through the
        ends of episodes. None, for batches from a replay, which have no order in time: it is the root mean square.
      clip: the most that a bonus is, or None.
      share: share of the rows, drawn anew for each minibatch, from which the predictor learns; of the numbers in their features, with
        ``mask_features``. None for all. Importance weights of a prioritized replay play no part.
      epochs: times that each row is learnt from.
      minibatch_size: rows B of a minibatch; it must divide the rows; None for all rows at once.

    Returns:
      A ``Curiosity``. Its metrics are ``predictor_loss``, ``feature_spread`` (the mean over the target's features of their deviation over
      the rows: where it falls to 0 the target tells nothing apart) and those of the target's loss.

    Raises:
      ValueError: if a count is below one; when tracing, if the rows do not divide into minibatches, or a ``discount`` meets a batch from a
        replay.
    """
    minibatches.require_sizes(epochs, minibatch_size)

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
            jnp.zeros(num_envs) if scale is None and discount is not None else (),
        )

    def moments_of(state: DistillationState, t: Transition) -> tuple[Moments | tuple[()], Moments | tuple[()]]:
        """What this batch is normalised by, and what the next one will be."""
        if not isinstance(state.observations, Moments):
            return (), ()
        following = normalize.fold(state.observations, proper(_flat(t, bonus_on_successor)))
        begun = state.observations[0] > 0  # [0] is the count.
        return jax.tree.map(lambda old, new: jnp.where(begun, old, new), state.observations, following), following

    def seen(moments: Moments | tuple[()], observation: chex.ArrayTree) -> chex.ArrayTree:
        rows = proper(observation)
        return normalize.normalize(moments, rows, OBSERVATION_CLIP) if isinstance(moments, Moments) else rows

    def errors(state: DistillationState, t: Transition) -> tuple[chex.Array, chex.Array]:
        """The target's features ``[T N, K]`` of what is paid for, and the bonuses as they come, of the shape of the reward."""
        moments, _ = moments_of(state, t)

        def part(rows: chex.ArrayTree) -> tuple[chex.Array, chex.Array]:
            rows = seen(moments, rows)
            features = target.apply(state.target, rows)
            return features, _squared_error(features, predictor.apply(state.predictor, rows))

        features, error = minibatches.in_minibatches(part, _flat(t, bonus_on_successor), minibatch_size or t.reward.size)
        return features, error.reshape(t.reward.shape)

    def scaled(state: DistillationState, bonus: chex.Array) -> tuple[DistillationState, chex.Array]:
        """With the bonuses taken in; and these over their size, and clipped."""
        state, bonus = measured(state, bonus)
        return state, bonus if clip is None else jnp.clip(bonus, 0.0, clip)

    def measured(state: DistillationState, bonus: chex.Array) -> tuple[DistillationState, chex.Array]:
        if not isinstance(state.bonuses, Moments):
            return state, bonus * scale
        if discount is None:
            moments = normalize.fold(state.bonuses, bonus.ravel())
            square = moments.variance + jnp.square(moments.mean)  # Alike bonuses have no deviation.
            return state._replace(bonuses=moments), bonus * jax.lax.rsqrt(square + normalize.EPSILON)
        if bonus.ndim != 2:
            raise ValueError(f"bonuses are summed over time in rollouts [T, N], got a batch {[*bonus.shape]}: leave out the discount")

        def forward(running: chex.Array, row: chex.Array) -> tuple[chex.Array, chex.Array]:
            running = discount * running + row
            return running, running

        running, sums = jax.lax.scan(forward, state.running, bonus)  # [N], [T, N]
        moments = normalize.fold(state.bonuses, sums, axes=(0, 1))
        return state._replace(bonuses=moments, running=running), bonus * jax.lax.rsqrt(moments.variance + normalize.EPSILON)

    def reward(state: DistillationState, t: Transition) -> chex.Array:
        return scaled(state, errors(state, t)[1])[1]

    def predictor_loss(params: Any, rows: chex.ArrayTree, features: chex.Array, key: chex.PRNGKey) -> chex.Array:
        squares = jnp.square(features - predictor.apply(params, rows))  # [B, K]
        if share is None:
            return jnp.mean(squares)
        shape = features.shape if mask_features else (features.shape[0], 1)
        kept = jnp.broadcast_to(jax.random.bernoulli(key, share, shape), features.shape)
        return jnp.sum(kept * squares) / jnp.maximum(jnp.sum(kept), 1)

    def learn(state: DistillationState, t: Transition, key: chex.PRNGKey) -> tuple[DistillationState, chex.Array, dict[str, chex.Array]]:
        moments, following_moments = moments_of(state, t)
        features, error = errors(state, t)
        before, bonus = scaled(state, error)
        now, following = _flat(t, False), _flat(t, True)

        def minibatch(new: DistillationState, inputs: tuple[chex.Array, chex.PRNGKey]) -> tuple[DistillationState, dict[str, chex.Array]]:
            index, key = inputs
            key_mask, key_target = jax.random.split(key)
            taken = [seen(moments, jax.tree.map(lambda leaf: leaf[index], rows)) for rows in (now, following)]
            paid = taken[int(bonus_on_successor)]
            wanted = features[index] if learning is None else target.apply(new.target, paid)  # [B, K]
            loss, grads = jax.value_and_grad(predictor_loss)(new.predictor, paid, wanted, key_mask)
            changes, predictor_opt = optimizer.update(grads, new.predictor_opt, new.predictor)
            new = new._replace(predictor=optax.apply_updates(new.predictor, changes), predictor_opt=predictor_opt)
            if learning is None:
                return new, {"predictor_loss": loss}
            few = jax.tree.map(lambda leaf: leaf[: learning.rows], taken)  # Minibatches are drawn: so are their first rows.
            grads, metrics = jax.grad(learning.loss, has_aux=True)(new.target, *few, key_target)
            changes, target_opt = learning.optimizer.update(grads, new.target_opt, new.target)
            new = new._replace(target=optax.apply_updates(new.target, changes), target_opt=target_opt)
            return new, {"predictor_loss": loss, **metrics}

        key_order, key_rows = jax.random.split(key)
        orders = minibatches.shuffled(key_order, t.reward.size, minibatch_size or t.reward.size, epochs)  # [epochs M, B]
        new, metrics = jax.lax.scan(minibatch, before, (orders, jax.random.split(key_rows, len(orders))))
        spread = jnp.mean(jnp.std(features, axis=0))
        return new._replace(observations=following_moments), bonus, {**jax.tree.map(jnp.mean, metrics), "feature_spread": spread}

    return Curiosity(init, reward, learn)


def _flat(t: Transition, successor: bool) -> chex.ArrayTree:
    """Observations or their successors as they came, ``[B, ...]``, of a rollout all rows in one."""
    lead = t.reward.ndim
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[lead:]), t.next_observation if successor else t.observation)


def _squared_error(features: chex.Array, predicted: chex.Array) -> chex.Array:
    """The mean ``[B]`` over K features of their squared error."""
    return jnp.mean(jnp.square(features - predicted), axis=1)
