"""Several agents, with networks, optimizers and discounts of their own, act each in its own environment and share one replay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dqn_jax
from dqn_jax import Transition, assemble
from dqn_jax.algorithms.dqn import dqn
from dqn_jax.memory.prioritized import prioritized
from dqn_jax.memory.ring import ring
from dqn_jax.memory.uniform import uniform
from dqn_jax.networks import QNetwork

MEMORIES = {
    "uniform": uniform(ring(600, n_steps=3), 32),
    "prioritized": prioritized(ring(600, n_steps=3), 32),
}


def play(memory, num_rows):
    """Two agents in two CartPoles: their states, of which the first holds the replay, and the actions ``[rows, 2]``."""
    env = dqn_jax.make("phys2d/CartPole-v1", polemass_length=0.05)
    near = assemble(dqn(QNetwork(2, (16,)), optax.sgd(1e-3), epsilon=0.0), memory, discount=0.5)
    far = assemble(dqn(QNetwork(2, (8, 8)), optax.adam(1e-3), epsilon=1.0), memory, discount=0.99)

    def step(carry, t):
        near_state, far_state, env_state, observation = carry
        near_state, near_decision = near.explore(near_state, observation[:1], near.noise(near_state, t, 1))
        far_state, far_decision = far.explore(far_state, observation[1:], far.noise(far_state, t, 1))
        action = jnp.concatenate([near_decision.action, far_decision.action])
        env_state, result = jax.vmap(env.step)(jax.random.split(jax.random.fold_in(jax.random.key(3), t), 2), env_state, action)
        last = result.terminated | result.truncated
        row = Transition(observation, action, result.reward, 1.0 - result.terminated, result.next_observation, last)
        near_state = near.observe(near_state, row)
        near_state, _ = near.update(near_state, near.draw(near_state, t))
        far_state = far_state._replace(memory=near_state.memory, step=far_state.step + 2)
        far_state, _ = far.update(far_state, far.draw(far_state, t))
        return (near_state._replace(memory=far_state.memory), far_state._replace(memory=()), env_state, result.observation), action

    env_state, observation = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), 2))
    states = near.init(jax.random.key(1), observation), far.init(jax.random.key(2), observation)._replace(memory=())
    (near_state, far_state, _, _), actions = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(num_rows)))(
        (*states, env_state, observation)
    )
    return states, (near_state, far_state), np.asarray(actions)


@pytest.mark.parametrize("name", MEMORIES)
def test_two_agents_learn_from_one_replay(name):
    memory = MEMORIES[name]
    before, (near, far), actions = play(memory, 250)
    assert int(near.memory.size) == 500 and far.memory == ()
    rows = near.memory.stored.rows if name == "prioritized" else near.memory.rows
    np.testing.assert_array_equal(rows.action[:250], actions)  # Each environment has its own column.
    noise = jax.vmap(memory.noise)(jax.random.split(jax.random.key(0), 50))
    drawn = np.asarray(jax.vmap(memory.sample, in_axes=(None, 0))(near.memory, noise).index)
    assert set(np.unique(drawn % 2)) == {0, 1}  # Either agent draws what the other did.
    for first, after in zip(before, (near, far), strict=True):
        assert int(after.updates) == 250
        assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (first.learner.params, after.learner.params)), strict=True))
