"""What a state takes in memory, and whether the device has it: to be asked before anything is allocated. What the process took."""

import math
import os
import sys
from pathlib import Path
from typing import Any

import jax

# Linux: what this process's container may use, in the two versions of control groups.
CONTAINER_LIMITS = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")


def num_bytes(shapes: Any) -> int:
    """The bytes of a pytree of arrays or shapes; of random keys, which are few, none."""
    leaves = [leaf for leaf in jax.tree.leaves(shapes) if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def require_room(shapes: Any, copies: int = 1) -> None:
    """Raises MemoryError, in bytes, if a state of these shapes is larger than the memory of the device.

    Without it a large replay fails late: Linux promises memory that it does not have, and ends the process when the replay fills up.

    Args:
      shapes: the state, as ``jax.eval_shape`` gives it.
      copies: how many of them there will be.
    """
    needed, present = copies * num_bytes(shapes), device_bytes()
    if present is not None and needed > present:
        raise MemoryError(
            f"{needed:,} bytes are needed ({needed / 1e9:.1f} GB for {copies} agent(s)), nearly all of it for the replay, and "
            f"{devices()[0]} has {present:,} ({present / 1e9:.1f} GB): lower capacity, or, for images, keep each once with the option "
            "frames"
        )


def device_bytes() -> int | None:
    """The memory that arrays may take on the default device, in bytes, or None where the system does not say."""
    device = devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    try:
        present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Not on Windows.
        return None
    for path in CONTAINER_LIMITS:
        try:
            present = min(present, int(path.read_text()))
        except (OSError, ValueError):  # No such file, or the word "max".
            continue
    return present


def peak_bytes() -> int:
    """The most memory that this process has held, in bytes, shared libraries included."""
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError):
        # Second choice: on Linux this begins at the mark of the process that started this one.
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak  # Bytes there, kilobytes elsewhere.


def devices() -> list[jax.Device]:
    """The devices of this process that compute where nobody says otherwise; arrays are made on the first."""
    chosen: Any = getattr(jax.config, "jax_default_device")  # noqa: B009 (its type stubs do not know it)
    return [chosen] if isinstance(chosen, jax.Device) else jax.local_devices(backend=chosen)
