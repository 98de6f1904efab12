"""Joined parameters: the same optimizer, and no concatenation large enough for XLA to share among threads."""

import os
import re

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dqn_jax import dqn
from dqn_jax.optimizers import MAX_JOINED, join_small

VECTOR = gymnasium.spaces.Box(-1, 1, (4,))
IMAGE = gymnasium.spaces.Box(0, 1, (10, 10, 4), np.bool_)
ACTIONS = gymnasium.spaces.Discrete(2)


@pytest.mark.parametrize("width", [8, MAX_JOINED // 4 + 1])
def test_joining_changes_no_number(width):
    params = {"a": jnp.linspace(-1, 1, 4 * width).reshape(4, width), "b": jnp.ones(3)}
    alone = joined = params
    optimizer = optax.chain(optax.trace(0.9), optax.scale_by_adam(), optax.add_decayed_weights(0.1), optax.scale(-0.01))
    small = join_small(optimizer)
    state, joined_state = optimizer.init(params), small.init(params)
    grads = jax.tree.map(jnp.cos, params)
    for _ in range(5):
        updates, state = optimizer.update(grads, state, alone)
        joined_updates, joined_state = small.update(grads, joined_state, joined)
        alone, joined = optax.apply_updates(alone, updates), optax.apply_updates(joined, joined_updates)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6), alone, joined)
    largest = max(leaf.ndim for leaf in jax.tree.leaves(joined_state))
    assert largest == (1 if width == 8 else 2)


def shared_joins(space, **options):
    """The concatenations along their first axis that a compiled update shares among threads."""
    agent = dqn((space, ACTIONS), capacity=1_000, **options)
    state = jax.eval_shape(agent.init, jax.random.key(0), jnp.zeros((1, *space.shape), space.dtype))
    text = jax.jit(agent.update).lower(state, jax.eval_shape(agent.draw, state, 0)).compile().as_text()
    bodies = dict(re.findall(r"^%?([\w.-]+) \(.*?\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))
    shared = re.findall(r"calls=%?([\w.-]+),.*outer_dimension_partitions", text)
    return [name for name in shared if re.search(r"concatenate\(.*dimensions=\{0\}", bodies[name])]


@pytest.mark.parametrize(
    ("space", "hidden"),
    [(VECTOR, (64, 64)), (VECTOR, (128, 128, 128)), (VECTOR, (512, 512)), (IMAGE, None)],
    ids=["2x64", "3x128", "2x512", "MinAtar"],
)
def test_no_update_shares_a_join_among_threads(space, hidden):
    assert not shared_joins(space, hidden=hidden)


@pytest.mark.skipif(jax.default_backend() != "cpu" or os.cpu_count() == 1, reason="only a CPU of several cores shares work so")
def test_many_joined_parameters_would_be_seen():
    assert shared_joins(VECTOR, hidden=(512, 512), optimizer=optax.flatten(optax.adam(1e-3)))
