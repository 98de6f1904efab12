"""The ready-made kinds of curiosity, as the options of an agent name them."""

import math
from typing import Any

import gymnasium
import jax
import optax

from dqn_jax import networks, policies, spaces
from dqn_jax.curiosity import snd
from dqn_jax.curiosity.distillation import TargetLearning, distillation
from dqn_jax.curiosity.rnd import rnd
from dqn_jax.networks import FeatureNetwork
from dqn_jax.optimizers import join_small
from dqn_jax.options import require_int, require_number
from dqn_jax.presets.reading import encoder_of
from dqn_jax.types import Curiosity

COMPARED = 64  # Rows that SND-V and SND-STD compare at once: the authors of SND for SND-V, those of ST-DIM for it.


def curiosity_of(options: Any, observation_space: gymnasium.Space, **paying: Any) -> Curiosity:
    """The curiosity that options ask for.

    What its networks see is what the agent's see: vectors, or images through convolutions. Vectors that are not within [0, 1] anyway are
    normalised by their running moments; for RND images of bytes are, too.

    Args:
      options: with ``curiosity``, ``curiosity_learning_rate``, ``curiosity_channels`` and ``encoder``.
      observation_space: of one environment.
      **paying: as for ``distillation.distillation``: ``discount``, ``scale``, ``clip``, ``bonus_on_successor``, ``share``,
        ``mask_features``, ``epochs``, ``minibatch_size``.

    Raises:
      ValueError: if images have fewer channels than are to be seen, or vectors are to have channels.
    """
    encoder, channels_first = encoder_of(options.encoder, observation_space, getattr(options, "frames", "off"))
    convolutions = {"flat": (), "nature": networks.NATURE, "minatar": networks.MINATAR}[encoder]
    width, num_features = {"flat": (64, 32), "nature": (512, 512), "minatar": (128, 128)}[encoder]
    if convolutions:
        see = _newest(spaces.image(observation_space, channels_first), options.curiosity_channels, observation_space)
    elif options.curiosity_channels is not None:
        given = options.curiosity_channels
        raise ValueError(
            f"curiosity_channels={given} is for images, and the networks see {observation_space} as a vector: give None; presets that have "
            "it are for stacks of grey frames"
        )
    else:
        see = spaces.features(observation_space)
    optimizer = join_small(optax.adam(options.curiosity_learning_rate))

    def network(*hidden: int, **more: Any) -> FeatureNetwork:
        return FeatureNetwork(num_features, hidden, convolutions, **more)

    rows: int | None = COMPARED
    predictor, small = network(width, width), _within_one(observation_space)
    shallow = () if convolutions else (width,)
    target: Any = network(*shallow)
    if options.curiosity == "rnd":
        return rnd(target, predictor, optimizer, see=see, normalize_observation=not small, **paying)
    if options.curiosity == "snd-v":
        loss = snd.contrastive(target.apply, snd.tiled if convolutions else snd.noisy)
    elif options.curiosity == "snd-vic":
        loss, rows = snd.variance(target.apply), None
    else:
        parts = network(*shallow, parts=True)
        target, loss = snd.with_classifiers(parts), snd.infomax(parts.apply)
    learning = TargetLearning(loss, join_small(optax.adam(options.curiosity_learning_rate)), rows)
    normalized = not convolutions and not small
    return distillation(target, predictor, optimizer, learning=learning, see=see, normalize_observation=normalized, **paying)


def require_curiosity(o: Any) -> None:
    """Raises TypeError or ValueError, naming the option, unless the options of a curiosity are in range and suit a batch."""
    require_number("intrinsic_coef", o.intrinsic_coef, 0, math.inf)
    require_number("curiosity_learning_rate", o.curiosity_learning_rate, 0, math.inf, open_low=True)
    if o.curiosity_channels is not None:
        require_int("curiosity_channels", o.curiosity_channels, 1)
    if o.curiosity.startswith("snd") and o.batch_size < 2:
        raise ValueError(f"curiosity={o.curiosity!r} compares the rows of a batch with one another, got batch_size={o.batch_size}")


def require_single_steps(o: Any) -> None:
    """Raises ValueError if a curiosity would have to pay for windows of several steps from a replay."""
    if o.curiosity != "off" and o.n_steps > 1:
        raise ValueError(
            f"curiosity={o.curiosity!r} pays for every step, and with n_steps={o.n_steps} the replay gives only the first observation of a "
            "window and what followed it: give n_steps=1"
        )


def _newest(read: Any, channels: int | None, space: gymnasium.Space) -> Any:
    """``read``, an image's reader, of its last channels only."""
    if channels is None:
        return read
    images = jax.eval_shape(read, policies.split_mask(spaces.example(space, 1))[0])
    if channels > images.shape[-1]:
        raise ValueError(f"curiosity_channels={channels} exceeds the {images.shape[-1]} channels of the images of {space}")
    return lambda observation: read(observation)[..., -channels:]


def _within_one(space: gymnasium.Space) -> bool:
    """Whether all numbers of observations are small anyway: choices, and floats and booleans within [0, 1]."""
    if isinstance(space, gymnasium.spaces.Dict):
        members = [space["observation"]] if spaces.is_masked(space) else list(space.spaces.values())
        return all(map(_within_one, members))
    if isinstance(space, gymnasium.spaces.Tuple):
        return all(map(_within_one, space.spaces))
    return not isinstance(space, gymnasium.spaces.Box) or bool((space.low >= 0).all() and (space.high <= 1).all())
