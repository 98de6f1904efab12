"""How far one update is from what the device could do: ``python -m dqn_jax.bench.roofline [--inline] [--out FILE.json]``.

A compiled update counts so many floating point operations and so many bytes read and written; the device does so many of each in a
second. The larger of the two times is the limit, and what an update takes above it is overhead: starting the program and its many small
steps, matrices too small to be multiplied at full rate, random rows of the replay.

* The device's rates are measured, with the same threads: of float32 matrix products at JAX's default precision, as the update has them,
  and of ``a x + y`` over arrays too large for any cache.
* XLA counts the operations and the bytes of the compiled program. It counts what every step of it reads and writes, most of which stays
  in caches: for small networks the time of the traffic is too high, and an update may even be faster than it.
* The operations of the matrix products are counted by hand as well, and stand in where the backend does not tell.
* The same update is also timed inside a compiled loop, where nobody has to start a program for it; of that loop an accelerator's profile
  tells how many kernels an update is, how long they run, and which of them the longest.
"""

import dataclasses
import functools
import gzip
import json
import math
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dqn_jax import spaces
from dqn_jax.bench import report
from dqn_jax.bench.latency import (
    BUDGET,
    CALLS,
    QUICK,
    SHAPES,
    Contender,
    Shape,
    bare_update,
    fill,
    make_agent,
    observation_space,
    time_in_turns,
)
from dqn_jax.programs import compute_inline
from dqn_jax.types import Agent, AgentState

DOUBLE = True  # The preset's: Double DQN values the successors twice.
LOOPED = 100  # Updates in one program.
LONGEST = 5  # Kernels that are named.


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures how far one update is from what the device could do."""

    inline: bool = False
    """Compute on the one thread that asks (``dqn_jax.compute_inline``)."""
    quick: bool = False
    """A little of everything: the small network, small arrays. These numbers are no result."""
    out: Path | None = None
    """A JSON file for everything measured."""


def multiply_adds(shape: Shape) -> list[int]:
    """The multiplications, an addition with each, of every layer for one observation: matrix products and convolutions alone."""
    counts = []
    width = math.prod(shape.observation)
    if shape.convolutions:
        height, breadth, channels = shape.observation
        for filters, size, stride in shape.convolutions:
            height, breadth = (height - size) // stride + 1, (breadth - size) // stride + 1
            counts.append(height * breadth * filters * size * size * channels)
            channels = filters
        width = height * breadth * channels
    for features in (*shape.hidden, shape.num_actions):
        counts.append(width * features)
        width = features
    return counts


def update_flops(shape: Shape, batch_size: int, double: bool = DOUBLE) -> int:
    """Floating point operations of the matrix products in one DQN update.

    Forward: the observations, and the successors once or, for Double DQN, twice. Backward: each product of the observations' pass twice,
    for the weights and for the layer's input; but nobody asks for the gradient of the observations.
    """
    layers = multiply_adds(shape)
    return 2 * batch_size * ((3 if double else 2) * sum(layers) + 2 * sum(layers) - layers[0])


def best_seconds(call: Callable[[], Any], repeats: int) -> float:
    """The shortest of several calls, compiled before; each blocks until its results are ready."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def measure_peaks(quick: bool = False) -> dict[str, float]:
    """What the device does in a second: ``flops`` of float32 matrix products, and ``bytes`` read and written.

    Args:
      quick: with arrays too small for a true figure.
    """
    is_cpu, repeats = jax.default_backend() == "cpu", 3 if quick else 10
    n = 256 if quick else 1024 if is_cpu else 8192
    length = 1 << (20 if quick else 25 if is_cpu else 28)
    a = jax.random.normal(jax.random.key(0), (n, n))
    multiply = jax.jit(lambda a: a @ a)
    flops = 2 * n**3 / best_seconds(lambda: multiply(a), repeats)
    x, cell = jnp.ones(length), [jnp.ones(length)]
    add = jax.jit(lambda x, y: 0.5 * x + y, donate_argnums=1)

    def stream() -> Any:
        cell[0] = add(x, cell[0])
        return cell[0]

    return {"flops": flops, "bytes": 3 * 4 * length / best_seconds(stream, repeats)}


def measure_update(shape: Shape, batch_size: int, calls: int, budget: float) -> dict[str, Any]:
    """One update from a full uniform replay: its counts, and its time.

    Returns:
      ``update_us`` percentiles; ``looped_us``, the least inside a loop; ``kernels`` as the function of that name gives them;
      ``flops_by_hand``; ``flops`` and ``bytes`` as ``counts_by_xla`` gives them.
    """
    agent = make_agent(shape, batch_size, prioritized=False)
    timed = time_in_turns([Contender(bare_update(agent, fill(agent, shape)), ("update",))], calls, budget)
    loop, number = updates_in_a_loop(agent.agent, fill(agent, shape)), min(LOOPED, calls)
    looped = {"looped_us": 1e6 * best_seconds(lambda: loop(number), 3) / number, "kernels": kernels(lambda: loop(number), number)}
    return {"update_us": timed["update"], **looped, "flops_by_hand": update_flops(shape, batch_size), **counts_by_xla(shape, batch_size)}


def updates_in_a_loop(agent: Agent, state: AgentState) -> Callable[[int], Any]:
    """From their number to updates in one program, their random numbers drawn in it at once; ``state`` is used up."""

    @functools.partial(jax.jit, static_argnums=1, donate_argnums=0)
    def run(state: AgentState, number: int) -> Any:
        drawn = jax.vmap(lambda counter: agent.draw(state, counter))(state.updates + jnp.arange(number))
        return jax.lax.scan(agent.update, state, drawn)

    cell = [state]

    def call(number: int) -> Any:
        cell[0], metrics = run(cell[0], number)
        return metrics

    return call


def kernels(call: Callable[[], Any], number: int) -> dict[str, Any] | None:
    """What an accelerator executes during a call, by JAX's profiler.

    Args:
      call: compiled before.
      number: of updates that it makes.

    Returns:
      For one update ``count``, kernels and copies; ``busy_us``, what they take together; and ``longest``, the names of those that take
      most with their us. None where the profile tells of no device, and on a CPU.
    """
    if jax.default_backend() == "cpu":
        return None
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            jax.block_until_ready(call())
        (path,) = Path(folder).rglob("perfetto_trace.json.gz")
        return summarize_trace(json.loads(gzip.decompress(path.read_bytes()))["traceEvents"], number)


def summarize_trace(events: list[dict[str, Any]], number: int) -> dict[str, Any] | None:
    """From the events of a trace, in Chrome's format, and the number of updates in it to what ``kernels`` gives."""
    names = {(event["pid"], event.get("tid"), event["name"]): event["args"].get("name", "") for event in events if event.get("ph") == "M"}
    devices = {pid for (pid, _, what), name in names.items() if what == "process_name" and "/device:" in name and "CPU" not in name}
    # A stream is what runs; other lines of the profile sum up the same time by operation or program.
    streams = {(pid, tid) for (pid, tid, what), name in names.items() if what == "thread_name" and pid in devices and "Stream" in name}
    ran = [event for event in events if event.get("ph") == "X" and (event["pid"], event.get("tid")) in streams]
    if not ran:
        return None
    by_name: dict[str, float] = {}
    for event in ran:
        name = re.sub(r"[_.]\d+$", "", event["name"])
        by_name[name] = by_name.get(name, 0.0) + event["dur"] / number
    longest = sorted(by_name.items(), key=lambda item: -item[1])[:LONGEST]
    return {"count": len(ran) / number, "busy_us": sum(by_name.values()), "longest": dict(longest)}


def counts_by_xla(shape: Shape, batch_size: int) -> dict[str, float | None]:
    """``flops`` and ``bytes`` of the compiled update as XLA counts them, None where it does not tell.

    It counts each lookup of rows as if the whole replay was read. So the bytes are those of a replay without size, on the line through the
    counts for two sizes.
    """
    small, large = (_cost_analysis(shape._replace(capacity=capacity), batch_size) for capacity in (4096, 8192))
    bytes_known = "bytes accessed" in small
    return {"flops": small.get("flops"), "bytes": 2 * small["bytes accessed"] - large["bytes accessed"] if bytes_known else None}


def _cost_analysis(shape: Shape, batch_size: int) -> dict[str, float]:
    agent = make_agent(shape, batch_size, prioritized=False).agent
    state = jax.eval_shape(agent.init, jax.random.key(0), spaces.example(observation_space(shape), 1))
    drawn = jax.eval_shape(agent.draw, state, state.updates)
    told: Any = jax.jit(agent.update, donate_argnums=0).lower(state, drawn).compile().cost_analysis()
    return told or {}


def against(peaks: dict[str, float], update: dict[str, Any]) -> dict[str, Any]:
    """How long the parts of an update would take alone at these rates.

    Returns:
      ``arithmetic_us``; ``traffic_us``, None where the bytes are unknown; ``share``: the larger of them over the update's median.
    """
    flops = update["flops_by_hand"] if update["flops"] is None else update["flops"]
    arithmetic = 1e6 * flops / peaks["flops"]
    traffic = None if update["bytes"] is None else 1e6 * update["bytes"] / peaks["bytes"]
    return {"arithmetic_us": arithmetic, "traffic_us": traffic, "share": max(arithmetic, traffic or 0.0) / update["update_us"]["p50"]}


def measure(quick: bool = False) -> dict[str, Any]:
    """Peaks and updates.

    Args:
      quick: a little of everything.

    Returns:
      ``device``; ``peaks`` as ``measure_peaks`` gives them; ``updates``: for each network and batch size what ``measure_update`` and
      ``against`` give.
    """
    peaks = measure_peaks(quick)
    calls, budget = (40, 0.5) if quick else (CALLS, BUDGET)
    updates = {}
    for name, shape in (QUICK if quick else SHAPES).items():
        for batch_size in shape.batch_sizes:
            update = measure_update(shape, batch_size, calls, budget)
            updates[f"{name}, batch {batch_size}"] = update | against(peaks, update)
    return {"device": str(jax.devices()[0]), "peaks": peaks, "updates": updates}


def show(measured: dict[str, Any]) -> None:
    """Prints what ``measure`` gives."""
    peaks = measured["peaks"]
    print(
        f"\none update on {measured['device']}: {peaks['flops'] / 1e9:,.0f} GFLOP/s and {peaks['bytes'] / 1e9:,.1f} GB/s were measured here"
    )
    for name, update in measured["updates"].items():
        traffic = "unknown (the backend does not count bytes)" if update["traffic_us"] is None else f"{update['traffic_us']:,.0f} us"
        by = "counted by hand" if update["flops"] is None else f"{update['flops'] / update['flops_by_hand']:.2f} times the count by hand"
        print(
            f"  {name}: update {update['update_us']['p50']:,.0f} us; arithmetic alone would take {update['arithmetic_us']:,.0f} us ({by}), "
            f"memory traffic {traffic}; {100 * update['share']:.0f} % of the limit; in a loop {update['looped_us']:,.0f} us",
            flush=True,
        )
        if ran := update["kernels"]:
            longest = ", ".join(f"{kernel} {us:.1f}" for kernel, us in ran["longest"].items())
            print(f"    in the loop {ran['count']:.1f} kernels and copies, {ran['busy_us']:.1f} us together: {longest}", flush=True)


def main() -> None:
    """Measures, prints a line for each network, and writes everything to ``--out``."""
    options = report.options(Options, __doc__)
    if options.inline:
        compute_inline()
    report.run(measure, show, options.quick, options.out, inline=options.inline)


if __name__ == "__main__":
    report.command(main)
