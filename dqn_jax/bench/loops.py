"""How fast the loops are, on the same work in one interleaved run: ``python -m dqn_jax.bench.loops [--repeats 5] [--out FILE.json]``.

The work is DQN on CartPole-v1 with a network of two layers of 64 (``PLAIN`` in ``settings.py``; ``host_loops.py``, ``compiled_loops.py``,
``peers.py`` and ``libtorch.py`` hold the loops):

* host loops, a Gymnasium environment stepped from Python: steps per second between step 2,000 and step 12,000, so without imports,
  compilation and random warm-up;
* compiled loops, the environment included, one seed and 128 seeds by ``vmap``: total steps per second of the whole run, compiled
  before.

Contenders on JAX are measured twice: with JAX as it comes, and inline, on the one thread that asks (``dqn_jax.compute_inline``).
Each measurement is a process of its own, and the contenders take turns. A measurement during which other programs used more than a
tenth of a core is marked and left out where a quiet one exists. All contenders must make the same number of updates, or the run fails.
What was timed also has to learn: the greedy return over 20 episodes of the compiled runs themselves, and of one longer run of each host
loop, stands beside the speed; one seed of it shows that a loop learns and ranks nobody. What a contender does otherwise than the setting
says is in the JSON file, under ``differences``.
"""

import dataclasses
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import jax
import numpy as np
import tyro

from dqn_jax.bench import compiled_loops, host_loops, libtorch, machine, peers
from dqn_jax.bench.settings import PLAIN, Setting
from dqn_jax.envs import make
from dqn_jax.programs import compute_inline

QUIET = 0.1  # Cores that other programs may use during a measurement.
HOST_BEGIN = 2_000
HOST: dict[str, Callable[..., host_loops.HostLoop]] = {
    "ours": host_loops.ours,
    "cleanrl-style": peers.cleanrl_style,
    "numpy-replay": host_loops.numpy_replay,
    "torch": peers.torch_eager,
    "sb3": peers.sb3,
    "pfrl": peers.pfrl,
}
LIBTORCH = "libtorch"  # The host contender that is a program of its own.
COMPILED: dict[str, Callable[..., Callable[[Any], compiled_loops.Outcome]]] = {
    "ours": compiled_loops.ours,
    "purejaxrl-style": compiled_loops.purejaxrl_style,
    "rejax": peers.rejax,
}
NEEDS = {
    "sb3": "stable_baselines3",
    "cleanrl-style": "stable_baselines3",
    "torch": "torch",
    LIBTORCH: "torch",
    "pfrl": "pfrl",
    "rejax": "rejax",
}  # Contenders that need a package, and which.
ONE_SEED = ("rejax",)  # Its sampler walks the whole replay of each seed at every update: minutes a run with many.
ON_TORCH = ("torch", LIBTORCH, "sb3", "pfrl")
EVALUATION_EPISODES = 20
INLINE = ", inline"  # Behind the name of a contender that is measured with JAX on one thread (``dqn_jax.compute_inline``).


@dataclasses.dataclass(frozen=True)
class Work:
    """What is measured.

    Attributes:
      kind: "host" or "compiled".
      interval: transitions between updates.
      steps: environment steps, of each seed.
      seeds: trained at once (1 for host loops).
    """

    kind: str
    interval: int
    steps: int
    seeds: int = 1

    @property
    def setting(self) -> Setting:
        """What the loops do."""
        return PLAIN._replace(interval=self.interval)

    @property
    def title(self) -> str:
        """One line about it."""
        if self.kind == "host":
            return f"host loop, an update every {self.interval} steps, steps {HOST_BEGIN:,} to {self.steps:,}"
        return f"compiled loop, an update every {self.interval} steps, {self.seeds} seed{'s'[: self.seeds > 1]}, {self.steps:,} steps each"


FULL = (
    Work("host", 4, 12_000),
    Work("host", 1, 12_000),
    Work("compiled", 4, 100_000),
    Work("compiled", 1, 50_000),
    Work("compiled", 4, 10_000, 128),
    Work("compiled", 1, 5_000, 128),
)
SHORT = (
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
    kinds: tuple[str, ...] = ("host", "compiled")
    """Which loops to measure."""
    short: bool = False
    """Little work, to see that it runs: these numbers are no result."""
    one: str = ""
    """Used by the command itself: one measurement in this process, described in JSON."""


class Clock(gymnasium.Wrapper):
    """Calls ``marks[n]()`` when n steps have been made, so that everybody's steps are counted and timed at the same place."""

    def __init__(self, env: gymnasium.Env, marks: dict[int, Callable[[], None]]):
        super().__init__(env)
        self._marks, self._steps = marks, 0

    def step(self, action: Any) -> Any:
        """Steps, then tells."""
        result = self.env.step(action)
        self._steps += 1
        if self._steps in self._marks:
            self._marks[self._steps]()
        return result


def measure_host(name: str, work: Work, seed: int, evaluate: bool) -> dict[str, Any]:
    """One measurement of a host loop, in this process.

    Args:
      name: of the contender.
      work: what to do.
      seed: of everything random.
      evaluate: whether to report the greedy return at the end.

    Returns:
      What ``machine.timing`` tells, the ``updates`` made in the timed window, and ``returns``.
    """
    if name == LIBTORCH:
        result = libtorch.run(libtorch.build(libtorch.cache()), work.setting, work.steps, HOST_BEGIN, seed)
        return result if evaluate else {key: value for key, value in result.items() if key != "returns"}
    seen: dict[str, Any] = {}

    # Counting stays outside of the window.
    def begin() -> None:
        seen["updates"] = loop.updates()
        seen["begin"] = machine.now()

    def end() -> None:
        seen["end"] = machine.now()
        seen["updates"] = loop.updates() - seen["updates"]

    env = Clock(gymnasium.make("CartPole-v1"), {HOST_BEGIN: begin, work.steps: end})
    loop = HOST[name](env, work.setting, work.steps, seed)
    loop.run()
    result = machine.timing(seen["begin"], seen["end"], work.steps - HOST_BEGIN) | {"updates": seen["updates"]}
    if evaluate:
        result["returns"] = [_play(loop.greedy, 10_000 + episode) for episode in range(EVALUATION_EPISODES)]
    return result


def _play(greedy: Any, seed: int) -> float:
    env = gymnasium.make("CartPole-v1")
    observation, _ = env.reset(seed=seed)
    total, ended = 0.0, False
    while not ended:
        observation, reward, terminated, truncated, _ = env.step(greedy(observation))
        total, ended = total + float(reward), terminated or truncated
    return total


def measure_compiled(name: str, work: Work, seed: int) -> dict[str, Any]:
    """One measurement of a compiled loop, in this process; arguments and result as ``measure_host``, and ``compile_seconds``."""
    # As shipped, the JAX version differs from CartPole-v1 in this product.
    env = make("phys2d/CartPole-v1", polemass_length=0.05)
    steps = compiled_loops.compiled_steps(env, work.setting, work.steps)
    run = COMPILED[name](env, work.setting, steps)

    def over_seeds(function: Any) -> Any:
        return jax.jit(jax.vmap(function) if work.seeds > 1 else function)

    key = jax.random.key(seed)
    keys = jax.random.split(key, work.seeds) if work.seeds > 1 else key
    begin = machine.now()
    compiled = over_seeds(run).lower(keys).compile()
    compile_seconds = machine.now().wall - begin.wall
    begin = machine.now()
    outcome = jax.block_until_ready(compiled(keys))
    result = machine.timing(begin, machine.now(), steps * work.seeds)
    made = {int(steps) for steps in np.atleast_1d(outcome.steps)}
    if made != {steps}:
        raise AssertionError(f"{name} made {made} steps where {steps} were asked for")
    (updates,) = {int(updates) for updates in np.atleast_1d(outcome.updates)}  # A seed with another number is an error.

    def evaluate(params: Any, key: Any) -> Any:
        return compiled_loops.greedy_returns(env, work.setting, params, key, EVALUATION_EPISODES).mean()

    returns = over_seeds(evaluate)(outcome.params, keys)
    device = jax.devices()[0].device_kind
    return result | {"updates": updates, "device": device, "compile_seconds": compile_seconds, "returns": np.atleast_1d(returns).tolist()}


def apart(name: str, work: Work, seed: int, evaluate: bool = False) -> dict[str, Any]:
    """One measurement, in a fresh process."""
    spec = json.dumps({"name": name, "work": dataclasses.asdict(work), "seed": seed, "evaluate": evaluate})
    done = subprocess.run([sys.executable, "-m", "dqn_jax.bench.loops", "--one", spec], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed on {work.title}:\n{done.stderr}")
    result = json.loads(done.stdout.splitlines()[-1]) | {"contender": name, **dataclasses.asdict(work), "seed": seed}
    print(f"{work.title}: {name}, {result['steps_per_second']:,.0f} steps/s{_loudness(result)}", file=sys.stderr, flush=True)
    return result


def _one(spec: str) -> dict[str, Any]:
    asked = json.loads(spec)
    work = Work(**asked["work"])
    name = asked["name"].removesuffix(INLINE)
    if name != asked["name"]:
        compute_inline()
    if work.kind == "compiled":
        return measure_compiled(name, work, asked["seed"])
    return measure_host(name, work, asked["seed"], asked["evaluate"])


def in_both_settings(names: list[str]) -> list[str]:
    """The contenders with JAX as it comes and inline, ours inline first; those on torch have one setting, their best."""
    return [variant for name in names for variant in ([name] if name in ON_TORCH else [name + INLINE, name])]


def _is_loud(result: dict[str, Any]) -> bool:
    return result["others_cores"] is not None and result["others_cores"] > QUIET


def _loudness(result: dict[str, Any]) -> str:
    return f", while others used {result['others_cores']:.2f} cores" if _is_loud(result) else ""


def measure(work: Work, names: list[str], repeats: int, learning_steps: int) -> dict[str, Any]:
    """All measurements of one piece of work, the contenders taking turns, and their summary.

    Args:
      work: what to do.
      names: the contenders; the first is compared with the others.
      repeats: rounds.
      learning_steps: length of the separate run in which a host loop shows that it learns.

    Returns:
      ``work``, ``updates``, ``measurements``, ``learning`` (the separate runs), and ``summary``: one dict for each contender.

    Raises:
      AssertionError: if the contenders made different numbers of updates.
      RuntimeError: if one failed.
    """
    rounds = [{name: apart(name, work, seed) for name in names} for seed in range(repeats)]
    updates = {result["updates"] for results in rounds for result in results.values()}
    if len(updates) != 1:
        raise AssertionError(f"{work.title}: the contenders made different numbers of updates, {sorted(updates)}")
    learning = {}
    if work.kind == "host":
        longer = dataclasses.replace(work, steps=learning_steps)
        # In which threads a program runs does not change what it learns: one run of each loop, inline where it can be.
        chosen = [name for name in names if name + INLINE not in names]
        loops = {name.removesuffix(INLINE): apart(name, longer, repeats, evaluate=True) for name in chosen}
        learning = {name: loops[name.removesuffix(INLINE)] for name in names}
    summary = []
    for name in names:
        returns = [learning[name]["returns"]] if learning else [results[name]["returns"] for results in rounds]
        seeds = [float(np.mean(values)) for values in returns] if work.seeds == 1 else [value for values in returns for value in values]
        summary.append(
            {"contender": name, **_summarize(rounds, name, names[0]), "return_mean": float(np.mean(seeds)), "return_worst": min(seeds)}
        )
    flat = [result for results in rounds for result in results.values()]
    return {
        "work": dataclasses.asdict(work),
        "title": work.title,
        "updates": updates.pop(),
        "summary": summary,
        "measurements": flat,
        "learning": list(learning.values()),
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


def table(report: dict[str, Any]) -> str:
    """The plain table of one piece of work."""
    head = ("", "steps/s", "CPU us/step", "compile s", "ours, times as fast", "greedy return (worst)", "timings used")
    rows = [head]
    for line in report["summary"]:
        compile_seconds = f"{line['compile_seconds']['median']:.1f}" if "compile_seconds" in line else "-"
        ratio = "1" if line is report["summary"][0] else _spread(line["ratio"], ".2f")
        greedy = f"{line['return_mean']:.0f} ({line['return_worst']:.0f})"
        rows.append(
            (
                line["contender"],
                _spread(line["steps_per_second"], ",.0f"),
                f"{line['cpu_us_per_step']['median']:.0f}",
                compile_seconds,
                ratio,
                greedy,
                f"{line['used']}{' *' if line['loud'] else ''}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([f"{report['title']} ({report['updates']:,} updates)", *lines])


def _spread(values: dict[str, float], spec: str) -> str:
    return f"{values['median']:{spec}} ({values['min']:{spec}}-{values['max']:{spec}})"


def main() -> None:
    """The command."""
    options = tyro.cli(Options, description=__doc__)
    if options.one:
        print(json.dumps(_one(options.one)))
        return
    described = machine.describe()
    print("  ".join(f"{name} {version}" for name, version in described["versions"].items()))
    print(
        f"{described['processor']}, {described['usable_cores']} of {described['cores']} cores, {described['memory']}, {described['system']}"
    )
    absent = [name for name, package in NEEDS.items() if importlib.util.find_spec(package) is None]
    for name in absent:
        print(f"{name} is skipped: {NEEDS[name]} is not installed")
    if shutil.which("g++") is None and LIBTORCH not in absent:
        absent.append(LIBTORCH)
        print(f"{LIBTORCH} is skipped: there is no g++ to build it")
    reports = []
    for work in SHORT if options.short else FULL:
        if work.kind not in options.kinds:
            continue
        contenders = [*HOST, LIBTORCH] if work.kind == "host" else [name for name in COMPILED if work.seeds == 1 or name not in ONE_SEED]
        names = [name for name in contenders if name not in absent]
        reports.append(measure(work, in_both_settings(names), options.repeats, work.steps if options.short else HOST_LEARNING_STEPS))
        print("\n" + table(reports[-1]), flush=True)
        if options.out:  # After each piece of work: an hour of measuring should not be lost to an interrupt.
            recorded = {"machine": described, "settings": PLAIN._asdict(), "differences": peers.DIFFERENCES, "reports": reports}
            options.out.write_text(json.dumps(recorded, indent=1) + "\n")
    print("\nMedians (and ranges) over the timings used; ratios are of neighbours in the same round.")
    if any(line["loud"] for report in reports for line in report["summary"]):
        print(f"* No quiet timing, or no quiet pair: other programs used more than {QUIET} cores during each. Measure again.")


if __name__ == "__main__":
    main()
