"""Running moments against NumPy over everything at once."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dqn_jax import normalize

SCALES = [(0.0, 1.0), (1e4, 1.0), (-1e4, 30.0), (2e-3, 1e-4), (0.0, 1e5)]
scales = pytest.mark.parametrize(("offset", "scale"), SCALES, ids=[f"{offset:g}+-{scale:g}" for offset, scale in SCALES])


def observations(random, lead, offset=0.0, scale=1.0):
    """A pytree with leading axes: floats that are normalised, and what must stay as it is."""
    return {
        "bytes": random.integers(0, 256, (*lead, 2, 2), dtype=np.uint8),
        "choice": random.integers(-5, 5, lead, dtype=np.int32),
        "flag": random.random(lead) < 0.5,
        "speed": (offset + scale * random.normal(size=(*lead, 3))).astype(np.float32),
        "time": (offset + scale * random.exponential(size=lead)).astype(np.float32),
    }


def example():
    return jax.tree.map(lambda leaf: leaf[0], observations(np.random.default_rng(0), (1,)))


def fold_all(batches, axes):
    state = normalize.moments(example())
    for batch in batches:
        state = normalize.fold(state, batch, axes)
    return state


@scales
@pytest.mark.parametrize(
    "leads", [[(1,), (7,), (64,), (2,), (33,)], [(1, 1), (8, 3), (2, 16), (5, 1)], [(300,)]], ids=["rows", "rollouts", "one"]
)
def test_moments_folded_batch_by_batch_are_those_of_everything(leads, offset, scale):
    random, axes = np.random.default_rng(1), tuple(range(len(leads[0])))
    batches = [observations(random, lead, offset, scale) for lead in leads]
    state = fold_all(batches, axes)
    assert state.count == sum(np.prod(lead) for lead in leads)
    for name in ("speed", "time"):
        everything = np.concatenate([batch[name].reshape(-1, *batch[name].shape[len(axes) :]) for batch in batches]).astype(np.float64)
        assert (state.mean[name].dtype, state.mean[name].shape) == (jnp.float32, everything.shape[1:])
        # Float32 holds 1e4 to 1e-3, and so a mean there. (The mean of squares less the square of the mean would be wrong by 8.)
        np.testing.assert_allclose(state.mean[name], everything.mean(0), rtol=2e-6, atol=2e-6 * scale)
        np.testing.assert_allclose(state.variance[name], everything.var(0), rtol=1e-3)


def test_one_fold_equals_many():
    random = np.random.default_rng(2)
    everything = observations(random, (24,), 5.0, 2.0)
    pieces = [jax.tree.map(lambda leaf, start=start: leaf[start : start + 6], everything) for start in range(0, 24, 6)]
    chex.assert_trees_all_close(fold_all([everything], (0,)), fold_all(pieces, (0,)), rtol=1e-5)
    chex.assert_trees_all_close(fold_all(pieces[::-1], (0,)), fold_all(pieces, (0,)), rtol=1e-5)


def test_only_the_axes_named_are_leading():
    values = {"speed": np.arange(24, dtype=np.float32).reshape(2, 4, 3)}
    state = normalize.moments({"speed": np.zeros((4, 3), np.float32)})
    state = normalize.fold(state, values, (0,))
    assert state.count == 2
    np.testing.assert_allclose(state.mean["speed"], values["speed"].mean(0))
    state = normalize.fold(normalize.moments({"speed": np.zeros(3, np.float32)}), values, (0, 1))
    assert state.count == 8
    np.testing.assert_allclose(state.variance["speed"], values["speed"].var((0, 1)), rtol=1e-6)


def test_what_is_no_float_stays_untouched():
    random = np.random.default_rng(3)
    batch, empty = observations(random, (9,)), normalize.moments(example())
    state = normalize.fold(empty, batch)
    out = normalize.normalize(state, batch)
    for name in ("bytes", "choice", "flag"):
        assert out[name] is batch[name]
        chex.assert_trees_all_equal((state.mean[name], state.variance[name]), (empty.mean[name], empty.variance[name]))
    assert not np.array_equal(out["speed"], batch["speed"])


def test_before_anything_was_folded_normalize_only_clips():
    values = {"x": np.array([-1e6, -10.0, -9.99, -1e-7, 0.0, 3.3, 10.0, 10.5], np.float32)}
    empty = normalize.moments({"x": np.float32(0)})
    np.testing.assert_array_equal(normalize.normalize(empty, values)["x"], np.clip(values["x"], -10, 10))
    np.testing.assert_array_equal(normalize.normalize(empty, values, clip=1e9)["x"], values["x"])


@scales
def test_normalized_values_are_less_the_mean_and_over_the_deviation(offset, scale):
    batch = observations(np.random.default_rng(4), (200,), offset, scale)
    out = normalize.normalize(fold_all([batch], (0,)), batch)
    for name in ("speed", "time"):
        x = batch[name].astype(np.float64)
        expected = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-8)
        assert out[name].dtype == jnp.float32
        np.testing.assert_allclose(out[name], expected, rtol=1e-3, atol=5e-3)  # 1e4 +- 1 is known to 1e-3


@pytest.mark.parametrize("lead", [(), (4,), (5, 2)])
def test_values_may_have_any_leading_axes(lead):
    random = np.random.default_rng(5)
    state, values = fold_all([observations(random, (50,), 3.0, 2.0)], (0,)), observations(random, lead, 3.0, 2.0)
    if not lead:
        values = jax.tree.map(np.asarray, values)
    out = normalize.normalize(state, values)
    chex.assert_trees_all_equal_shapes_and_dtypes(out, values)
    np.testing.assert_allclose(out["time"], (values["time"] - state.mean["time"]) / np.sqrt(state.variance["time"]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("clip", [0.5, 10.0])
def test_nothing_is_further_from_zero_than_the_clip(clip):
    random = np.random.default_rng(6)
    state = fold_all([observations(random, (50,))], (0,))
    far = {**observations(random, (4,)), "time": np.array([-1e30, -100.0, 100.0, 1e30], np.float32)}
    np.testing.assert_array_equal(normalize.normalize(state, far, clip)["time"], np.float32([-clip, -clip, clip, clip]))


@pytest.mark.parametrize("constant", [0.0, 0.1, -7.3, 1e4 + 0.1, 1e-12])
def test_constant_features_stay_finite_and_small(constant):
    values = {"x": np.full((13, 1), constant, np.float32)}
    state = normalize.moments({"x": np.zeros(1, np.float32)})
    for number in (1, 13, 5, 8):
        state = normalize.fold(state, {"x": values["x"][:number]})
        assert (state.variance["x"] >= 0).all()
        out = normalize.normalize(state, values)["x"]
        assert np.isfinite(out).all() and np.abs(out).max() < 2  # rounding of the mean, over the deviation that it makes
    np.testing.assert_allclose(state.mean["x"], constant, rtol=1e-6)


def test_jit_and_vmap_over_seeds():
    random = np.random.default_rng(7)
    batches = [observations(random, (3, 6, 2), 10.0, 4.0) for _ in range(4)]  # 3 seeds, 6 steps, 2 environments
    rows = jax.tree.map(lambda leaf: leaf[0, 0, 0], batches[0])

    def run(batches):
        state = normalize.moments(rows)
        for batch in batches:
            state = normalize.fold(state, batch, (0, 1))
        return state, normalize.normalize(state, batches[-1])

    stacked = jax.jit(jax.vmap(run))(batches)
    for seed in range(3):
        alone = run([jax.tree.map(lambda leaf, seed=seed: leaf[seed], batch) for batch in batches])
        chex.assert_trees_all_close(jax.tree.map(lambda leaf, seed=seed: leaf[seed], stacked), alone, rtol=1e-5, atol=1e-6)
    assert len(np.unique(stacked[0].mean["time"])) == 3  # each seed has moments of its own
