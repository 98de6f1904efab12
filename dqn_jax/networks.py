"""Networks: flax.linen modules, used through their pure ``init(key, observation)`` and ``apply(params, observation)`` only.

Anything with these two functions serves as a network; ``from_nnx`` makes such a pair of an NNX module.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.linen.dtypes import promote_dtype

SQRT2 = 2**0.5  # The scale of an orthogonal layer that keeps the size of what a ReLU halves.


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
      dtype: in which to compute, for example ``jnp.bfloat16``; by default that of inputs and parameters together, as in flax.
        Parameters stay float32.
      layer_norm: whether each hidden layer is normalised before its ReLU, over its units (Ba et al., "Layer normalization", 2016), with a
        learnt scale and bias: what PQN needs.
    """

    num_actions: int
    hidden: Sequence[int] = (64, 64)
    features: Callable[[chex.ArrayTree], chex.Array] = flatten
    dtype: Any = None
    layer_norm: bool = False

    @nn.compact
    def __call__(self, observation: chex.ArrayTree) -> chex.Array:
        """The values ``[B, A]`` of a batch of observations ``[B, ...]``, float32 in whatever type they were computed."""
        x = self.features(observation)  # [B, F]
        for width in self.hidden:
            x = nn.relu(_normalised(nn.Dense(width, dtype=self.dtype)(x), self.layer_norm))
        return nn.Dense(self.num_actions, dtype=self.dtype)(x).astype(jnp.float32)  # [B, A]


def _normalised(x: chex.Array, layer_norm: bool) -> chex.Array:
    """``x``, over its last axis where that is asked for; called inside a module, to which scale and bias then belong."""
    return nn.LayerNorm(dtype=x.dtype)(x) if layer_norm else x


# Convolutions for ``ConvQNetwork``, as (filters, kernel size, stride), and the hidden layers that go with them.
NATURE = ((32, 8, 4), (64, 4, 2), (64, 3, 1))  # hidden (512,): Mnih et al. 2015, for images of 84x84
MINATAR = ((16, 3, 1),)  # hidden (128,): Young and Tian 2019, for images of 10x10
SMALL_WINDOW = 128  # Numbers in a window; MinAtar's hold up to 3 x 3 x 10, the smallest of Nature's 4 x 8 x 8.


def conv(x: chex.Array, kernel: chex.Array, stride: int) -> chex.Array:
    """Two-dimensional convolution without padding, of the kind that is fast on the backend at hand.

    XLA runs a convolution inside a compiled loop on CPU three to ten times slower than outside it (jax-ml/jax#12868). There the same
    numbers, up to rounding, come out of slices and one matrix product; on accelerators, too, where a window holds few numbers, as
    MinAtar's do: convolutions with another kernel for each of many seeds take three times as long on an H100, and one alone a fifth
    longer. The choice is made when the program is traced, by ``jax.default_backend()``.

    Args:
      x: images ``[B, H, W, C]`` of floats, no smaller than the kernel.
      kernel: ``[K, K, C, F]`` of the same type.
      stride: the step between windows, in pixels, along both axes.

    Returns:
      ``[B, (H - K) // stride + 1, (W - K) // stride + 1, F]`` of the same type.
    """
    chex.assert_rank([x, kernel], 4)
    if jax.default_backend() == "cpu" or math.prod(kernel.shape[:3]) <= SMALL_WINDOW:
        return _conv_by_matmul(x, kernel, stride)
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _conv_by_matmul(x: chex.Array, kernel: chex.Array, stride: int) -> chex.Array:
    batch, _, _, channels = x.shape
    size, _, _, filters = kernel.shape
    height, width = ((extent - size) // stride + 1 for extent in x.shape[1:3])
    # Copying pixels costs as much as multiplying them, so a stride that divides the kernel serves twice. Along the width, pixels that
    # enter windows together become channels, by a mere reshape. Along the height, each block of ``stride`` rows goes into the product
    # once, with every part of the kernel that ever meets it, and the results are shifted and summed. (With stride 1 these would be
    # more numbers than the windows hold.)
    divides = size % stride == 0
    fold = stride if divides else 1
    parts = size // stride if divides and stride > 1 else 1
    rows, step = height + parts - 1, stride // fold
    x = x[:, :, : (width - 1) * stride + size].reshape(batch, x.shape[1], -1, fold * channels)  # [B, H, W / fold, fold C]
    windows = [
        x[:, i : i + (rows - 1) * stride + 1 : stride, j : j + (width - 1) * step + 1 : step]
        for i in range(size // parts)
        for j in range(size // fold)
    ]
    columns = jnp.concatenate(windows, axis=-1).reshape(batch * rows * width, -1)  # [B rows width, K / parts * K C]
    weights = jnp.concatenate(list(kernel.reshape(parts, -1, filters)), axis=-1)  # [K / parts * K C, parts F]
    y = (columns @ weights).reshape(batch, rows, width, parts, filters)
    return sum((y[:, p : p + height, :, p] for p in range(1, parts)), y[:, :height, :, 0])


class Conv(nn.Module):
    """A convolutional layer without padding: ``conv`` plus a bias, with the parameters of ``flax.linen.Conv`` on every backend.

    Attributes:
      features: the number F of filters.
      kernel_size: the side K of a square window, in pixels.
      stride: the step between windows, in pixels.
      dtype: in which to compute; by default that of images and parameters together. Parameters stay float32.
      kernel_init: as in flax.
    """

    features: int
    kernel_size: int
    stride: int = 1
    dtype: Any = None
    kernel_init: Callable[..., chex.Array] = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        """From images ``[B, H, W, C]`` to ``[B, (H - K) // stride + 1, (W - K) // stride + 1, F]`` of the type computed in."""
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        return conv(x, kernel, self.stride) + bias


class ConvQNetwork(nn.Module):
    """Convolutions, then a multilayer perceptron, all with ReLU, that give one value per action (Mnih et al. 2015).

    Attributes:
      num_actions: the number A of actions.
      convolutions: (filters, kernel size, stride) of each, first to last: ``NATURE``, ``MINATAR`` or your own.
      hidden: width of each hidden layer after them.
      image: from a batch of observations to images ``[B, H, W, C]`` of float32, for example ``spaces.image(space)``.
      dtype: in which to compute, as for ``QNetwork``.
      layer_norm: as for ``QNetwork``, also after each convolution, at each place over its filters.
    """

    num_actions: int
    convolutions: Sequence[tuple[int, int, int]]
    hidden: Sequence[int]
    image: Callable[[chex.ArrayTree], chex.Array]
    dtype: Any = None
    layer_norm: bool = False

    @nn.compact
    def __call__(self, observation: chex.ArrayTree) -> chex.Array:
        """The values ``[B, A]`` of a batch of observations ``[B, ...]``, float32 in whatever type they were computed.

        Raises:
          ValueError: if a kernel does not fit the image that reaches it.
        """
        image = self.image(observation)  # [B, H, W, C]
        layers = [Conv(*each, self.dtype) for each in self.convolutions]
        x = flatten(convolve(layers, image, lambda x: nn.relu(_normalised(x, self.layer_norm))))  # [B, F]
        for features in self.hidden:
            x = nn.relu(_normalised(nn.Dense(features, dtype=self.dtype)(x), self.layer_norm))
        return nn.Dense(self.num_actions, dtype=self.dtype)(x).astype(jnp.float32)  # [B, A]


def convolve(layers: Sequence[Conv], image: chex.Array, activation: Callable[[chex.Array], chex.Array] = nn.relu) -> chex.Array:
    """Images ``[B, H, W, C]`` through convolutions, each with its activation, to others; ValueError if a kernel does not fit."""
    x = image
    for i, layer in enumerate(layers):
        if min(x.shape[1:3]) < layer.kernel_size:
            raise ValueError(
                f"an image of {image.shape[1]}x{image.shape[2]} reaches convolution {i} as {x.shape[1]}x{x.shape[2]}, smaller than "
                f"its {layer.kernel_size}x{layer.kernel_size} kernel: give smaller kernels or strides (networks.MINATAR suits 10x10), "
                "enlarge the image, or say where its channels are (spaces.image)"
            )
        x = activation(layer(x))
    return x


def orthogonal(scale: float) -> Callable[..., chex.Array]:
    """Orthonormal columns (rows, where there are more columns), times ``scale``: the initialisation that policy gradients are used to.

    By Gram and Schmidt, each column twice, which is enough for float32. LAPACK's QR, as in ``nn.initializers.orthogonal``, waits for
    threads of the CPU backend, hangs where each core is a device (``dqn_jax.device_per_core``; seen with jax 0.10.2), and compiles longer.

    Returns:
      An initialiser, ``(key, shape, dtype) -> array``; all axes but the last count as rows.
    """

    def init(key: chex.PRNGKey, shape: tuple[int, ...], dtype: Any = jnp.float32) -> chex.Array:
        rows, columns = math.prod(shape[:-1]), shape[-1]
        random = jax.random.normal(key, (max(rows, columns), min(rows, columns)), dtype)

        def add_column(j: chex.Array, done: chex.Array) -> chex.Array:
            column = random[:, j]
            for _ in range(2):
                coordinates = jnp.matmul(done.T, column, precision="highest")
                column = column - jnp.matmul(done, coordinates, precision="highest")
            return done.at[:, j].set(column / jnp.linalg.norm(column))

        done = jax.lax.fori_loop(0, random.shape[1], add_column, jnp.zeros_like(random))
        return scale * (done if rows >= columns else done.T).reshape(shape)

    return init


class ActorCritic(nn.Module):
    """A policy's outputs and a value from one observation, as PPO asks for; orthogonal initialisation, zero biases.

    The last layer of the policy begins near zero (scale 0.01), so that every action is about as likely at first.

    Attributes:
      num_outputs: the numbers P that the policy's distribution takes, without ``num_free``.
      hidden: width of each hidden layer.
      features: from a batch of observations to vectors ``[B, F]``, or images ``[B, H, W, C]`` where there are convolutions.
      convolutions: (filters, kernel size, stride) of each, with ReLU, before the hidden layers.
      shared: whether policy and value share all layers but the last.
      num_free: further outputs that are parameters of their own, the same for every observation, zeros at first: the logarithms of
        standard deviations.
      activation: of the hidden layers.
      num_values: values V of an observation, one for each stream of rewards.
      dtype: in which to compute, as for ``QNetwork``.
    """

    num_outputs: int
    hidden: Sequence[int] = (64, 64)
    features: Callable[[chex.ArrayTree], chex.Array] = flatten
    convolutions: Sequence[tuple[int, int, int]] = ()
    shared: bool = False
    num_free: int = 0
    activation: Callable[[chex.Array], chex.Array] = nn.tanh
    num_values: int = 1
    dtype: Any = None

    @nn.compact
    def __call__(self, observation: chex.ArrayTree) -> tuple[chex.Array, chex.Array]:
        """The outputs ``[B, P + num_free]`` and the values of a batch of observations ``[B, ...]``, float32: ``[B]``, or ``[B, V]`` where
        there are several.

        Raises:
          ValueError: if a kernel does not fit the image that reaches it.
        """
        x = self.features(observation)
        for_policy = self._hidden(x)  # [B, F]
        for_value = for_policy if self.shared else self._hidden(x)  # [B, F]
        outputs = self._dense(self.num_outputs, 0.01)(for_policy).astype(jnp.float32)  # [B, P]
        if self.num_free:
            free = self.param("free", nn.initializers.zeros, (self.num_free,))
            outputs = jnp.concatenate([outputs, jnp.broadcast_to(free, (outputs.shape[0], self.num_free))], axis=-1)
        values = self._dense(self.num_values, 1.0)(for_value).astype(jnp.float32)  # [B, V]
        return outputs, values[:, 0] if self.num_values == 1 else values

    def _hidden(self, x: chex.Array) -> chex.Array:
        if self.convolutions:
            x = convolve([Conv(*each, self.dtype, orthogonal(SQRT2)) for each in self.convolutions], x)
            x = x.reshape(x.shape[0], -1)  # [B, F]
        for width in self.hidden:
            x = self.activation(self._dense(width, SQRT2)(x))
        return x

    def _dense(self, width: int, scale: float) -> nn.Dense:
        return nn.Dense(width, dtype=self.dtype, kernel_init=orthogonal(scale))


class FeatureNetwork(nn.Module):
    """Features of what a curiosity sees; orthogonal initialisation, zero biases, the last layer linear.

    Attributes:
      num_features: K.
      hidden: width of each hidden layer.
      convolutions: (filters, kernel size, stride) of each, for images; empty for vectors.
      activation: of all layers but the last; by default Burda et al.'s, TensorFlow's leaky ReLU.
      scale: of the initialisation.
      parts: whether to give what the features are made of, too.
    """

    num_features: int
    hidden: Sequence[int] = (64,)
    convolutions: Sequence[tuple[int, int, int]] = ()
    activation: Callable[[chex.Array], chex.Array] = functools.partial(nn.leaky_relu, negative_slope=0.2)
    scale: float = SQRT2
    parts: bool = False

    @nn.compact
    def __call__(self, x: chex.Array) -> Any:
        """The features ``[B, K]`` of vectors ``[B, F]`` or images ``[B, H, W, C]``, floats; with ``parts`` also, ``[B, L, C]``, the places
        of the last convolution's output, or the last hidden layer of a vector as a single part.
        """
        parts = x = convolve([Conv(*each, kernel_init=orthogonal(self.scale)) for each in self.convolutions], x, self.activation)
        x = x.reshape(x.shape[0], -1)
        for width in self.hidden:
            x = self.activation(nn.Dense(width, kernel_init=orthogonal(self.scale))(x))
        parts = parts.reshape(parts.shape[0], -1, parts.shape[-1]) if self.convolutions else x[:, None]
        features = nn.Dense(self.num_features, kernel_init=orthogonal(self.scale))(x)
        return (features, parts) if self.parts else features


class ActionValue(nn.Module):
    """A multilayer perceptron with ReLU that values an action of numbers: observation and action side by side.

    Attributes:
      hidden: width of each hidden layer.
      features: from a batch of observations to vectors ``[B, F]``.
      dtype: in which to compute, as for ``QNetwork``.
    """

    hidden: Sequence[int] = (256, 256)
    features: Callable[[chex.ArrayTree], chex.Array] = flatten
    dtype: Any = None

    @nn.compact
    def __call__(self, observation: chex.ArrayTree, action: chex.Array) -> chex.Array:
        """The values ``[B]`` of observations ``[B, ...]`` and actions ``[B, D]``, float32."""
        x = jnp.concatenate([self.features(observation), action], axis=-1)  # [B, F + D]
        for width in self.hidden:
            x = nn.relu(nn.Dense(width, dtype=self.dtype)(x))
        return nn.Dense(1, dtype=self.dtype)(x)[:, 0].astype(jnp.float32)


class Network(NamedTuple):
    """The two functions that the package asks of a network."""

    init: Callable[..., Any]
    apply: Callable[..., Any]


def from_nnx(build: Callable[[nnx.Rngs], Any]) -> Network:
    """A network from an NNX module, of one input or, as a critic of actions has, several.

    Args:
      build: makes the module from its random streams, for example ``lambda rngs: MyModule(4, 2, rngs=rngs)``. The module must keep
        no state but its parameters (no batch statistics, no dropout streams that advance).

    Returns:
      A ``Network`` whose parameters are a plain dict of arrays.
    """

    def init(key: chex.PRNGKey, *inputs: chex.ArrayTree) -> Any:
        del inputs  # An NNX module knows its input sizes.
        return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(params=key))))

    def apply(params: Any, *inputs: chex.ArrayTree) -> Any:
        module = nnx.eval_shape(lambda: build(nnx.Rngs(params=jax.random.key(0))))
        structure, state = nnx.split(module)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(structure, state)(*inputs)

    return Network(init, apply)
