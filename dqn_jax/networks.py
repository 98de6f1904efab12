"""Networks: flax.linen modules, used through their pure ``init(key, observation)`` and ``apply(params, observation)`` only.

Anything with these two functions serves as a network; ``from_nnx`` makes such a pair of an NNX module.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx


def flatten(observation: chex.ArrayTree) -> chex.Array:
    """Joins the leaves of a batch of observations ``[B, ...]`` into vectors ``[B, F]`` of float32."""
    leaves = [jnp.reshape(leaf, (leaf.shape[0], -1)).astype(jnp.float32) for leaf in jax.tree.leaves(observation)]
    return jnp.concatenate(leaves, axis=-1) if len(leaves) > 1 else leaves[0]


class QNetwork(nn.Module):
    """A multilayer perceptron with ReLU that gives one value per action.

    Attributes:
      num_actions: the number A of actions.
      hidden: width of each hidden layer.
      features: from a batch of observations, any pytree of ``[B, ...]``, to vectors ``[B, F]``.
    """

    num_actions: int
    hidden: Sequence[int] = (64, 64)
    features: Callable[[chex.ArrayTree], chex.Array] = flatten

    @nn.compact
    def __call__(self, observation: chex.ArrayTree) -> chex.Array:
        """The values ``[B, A]`` of a batch of observations ``[B, ...]``."""
        x = self.features(observation)  # [B, F]
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.num_actions)(x)  # [B, A]


class Network(NamedTuple):
    """The two functions that the package asks of a network."""

    init: Callable[[chex.PRNGKey, chex.ArrayTree], Any]
    apply: Callable[[Any, chex.ArrayTree], chex.Array]


def from_nnx(build: Callable[[nnx.Rngs], Any]) -> Network:
    """A network from an NNX module.

    Args:
      build: makes the module from its random streams, for example ``lambda rngs: MyModule(4, 2, rngs=rngs)``. The module must keep
        no state but its parameters (no batch statistics, no dropout streams that advance).

    Returns:
      A ``Network`` whose parameters are a plain dict of arrays.
    """

    def init(key: chex.PRNGKey, observation: chex.ArrayTree) -> Any:
        del observation  # An NNX module knows its input sizes.
        return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(params=key))))

    def apply(params: Any, observation: chex.ArrayTree) -> chex.Array:
        module = nnx.eval_shape(lambda: build(nnx.Rngs(params=jax.random.key(0))))
        structure, state = nnx.split(module)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(structure, state)(observation)

    return Network(init, apply)
