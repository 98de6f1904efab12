"""Does an agent that trains for hours stay as it began? ``python -m dqn_jax.bench.soak --minutes 60``.

A DQN is stepped through CartPole by ``act_and_train`` as a user would, asked for its statistics now and then, and looked at once a minute:
the memory of the process, the live arrays, the time of a step. Leaks and slowdowns show as slopes over the minutes, the first few of
which, while the replay fills and the allocator settles, are left out. The time of a step is also given in seconds of the processor, which
other programs on the machine disturb less.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import jax
import numpy as np

from dqn_jax.bench import report
from dqn_jax.presets.dqn import DQN
from dqn_jax.programs import compute_inline

SETTLING = 5  # Samples that are left out: meanwhile the replay fills.
MB_PER_HOUR, MORE_ARRAYS, TIME_PER_HOUR = 5.0, 10, 0.05  # More than this is called a leak, and a slowdown by more than this share.
ASKED_EVERY = 10_000  # Steps between two questions for the statistics.


@dataclasses.dataclass(frozen=True)
class Options:
    """Trains for a long time and looks whether memory and latency stay flat."""

    minutes: float = 60.0
    """How long."""
    every: float = 60.0
    """Seconds of a sample."""
    quick: bool = False
    """Twelve samples of a third of a second, to see that it runs: these numbers are no result."""
    out: Path | None = None
    """A JSON file for everything measured."""


def resident_bytes() -> int:
    """What this process holds in memory now; Linux only."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def steps(agent: Any, env: gymnasium.Env) -> Iterator[float]:
    """Trains for ever; yields the seconds that the agent took for each step, without the environment's."""
    number = 0
    while True:
        observation, _ = env.reset(seed=number)
        reward, ended = 0.0, False
        while not ended:
            begin = time.perf_counter()
            action = agent.act_and_train(observation, reward)
            seconds = time.perf_counter() - begin
            observation, paid, terminated, truncated, _ = env.step(action)
            reward, ended = float(paid), terminated or truncated
            number += 1
            if number % ASKED_EVERY == 0:
                agent.get_statistics()
            yield seconds
        agent.stop_episode_and_train(observation, reward, terminated=terminated)


def sample(loop: Iterator[float], seconds: float) -> dict[str, float]:
    """Steps for so long; what was seen."""
    begin, processor, taken = time.perf_counter(), time.process_time(), []
    while time.perf_counter() - begin < seconds:
        taken.append(next(loop))
    p50, p99 = 1e6 * np.percentile(taken, (50, 99))
    return {
        "steps": len(taken),
        "resident_mb": resident_bytes() / 1e6,
        "arrays": len(jax.live_arrays()),
        "p50_us": float(p50),
        "p99_us": float(p99),
        "processor_us": 1e6 * (time.process_time() - processor) / len(taken),
    }


def slope(values: list[float]) -> float:
    """The growth from one value to the next, by least squares."""
    return float(np.polyfit(np.arange(len(values)), values, 1)[0])


def judge(samples: list[dict[str, float]], every: float) -> dict[str, Any]:
    """What the samples say once they have settled.

    Args:
      samples: as ``sample`` gives them, in order.
      every: seconds from one to the next.

    Returns:
      ``mb_per_hour``, ``mb_range`` (highest less lowest), ``time_per_hour`` (growth of the processor's time for a step, as a share of its
      median), ``arrays`` (fewest and most alive), and ``leaks`` and ``slows``: what is more than ``MB_PER_HOUR`` or ``MORE_ARRAYS``,
      and ``TIME_PER_HOUR``.

    Raises:
      ValueError: if fewer than three samples are left.
    """
    settled = samples[SETTLING:]
    if len(settled) < 3:
        raise ValueError(f"got {len(samples)} samples, and {SETTLING} are left out: measure for longer")
    resident, arrays = [one["resident_mb"] for one in settled], [one["arrays"] for one in settled]
    processor = [one["processor_us"] for one in settled]
    growth, slowdown = (3600 / every * slope(values) for values in (resident, processor))
    return {
        "mb_per_hour": growth,
        "mb_range": max(resident) - min(resident),
        "time_per_hour": slowdown / float(np.median(processor)),
        "arrays": [min(arrays), max(arrays)],
        "leaks": growth > MB_PER_HOUR or max(arrays) - min(arrays) > MORE_ARRAYS,
        "slows": slowdown > TIME_PER_HOUR * float(np.median(processor)),
    }


def main() -> None:
    """Trains, prints a line for each sample and a verdict, and writes everything to ``--out``. Exits with 1 where something grows."""
    options = report.options(Options, __doc__)
    seconds, count = (1 / 3, 12) if options.quick else (options.every, round(60 * options.minutes / options.every))
    compute_inline()
    env = gymnasium.make("CartPole-v1")
    agent = DQN(env)
    agent.compile()
    loop, samples = steps(agent, env), []
    print("  hour     steps  resident MB  arrays  p50 us  p99 us  processor us a step")
    for number in range(count):
        samples.append(one := sample(loop, seconds))
        print(
            f"{(number + 1) * seconds / 3600:6.2f} {one['steps']:9,} {one['resident_mb']:12,.1f} {one['arrays']:7} {one['p50_us']:7.1f} "
            f"{one['p99_us']:7.1f} {one['processor_us']:9.1f}",
            flush=True,
        )
    verdict = judge(samples, seconds)
    statistics = agent.get_statistics()
    print(
        f"{statistics['t']:,} steps, {statistics['n_updates']:,} updates: memory grows by {verdict['mb_per_hour']:.2f} MB an hour (range "
        f"{verdict['mb_range']:.2f} MB, arrays {verdict['arrays'][0]} to {verdict['arrays'][1]}), the time of a step by "
        f"{100 * verdict['time_per_hour']:.1f} % an hour"
    )
    report.write(options.out, {"samples": samples, "verdict": verdict, "statistics": statistics})
    if not options.quick and (verdict["leaks"] or verdict["slows"]):
        sys.exit("something grows")


if __name__ == "__main__":
    report.command(main)
