"""What the members of DQN's family cost: an update of each inside a compiled loop, ``python -m dqn_jax.bench.family``.

A full update, sampling from a uniform replay of made-up transitions included (Rainbow's, too), at equal batch and with layers as wide;
what a piece adds to them, a second stream or an embedding, is part of its cost. Contenders take turns; compilation is apart; medians and
ranges are over the rounds.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces

from dqn_jax.bench import report
from dqn_jax.presets.dqn import dqn
from dqn_jax.presets.dqn_sets import RAINBOW_PRESETS
from dqn_jax.programs import compute_inline
from dqn_jax.types import Transition

DEFAULTS: dict[str, dict[str, Any]] = {
    "DQN": {},
    "dueling": {"dueling": True},
    "noisy": {"noisy": 0.5},
    "Munchausen": {"munchausen": 0.9},
    "C51": {"distribution": "c51"},
    "QR-DQN": {"distribution": "qrdqn"},
    "IQN": {"distribution": "iqn"},
    "Rainbow": {**RAINBOW_PRESETS["default"], "n_steps": 1, "prioritized": False},
}
PAPERS = {**DEFAULTS, "QR-DQN": {"distribution": "qrdqn", "num_quantiles": 200}, "IQN": {"distribution": "iqn", "num_quantiles": 64}}
ROWS = 512  # In the replay.


@dataclasses.dataclass(frozen=True)
class Work:
    """What is measured: observations, actions, batch, updates of one round, and options of each contender."""

    space: spaces.Box
    num_actions: int
    batch_size: int
    updates: int
    contenders: dict[str, dict[str, Any]]


VECTORS = spaces.Box(-1, 1, (4,), np.float32)
WORK = {
    "2 x 64, batch 64": Work(VECTORS, 2, 64, 400, DEFAULTS),
    "MinAtar, batch 32": Work(spaces.Box(0, 1, (10, 10, 4), np.uint8), 6, 32, 100, DEFAULTS),
    "Nature, batch 32, as many quantiles as in the papers": Work(spaces.Box(0, 255, (84, 84, 4), np.uint8), 6, 32, 4, PAPERS),
}
QUICK = {"2 x 64, batch 8": Work(VECTORS, 2, 8, 5, DEFAULTS)}


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures an update of each member of DQN's family."""

    repeats: int = 9
    """Rounds, in which all contenders take turns."""
    inline: bool = False
    """Compute on the one thread that asks (``dqn_jax.compute_inline``)."""
    quick: bool = False
    """One small batch and two rounds, to see that it runs: these numbers are no result."""
    out: Path | None = None
    """A JSON file for everything measured."""


def updates_of(work: Work, options: dict[str, Any]) -> Callable[[], Any]:
    """A function that makes ``work.updates`` updates of an agent with these options, as one program, on a full replay."""
    plain = {"n_steps": 1, "batch_size": work.batch_size, "capacity": ROWS, "replay_start_size": ROWS}
    agent = dqn((work.space, spaces.Discrete(work.num_actions)), **{**plain, **options})
    example = jnp.zeros((ROWS, *work.space.shape), work.space.dtype)

    def fill(key: jax.Array) -> Any:
        state = agent.init(key, example)  # One row of as many environments fills the replay.
        keys = jax.random.split(key, 4)
        seen, then = (jax.random.randint(one, example.shape, 0, int(work.space.high.max()) + 1) for one in keys[:2])
        reward, ends = jax.random.normal(keys[2], (ROWS,)), jax.random.bernoulli(keys[3], 0.1, (ROWS,))
        decision = agent.explore(state, example, agent.noise(state, 0, ROWS))[1]
        row = Transition(seen.astype(example.dtype), decision.action, reward, 1.0 - ends, then.astype(example.dtype), ends)
        return agent.observe(state, row)

    def loop(state: Any) -> Any:
        return jax.lax.fori_loop(0, work.updates, lambda _, state: agent.update(state, agent.draw(state, state.updates))[0], state)

    program = jax.jit(loop, donate_argnums=0)
    states = [jax.jit(fill)(jax.random.key(0))]

    def run() -> None:
        states[0] = jax.block_until_ready(program(states[0]))

    return run


def measure(work: Work, repeats: int) -> dict[str, dict[str, Any]]:
    """For each contender microseconds of an update, and how many times as long as plain DQN's."""
    rounds = {}
    for name, options in work.contenders.items():
        rounds[name] = updates_of(work, options)
        rounds[name]()  # Compiles.
        print(f"{name}: compiled", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in rounds}
    for turn in range(repeats):
        for name in [*rounds][:: -1 if turn % 2 else 1]:
            begin = time.perf_counter()
            rounds[name]()
            seconds[name].append((time.perf_counter() - begin) / work.updates)
    return {
        name: {
            "update_us": report.spread([1e6 * one for one in own]),
            "times_as_long": report.spread([one / plain for one, plain in zip(own, seconds["DQN"], strict=True)]),
        }
        for name, own in seconds.items()
    }


def show(title: str, result: dict[str, dict[str, Any]]) -> None:
    """Prints a table of what ``measure`` found."""
    rows = [(name, report.ranged(one["update_us"], ",.0f"), report.ranged(one["times_as_long"], ".2f")) for name, one in result.items()]
    report.table(title, ("agent", "us of an update", "times as long as DQN"), rows)


def main() -> None:
    """Measures, prints a table for each work, and writes everything to ``--out``."""
    options = report.options(Options, __doc__)
    if options.inline:
        compute_inline()
    everything: dict[str, Any] = {"device": str(jax.devices()[0]), "inline": options.inline, "agents": {}}
    for name, work in (QUICK if options.quick else WORK).items():
        everything["agents"][name] = measured = measure(work, 2 if options.quick else options.repeats)
        show(f"DQN's family, {name}", measured)
    report.write(options.out, everything)


if __name__ == "__main__":
    report.command(main)
