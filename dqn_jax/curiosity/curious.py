"""``curious``: an algorithm that is also paid for seeing what is new to it.

The bonus is computed when the algorithm learns, never when the transition is stored: a replay holds the environment's rewards alone, and
what is drawn from it twice is paid by what the agent knows each time.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from dqn_jax import finite
from dqn_jax.types import Algorithm, Batch, Curiosity, Decision, Feedback, Transition


class CuriousState(NamedTuple):
    """What both have learnt.

    Attributes:
      learner: the algorithm's.
      curiosity: the curiosity's.
    """

    learner: Any
    curiosity: Any


def curious(algorithm: Algorithm, curiosity: Curiosity, *, weight: chex.Numeric = 1.0, discount: chex.Numeric | None = None) -> Algorithm:
    """An algorithm that is also paid for what is new.

    Args:
      algorithm: who learns.
      curiosity: what pays, for example ``curiosity.rnd.rnd``.
      weight: factor of the bonus.
      discount: None adds the bonus to the reward, which is for batches of one-step transitions from a replay; a number makes it a second
        stream of rewards with that discount factor, which never ends: for ``algorithms.ppo`` with an ``intrinsic_coef``.

    Returns:
      An ``Algorithm`` whose learner is a ``CuriousState``. Its metrics also hold ``intrinsic_reward``, the mean bonus, and the
      curiosity's own.

    Raises:
      ValueError: from ``learn``, when it is traced, if the bonus is added to windows of several steps: their observations in between are
        not there.
    """

    def init(key: chex.PRNGKey, observation: chex.ArrayTree) -> CuriousState:
        key_learner, key_curiosity = jax.random.split(key)
        return CuriousState(algorithm.init(key_learner, observation), curiosity.init(key_curiosity, observation))

    def noise(state: CuriousState, key: chex.PRNGKey, num: int) -> Any:
        return algorithm.noise(state.learner, key, num)

    def explore(state: CuriousState, observation: chex.ArrayTree, noise: Any, step: chex.Array) -> Decision:
        return algorithm.explore(state.learner, observation, noise, step)

    def exploit(state: CuriousState, observation: chex.ArrayTree) -> chex.ArrayTree:
        return algorithm.exploit(state.learner, observation)

    def learn(state: CuriousState, batch: Batch, key: chex.PRNGKey, step: chex.Array) -> tuple[CuriousState, Feedback]:
        key_learner, key_curiosity = jax.random.split(key)
        t = batch.transition if discount is not None else one_step(batch.transition)
        urge, bonus, metrics = curiosity.learn(state.curiosity, t, key_curiosity)
        bonus = weight * bonus  # [B] or [T, N]
        if discount is None:
            paid = t._replace(reward=t.reward + bonus)
        else:
            stream = {"intrinsic_reward": bonus, "intrinsic_discount": jnp.full_like(bonus, discount)}
            paid = t._replace(extras={**t.extras, **stream})
        learner, feedback = algorithm.learn(state.learner, batch._replace(transition=paid), key_learner, step)
        metrics = {**feedback.metrics, "intrinsic_reward": jnp.mean(bonus), **metrics}
        new = CuriousState(learner, urge)
        if isinstance(feedback.finite, tuple):  # Nobody has looked yet: ``assemble`` looks through both.
            return new, feedback._replace(metrics=metrics)
        sound = feedback.finite & finite.all_finite(urge)  # What is wrong with one leaves both as they were.
        return finite.choose(sound, new, state), feedback._replace(metrics=metrics, finite=sound)

    return Algorithm(init, noise, explore, exploit, learn)


def one_step(transition: Transition) -> Transition:
    """Windows ``[B, 1]`` as transitions ``[B]``. Raises ValueError if a window is longer."""
    reward = transition.reward
    if reward.ndim == 2 and reward.shape[1] > 1:
        raise ValueError(
            f"a bonus cannot be added to windows of {reward.shape[1]} steps: what was seen in between is not there; give n_steps=1"
        )
    flat = {name: getattr(transition, name).reshape(reward.shape[0]) for name in ("reward", "discount", "last")}
    return transition._replace(**flat)
