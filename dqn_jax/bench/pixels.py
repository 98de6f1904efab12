"""What an update of a convolutional network costs inside a compiled loop and outside it: ``python -m dqn_jax.bench.pixels``.

A full DQN update (three forward passes, one backward, Adam) on a given batch of images: many in one ``lax.scan``, as a compiled loop has
them, and one for each call, as a host loop has them. ``flax.linen.Conv`` stands beside ours: inside a loop on CPU it is several times
slower (jax-ml/jax#12868). Contenders take turns, compilation is apart, medians and ranges are over the rounds.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dqn_jax.algorithms.dqn import dqn
from dqn_jax.bench import report
from dqn_jax.bench.compiled_loops import FlaxQNetwork
from dqn_jax.networks import MINATAR, NATURE, ConvQNetwork
from dqn_jax.optimizers import join_small
from dqn_jax.programs import compute_inline
from dqn_jax.types import Batch, Transition

WORK = {
    "MinAtar, batch 32": (MINATAR, (128,), (10, 10, 4), 32, 100),
    "MinAtar, batch 128": (MINATAR, (128,), (10, 10, 4), 128, 30),
    "Nature, batch 32": (NATURE, (512,), (84, 84, 4), 32, 5),
}
QUICK = {"MinAtar, batch 8": (MINATAR, (128,), (10, 10, 4), 8, 5)}


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures updates of convolutional networks."""

    repeats: int = 9
    """Rounds, in which all contenders take turns."""
    inline: bool = False
    """Compute on the one thread that asks, as ``dqn-jax train`` does for small networks (``dqn_jax.compute_inline``)."""
    quick: bool = False
    """One small batch and two rounds, to see that it runs: these numbers are no result."""
    out: Path | None = None
    """A JSON file for everything measured."""


def contenders(convolutions: Any, hidden: Any, shape: tuple[int, ...], batch_size: int, updates: int) -> dict[str, Callable[[], Any]]:
    """For each network and place a function that makes that many updates."""
    keys = jax.random.split(jax.random.key(0), 3)
    images = jax.random.uniform(keys[0], (2, batch_size, *shape))
    action = jax.random.randint(keys[1], (batch_size,), 0, 6)
    ones = jnp.ones(batch_size)
    batch = Batch(Transition(images[0], action, jax.random.normal(keys[2], (batch_size,)), 0.99 * ones, images[1], ones > 2))
    networks = {
        "ours": ConvQNetwork(6, convolutions, hidden, lambda x: x),
        "flax.linen.Conv": FlaxQNetwork(6, convolutions, hidden, lambda x: x),
    }
    rounds: dict[str, Callable[[], Any]] = {}
    for name, network in networks.items():
        algorithm = dqn(network, join_small(optax.adam(1e-4)), epsilon=0.1)
        learner = jax.jit(algorithm.init)(jax.random.key(0), images[0])

        def update(learner: Any, batch: Batch, learn: Any = algorithm.learn) -> Any:
            return learn(learner, batch, jax.random.key(0), learner.step + 4)[0]

        one = jax.jit(update)
        loop = jax.jit(lambda learner, batch, update=update: jax.lax.fori_loop(0, updates, lambda _, state: update(state, batch), learner))

        def outside(learner: Any = learner, one: Any = one) -> None:
            for _ in range(updates):
                learner = one(learner, batch)
            jax.block_until_ready(learner)

        def inside(learner: Any = learner, loop: Any = loop) -> None:
            jax.block_until_ready(loop(learner, batch))

        rounds[f"{name}, inside a loop"], rounds[f"{name}, a call each"] = inside, outside
    return rounds


def measure(work: Any, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of one update, for each contender; ``work`` is as in WORK."""
    updates = work[-1]
    rounds = contenders(*work)
    for one in rounds.values():
        one()  # Compiles.
    milliseconds: dict[str, list[float]] = {contender: [] for contender in rounds}
    for _ in range(repeats):
        for contender, one in rounds.items():
            begin = time.perf_counter()
            one()
            milliseconds[contender].append(1e3 * (time.perf_counter() - begin) / updates)
    return {contender: report.spread(ms) for contender, ms in milliseconds.items()}


def main() -> None:
    """Measures, prints a table, and writes everything to ``--out``."""
    options = report.options(Options, __doc__)
    if options.inline:
        compute_inline()
    everything: dict[str, Any] = {"device": str(jax.devices()[0]), "update_ms": {}}
    for name, work in (QUICK if options.quick else WORK).items():
        everything["update_ms"][name] = measured = measure(work, 2 if options.quick else options.repeats)
        report.show(f"milliseconds of one update, {name}", measured)
    report.write(options.out, everything)


if __name__ == "__main__":
    report.command(main)
