"""What prioritized replay costs, beside flashbax and cpprb: ``python -m dqn_jax.bench.replay [--repeats 7] [--out FILE.json]``.

* Microseconds for sampling a batch and writing its new priorities, from a full replay of transitions with observations of four
  float32: a hundred times inside one compiled program (how a compiled loop uses it), and as two calls from Python. Everybody delivers
  observation, action, reward, successor, end, weight (flashbax: probability) and index. flashbax and cpprb take part where they are
  installed, ``pip install flashbax cpprb``.
* Steps per second of the compiled loop, CartPole with a network of two layers of 64, with prioritized and with uniform replay.

Contenders take turns in one process, compilation is apart, medians and ranges are over the rounds.
"""

import dataclasses
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dqn_jax.bench import machine, report
from dqn_jax.envs import make
from dqn_jax.memory.prioritized import prioritized
from dqn_jax.memory.ring import ring
from dqn_jax.presets.dqn import dqn
from dqn_jax.training import train
from dqn_jax.types import Transition

ALPHA, BETA = 0.6, 0.4
CALLS = 100  # Samplings inside one compiled program, and in one round from Python.
CHUNK = 10_000  # Transitions added at once while filling.
Round = Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures what prioritized replay costs."""

    repeats: int = 7
    """Rounds, in which all contenders take turns."""
    capacities: tuple[int, ...] = (100_000, 1_000_000)
    """Transitions in the replay."""
    batch_sizes: tuple[int, ...] = (32, 256)
    """Transitions in a batch."""
    loop_steps: int = 100_000
    """Steps of each compiled loop; 0 leaves the loops out."""
    out: Path | None = None
    """A JSON file for everything measured."""


def chunk(random: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Observations (one more than the rest), actions, rewards and ends of CHUNK transitions."""
    return (
        random.normal(size=(CHUNK + 1, 4)).astype(np.float32),
        random.integers(2, size=CHUNK).astype(np.int32),
        random.normal(size=CHUNK).astype(np.float32),
        random.random(CHUNK) < 0.01,
    )


def ours(capacity: int, batch_size: int, priorities: np.ndarray) -> dict[str, Round]:
    """The ring with priorities."""
    random = np.random.default_rng(0)
    memory = prioritized(ring(capacity), batch_size, alpha=ALPHA, beta=BETA)

    def add_all(state: Any, rows: Transition) -> Any:
        return jax.lax.scan(lambda state, row: (memory.add(state, row), None), state, rows)[0]

    def rows() -> Transition:
        observation, action, reward, ended = chunk(random)
        row = Transition(observation[:-1], action, reward, 1 - ended.astype(np.float32), observation[1:], ended)
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[:, None], row)

    state = memory.init(jax.tree.map(lambda leaf: leaf[0], rows()))
    add = jax.jit(add_all, donate_argnums=0)
    for _ in range(capacity // CHUNK):
        state = add(state, rows())
    keys = jax.random.split(jax.random.key(0), CALLS)

    def step(state: Any, drawn: tuple[Any, Any]) -> tuple[Any, None]:
        noise, priority = drawn
        batch = memory.sample(state, noise)
        return memory.reweigh(state, batch.index, priority + 0.0 * _used(batch)), None

    def inside(state: Any, drawn: tuple[Any, Any]) -> Any:
        keys, priorities = drawn  # What all samplings draw is drawn at once, in the same program, as the compiled loop does.
        return jax.lax.scan(step, state, (jax.vmap(memory.noise)(keys), priorities))[0]

    def sample(state: Any, key: Any) -> Any:
        return memory.sample(state, memory.noise(key))

    return _jax_rounds(state, inside, (keys, jnp.asarray(priorities)), sample, lambda s, b, p: memory.reweigh(s, b.index, p))


def flashbax(capacity: int, batch_size: int, priorities: np.ndarray) -> dict[str, Round]:
    """flashbax's flat buffer with priorities."""
    import flashbax

    random = np.random.default_rng(0)
    buffer = flashbax.make_prioritised_flat_buffer(
        max_length=capacity,
        min_length=batch_size,
        sample_batch_size=batch_size,
        add_sequences=True,
        add_batch_size=1,
        priority_exponent=ALPHA,
        device=jax.default_backend(),
    )
    state = buffer.init({"o": jnp.zeros(4), "a": jnp.zeros((), jnp.int32), "r": jnp.zeros(()), "d": jnp.zeros(())})
    add = jax.jit(buffer.add, donate_argnums=0)
    for _ in range(capacity // CHUNK):
        observation, action, reward, ended = chunk(random)
        row = {"o": observation[:-1], "a": action, "r": reward, "d": ended.astype(np.float32)}
        state = add(state, jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], row))
    keys = jax.random.split(jax.random.key(0), CALLS)

    def step(state: Any, drawn: tuple[Any, Any]) -> tuple[Any, None]:
        key, priority = drawn
        batch = buffer.sample(state, key)
        used = _used((batch.experience, batch.probabilities))
        return buffer.set_priorities(state, batch.indices, priority + 0.0 * used), None

    def inside(state: Any, drawn: tuple[Any, Any]) -> Any:
        return jax.lax.scan(step, state, drawn)[0]

    def reweigh(state: Any, batch: Any, priority: Any) -> Any:
        return buffer.set_priorities(state, batch.indices, priority)

    return _jax_rounds(state, inside, (keys, jnp.asarray(priorities)), buffer.sample, reweigh)


def cpprb(capacity: int, batch_size: int, priorities: np.ndarray) -> dict[str, Round]:
    """cpprb's buffer in C++, called from Python."""
    from cpprb import PrioritizedReplayBuffer

    random = np.random.default_rng(0)
    fields = {"o": {"shape": 4}, "a": {"dtype": np.int32}, "r": {}, "n": {"shape": 4}, "d": {}}
    buffer = PrioritizedReplayBuffer(capacity, fields, alpha=ALPHA)
    for _ in range(capacity // CHUNK):
        observation, action, reward, ended = chunk(random)
        buffer.add(o=observation[:-1], a=action, r=reward, n=observation[1:], d=ended)

    def calls() -> None:
        for priority in priorities:
            batch = buffer.sample(batch_size, beta=BETA)
            buffer.update_priorities(batch["indexes"], priority)

    return {"from Python": calls}


CONTENDERS = {"ours": ours, "flashbax": flashbax, "cpprb": cpprb}


def _used(batch: Any) -> jax.Array:
    """A number that depends on everything in the batch, so that nothing of it is left uncomputed."""
    return jnp.asarray(sum(jnp.sum(leaf, dtype=jnp.float32) for leaf in jax.tree.leaves(batch)))


def _jax_rounds(state: Any, all_inside: Any, drawn: tuple[Any, Any], sample: Any, reweigh: Any) -> dict[str, Round]:
    """Both ways to use a buffer that is written in JAX."""
    cell = [state]
    compiled = jax.jit(all_inside, donate_argnums=0)
    sample_alone, reweigh_alone = jax.jit(sample), jax.jit(reweigh, donate_argnums=0)
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], drawn) for i in range(CALLS)]

    def inside() -> None:
        cell[0] = jax.block_until_ready(compiled(cell[0], drawn))

    def calls() -> None:
        for randomness, priority in each:
            cell[0] = reweigh_alone(cell[0], sample_alone(cell[0], randomness), priority)
        jax.block_until_ready(cell[0])

    return {"compiled": inside, "from Python": calls}


def measure_sampling(capacity: int, batch_size: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Microseconds of one sampling and writing back, for each contender and way to use it."""
    random = np.random.default_rng(1)
    priorities = (np.abs(random.normal(size=(CALLS, batch_size))) + 1e-2).astype(np.float32)
    rounds = {}
    for name, contender in CONTENDERS.items():
        if name == "ours" or importlib.util.find_spec(name):
            for way, one in contender(capacity, batch_size, priorities).items():
                rounds[f"{name}, {way}"] = one
    for one in rounds.values():  # Compilation, and priorities that differ.
        for _ in range(5):
            one()
    seconds: dict[str, list[float]] = {name: [] for name in rounds}
    for _ in range(repeats):
        for name, one in rounds.items():
            begin = time.perf_counter()
            for _ in range(5):
                one()
            seconds[name].append(time.perf_counter() - begin)
    return {name: report.spread([1e6 * s / (5 * CALLS) for s in values]) for name, values in seconds.items()}


def measure_loop(interval: int, steps: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Steps per second of the compiled loop with either replay, and the ratio of neighbours."""
    env = make("phys2d/CartPole-v1", polemass_length=0.05)
    runs: dict[str, Any] = {}
    for name in ("uniform", "prioritized"):
        options = {"batch_size": 64, "n_steps": 1, "update_interval": interval, "prioritized": name == "prioritized"}
        run = jax.jit(train(dqn(env, **options), env, num_steps=steps).run)
        runs[name] = run.lower(jax.random.key(0)).compile()
        jax.block_until_ready(runs[name](jax.random.key(0)))
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name, run in runs.items():
            begin = time.perf_counter()
            jax.block_until_ready(run(jax.random.key(repeat)))
            speeds[name].append(steps / (time.perf_counter() - begin))
    ratios = [plain / weighed for plain, weighed in zip(speeds["uniform"], speeds["prioritized"], strict=True)]
    return {**{name: report.spread(values) for name, values in speeds.items()}, "times as long as uniform": report.spread(ratios)}


def main() -> None:
    """Measures, prints tables, and writes everything to ``--out``."""
    options = report.options(Options, __doc__)
    everything: dict[str, Any] = {"machine": machine.describe(), "device": str(jax.devices()[0]), "sampling_us": {}, "loop": {}}
    for capacity in options.capacities:
        for batch_size in options.batch_sizes:
            measured = measure_sampling(capacity, batch_size, options.repeats)
            everything["sampling_us"][f"{capacity}, {batch_size}"] = measured
            report.show(f"microseconds a batch of {batch_size} from {capacity:,} transitions", measured)
    for interval in (4, 1) if options.loop_steps else ():
        measured = measure_loop(interval, options.loop_steps, options.repeats)
        everything["loop"][interval] = measured
        report.show(f"steps per second of the compiled loop, an update every {interval} steps", measured)
    if options.out is not None:
        options.out.write_text(json.dumps(everything, indent=2) + "\n")


if __name__ == "__main__":
    report.command(main)
