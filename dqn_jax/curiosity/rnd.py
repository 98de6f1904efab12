"""RND: what a network cannot predict of another one that was only initialised, it has not seen often.

Burda, Edwards, Storkey and Klimov, "Exploration by random network distillation" (2018), sections 2.2 to 2.4.

Differs from the paper in:
  1. The last transition of an episode is paid for its true successor; there the vector environment had already replaced it by the first
     observation of the next.
  2. The moments of the observations begin with the first batch that is learnt from, not with 50 rollouts of random actions.
  3. The predictor learns by an optimizer of its own, on minibatches of its own.
  4. Drawn from a replay, bonuses are divided by their root mean square: there is no order in time to sum them in.
"""

from typing import Any

import chex
import optax

from dqn_jax.curiosity.distillation import distillation
from dqn_jax.types import Curiosity


def rnd(
    target: Any,
    predictor: Any,
    optimizer: optax.GradientTransformation,
    *,
    see: Any = lambda observation: observation,
    normalize_observation: bool = True,
    discount: chex.Numeric = 0.99,
    share: chex.Numeric | None = None,
    epochs: int = 1,
    minibatch_size: int | None = None,
) -> Curiosity:
    """RND as a curiosity: the bonus is for the successor, and scaled by its running size.

    Args:
      target, predictor, optimizer, see, discount, epochs, minibatch_size: as for ``distillation.distillation``.
      normalize_observation: as there; for images and numbers of all sizes, not for one-hot vectors, whose rare parts it would blow up.
      share: of the rows that the predictor learns from, against its learning too fast where there are many environments; the paper has
        0.25 at 128 environments, all at 32.

    Returns:
      A ``Curiosity``.
    """
    return distillation(
        target,
        predictor,
        optimizer,
        see=see,
        normalize_observation=normalize_observation,
        discount=discount,
        share=share,
        epochs=epochs,
        minibatch_size=minibatch_size,
    )
