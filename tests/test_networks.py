"""Networks that compute in another type than float32, their parameters and values apart."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from dqn_jax import heads, networks
from dqn_jax.algorithms.dqn import dqn
from dqn_jax.types import Batch, Transition

NETWORKS = {
    "perceptron": (networks.QNetwork(3, (32, 32)), (6,), ("cpu",)),
    "convolutions": (networks.ConvQNetwork(3, ((8, 4, 2), (8, 3, 1)), (32,), lambda x: x), (12, 12, 4), ("cpu", "gpu")),
}
CASES = [
    pytest.param(network, shape, backend, id=f"{name}, {backend}")
    for name, (network, shape, backends) in NETWORKS.items()
    for backend in backends
]


def seen(shape, batch=16):
    return jax.random.normal(jax.random.key(7), (batch, *shape))


def products(network, params, x):
    """The types of what goes into the matrix products and convolutions."""
    jaxpr = jax.make_jaxpr(lambda params, x: network.apply(params, x))(params, x)
    found = [eqn for eqn in jax.tree.leaves(list(equations(jaxpr.jaxpr))) if eqn.primitive.name in ("dot_general", "conv_general_dilated")]
    return {var.aval.dtype for eqn in found for var in eqn.invars}


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in eqn.params.values():
            if hasattr(inner, "jaxpr"):
                yield from equations(inner.jaxpr)


@pytest.mark.parametrize(("network", "shape", "backend"), CASES)
def test_a_type_to_compute_in_changes_neither_parameters_nor_the_type_of_values(monkeypatch, network, shape, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)  # It chooses the convolution.
    half, x = network.clone(dtype=jnp.bfloat16), seen(shape)
    params = network.init(jax.random.key(0), x)
    for ours, plain in zip(jax.tree.leaves(half.init(jax.random.key(0), x)), jax.tree.leaves(params), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_array_equal(ours, plain)
    assert products(half, params, x) == {jnp.dtype(jnp.bfloat16)} and products(network, params, x) == {jnp.dtype(jnp.float32)}
    values, expected = half.apply(params, x), network.apply(params, x)
    assert values.dtype == expected.dtype == jnp.float32 and values.shape == (16, 3)
    # Eight bits of a mantissa: each layer rounds by up to 2 ** -8 of its own size.
    np.testing.assert_allclose(values, expected, rtol=0, atol=0.03 * float(jnp.abs(expected).max()))
    np.testing.assert_array_equal(values, values.astype(jnp.bfloat16).astype(jnp.float32))


@pytest.mark.parametrize(("network", "shape", "backend"), CASES)
def test_without_a_type_nothing_is_converted(monkeypatch, network, shape, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    # Vectors are made float32 by the features, which is no conversion where they are already.
    x = seen(shape)
    params = network.init(jax.random.key(0), x)
    gradient = jax.make_jaxpr(jax.grad(lambda params, x: jnp.sum(network.apply(params, x) ** 2)))(params, x)
    names = {eqn.primitive.name for eqn in equations(gradient.jaxpr)}
    assert "dot_general" in names and "convert_element_type" not in names


def test_without_a_type_the_values_are_those_of_the_bare_layers():
    x = seen((6,))
    network = networks.QNetwork(3, (32, 32))
    params = network.init(jax.random.key(0), x)
    bare = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(32), nn.relu, nn.Dense(3)])
    renamed = dict(zip(("layers_0", "layers_2", "layers_4"), (params["params"][f"Dense_{i}"] for i in range(3)), strict=True))
    np.testing.assert_array_equal(network.apply(params, x), bare.apply({"params": renamed}, x))


def test_without_a_type_images_are_promoted_as_flax_does():
    image = seen((6, 6, 2)).astype(jnp.float16)
    layer = networks.Conv(4, 3)
    params = layer.init(jax.random.key(0), image)
    values, expected = layer.apply(params, image), nn.Conv(4, (3, 3), padding="VALID").apply(params, image)
    assert values.dtype == expected.dtype == jnp.float32
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)
    assert networks.Conv(4, 3, dtype=jnp.float16).apply(params, image).dtype == jnp.float16


@pytest.mark.parametrize(("network", "shape", "backend"), CASES)
def test_dqn_learns_with_a_network_that_computes_in_bfloat16(monkeypatch, network, shape, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    x, ones = seen(shape), jnp.ones((16, 1))
    batch = Batch(Transition(x, jnp.arange(16) % 3, ones, 0.9 * ones, -x, ones < 1))
    moved = {}
    for dtype in (None, jnp.bfloat16):
        algorithm = dqn(network.clone(dtype=dtype), optax.sgd(0.01), epsilon=0.1, head=heads.expected("mse"))
        learner = algorithm.init(jax.random.key(0), x)
        learnt, feedback = jax.jit(algorithm.learn)(learner, batch, jax.random.key(1), 16)
        assert np.isfinite(feedback.metrics["loss"]) and feedback.priority.dtype == jnp.float32
        change = jax.tree.map(lambda new, old: new - old, learnt.params, learner.params)
        assert all(leaf.dtype == jnp.float32 and jnp.any(leaf) for leaf in jax.tree.leaves(change))
        moved[dtype] = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(change)])
    exact, rounded = moved[None], moved[jnp.bfloat16]
    assert jnp.linalg.norm(rounded - exact) < 0.05 * jnp.linalg.norm(exact)


@pytest.mark.parametrize("convolutions", [(), ((8, 4, 2), (8, 3, 1))])
def test_actor_critics_and_critics_of_actions_compute_in_another_type_too(convolutions):
    x, action = seen((12, 12, 4) if convolutions else (6,)), seen((2,))
    both = networks.ActorCritic(3, (32,), lambda x: x, convolutions, num_free=2), (x,)
    for network, inputs in (both, *(() if convolutions else ((networks.ActionValue((32,)), (x, action)),))):
        params, half = network.init(jax.random.key(0), *inputs), network.clone(dtype=jnp.bfloat16)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(half.init(jax.random.key(0), *inputs)))
        exact, rounded = (jax.tree.leaves(each.apply(params, *inputs)) for each in (network, half))
        for one, other in zip(rounded, exact, strict=True):
            assert one.dtype == other.dtype == jnp.float32
            np.testing.assert_allclose(one, other, rtol=0, atol=0.03 * float(jnp.abs(other).max()))
        assert any((one != other).any() for one, other in zip(rounded, exact, strict=True))


def test_an_actor_critic_says_which_kernel_does_not_fit():
    network = networks.ActorCritic(3, (32,), lambda x: x, networks.NATURE)
    with pytest.raises(ValueError, match="an image of 10x10 reaches convolution 1 as 1x1, smaller than its 4x4 kernel"):
        network.init(jax.random.key(0), seen((10, 10, 4)))


def test_an_nnx_module_of_two_inputs_is_a_critic():
    class Critic(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(8, 1, rngs=rngs)

        def __call__(self, observation, action):
            return self.layer(jnp.concatenate([observation, action], -1))[:, 0]

    critic, inputs = networks.from_nnx(lambda rngs: Critic(rngs)), (seen((6,)), seen((2,)))
    params = critic.init(jax.random.key(0), *inputs)
    weights = params["layer"]
    np.testing.assert_allclose(
        jax.jit(critic.apply)(params, *inputs),
        (jnp.concatenate(inputs, -1) @ weights["kernel"] + weights["bias"])[:, 0],
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("shape", [(4, 64), (64, 64), (64, 2), (3, 3, 4, 16), (700, 100)])
def test_orthogonal_weights(shape):
    weights = jax.jit(lambda key: networks.orthogonal(2.0)(key, shape))(jax.random.key(0)).reshape(-1, shape[-1])
    assert weights.dtype == jnp.float32
    exact = np.asarray(weights)  # An accelerator may take products of float32 in a shorter type.
    products = exact.T @ exact if len(weights) >= shape[-1] else exact @ exact.T
    np.testing.assert_allclose(products, 4 * np.eye(len(products)), atol=1e-5)
    others = networks.orthogonal(2.0)(jax.random.key(1), shape).reshape(-1, shape[-1])
    assert np.abs(others - weights).max() > 0.01


@pytest.mark.parametrize(("network", "shape"), [(network, shape) for network, shape, _ in NETWORKS.values()], ids=NETWORKS)
def test_layers_are_normalised_before_the_relu_if_asked(network, shape):
    normalised, x = network.clone(layer_norm=True), seen(shape)
    params, plain = (each.init(jax.random.key(0), x)["params"] for each in (normalised, network))
    hidden = len(network.hidden) + len(getattr(network, "convolutions", ()))
    assert set(params) - set(plain) == {f"LayerNorm_{i}" for i in range(hidden)}
    # By hand, from the same parameters, with scales and biases that are not 1 and 0.
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    y = x
    for i in range(hidden):
        convolution = i < len(getattr(network, "convolutions", ()))
        layer = params[f"Conv_{i}" if convolution else f"Dense_{i - hidden + len(network.hidden)}"]
        y = y if convolution else y.reshape(len(x), -1)
        y = networks.conv(y, layer["kernel"], network.convolutions[i][2]) if convolution else y @ layer["kernel"]
        y = y + layer["bias"]
        y = (y - y.mean(axis=-1, keepdims=True)) / np.sqrt(y.var(axis=-1, keepdims=True) + 1e-6)
        y = np.maximum(y * params[f"LayerNorm_{i}"]["scale"] + params[f"LayerNorm_{i}"]["bias"], 0)
    last = params[f"Dense_{len(network.hidden)}"]
    expected = y.reshape(len(x), -1) @ last["kernel"] + last["bias"]
    np.testing.assert_allclose(normalised.apply({"params": params}, x), expected, rtol=1e-3, atol=1e-4)
    half = normalised.clone(dtype=jnp.bfloat16)
    assert products(half, {"params": params}, x) == {jnp.dtype(jnp.bfloat16)}
    assert half.apply({"params": params}, x).dtype == jnp.float32
