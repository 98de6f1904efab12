"""Networks for DQN's family: dueling streams, noisy layers, and outputs for distributions of returns, in any combination."""

from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn

from dqn_jax.networks import Conv, convolve, flatten


class NoisyDense(nn.Module):
    """A dense layer whose weights are noisy, with factorised noise whose scale is learnt.

    Fortunato et al., "Noisy networks for exploration" (2018), equations 9 to 11 and section 3.2.

    Attributes:
      width: the number O of outputs.
      scale: sigma_0, the noise of an output at first, in about the units of the output's own spread.
      dtype: in which to compute; by default that of inputs and parameters together. Parameters stay float32.
    """

    width: int
    scale: float = 0.5
    dtype: Any = None

    @nn.compact
    def __call__(self, x: chex.Array, noise: tuple[chex.Array, chex.Array] | None = None) -> chex.Array:
        """From ``[..., I]`` to ``[..., O]``; ``noise`` is the pair ``[I]``, ``[O]``, and without it the layer is the mean one."""
        shape = (x.shape[-1], self.width)
        bound = shape[0] ** -0.5

        def even(key: chex.PRNGKey, shape: tuple[int, ...]) -> chex.Array:
            return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

        kernel, bias = self.param("kernel", even, shape), self.param("bias", even, shape[1:])
        spread = nn.initializers.constant(self.scale * bound)
        kernel_scale, bias_scale = self.param("kernel_scale", spread, shape), self.param("bias_scale", spread, shape[1:])
        if noise is not None:
            inputs, outputs = noise
            kernel = kernel + kernel_scale * jnp.outer(inputs, outputs)
            bias = bias + bias_scale * outputs
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        return x @ kernel + bias


class ValueNetwork(nn.Module):
    """Convolutions and hidden layers with ReLU, of which the last belongs to one stream or, dueling, to two.

    The last hidden layer and the outputs are what dueling doubles and noise shakes. Where quantiles are asked for at given fractions, an
    embedding of the fraction multiplies what the last hidden layer says, and only the outputs come behind. (In the paper it multiplies what
    the convolutions say: the hidden layer is then computed for every fraction, ten times the work of DQN with Nature's network.)

    Attributes:
      num_actions: the number A of actions.
      num_outputs: the numbers K for each action; 0 gives one value without an axis of its own.
      hidden: width of each hidden layer.
      features: from a batch of observations to vectors ``[B, F]``, or images ``[B, H, W, C]`` where there are convolutions.
      convolutions: (filters, kernel size, stride) of each.
      dueling: a value and advantages, whose mean is taken away (Wang et al., "Dueling network architectures", 2016, equation 9).
      noisy: the scale of noisy layers at first, or None for plain ones.
      cosines: the number n of cosines that a fraction is embedded by, where quantiles are given at fractions that come with the observation
        (Dabney et al. 2018b, equation 4, where n is 64); 0 where they are not.
      dtype: in which to compute, as for ``networks.QNetwork``.
    """

    num_actions: int
    num_outputs: int = 0
    hidden: Sequence[int] = (64, 64)
    features: Callable[[chex.ArrayTree], chex.Array] = flatten
    convolutions: Sequence[tuple[int, int, int]] = ()
    dueling: bool = False
    noisy: float | None = None
    cosines: int = 0
    dtype: Any = None

    @nn.compact
    def __call__(self, observation: chex.ArrayTree, fractions: chex.Array | None = None, noise: Any = ()) -> chex.Array:
        """The outputs of a batch of observations ``[B, ...]``, float32 in whatever type they were computed.

        Args:
          observation: a pytree of arrays ``[B, ...]``.
          fractions: ``[B, N]``, or ``[N]`` for all alike, in [0, 1]; only where there are ``cosines``.
          noise: what ``draw_noise`` drew, or nothing for the mean network.

        Returns:
          ``[B, A]``, ``[B, A, K]``, or where there are ``cosines`` ``[B, A, N]``.

        Raises:
          ValueError: if a kernel does not fit the image that reaches it.
        """
        x = self.features(observation)
        if self.convolutions:
            x = flatten(convolve([Conv(*each, self.dtype) for each in self.convolutions], x))  # [B, F]
        own = () if self.cosines else self.hidden[-1:]  # Hidden layers that belong to a stream.
        for width in self.hidden[: len(self.hidden) - len(own)]:
            x = nn.relu(nn.Dense(width, dtype=self.dtype)(x))  # [B, F]
        if self.cosines:
            assert fractions is not None, "this network gives quantiles at fractions: pass them after the observation"
            x = x[:, None] * self._embedding(jnp.atleast_2d(fractions), x.shape[-1])  # [B, N, F]
        per_action = max(self.num_outputs, 1)
        outputs = self._stream("advantage" if self.dueling else "value", x, own, self.num_actions * per_action, noise)
        outputs = outputs.reshape(*outputs.shape[:-1], self.num_actions, per_action)  # [B, A, K], or [B, N, A, 1]
        if self.dueling:
            value = self._stream("value", x, own, per_action, noise)[..., None, :]  # [B, 1, K], or [B, N, 1, 1]
            outputs = value + outputs - jnp.mean(outputs, axis=-2, keepdims=True)
        if self.cosines:
            return jnp.moveaxis(outputs[..., 0], 1, 2)  # [B, A, N]
        return outputs if self.num_outputs else outputs[..., 0]

    @nn.nowrap
    def draw_noise(self, params: Any, key: chex.PRNGKey) -> Any:
        """One draw for all noisy layers: for each by its name a pair ``[I]``, ``[O]`` of numbers; nothing where none is noisy."""
        if self.noisy is None:
            return ()
        shapes = {name: leaves["kernel_scale"].shape for name, leaves in sorted(params["params"].items()) if "kernel_scale" in leaves}
        normal = jax.random.normal(key, (sum(map(sum, shapes.values())),))
        numbers = jnp.sign(normal) * jnp.sqrt(jnp.abs(normal))
        drawn, begin = {}, 0
        for name, (inputs, outputs) in shapes.items():
            middle, end = begin + inputs, begin + inputs + outputs
            drawn[name] = numbers[begin:middle], numbers[middle:end]
            begin = end
        return drawn

    def _stream(self, name: str, x: chex.Array, hidden: Sequence[int], num_outputs: int, noise: Any) -> chex.Array:
        for width in hidden:
            x = nn.relu(self._dense(f"{name}_hidden", x, width, noise))
        return self._dense(name, x, num_outputs, noise).astype(jnp.float32)

    def _dense(self, name: str, x: chex.Array, width: int, noise: Any) -> chex.Array:
        if self.noisy is None:
            return nn.Dense(width, dtype=self.dtype, name=name)(x)
        return NoisyDense(width, self.noisy, self.dtype, name=name)(x, noise[name] if noise else None)

    def _embedding(self, fractions: chex.Array, width: int) -> chex.Array:
        cosines = jnp.cos(jnp.pi * jnp.arange(self.cosines) * fractions[..., None])  # [B, N, n]
        return nn.relu(nn.Dense(width, dtype=self.dtype, name="fractions")(cosines))  # [B, N, F]
