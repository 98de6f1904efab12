"""What curiosity costs: PPO's compiled loop on DeepSea without it and with each kind of it, ``python -m dqn_jax.bench.curiosity``.

Contenders take turns; compilation is apart; medians and ranges are over the rounds. The share of seeds that came to know the treasure's
way stands beside, to show that what is timed explores.
"""

import dataclasses
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dqn_jax.bench import report
from dqn_jax.envs import make
from dqn_jax.presets.ppo import PPO_PRESETS, ppo
from dqn_jax.programs import compute_inline
from dqn_jax.seeds import over_seeds
from dqn_jax.training import train

KINDS = ("off", "rnd", "snd-v", "snd-std", "snd-vic")
SIZE, NUM_ENVS, EPISODES = 10, 64, 2_048
FOUND = 0.5  # A mean return beyond this is that of a policy that goes for the treasure.


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures what curiosity adds to PPO's compiled loop on DeepSea."""

    repeats: int = 5
    """Rounds, in which all kinds take turns."""
    seeds: int = 4
    """Seeds trained at once."""
    inline: bool = False
    """Compute on the one thread that asks (``dqn_jax.compute_inline``)."""
    quick: bool = False
    """Little work, to see that it runs: these numbers are no result."""
    out: Path | None = None
    """A JSON file for everything measured."""


def measure(repeats: int, seeds: int, episodes: int) -> dict[str, Any]:
    """For each kind, "off" first: steps per second of all seeds together, seconds of compilation, how many times as long as without
    curiosity a step takes, and the share of the trained agents that found the treasure.
    """
    env = make("gymnax/DeepSea-bsuite", size=SIZE, action_seed=1)
    steps = episodes * SIZE
    keys = jax.random.split(jax.random.key(0), (repeats + 1, seeds))
    programs: dict[str, Any] = {}
    result: dict[str, dict[str, Any]] = {}
    jax.jit(lambda x: x + 1)(0)  # The first compilation of a process also sets up the compiler.
    for kind in KINDS:
        agent = ppo(env, **{**PPO_PRESETS["deepsea"], "curiosity": kind, "rollout_length": SIZE, "batch_size": SIZE * NUM_ENVS // 4})
        training = train(agent, env, num_steps=steps, num_envs=NUM_ENVS, history_length=8)
        loop = over_seeds(lambda key, training=training: training.run(key).history["return"][-1])
        begin = time.perf_counter()
        programs[kind] = jax.jit(loop).lower(keys[0]).compile()
        result[kind] = {"compile_seconds": time.perf_counter() - begin, "speeds": [], "returns": []}
        print(f"{kind}: compiled", flush=True)
        jax.block_until_ready(programs[kind](keys[0]))  # The first call of a program also allocates: it is not timed.
    for turn in range(repeats):
        for kind in KINDS[:: -1 if turn % 2 else 1]:
            begin = time.perf_counter()
            returns = jax.block_until_ready(programs[kind](keys[turn + 1]))
            result[kind]["speeds"].append(seeds * steps / (time.perf_counter() - begin))
            result[kind]["returns"] += np.asarray(returns).tolist()
    for one in result.values():
        one["times_as_long"] = report.spread([plain / own for plain, own in zip(result["off"]["speeds"], one["speeds"], strict=True)])
        one["found"] = float(np.mean(np.asarray(one["returns"]) > FOUND))
    return result


def show(result: dict[str, Any], seeds: int, episodes: int) -> None:
    """Prints a table of what ``measure`` found."""
    rows = []
    for kind, one in result.items():
        speed, cost = report.ranged(report.spread(one["speeds"]), ",.0f"), report.ranged(one["times_as_long"], ".2f")
        found = f"{one['found'] * len(one['returns']):.0f} of {len(one['returns'])}"
        rows.append((kind, speed, f"{one['compile_seconds']:.1f}", cost, found))
    title = f"PPO on DeepSea of size {SIZE}, {NUM_ENVS} environments, {seeds} seed{'s'[: seeds > 1]}, {episodes:,} episodes each"
    report.table(title, ("curiosity", "steps/s", "compile s", "times as long as off", "found the treasure"), rows)


def main() -> None:
    """Measures, prints a table, and writes everything to ``--out``."""
    options = report.options(Options, __doc__)
    if importlib.util.find_spec("gymnax") is None:
        print("curiosity is skipped: it plays gymnax's DeepSea, and gymnax is not installed (pip install 'dqn_jax[gymnax]')")
        report.write(options.out, {"skipped": "gymnax is not installed"})
        return
    if options.repeats < 1 or options.seeds < 1:
        sys.exit(f"--repeats and --seeds must be at least 1, got {options.repeats} and {options.seeds}")
    if options.inline:
        compute_inline()
    repeats, seeds, episodes = (2, 1, NUM_ENVS * 8) if options.quick else (options.repeats, options.seeds, EPISODES)
    result = measure(repeats, seeds, episodes)
    show(result, seeds, episodes)
    report.write(options.out, {"device": str(jax.devices()[0]), "inline": options.inline, "kinds": result})


if __name__ == "__main__":
    report.command(main)
