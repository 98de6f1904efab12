"""Independent agents, all at once: ``jax.vmap``, spread over the devices.

Seeds have nothing to tell one another, so each device takes a share of them and works by itself, with no word passed between devices.
On a CPU a device is a core, where ``dqn_jax.device_per_core`` has made it so: one core does all of a small program faster than several do
it together.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dqn_jax import footprint

AXIS = PartitionSpec("seeds")


def over_seeds(function: Callable[..., Any]) -> Callable[..., Any]:
    """``jax.vmap`` over the first axis of every argument, the lanes spread over the local devices.

    As many devices take part as divide the number of seeds: of two, both with 16 seeds, one with 5. With one device it is ``jax.vmap``.
    The results lie where they were computed; ``Result.seed`` brings one of them to the default device. What a seed learns may differ in
    the last bits with the number of seeds on its device, as it does under ``jax.vmap``. Arguments that somebody has put on other devices
    must be brought to these first: ``jax.device_put(tree, sharding(seeds))``. Inside of itself it is ``jax.vmap``.

    Args:
      function: of arrays without an axis for seeds, such as ``Training.run``.

    Returns:
      A function for ``jax.jit``: ``jax.jit(over_seeds(training.run))(keys)``.
    """
    lanes = jax.vmap(function)

    def spread(*args: Any) -> Any:
        where = sharding(_length(args))
        if where is None or not jax.sharding.get_abstract_mesh().empty:
            return lanes(*args)
        # What is equal on all devices is not looked for: nothing is, and the check refuses loops that begin with constants.
        return jax.shard_map(lanes, mesh=where.mesh, in_specs=AXIS, out_specs=AXIS, check_vma=False)(*args)

    return spread


def num_devices(seeds: int, present: int | None = None) -> int:
    """How many devices share so many seeds: the most that divide them. ``present`` is for asking before JAX has started."""
    present = len(footprint.devices()) if present is None else present
    return max(count for count in range(1, present + 1) if seeds % count == 0)


def num_in_one_memory(seeds: int) -> int:
    """How many of so many seeds lie in one memory: cores share theirs, other devices have each their own."""
    return seeds if footprint.devices()[0].platform == "cpu" else seeds // num_devices(seeds)


def sharding(seeds: int) -> NamedSharding | None:
    """How ``over_seeds`` lays arrays over the devices, or None where one device takes all."""
    count = num_devices(seeds)
    return None if count == 1 else NamedSharding(Mesh(np.array(footprint.devices()[:count]), ("seeds",)), AXIS)


def one_seed(stacked: Any, index: int) -> Any:
    """One seed of a pytree with a first axis for seeds; of a tree that lies on several devices, on the default one.

    Raises:
      IndexError: if there is no such seed.
    """
    seeds = _length(stacked)
    if not -seeds <= index < seeds:
        raise IndexError(f"there are {seeds} seeds, 0 to {seeds - 1}: there is no seed {index}")
    index %= seeds
    return jax.tree.map(lambda leaf: _pick(leaf, index), stacked)


def _pick(leaf: Any, index: int) -> Any:
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer) or len(leaf.sharding.device_set) == 1:
        return leaf[index]
    # To index an array that lies on several devices leaves the result on all of them, and whoever goes on with it computes on each.
    home = footprint.devices()[0]
    for shard in leaf.addressable_shards:
        begin, end, _ = shard.index[0].indices(leaf.shape[0])
        if begin <= index < end and shard.data.shape[1:] == leaf.shape[1:]:
            return jax.device_put(shard.data[index - begin], home)
    return jax.device_put(leaf[index], home)  # It is cut along other axes, too.


def _length(stacked: Any) -> int:
    return jax.tree.leaves(stacked)[0].shape[0]
