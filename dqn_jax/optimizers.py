"""Optimizers: what optax leaves to be chosen for programs as small as an update of a small network."""

from typing import Any

import chex
import jax
import optax

# Up to here parameters are joined. XLA's CPU backend shares the work of larger arrays among threads (seen at 70,000 numbers, not at
# 34,000), and compiles a shared concatenation so that each thread goes over its whole share for every joined piece, with masked-off reads
# far past the piece's end. A profile shows the time in those reads. Why it varies fifty-fold from run to run is not proven; a likely
# reason is that they are slow where they meet memory that is not mapped. Measured: an update of 3 x 512 units, batch 64, in 19 ms
# joined and 2.8 apart.
MAX_JOINED = 50_000


def join_small(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimizer on one vector of all parameters, where there are few of them.

    Each array that enters or leaves a small program, and each operation in it, costs more than its arithmetic. For parameters of more
    than ``MAX_JOINED`` numbers in all nothing changes.

    Args:
      optimizer: any transformation that does not tell one leaf of the parameters from another.

    Returns:
      An optax transformation; its state holds the vector in place of the tree, so a checkpoint fits only the same rule.
    """
    flat = optax.flatten(optimizer)

    def fitting(tree: chex.ArrayTree) -> optax.GradientTransformation:
        return flat if sum(leaf.size for leaf in jax.tree.leaves(tree)) <= MAX_JOINED else optimizer

    def init(params: chex.ArrayTree) -> Any:
        return fitting(params).init(params)

    def update(updates: chex.ArrayTree, state: Any, params: chex.ArrayTree | None = None) -> tuple[chex.ArrayTree, Any]:
        return fitting(updates).update(updates, state, params)

    return optax.GradientTransformation(init, update)


def clipped(optimizer: optax.GradientTransformation, max_norm: float | None) -> optax.GradientTransformation:
    """The optimizer behind a bound on the gradient's global norm, or none, on joined parameters where there are few (``join_small``)."""
    clip = optax.identity() if max_norm is None else optax.clip_by_global_norm(max_norm)
    return join_small(optax.chain(clip, optimizer))
