"""RND: what a network cannot predict of another one that was only initialised, it has not seen often.

Burda, Edwards, Storkey and Klimov, "Exploration by random network distillation" (2018), sections 2.2 to 2.4.

Differs from the paper in:
  1. The last transition of an episode is paid for its true successor; there the vector environment had already replaced it by the first
     observation of the next.
  2. The moments of the observations begin with the first batch that is learnt from, not with 50 rollouts of random actions.
  3. The predictor learns by an optimizer of its own, on minibatches of its own.
  4. The predictor sees what is normalised as it was for the bonus, not by moments that include the rollout.
  5. Drawn from a replay, bonuses are divided by their root mean square: there is no order in time to sum them in.
"""

from typing import Any

import optax

from dqn_jax.curiosity.distillation import distillation
from dqn_jax.types import Curiosity


def rnd(
    target: Any, predictor: Any, optimizer: optax.GradientTransformation, *, normalize_observation: bool = True, **options: Any
) -> Curiosity:
    """RND as a curiosity: ``distillation`` of a target that stays as it was initialised.

    Args:
      target, predictor, optimizer: as for ``distillation.distillation``.
      normalize_observation: as there; for images and numbers of all sizes, not for one-hot vectors, whose rare parts it would blow up.
      **options: as there. The ``share`` of the rows that the predictor learns from is 0.25 at 128 environments in the paper, all at 32.

    Returns:
      A ``Curiosity``.
    """
    return distillation(target, predictor, optimizer, normalize_observation=normalize_observation, **options)
