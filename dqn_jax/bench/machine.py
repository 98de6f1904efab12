"""What a timing needs to know of its surroundings: the clocks, the machine, and what everybody else is doing on it."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from typing import Any, NamedTuple

PACKAGES = (
    *("dqn_jax", "jax", "jaxlib", "flax", "optax", "numpy", "gymnasium"),
    *("torch", "stable-baselines3", "pfrl", "rejax", "flashbax", "cpprb"),
)


ASK_FOR_DEVICE = "import jax, json; d = jax.devices()[0]; print(json.dumps({'platform': d.platform, 'kind': d.device_kind}))"


class Moment(NamedTuple):
    """The clocks at one moment, in seconds.

    Attributes:
      wall: of the wall.
      own: CPU time of this process, all its threads.
      busy: CPU time of the whole machine, what a hypervisor stole included; None where the system does not tell.
    """

    wall: float
    own: float
    busy: float | None


def now() -> Moment:
    """Reads the clocks."""
    try:
        with open("/proc/stat") as stat:
            user, nice, system, _, _, irq, softirq, steal = (int(ticks) for ticks in stat.readline().split()[1:9])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    except OSError:
        busy = None
    return Moment(time.perf_counter(), time.process_time(), busy)


def timing(begin: Moment, end: Moment, steps: int) -> dict[str, Any]:
    """What happened between two moments in which ``steps`` environment steps were made.

    Returns:
      ``steps_per_second`` by the wall clock, ``cpu_us_per_step`` of this process, and ``others_cores``: cores used by everybody else
      (None where the system does not tell).
    """
    wall, own = end.wall - begin.wall, end.own - begin.own
    others = None if begin.busy is None or end.busy is None else max(0.0, (end.busy - begin.busy - own) / wall)
    return {"steps_per_second": steps / wall, "cpu_us_per_step": own / steps * 1e6, "others_cores": others}


def describe() -> dict[str, Any]:
    """The processor, the cores that this process may use, the memory, and the versions of what is measured."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": _first_value("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": _first_value("/proc/meminfo", "MemTotal"),
        "system": f"{sys.platform} {platform.release()}",
        "versions": versions,
    }


def find_device() -> dict[str, str]:
    """The ``platform`` and ``kind`` of the device on which JAX computes.

    A process of its own asks: JAX in this one would keep memory of an accelerator from the sections, and threads from their work.

    Raises:
      ChildProcessError: if JAX finds none.
    """
    done = subprocess.run([sys.executable, "-c", ASK_FOR_DEVICE], capture_output=True, text=True)
    if done.returncode:
        raise ChildProcessError(f"JAX finds no device to compute on: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _first_value(path: str, name: str) -> str | None:
    try:
        with open(path) as lines:
            return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)
    except OSError:
        return None
