"""How fast the loops are, on the same work in one interleaved run: ``python -m dqn_jax.bench.loops [--repeats 5] [--out FILE.json]``.

The work is DQN on CartPole-v1, in the slide deck's setting by those who can do it and with a network of two layers of 64 by all (``DECK``
and ``PLAIN`` in ``settings.py``; ``host_loops.py``, ``compiled_loops.py``, ``torch_loops.py``, ``peers.py`` and ``libtorch.py`` hold the
loops):

* host loops, a Gymnasium environment stepped from Python: steps per second between step 2,000 and step 12,000, so without imports,
  compilation and random warm-up; and between step 20,000 and step 30,000, where the network chooses nearly every action: a loop that
  asks it only then is faster before;
* compiled loops, the environment included, one seed and 16 and 128 seeds at once: total steps per second of the whole run, compiled
  before.

Contenders on JAX are measured with JAX as it comes, and inline, on the one thread that asks (``dqn_jax.compute_inline``). Many seeds run
by ``jax.vmap``, and once more spread over the cores (``dqn_jax.device_per_core`` and ``dqn_jax.over_seeds``); the loops of others do not
do that by themselves, so their lines that say so show what they would gain from it.
Each measurement is a process of its own, and the contenders take turns. A measurement during which other programs used more than a
tenth of a core is marked and left out where a quiet one exists. All contenders must make the same number of updates, or the run fails.
What was timed also has to learn: the greedy return over 20 episodes of the compiled runs themselves, and of one longer run of each host
loop, stands beside the speed; one seed of it shows that a loop learns and ranks nobody. What a contender does otherwise than the setting
says is in the JSON file, under ``differences``.
"""

import dataclasses
import importlib.util
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dqn_jax.bench import libtorch, machine, peers, report, torch_loops
from dqn_jax.bench.one_loop import COMPILED, HOST, INLINE, LIBTORCH, SPREAD, Work, without_way
from dqn_jax.bench.settings import DECK, PLAIN, Setting

QUIET = 0.1  # Cores that other programs may use during a measurement.
CONTENDERS = tuple(dict.fromkeys([*HOST, LIBTORCH, *COMPILED]))
NEEDS = {**torch_loops.NEEDS, "cleanrl-style": "stable_baselines3", "rejax": "rejax"}  # Contenders that need a package, and which.
N_STEPS, DOUBLE = "n-step returns", "Double DQN"
LACKS = {
    "cleanrl-style": (N_STEPS, DOUBLE),
    "numpy-replay": (N_STEPS, DOUBLE),
    "sb3": (DOUBLE,),
    "purejaxrl-style": (N_STEPS, DOUBLE),
    "rejax": (N_STEPS,),
}  # What contenders cannot do.
ONE_SEED = ("rejax",)  # Its sampler walks the whole replay of each seed at every update: minutes a run with many.
ON_TORCH = (*torch_loops.LOOPS, LIBTORCH)


FULL = (
    Work("host", DECK.interval, 12_000, deck=True),
    Work("host", 4, 12_000),
    Work("host", 1, 12_000),
    Work("host", 4, 30_000, begin=20_000),
    Work("host", 1, 30_000, begin=20_000),
    Work("compiled", 4, 100_000),
    Work("compiled", 1, 50_000),
    Work("compiled", 4, 20_000, 16),
    Work("compiled", 1, 10_000, 16),
    Work("compiled", 4, 10_000, 128),
    Work("compiled", 1, 5_000, 128),
)
SHORT = (
    Work("host", DECK.interval, 4_000, deck=True),
    Work("host", 4, 4_000),
    Work("host", 1, 4_000),
    Work("compiled", 4, 5_000),
    Work("compiled", 1, 5_000),
    Work("compiled", 4, 1_500, 128),
    Work("compiled", 1, 1_500, 128),
)
HOST_LEARNING_STEPS = 50_000


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures how fast the loops are, beside other ways to write them."""

    repeats: int = 5
    """Measurements of each contender on each piece of work."""
    out: Path | None = None
    """A JSON file for everything measured."""
    kinds: tuple[Literal["host", "compiled"], ...] = ("host", "compiled")
    """Which loops to measure."""
    only: tuple[str, ...] = ()
    """Names of contenders to measure (default: all); the first one measured is compared with the others."""
    quick: bool = False
    """Little work, to see that it runs: these numbers are no result."""


def apart(name: str, work: Work, seed: int, evaluate: bool = False) -> dict[str, Any]:
    """One measurement, in a fresh process."""
    spec = json.dumps({"name": name, "work": dataclasses.asdict(work), "seed": seed, "evaluate": evaluate})
    done = subprocess.run([sys.executable, "-m", "dqn_jax.bench.one_loop", spec], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed on {work.title}:\n{done.stderr}")
    result = json.loads(done.stdout.splitlines()[-1]) | {"contender": name, **dataclasses.asdict(work), "seed": seed}
    print(f"{work.title}: {name}, {result['steps_per_second']:,.0f} steps/s{_loudness(result)}", file=sys.stderr, flush=True)
    return result


def able(name: str, work: Work) -> bool:
    """Whether a contender can do a piece of work; a line says so where its setting is beyond it."""
    if name not in ([*HOST, LIBTORCH] if work.kind == "host" else COMPILED) or (work.seeds > 1 and name in ONE_SEED):
        return False
    asked = {N_STEPS: work.setting.n_steps > 1, DOUBLE: work.setting.double}
    lacking = [what for what in LACKS.get(name, ()) if asked[what]]
    if lacking:
        print(f"{work.title}: {name} is left out: it has no {' and no '.join(lacking)}")
    return not lacking


def chosen(only: tuple[str, ...]) -> list[str]:
    """The contenders that are asked for (all, where none is named) and can be run here; a line says why another is skipped.

    Raises:
      ValueError: if there is no such contender.
    """
    unknown = sorted({*only} - {*CONTENDERS})
    if unknown:
        raise ValueError(f"there is no contender {', '.join(unknown)}: --only takes {', '.join(CONTENDERS)}")
    obstacles = {name: f"{package} is not installed" for name, package in NEEDS.items() if importlib.util.find_spec(package) is None}
    if libtorch.obstacle():
        obstacles[LIBTORCH] = libtorch.obstacle()
    names = [name for name in CONTENDERS if name in only or not only]
    for name in names:
        if name in obstacles:
            print(f"{name} is skipped: {obstacles[name]}")
    return [name for name in names if name not in obstacles]


def in_each_way(names: list[str], work: Work, is_cpu: bool) -> list[str]:
    """The contenders as they are measured, ours in its best way first: with JAX as it comes, and, where that computes on the CPU, inline
    and, of many seeds, spread over the cores. Those on torch have one way, their best.
    """
    ways = [*[SPREAD] * (work.seeds > 1), INLINE, ""] if is_cpu else [""]
    return [name + way for name in names for way in ([""] if name in ON_TORCH else ways)]


def _is_loud(result: dict[str, Any]) -> bool:
    return result["others_cores"] is not None and result["others_cores"] > QUIET


def _loudness(result: dict[str, Any]) -> str:
    return f", while others used {result['others_cores']:.2f} cores" if _is_loud(result) else ""


def measure(work: Work, names: list[str], repeats: int, learning_steps: int, learnt: dict[tuple[str, Setting], Any]) -> dict[str, Any]:
    """All measurements of one piece of work, the contenders taking turns, and their summary.

    Args:
      work: what to do.
      names: the contenders; the first is compared with the others.
      repeats: rounds; every other one goes through the contenders backwards, so that what drifts hits all alike.
      learning_steps: length of the separate run in which a host loop shows that it learns.
      learnt: those runs by loop and setting, made once for all windows of a setting: what is missing is run and added.

    Returns:
      ``work``, ``updates``, ``measurements``, ``learning`` (the separate runs), ``summary``: one dict for each contender, and ``failed``:
      the error of each that failed and is left out.

    Raises:
      AssertionError: if the contenders made different numbers of updates.
      RuntimeError: if all failed.
    """
    failed: dict[str, str] = {}

    def attempt(name: str, work: Work, seed: int, evaluate: bool = False) -> dict[str, dict[str, Any]]:
        """The measurement under the contender's name, or nothing once it has failed."""
        if name not in failed:
            try:
                return {name: apart(name, work, seed, evaluate)}
            except RuntimeError as error:
                failed[name] = str(error)
        return {}

    rounds: list[dict[str, Any]] = []
    for seed in range(repeats):
        rounds.append({})
        for name in names[:: -1 if seed % 2 else 1]:
            rounds[-1].update(attempt(name, work, seed))
    if work.kind == "host":
        longer = dataclasses.replace(work, steps=learning_steps)
        # In which threads a program runs does not change what it learns: one run of each loop, inline where it can be.
        for name in names:
            loop = without_way(name)[0], work.setting
            if loop not in learnt:
                for result in attempt(name, longer, repeats, evaluate=True).values():
                    learnt[loop] = result
    names = [name for name in names if name not in failed]
    if not names:
        raise RuntimeError(f"{work.title}: nobody could do it\n" + "\n".join(failed.values()))
    rounds = [{name: results[name] for name in names} for results in rounds]
    updates = {result["updates"] for results in rounds for result in results.values()}
    if len(updates) != 1:
        raise AssertionError(f"{work.title}: the contenders made different numbers of updates, {sorted(updates)}")
    learning = {name: learnt[without_way(name)[0], work.setting] for name in names} if work.kind == "host" else {}
    summary = []
    for name in names:
        returns = [learning[name]["returns"]] if learning else [results[name]["returns"] for results in rounds]
        seeds = [float(np.mean(values)) for values in returns] if work.seeds == 1 else [value for values in returns for value in values]
        summary.append(
            {"contender": name, **_summarize(rounds, name, names[0]), "return_mean": float(np.mean(seeds)), "return_worst": min(seeds)}
        )
    return {
        "work": dataclasses.asdict(work),
        "title": work.title,
        "updates": updates.pop(),
        "summary": summary,
        "measurements": [result for results in rounds for result in results.values()],
        "learning": list(learning.values()),
        "failed": failed,
    }


def _summarize(rounds: list[dict[str, Any]], name: str, first: str) -> dict[str, Any]:
    """Medians and ranges of one contender, and how many times as fast as it the first one is, over the quiet measurements or over all."""
    quiet = [results[name] for results in rounds if not _is_loud(results[name])]
    used = quiet or [results[name] for results in rounds]
    both_quiet = [results for results in rounds if not _is_loud(results[name]) and not _is_loud(results[first])]
    ratios = [results[first]["steps_per_second"] / results[name]["steps_per_second"] for results in both_quiet or rounds]
    summary: dict[str, Any] = {"loud": not quiet or not both_quiet, "used": len(used), "used_pairs": len(ratios)}
    columns = {
        quantity: [result[quantity] for result in used if quantity in result]
        for quantity in ("steps_per_second", "cpu_us_per_step", "compile_seconds")
    }
    for quantity, values in (columns | {"ratio": ratios}).items():
        if values:
            summary[quantity] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return summary


def table(done: dict[str, Any]) -> str:
    """The plain table of one piece of work."""
    first = without_way(done["summary"][0]["contender"])[0]
    head = ("", "steps/s", "CPU us/step", "compile s", f"{first}, times as fast", "greedy return (worst)", "timings used")
    rows = [head]
    for line in done["summary"]:
        compile_seconds = f"{line['compile_seconds']['median']:.1f}" if "compile_seconds" in line else "-"
        ratio = "1" if line is done["summary"][0] else report.ranged(line["ratio"], ".2f")
        greedy = f"{line['return_mean']:.0f} ({line['return_worst']:.0f})"
        rows.append(
            (
                line["contender"],
                report.ranged(line["steps_per_second"], ",.0f"),
                f"{line['cpu_us_per_step']['median']:.0f}",
                compile_seconds,
                ratio,
                greedy,
                f"{line['used']}{' *' if line['loud'] else ''}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([f"{done['title']} ({done['updates']:,} updates)", *lines])


def main() -> None:
    """The command."""
    options = report.options(Options, __doc__)
    if options.repeats < 1:
        sys.exit(f"--repeats must be at least 1, got {options.repeats}")
    described = machine.describe()
    print("  ".join(f"{name} {version}" for name, version in described["versions"].items()))
    print(
        f"{described['processor']}, {described['usable_cores']} of {described['cores']} cores, {described['memory']}, {described['system']}"
    )
    try:
        contenders = chosen(options.only)
    except ValueError as error:
        sys.exit(str(error))
    reports, is_cpu = [], machine.find_device()["platform"] == "cpu"
    learnt: dict[tuple[str, Setting], Any] = {}
    for work in SHORT if options.quick else FULL:
        if work.kind not in options.kinds:
            continue
        names = in_each_way([name for name in contenders if able(name, work)], work, is_cpu)
        if not names:
            continue
        reports.append(measure(work, names, options.repeats, work.steps if options.quick else HOST_LEARNING_STEPS, learnt))
        print("\n" + table(reports[-1]), flush=True)
        if options.out:  # After each piece of work: an hour of measuring should not be lost to an interrupt.
            settings = {"deck": DECK._asdict(), "plain": PLAIN._asdict()}
            recorded = {"machine": described, "settings": settings, "differences": peers.DIFFERENCES, "reports": reports}
            options.out.write_text(json.dumps(recorded, indent=1) + "\n")
    print("\nMedians (and ranges) over the timings used; ratios are of timings in the same round.")
    if any(line["loud"] for one in reports for line in one["summary"]):
        print(f"* No quiet timing, or no quiet pair: other programs used more than {QUIET} cores during each. Measure again.")
    if failed := [error for one in reports for error in one["failed"].values()]:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    report.command(main)
