"""Numbers that are none: how an update that would spoil what was learnt is noticed, and undone.

One batch with a reward of 1e30, or one division by nothing, is enough to make every parameter NaN, and Adam keeps it so. An update whose
loss or gradient is not finite therefore changes nothing.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from dqn_jax.types import Agent, AgentState

SMALL = 50_000  # Up to so many numbers one long vector costs less than several, and on an accelerator a choice less than a branch.
TOO_LARGE = 1e15  # No network that learns has such numbers, and products of a few are infinite.
PATIENCE = 20  # Calls that learn, or updates of a compiled run, that may be refused in a row.


class NonFiniteError(FloatingPointError):
    """Update after update had a loss or gradient that was not finite, and was refused."""


def is_sound(loss: chex.Array, gradient: chex.ArrayTree) -> chex.Array:
    """Whether the loss and the norm of its gradient are finite, a bool ``[]``. Beyond 1e19 the squares that the norm, and Adam, are made of
    are not.
    """
    return jnp.isfinite(loss + sum(jnp.vdot(leaf, leaf) for leaf in _vectors(gradient)))


def all_finite(tree: chex.ArrayTree) -> chex.Array:
    """Whether all floats in the tree are finite, a bool ``[]``."""
    # Nothing times a finite number is nothing.
    return jnp.isfinite(sum((jnp.vdot(leaf, jnp.zeros_like(leaf)) for leaf in _vectors(tree)), jnp.zeros(())))


def _vectors(tree: chex.ArrayTree) -> list[chex.Array]:
    """The floats of the tree, where they are few as one vector. Products of vectors, which they are for, are what XLA reduces on a CPU with
    more than one number at a time.
    """
    leaves = [leaf.ravel() for leaf in jax.tree.leaves(tree) if _is_float(leaf)]
    return [jnp.concatenate(leaves)] if 0 < sum(leaf.size for leaf in leaves) <= SMALL else leaves


def choose(sound: chex.Array, new: chex.ArrayTree, old: chex.ArrayTree) -> Any:
    """``new`` where ``sound``, else ``old``."""
    return jax.tree.map(lambda new, old: jnp.where(sound, new, old), new, old)


def learn_if(sound: chex.Array, learn: Callable[[Any], Any], learner: Any) -> Any:
    """``learn(learner)`` where ``sound``, else ``learner``.

    Args:
      sound: a bool.
      learn: what an update does once its gradient is known.
      learner: any pytree.
    """
    # A choice between old and new keeps both alive, where an update could have written in place: for large networks it copies. For small
    # ones it is an operation for each leaf, all of them ready at the same time, and where more than eight are, XLA's CPU runtime wakes
    # another thread for half of them: 85 us more for an update of 2 x 64 units in a loop in Python, where a branch costs 2. On an
    # accelerator a branch may wait for the host.
    if jax.default_backend() != "cpu" and sum(leaf.size for leaf in jax.tree.leaves(learner)) <= 4 * SMALL:
        return choose(sound, learn(learner), learner)
    return jax.lax.cond(sound, learn, lambda learner: learner, learner)


def all_refused(share: Any, updates: int) -> Any:
    """Whether a metric ``refused`` says that all of so many updates were: a mean of ones may be a little less than one."""
    return np.asarray(share) > 1 - 0.5 / max(updates, 1)


def explain(agent: Agent, state: AgentState) -> str:
    """Why the last update of this state was refused, for people: the tensors that were not finite, the rows of the batch to look at, and
    what to try.

    Args:
      agent: whose state it is.
      state: as it stood after that update; nothing is donated.
    """
    drawn = jax.jit(agent.draw)(state, state.updates - 1)
    batch, learner, feedback = jax.device_get(jax.jit(agent.examine)(state, drawn))
    t = batch.transition
    found = [
        *_non_finite("", {"observation": t.observation, "reward": t.reward, "next_observation": t.next_observation}, rows=True),
        *_non_finite("TD error", feedback.priority, rows=True),
        *_non_finite("metric", feedback.metrics),
        *_non_finite("gradient", feedback.gradient),
        *_non_finite("before it", state.learner),
        *_non_finite("after it", learner),
    ]
    measured = {"reward": t.reward, "observation": t.observation, "TD error": feedback.priority}
    sizes = {name: _sizes(tree) for name, tree in measured.items() if jax.tree.leaves(tree)}
    largest = [f"the largest {name} of the batch is {size.max():.3g}, in row {size.argmax()}" for name, size in sizes.items()]
    tops = {_name(path): np.abs(leaf).max() for path, leaf in jax.tree_util.tree_flatten_with_path(feedback.gradient)[0]}
    if tops and np.isfinite(list(tops.values())).all():
        name = max(tops, key=tops.__getitem__)
        largest.append(f"the largest number of the gradient is {tops[name]:.3g}, in {name}")
    before = {_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state.learner)[0] if _is_float(leaf)}
    learnt = {name: np.abs(np.asarray(leaf)).max() for name, leaf in before.items() if "opt" not in name}  # Moments are squares.
    if learnt and (top := max(learnt.values())) > TOO_LARGE:
        name = max(learnt, key=learnt.__getitem__)
        largest.append(f"what had been learnt before reaches {top:.3g}, in {name}: an earlier update has ruined it")
    return "\n  ".join(
        [
            *found,
            *largest,
            "try: smaller rewards and observations (scaled or clipped), a lower learning_rate, a smaller max_grad_norm, DQN's "
            "loss='huber'; and go back to an earlier checkpoint",
        ]
    )


def _non_finite(what: str, tree: Any, rows: bool = False) -> list[str]:
    """A line for each tensor of the tree in which something is not finite, six at most."""
    lines = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if not _is_float(leaf) or np.isfinite(leaf).all():
            continue
        wrong = ~np.isfinite(leaf)
        where = ""
        if rows:
            numbers = np.flatnonzero(wrong.reshape(len(wrong), -1).any(axis=1))
            where = f" in the rows {', '.join(map(str, numbers[:10]))}{' ...' if len(numbers) > 10 else ''} of {len(wrong)}"
        lines.append(f"{' '.join(filter(None, (what, _name(path))))} is {np.asarray(leaf)[wrong].flat[0]}{where}")
    return lines[:6] + ([f"{what} and {len(lines) - 6} more"] if len(lines) > 6 else [])


def _is_float(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _sizes(tree: Any) -> np.ndarray:
    """The largest magnitude in each row, ``[B]``, over all leaves."""
    leaves = [np.abs(np.asarray(leaf, np.float64)).reshape(len(leaf), -1).max(axis=1) for leaf in jax.tree.leaves(tree)]
    return np.max(leaves, axis=0)
