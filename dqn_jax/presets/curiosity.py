"""The ready-made kinds of curiosity, as the options of an agent name them."""

import math
from typing import Any

import gymnasium
import numpy as np
import optax

from dqn_jax import networks, spaces
from dqn_jax.curiosity import snd
from dqn_jax.curiosity.distillation import TargetLearning, distillation
from dqn_jax.curiosity.rnd import rnd
from dqn_jax.networks import FeatureNetwork
from dqn_jax.options import require_number
from dqn_jax.presets.reading import encoder_of
from dqn_jax.types import Curiosity


def curiosity_of(options: Any, observation_space: gymnasium.Space, *, epochs: int = 1, minibatch_size: int | None = None) -> Curiosity:
    """The curiosity that options ask for.

    What its networks see is what the agent's see: vectors, or images through convolutions. Numbers that are not within [0, 1] already are
    normalised for RND. Images of bytes are divided by 255 and, unlike in the paper, not normalised.

    Args:
      options: with ``curiosity``, ``curiosity_learning_rate``, ``predictor_share``, ``intrinsic_gamma`` and ``encoder``.
      observation_space: of one environment.
      epochs, minibatch_size: as for ``distillation.distillation``.
    """
    encoder, channels_first = encoder_of(options.encoder, observation_space, getattr(options, "frames", "off"))
    optimizer = optax.adam(options.curiosity_learning_rate)
    shared: dict[str, Any] = {"discount": options.intrinsic_gamma, "epochs": epochs, "minibatch_size": minibatch_size}
    convolutions = {"flat": (), "nature": networks.NATURE, "minatar": networks.MINATAR}[encoder]
    shared["see"] = spaces.image(observation_space, channels_first) if convolutions else spaces.features(observation_space)
    width, num_features = {"flat": (64, 32), "nature": (512, 512), "minatar": (128, 128)}[encoder]

    def network(*hidden: int, **more: Any) -> FeatureNetwork:
        return FeatureNetwork(num_features, hidden, convolutions, **more)

    share = options.predictor_share
    predictor = network(width, width)
    if options.curiosity == "rnd":
        fixed = network(*(() if convolutions else (width,)))
        normalized = not _within_one(observation_space)
        return rnd(fixed, predictor, optimizer, normalize_observation=normalized, share=share, **shared)
    target: Any = network(width)
    if options.curiosity == "snd-v":
        loss = snd.contrastive(target.apply, snd.tiled if convolutions else snd.noisy)
    elif options.curiosity == "snd-vic":
        loss = snd.variance(target.apply)
    else:
        parts = network(width, parts=True)
        target, loss = snd.with_classifiers(parts), snd.infomax(parts.apply)
    learning = TargetLearning(loss, optax.adam(options.curiosity_learning_rate))
    return distillation(target, predictor, optimizer, learning=learning, share=share, **shared)


def require_curiosity(o: Any) -> None:
    """Raises TypeError or ValueError, naming the option, unless the numbers of a curiosity are in range."""
    require_number("intrinsic_gamma", o.intrinsic_gamma, 0, 1)
    require_number("curiosity_learning_rate", o.curiosity_learning_rate, 0, math.inf, open_low=True)
    if o.predictor_share is not None:
        require_number("predictor_share", o.predictor_share, 0, 1, open_low=True)


def _within_one(space: gymnasium.Space) -> bool:
    """Whether what the networks see of observations lies within [0, 1]: choices, bytes over 255, and floats so bounded."""
    if isinstance(space, gymnasium.spaces.Dict):
        members = [space["observation"]] if spaces.is_masked(space) else list(space.spaces.values())
        return all(map(_within_one, members))
    if isinstance(space, gymnasium.spaces.Tuple):
        return all(map(_within_one, space.spaces))
    if not isinstance(space, gymnasium.spaces.Box):
        return True
    is_bytes = space.dtype == np.uint8 and len(space.shape) > 1
    return is_bytes or bool((space.low >= 0).all() and (space.high <= 1).all())
