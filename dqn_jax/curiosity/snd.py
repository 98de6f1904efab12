r"""SND: distillation (``distillation.py``) into a predictor from a target that keeps learning to tell observations apart.

A random target may tell little apart, and once the predictor knows it nothing is new any more. Here the target learns without labels, by
one of three losses, and the bonus lives on:

* ``contrastive`` (SND-V): two views of one observation have the same features, two observations features at a distance of 1.
* ``infomax`` (SND-STD): an observation's parts tell its successor from all other successors (ST-DIM).
* ``variance`` (SND-VIC): an observation and its successor have similar features, which vary and do not repeat one another (VICReg).

Pechac, Chovanec and Farkas, "Self-supervised network distillation: an effective approach to exploration in sparse reward environments"
(2023). Anand et al., "Unsupervised state representation learning in Atari" (2019), equations 1 to 3. Bardes, Ponce and LeCun, "VICReg"
(2022), equations 1 to 6.

Differs from the authors' code in:
  1. Successors are the true ones: a pair never spans the end of an episode.
  2. Every row of a rollout counts, the last one too.
  3. In PPO the stream of bonuses runs on through the ends of episodes; there it is cut at them.
  4. The ready-made SND-STD compares 64 rows of each minibatch, as ST-DIM does, and not all. Its parts are of the last convolution, of the
     third of four there.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from dqn_jax.networks import Network

MAX_SQUARE = 200.0  # Mean squares of features that ``contrastive`` leaves alone, those of both views together.
EPSILON = 1e-4  # Added to squares below a root, whose slope at 0 is infinite.
NOISE, LEFT_OUT, TILES = 0.2, 0.1, (1, 2, 4, 8, 12, 16)  # Of augmentations; sides of tiles in pixels.


def contrastive(apply: Callable[..., chex.Array], augment: Callable[..., chex.ArrayTree]) -> Callable[..., Any]:
    r"""SND-V: :math:`(l - \frac{1}{K}\|z_a - z_b\|^2)^2 + \max(0, \overline{z_a^2} + \overline{z_b^2} - 200)`.

    Half of the rows are paired with another view of themselves, :math:`l = 0`, half with a view of another row, :math:`l = 1`.

    Args:
      apply: ``(params, rows) -> features [B, K]``.
      augment: ``(key, rows) -> rows``, another view of each.

    Returns:
      A loss as ``distillation.TargetLearning`` asks for.
    """

    def loss(params: Any, now: chex.ArrayTree, following: chex.ArrayTree, key: chex.PRNGKey) -> tuple[chex.Array, dict[str, chex.Array]]:
        del following
        key_views, key_other, key_kind, key_shift = jax.random.split(key, 4)
        num_rows = jax.tree.leaves(now)[0].shape[0]
        # Never itself: the row that lies a random way further on, around the end.
        other = (jnp.arange(num_rows) + jax.random.randint(key_shift, (num_rows,), 1, max(2, num_rows))) % num_rows
        differs = jax.random.bernoulli(key_kind, 0.5, (num_rows,))  # [B]
        partner = jnp.where(differs, other, jnp.arange(num_rows))
        first = apply(params, augment(key_views, now))  # [B, K]
        second = apply(params, augment(key_other, jax.tree.map(lambda leaf: leaf[partner], now)))
        distance = jnp.mean(jnp.square(first - second), axis=1)
        square = jnp.mean(jnp.square(first)) + jnp.mean(jnp.square(second))
        total = jnp.mean(jnp.square(differs - distance)) + jnp.maximum(square - MAX_SQUARE, 0.0)
        return total, {"target_loss": total}

    return loss


def with_classifiers(network: Any) -> Network:
    """A target for ``infomax``.

    Args:
      network: anything with ``init(key, rows)`` and ``apply(params, rows) -> (features [B, K], parts [B, L, C])``.

    Returns:
      A network that gives the features alone; its parameters are a dict of ``network``'s and ``classifiers``: W ``[K, C]``, V ``[C, C]``.
    """

    def init(key: chex.PRNGKey, rows: chex.ArrayTree) -> dict[str, Any]:
        key_network, key_whole, key_part = jax.random.split(key, 3)
        params = network.init(key_network, rows)
        features, parts = jax.eval_shape(network.apply, params, rows)
        draw, width = jax.nn.initializers.lecun_normal(), parts.shape[-1]
        return {"network": params, "classifiers": (draw(key_whole, (features.shape[-1], width)), draw(key_part, (width, width)))}

    return Network(init, lambda params, rows: network.apply(params["network"], rows)[0])


def infomax(
    apply: Callable[..., tuple[chex.Array, chex.Array]], *, norm_coef: chex.Numeric = 1e-4, spread_coef: chex.Numeric = 1e-4
) -> Callable[..., Any]:
    r"""SND-STD: InfoNCE from the successor to the parts of the observation, and from its parts to the same parts.

    With :math:`g` the features of the successor, :math:`c_l` those of part :math:`l` of the observation and :math:`c'_l` of the
    successor, the scores are :math:`g_i^\top W c_{j,l}` and :math:`c_{i,l}'^\top V c_{j,l}` of rows i and j; each row should score highest
    with itself. Both losses are means over parts, and are added up; so are the Frobenius norms of the scores of a part.

    Args:
      apply: ``(params, rows) -> (features [B, K], parts [B, L, C])``: of an image the places of a convolution's output, of a vector the
        hidden layer as a single part. The loss's parameters are those of ``with_classifiers``.
      norm_coef: weight of these norms.
      spread_coef: weight of the deviation over the K features of a row, of which there is to be much.

    Returns:
      A loss as ``distillation.TargetLearning`` asks for.
    """

    def loss(params: Any, now: chex.ArrayTree, following: chex.ArrayTree, key: chex.PRNGKey) -> tuple[chex.Array, dict[str, chex.Array]]:
        del key
        features, parts = apply(params["network"], now)  # [B, K], [B, L, C]
        successor, its_parts = apply(params["network"], following)
        whole, part = params["classifiers"]
        by_whole = jnp.einsum("ik,kc,jlc->lij", successor, whole, parts)  # [L, B, B]
        by_part = jnp.einsum("ild,dc,jlc->lij", its_parts, part, parts)
        scores = jnp.stack([by_whole, by_part])  # [2, L, B, B]
        picked = jnp.diagonal(jax.nn.log_softmax(scores, axis=3), axis1=2, axis2=3)  # [2, L, B]
        norms = jnp.sqrt(jnp.sum(jnp.square(scores), axis=(2, 3)) + EPSILON)  # [2, L]
        spread = jnp.mean(jnp.sqrt(jnp.var(features, axis=1) + EPSILON))
        total = jnp.sum(jnp.mean(norm_coef * norms - jnp.mean(picked, axis=2), axis=1)) - spread_coef * spread
        return total, {"target_loss": total}

    return loss


def variance(apply: Callable[..., chex.Array]) -> Callable[..., Any]:
    r"""SND-VIC: :math:`s(z, z') + v(z) + v(z') + \frac{1}{25}(c(z) + c(z'))` of an observation and its successor.

    s is the mean squared difference, v the mean over features of :math:`\max(0, 1 - \sqrt{\mathrm{Var} + 10^{-4}})`, c the sum of squares
    of what is beside the diagonal of the covariance, over K.

    Args:
      apply: ``(params, rows) -> features [B, K]``.

    Returns:
      A loss as ``distillation.TargetLearning`` asks for.
    """

    def spread(features: chex.Array) -> chex.Array:
        return jnp.mean(jnp.maximum(0.0, 1.0 - jnp.sqrt(jnp.var(features, axis=0, ddof=1) + EPSILON)))

    def repetition(features: chex.Array) -> chex.Array:
        covariance = jnp.cov(features, rowvar=False)  # [K, K]
        return jnp.sum(jnp.square(covariance - jnp.diag(jnp.diag(covariance)))) / features.shape[1]

    def loss(params: Any, now: chex.ArrayTree, following: chex.ArrayTree, key: chex.PRNGKey) -> tuple[chex.Array, dict[str, chex.Array]]:
        del key
        first, second = apply(params, now), apply(params, following)  # [B, K]
        alike = jnp.mean(jnp.square(first - second))
        total = alike + spread(first) + spread(second) + (repetition(first) + repetition(second)) / 25
        return total, {"target_loss": total}

    return loss


def noisy(key: chex.PRNGKey, rows: chex.Array) -> chex.Array:
    """Another view of vectors ``[B, F]``: in half of them numbers are left out with probability 0.1, and to half is added uniform noise
    within 0.2 of zero.
    """
    key_left_out, key_which, key_noise = jax.random.split(key, 3)
    concerned = jax.random.bernoulli(key_which, 0.5, (rows.shape[0], 1))
    left_out = _fractions(key_left_out, rows.shape) < LEFT_OUT
    return _with_noise(key_noise, jnp.where(concerned & left_out, 0.0, rows))


def tiled(key: chex.PRNGKey, images: chex.Array) -> chex.Array:
    """Another view of images ``[B, H, W, C]``: in half of them square tiles, of a side drawn for the batch, are left out with probability
    0.1; to half is added noise as by ``noisy``.
    """
    key_side, key_tiles, key_which, key_noise = jax.random.split(key, 4)
    height, width = images.shape[1:3]
    side = jax.random.choice(key_side, jnp.array(TILES))
    left_out = jax.random.bernoulli(key_tiles, LEFT_OUT, (images.shape[0], height, width))  # As many as there could be.
    dropped = left_out[:, jnp.arange(height) // side][:, :, jnp.arange(width) // side][..., None]  # [B, H, W, 1]
    concerned = jax.random.bernoulli(key_which, 0.5, (images.shape[0], 1, 1, 1))
    return _with_noise(key_noise, jnp.where(concerned & dropped, 0.0, images))


def _with_noise(key: chex.PRNGKey, rows: chex.Array) -> chex.Array:
    key_which, key_noise = jax.random.split(key)
    concerned = jax.random.bernoulli(key_which, 0.5, (rows.shape[0], *[1] * (rows.ndim - 1)))
    return rows + concerned * NOISE * (2.0 * _fractions(key_noise, rows.shape) - 1.0)


def _fractions(key: chex.PRNGKey, shape: tuple[int, ...]) -> chex.Array:
    """Uniform in [0, 1), in steps of 1 / 65,536: half the random bits of ``jax.random.uniform``, which are most of the work here."""
    return jax.random.bits(key, shape, jnp.uint16) * jnp.float32(2**-16)
