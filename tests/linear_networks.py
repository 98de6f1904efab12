"""Networks that compile in no time, for tests that are not about networks."""

import jax
import jax.numpy as jnp

from dqn_jax.networks import Network


def linear(num_outputs, read=lambda outputs: outputs):
    """Linear in the observation, a vector, and in an action, where there is one.

    Args:
      num_outputs: P.
      read: makes of the outputs ``[B, P]`` what an algorithm asks for.
    """

    def init(key, observation, *action):
        width = sum(part.shape[-1] for part in (observation, *action))
        return {"w": jax.random.uniform(key, (width, num_outputs), minval=-1.0)}

    return Network(init, lambda params, *parts: read(jnp.concatenate(parts, axis=-1) @ params["w"]))


def policy_and_value(num_outputs):
    """As PPO asks for: that many outputs, and a value."""
    return linear(num_outputs + 1, lambda outputs: (outputs[:, :-1], outputs[:, -1]))


def action_value():
    """As SAC asks for where actions are numbers: one value."""
    return linear(1, lambda outputs: outputs[:, 0])
