"""Choosing actions, the networks, and how observations reach them."""

import chex
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from gymnasium import spaces as gym_spaces
from scipy import stats

from dqn_jax import networks, policies, spaces
from dqn_jax.types import Masked

VALUES = jnp.array([0.1, -2.0, 3.0, 0.5, 1.0])
MASK = jnp.array([True, True, False, False, True])  # forbids the best action, 2: the best allowed one is 4
DRAWS = 4_000


@jax.jit
def choices(mask, epsilon):
    noise = policies.epsilon_greedy_noise(jax.random.key(3), DRAWS)
    return jax.vmap(policies.epsilon_greedy, in_axes=(None, None, 0, None))(VALUES, mask, noise, epsilon)


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all allowed", "masked"])
def test_epsilon_greedy_frequencies(mask, epsilon):
    actions = choices(mask, epsilon)
    assert (actions.dtype, actions.shape) == (jnp.int32, (DRAWS,))
    allowed = np.ones(5, bool) if mask is None else np.asarray(mask)
    chance = epsilon * allowed / allowed.sum()
    chance[2 if mask is None else 4] += 1 - epsilon
    counts = np.bincount(actions, minlength=5)
    assert not counts[chance == 0].any()
    if epsilon:
        assert stats.chisquare(counts[chance > 0], DRAWS * chance[chance > 0]).pvalue > 1e-3


def test_epsilon_greedy_at_the_ends_of_the_unit_interval():
    below_one = np.nextafter(np.float32(1), np.float32(0))
    for mask, last in ((None, 4), (MASK, 4), (jnp.array([True, True, False, False, False]), 1)):
        assert policies.epsilon_greedy(VALUES, mask, jnp.array([0.0, below_one]), 1.0) == last
        assert policies.epsilon_greedy(VALUES, mask, jnp.array([0.0, 0.0]), 1.0) == 0


def test_the_two_draws_of_a_choice_are_independent():
    noise = np.asarray(policies.epsilon_greedy_noise(jax.random.key(1), 2_000))
    assert noise.shape == (2_000, 2)
    assert (noise >= 0).all() and (noise < 1).all()
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.08


def test_a_mask_that_forbids_everything_gives_no_nan():
    nothing = jnp.zeros(5, bool)
    masked = policies.mask_values(VALUES, nothing)
    assert np.isfinite(masked).all()
    assert 0.0 * jnp.max(masked) == 0  # what a terminated successor contributes
    for epsilon in (0.0, 1.0):
        assert 0 <= policies.epsilon_greedy(VALUES, nothing, jnp.array([0.5, 0.5]), epsilon) < 5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_mask_values_keeps_allowed_values_and_stays_finite(dtype):
    values = VALUES.astype(dtype)
    masked = policies.mask_values(values, MASK)
    assert masked.dtype == dtype and bool(jnp.isfinite(masked).all())
    chex.assert_trees_all_equal(masked[MASK], values[MASK])
    assert masked[~MASK].max() < values.min()
    assert policies.mask_values(values, None) is values


def test_no_gradient_reaches_a_forbidden_value():
    grads = jax.grad(lambda v: jnp.max(policies.mask_values(v, MASK)))(VALUES)
    np.testing.assert_array_equal(grads, np.eye(5)[4])


def test_mask_values_refuses_a_mask_of_another_shape():
    with pytest.raises(AssertionError):
        policies.mask_values(jnp.zeros((2, 5)), MASK)  # would broadcast in silence


def test_split_mask():
    assert policies.split_mask(Masked(VALUES, MASK)) == (VALUES, MASK)
    assert policies.split_mask({"a": 1}) == ({"a": 1}, None)


# Networks.

OBSERVATION = {"image": jnp.arange(12, dtype=jnp.uint8).reshape(2, 3, 2), "speed": jnp.array([[0.5], [-1.0]])}


def test_flatten_joins_the_leaves_as_float32():
    flat = networks.flatten(OBSERVATION)
    assert flat.dtype == jnp.float32
    np.testing.assert_array_equal(flat, [[0, 1, 2, 3, 4, 5, 0.5], [6, 7, 8, 9, 10, 11, -1]])
    np.testing.assert_array_equal(networks.flatten(jnp.ones((3, 2, 2))), np.ones((3, 4)))


def test_q_network_is_the_perceptron_that_it_says():
    network = networks.QNetwork(3, (4,))
    params = network.init(jax.random.key(0), OBSERVATION)
    layers = params["params"]
    hidden = np.maximum(np.asarray(networks.flatten(OBSERVATION)) @ layers["Dense_0"]["kernel"] + layers["Dense_0"]["bias"], 0)
    expected = hidden @ layers["Dense_1"]["kernel"] + layers["Dense_1"]["bias"]
    np.testing.assert_allclose(network.apply(params, OBSERVATION), expected, rtol=1e-5, atol=1e-5)
    assert layers["Dense_0"]["kernel"].shape == (7, 4) and layers["Dense_1"]["kernel"].shape == (4, 3)


def test_q_network_reads_through_its_features():
    network = networks.QNetwork(2, (4,), features=lambda x: x["speed"])
    params = network.init(jax.random.key(0), OBSERVATION)
    other = {**OBSERVATION, "image": OBSERVATION["image"] + 1}
    chex.assert_trees_all_equal(network.apply(params, OBSERVATION), network.apply(params, other))


class Module(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.second = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


def test_from_nnx_is_a_pure_network():
    network = networks.from_nnx(lambda rngs: Module(rngs))
    x = jnp.ones((5, 3))
    init, apply = jax.jit(network.init), jax.jit(network.apply)
    params = init(jax.random.key(0), x)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    chex.assert_trees_all_equal(params, init(jax.random.key(0), x))
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(params, init(jax.random.key(1), x))

    first, second = params["first"], params["second"]
    expected = np.maximum(x @ first["kernel"] + first["bias"], 0) @ second["kernel"] + second["bias"]
    np.testing.assert_allclose(apply(params, x), expected, rtol=1e-5)

    before = jax.tree.map(np.array, params)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(network.apply(p, x) ** 2)))(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, params)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(grads))
    chex.assert_trees_all_equal(params, before)  # the module behind it is rebuilt, not kept

    stacked = jax.vmap(network.init, in_axes=(0, None))(jax.random.split(jax.random.key(2), 3), x)
    values = jax.vmap(network.apply, in_axes=(0, None))(stacked, x)
    assert values.shape == (3, 5, 2)
    assert not np.allclose(values[0], values[1])
    np.testing.assert_allclose(values[1], network.apply(jax.tree.map(lambda leaf: leaf[1], stacked), x), rtol=1e-5)


# Convolutions. Both implementations run here; which one a program holds is decided by the backend when it is traced.

CONVOLUTIONS = {  # kernel size, stride, height, width, C, F
    "nature 0": (8, 4, 84, 84, 4, 32),
    "nature 1": (4, 2, 20, 20, 32, 64),
    "nature 2": (3, 1, 9, 9, 64, 64),
    "minatar": (3, 1, 10, 10, 4, 16),
    "nothing left over": (4, 2, 8, 12, 3, 5),
    "pixels left over": (4, 2, 9, 7, 3, 5),
    "stride does not divide": (3, 2, 9, 8, 3, 5),
    "stride past the kernel": (2, 3, 9, 10, 3, 5),
    "windows side by side": (3, 3, 10, 9, 3, 5),
    "pixel by pixel": (1, 1, 4, 3, 3, 5),
    "as large as the image": (5, 2, 5, 5, 1, 2),
}


def drawn(size, height, width, channels, filters, batch=2, lead=()):
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (*lead, batch, height, width, channels))
    kernel = jax.random.normal(keys[1], (*lead, size, size, channels, filters)) / (size * channels**0.5)
    return x, kernel


def on(monkeypatch, backend, function):
    """The function traced anew, as if for this backend."""

    def run(*args):
        with monkeypatch.context() as patch:
            patch.setattr(jax, "default_backend", lambda: backend)
            patch.setattr(networks, "SMALL_WINDOW", 0)  # Or no window here would be large enough for a convolution.
            return jax.jit(lambda *args: function(*args))(*args)

    return run


@pytest.mark.parametrize(("size", "stride", "height", "width", "channels", "filters"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_both_convolutions_agree_with_flax(monkeypatch, size, stride, height, width, channels, filters):
    x, kernel = drawn(size, height, width, channels, filters)
    layer = nn.Conv(filters, (size, size), stride, padding="VALID", use_bias=False)

    def values_and_gradients(function):
        def loss(x, kernel):
            y = function(x, kernel)
            return jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape))), y  # every output has a gradient of its own

        return lambda x, kernel: jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, kernel)

    ours = values_and_gradients(lambda x, kernel: networks.conv(x, kernel, stride))
    expected = jax.jit(values_and_gradients(lambda x, kernel: layer.apply({"params": {"kernel": kernel}}, x)))(x, kernel)
    for backend in ("cpu", "gpu"):
        (_, y), gradients = on(monkeypatch, backend, ours)(x, kernel)
        assert y.shape == (2, (height - size) // stride + 1, (width - size) // stride + 1, filters) and y.dtype == jnp.float32
        chex.assert_trees_all_close((y, gradients), (expected[0][1], expected[1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stacked", [(0, 0), (None, 0), (0, None)], ids=["both", "kernels", "images"])
def test_convolutions_under_vmap(monkeypatch, stacked):
    x, kernel = drawn(4, 9, 8, 3, 5, lead=(3,))
    x, kernel = (leaf if axis == 0 else leaf[0] for leaf, axis in zip((x, kernel), stacked, strict=True))
    pairs = [[leaf if axis is None else leaf[i] for leaf, axis in zip((x, kernel), stacked, strict=True)] for i in range(3)]
    one_by_one = on(monkeypatch, "gpu", lambda pairs: jnp.stack([networks.conv(*pair, 2) for pair in pairs]))(pairs)
    for backend in ("cpu", "gpu"):
        together = on(monkeypatch, backend, jax.vmap(lambda x, k: networks.conv(x, k, 2), in_axes=stacked))(x, kernel)
        chex.assert_trees_all_close(together, one_by_one, rtol=1e-5, atol=1e-5)


def test_conv_starts_and_computes_as_the_layer_of_flax_does(monkeypatch):
    x, _ = drawn(3, 10, 10, 4, 16)
    layer = nn.Conv(16, (3, 3), 2, padding="VALID")
    ours = networks.Conv(16, 3, 2)
    params = jax.jit(layer.init)(jax.random.key(1), x)
    shifted = jax.tree.map(lambda leaf: leaf + 0.1, params)  # so that the bias counts
    expected = jax.jit(layer.apply)(shifted, x)
    for backend in ("cpu", "gpu"):
        chex.assert_trees_all_equal(on(monkeypatch, backend, ours.init)(jax.random.key(1), x), params)
        chex.assert_trees_all_close(on(monkeypatch, backend, ours.apply)(shifted, x), expected, rtol=1e-5, atol=1e-5)


ATARI = gym_spaces.Box(0, 255, (84, 84, 4), np.uint8)
GRID = gym_spaces.Box(0, 1, (10, 10, 4), np.bool_)


def learn(network, x):
    """Three steps down the gradient in a compiled loop."""

    def step(params, _):
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(lambda p: jnp.mean(network.apply(p, x) ** 2))(params)), ()

    return lambda params: jax.lax.scan(step, params, length=3)[0]


@pytest.mark.parametrize(("convolutions", "backends"), [(networks.MINATAR, ()), (((8, 6, 2),), ("gpu",))], ids=["small windows", "large"])
def test_only_other_backends_run_a_convolution_in_the_loop(monkeypatch, convolutions, backends):
    network = networks.ConvQNetwork(3, convolutions, (8,), spaces.image(GRID))
    x = jnp.ones((2, 10, 10, 4), bool)
    params = network.init(jax.random.key(0), x)
    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert ("convolution(" in jax.jit(learn(network, x)).lower(params).compile().as_text()) == (backend in backends)


def test_conv_q_network_is_the_network_that_it_says(monkeypatch):
    network = networks.ConvQNetwork(3, ((5, 4, 2), (6, 2, 1)), (7,), spaces.image(ATARI))
    observation = jnp.arange(2 * 9 * 8 * 2).reshape(2, 9, 8, 2).astype(jnp.uint8)
    params = jax.jit(network.init)(jax.random.key(0), observation)
    layers = params["params"]
    x = observation / 255
    for name, layer in (("Conv_0", nn.Conv(5, (4, 4), 2, padding="VALID")), ("Conv_1", nn.Conv(6, (2, 2), 1, padding="VALID"))):
        x = nn.relu(layer.apply({"params": layers[name]}, x))
    x = nn.relu(x.reshape(2, -1) @ layers["Dense_0"]["kernel"] + layers["Dense_0"]["bias"])
    expected = x @ layers["Dense_1"]["kernel"] + layers["Dense_1"]["bias"]
    for backend in ("cpu", "gpu"):
        np.testing.assert_allclose(on(monkeypatch, backend, network.apply)(params, observation), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("space", "convolutions", "hidden", "count"),
    [(ATARI, networks.NATURE, (512,), 1_687_206), (GRID, networks.MINATAR, (128,), 592 + 131_200 + 774)],
    ids=["nature", "minatar"],
)
def test_the_networks_of_the_papers(monkeypatch, space, convolutions, hidden, count):
    network = networks.ConvQNetwork(6, convolutions, hidden, spaces.image(space))
    observation = spaces.example(space, 5)
    params = jax.eval_shape(network.init, jax.random.key(0), observation)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
    values = jax.eval_shape(network.apply, params, observation)
    assert (values.shape, values.dtype) == ((5, 6), jnp.float32)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    chex.assert_trees_all_equal(jax.eval_shape(lambda *args: network.init(*args), jax.random.key(0), observation), params)


@pytest.mark.parametrize(
    ("convolutions", "shape", "message"),
    [
        (networks.NATURE, (10, 10, 4), "image of 10x10 reaches convolution 1 as 1x1, smaller than its 4x4 kernel: give.*MINATAR"),
        (networks.NATURE, (4, 84, 84), "image of 4x84 reaches convolution 0 as 4x84, smaller than its 8x8 kernel.*channels"),
        (networks.MINATAR, (10, 2, 4), "image of 10x2 reaches convolution 0 as 10x2, smaller than its 3x3 kernel"),
    ],
)
def test_a_kernel_that_does_not_fit_is_refused(convolutions, shape, message):
    network = networks.ConvQNetwork(6, convolutions, (512,), spaces.image(ATARI))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *shape), jnp.uint8))


# What networks see of Gymnasium spaces.

IMAGE = gym_spaces.Box(0, 255, (2, 2), np.uint8)
FEATURES = {
    "box": (gym_spaces.Box(-1, 1, (2,)), np.array([[0.5, -1]], np.float32), [[0.5, -1]]),
    "matrix": (gym_spaces.Box(-1, 1, (2, 2)), np.array([[[1, 0.5], [0, -1]]], np.float32), [[1, 0.5, 0, -1]]),
    "scalar": (gym_spaces.Box(-1, 1, ()), np.array([0.5], np.float32), [[0.5]]),
    "discrete": (gym_spaces.Discrete(3), np.array([2]), [[0, 0, 1]]),
    "discrete from 5": (gym_spaces.Discrete(3, start=5), np.array([5]), [[1, 0, 0]]),
    "multidiscrete": (gym_spaces.MultiDiscrete([2, 3]), np.array([[1, 2]]), [[0, 1, 0, 0, 1]]),
    "multidiscrete from (1, -1)": (gym_spaces.MultiDiscrete([2, 3], start=[1, -1]), np.array([[1, 1]]), [[1, 0, 0, 0, 1]]),
    "multidiscrete matrix": (gym_spaces.MultiDiscrete([[2], [2]]), np.array([[[1], [0]]]), [[0, 1, 1, 0]]),
    "multibinary": (gym_spaces.MultiBinary(3), np.array([[1, 0, 1]], np.int8), [[1, 0, 1]]),
    "image": (IMAGE, np.array([[[0, 51], [102, 255]]], np.uint8), [[0, 0.2, 0.4, 1]]),
    "bytes": (gym_spaces.Box(0, 255, (2,), np.uint8), np.array([[3, 4]], np.uint8), [[3, 4]]),  # a vector is not an image
    "dict": (
        gym_spaces.Dict({"b": gym_spaces.Discrete(2), "a": gym_spaces.Box(-1, 1, (1,))}),
        {"a": np.array([[0.5]], np.float32), "b": np.array([1])},
        [[0.5, 0, 1]],
    ),
    "tuple": (gym_spaces.Tuple([gym_spaces.Discrete(2), IMAGE]), (np.array([0]), np.full((1, 2, 2), 255, np.uint8)), [[1, 0, 1, 1, 1, 1]]),
    "nested": (
        gym_spaces.Dict({"x": gym_spaces.Tuple([gym_spaces.Discrete(2), gym_spaces.Discrete(2)])}),
        {"x": (np.array([0]), np.array([1]))},
        [[1, 0, 0, 1]],
    ),
}
MASKED = gym_spaces.Dict({"observation": gym_spaces.Discrete(3), "action_mask": gym_spaces.MultiBinary(4)})


@pytest.mark.parametrize(("space", "value", "expected"), FEATURES.values(), ids=FEATURES)
def test_features_by_hand(space, value, expected):
    got = spaces.features(space)(jax.tree.map(jnp.asarray, value))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_features_of_a_masked_space_are_those_of_the_observation_proper():
    assert spaces.is_masked(MASKED)
    np.testing.assert_array_equal(spaces.features(MASKED)(jnp.array([1, 0])), [[0, 1, 0], [1, 0, 0]])


@pytest.mark.parametrize("space", [case[0] for case in FEATURES.values()], ids=FEATURES)
def test_samples_of_a_space_fit_its_example_and_its_network(space):
    example = spaces.example(space, 2)
    space.seed(0)
    checked = spaces.observation_check(space, None)(space.sample())
    chex.assert_trees_all_equal_shapes_and_dtypes(checked, jax.tree.map(lambda leaf: leaf[:1], example))
    features = jax.eval_shape(spaces.features(space), example)
    assert features.shape == (2, gymnasium.spaces.flatdim(space)) and features.dtype == jnp.float32


IMAGES = {
    "uint8": (gym_spaces.Box(0, 255, (3, 2, 4), np.uint8), True, (3, 2, 4), (2, 4, 3)),
    "bool": (gym_spaces.Box(0, 1, (3, 2, 4), np.bool_), True, (3, 2, 4), (2, 4, 3)),
    "one channel": (gym_spaces.Box(0, 255, (3, 2), np.uint8), True, (3, 2, 1), (3, 2, 1)),
    "multibinary": (gym_spaces.MultiBinary((3, 2, 4)), False, (3, 2, 4), (2, 4, 3)),
    "float": (gym_spaces.Box(-1, 1, (3, 2, 4)), False, (3, 2, 4), (2, 4, 3)),
}


@pytest.mark.parametrize(("space", "looks", "last", "first"), IMAGES.values(), ids=IMAGES)
def test_images(space, looks, last, first):
    masked = gym_spaces.Dict({"observation": space, "action_mask": gym_spaces.MultiBinary(4)})
    assert spaces.is_image(space) == spaces.is_image(masked) == looks
    space.seed(0)
    value = np.stack([space.sample() for _ in range(2)])
    expected = value.astype(np.float32) / (255 if space.dtype == np.uint8 else 1)
    for channels_first, shape in ((False, last), (True, first)):
        moved = expected[..., None] if len(space.shape) == 2 else expected.transpose(0, 2, 3, 1) if channels_first else expected
        for read in (spaces.image(space, channels_first), spaces.image(masked, channels_first)):
            got = read(jnp.asarray(value))
            assert (got.shape, got.dtype) == ((2, *shape), jnp.float32)
            np.testing.assert_allclose(got, moved, rtol=1e-6)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 2, 4)])
def test_what_has_not_two_or_three_axes_is_no_image(shape):
    space = gym_spaces.Box(0, 255, shape, np.uint8)
    assert not spaces.is_image(space)
    with pytest.raises(ValueError, match="two or three axes"):
        spaces.image(space)
    assert not spaces.is_image(gym_spaces.Dict({"a": IMAGE}))


def test_a_masked_example_is_masked_and_allows_everything():
    example = spaces.example(MASKED, 2)
    assert isinstance(example, Masked)
    np.testing.assert_array_equal(example.action_mask, np.ones((2, 4), bool))
    checked = spaces.observation_check(MASKED, None)({"observation": 2, "action_mask": np.array([0, 1, 0, 1], np.int8)})
    chex.assert_trees_all_equal(checked, Masked(np.array([2], np.int32), np.array([[False, True, False, True]])))


def test_unsupported_spaces_are_refused():
    with pytest.raises(NotImplementedError, match="not supported"):
        spaces.example(gym_spaces.Dict({"a": gym_spaces.Text(3)}), 1)
