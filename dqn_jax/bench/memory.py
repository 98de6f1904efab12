"""What training takes in memory, stage by stage, beside others: ``python -m dqn_jax.bench.memory [--out FILE.json]``.

The high-water mark of a fresh process (the most that it has held in RAM so far, shared libraries included) after importing, after
building the agent, after the first update, which compilation precedes, and at the end of the steps. Of these the replay and the
parameters are told apart, by their shapes. Where JAX computes on an accelerator, the peak of its memory stands beside it.

The cases are the slide deck's setting on CartPole-v1, a network of two layers of 64 with 50,000 transitions, and Nature's convolutions
on images 84x84, four to a stack, with 20,000 frames kept once. Where they are installed, the loops of ``torch_loops.py`` and the C++
program of ``libtorch.py`` do the first of them, too: as many steps, as large a replay, on one thread of the CPU.
"""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import jax
import numpy as np

from dqn_jax import footprint, spaces
from dqn_jax.bench import libtorch, report, torch_loops
from dqn_jax.bench.settings import DECK
from dqn_jax.presets.dqn import DQN
from dqn_jax.presets.dqn_sets import PRESETS

STAGES = ("imported", "built", "first update", "end")
LIBTORCH = "libtorch"  # The contender that is a program of its own.


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures the memory that training takes."""

    quick: bool = False
    """The deck's setting alone, and few steps."""
    out: Path | None = None
    """A JSON file for everything measured."""
    one: str = ""
    """Used by the command itself: one measurement, described in JSON."""


class Screens(gymnasium.Env):
    """Grey images ``[84, 84]`` of uint8 that cost nothing to make, in episodes of 200 steps; no action changes anything."""

    observation_space = gymnasium.spaces.Box(0, 255, (84, 84), np.uint8)
    action_space = gymnasium.spaces.Discrete(6)

    def __init__(self) -> None:
        self._images = np.random.default_rng(0).integers(0, 256, (64, 84, 84)).astype(np.uint8)
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """The first image."""
        super().reset(seed=seed)
        self._steps = 0
        return self._images[0], {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """The next image, a reward of one, and an end after 200 steps."""
        self._steps += 1
        return self._images[self._steps % len(self._images)], 1.0, self._steps >= 200, False, {}


class Case(NamedTuple):
    """One thing to train.

    Attributes:
      env: makes the environment.
      options: of the agent.
      steps: to make.
      quick_steps: to make where it has to be quick.
    """

    env: Callable[[], gymnasium.Env]
    options: dict[str, Any]
    steps: int
    quick_steps: int


PLAIN = {"hidden": (64, 64), "capacity": 50_000, "batch_size": 64, "update_interval": 4, "replay_start_size": 1_000, "n_steps": 1}
PIXELS = {"frames": "stack_first", "capacity": 20_000, "batch_size": 32, "update_interval": 4, "replay_start_size": 400, "n_steps": 1}
CASES = {
    "ours, the deck's 3x128, 2,000 transitions": Case(lambda: gymnasium.make("CartPole-v1"), PRESETS["deck"], 10_000, 200),
    "ours, 2x64, 50,000 transitions": Case(lambda: gymnasium.make("CartPole-v1"), PLAIN, 60_000, 1_200),
    "ours, Nature, 20,000 frames": Case(lambda: gymnasium.wrappers.FrameStackObservation(Screens(), 4), PIXELS, 800, 410),
}


def measure_here(name: str, quick: bool = False) -> dict[str, Any]:
    """One case, in this process.

    Returns:
      ``marks``: bytes of the process for each of STAGES; ``device_marks``: the same of an accelerator's memory, empty where there is
      none; ``replay_bytes``, ``parameter_bytes`` (one set) and ``learner_bytes`` (parameters, target, optimizer); ``steps`` and ``updates``
      made; ``device``.
    """
    case = CASES[name]
    steps = case.quick_steps if quick else case.steps
    marks: dict[str, int] = {}
    device_marks: dict[str, int] = {}

    def mark(stage: str) -> None:
        marks[stage] = footprint.peak_bytes()
        statistics = jax.local_devices()[0].memory_stats() if stage != STAGES[0] else None  # To ask would start JAX.
        if statistics and "peak_bytes_in_use" in statistics:
            device_marks[stage] = statistics["peak_bytes_in_use"]

    mark("imported")
    env = case.env()
    agent = DQN(env, **case.options)
    agent.get_statistics()  # Waits until the replay is there.
    mark("built")
    cadence = agent.agent.cadence(1)
    _run(agent, env, steps, cadence.prefill + cadence.rows, lambda: mark("first update"))
    mark("end")
    shapes = jax.eval_shape(agent.agent.init, jax.random.key(0), spaces.example(env.observation_space, 1))
    return {
        "marks": marks,
        "device_marks": device_marks,
        "replay_bytes": footprint.num_bytes(shapes.memory),
        "parameter_bytes": footprint.num_bytes(shapes.learner.params),
        "learner_bytes": footprint.num_bytes(shapes.learner),
        "steps": steps,
        "updates": int(agent.get_statistics()["n_updates"]),
        "device": str(jax.devices()[0]),
    }


def _run(agent: DQN, env: gymnasium.Env, steps: int, first_due: int, learnt: Callable[[], None]) -> None:
    """Makes the steps; calls ``learnt`` once, when the first update, due after ``first_due`` transitions, is done."""
    observation, _ = env.reset(seed=0)
    reward: Any = 0.0
    is_new = True
    for step in range(steps):
        action = agent.act_and_train(observation, reward)
        if is_new and step >= first_due and agent.get_statistics()["n_updates"]:  # The statistics wait for the update.
            learnt()
            is_new = False
        observation, reward, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            agent.stop_episode_and_train(observation, reward, terminated)
            observation, _ = env.reset()
    agent.get_statistics()


def deck_steps(quick: bool) -> int:
    """The steps of the first case, the deck's setting."""
    deck = next(iter(CASES.values()))
    return deck.quick_steps if quick else deck.steps


def measure_libtorch(quick: bool = False) -> dict[str, Any]:
    """The C++ program in the deck's setting: ``marks`` of STAGES, of which the first is its start, with its libraries; ``steps`` made, and
    the ``seconds`` that the program took: compiling it is apart.
    """
    steps, program = deck_steps(quick), libtorch.build(libtorch.cache())
    begin = time.perf_counter()
    result = libtorch.run(program, DECK, steps, steps // 2, 0)
    seconds = time.perf_counter() - begin
    mib = result["memory_mib"]
    marks = {stage: round(mib[name] * 2**20) for stage, name in zip(STAGES, ("start", "built", "first_update", "end"), strict=True)}
    return {"marks": marks, "steps": steps, "seconds": seconds}


def peers(quick: bool = False) -> dict[str, list[str]]:
    """The commands that measure what else is installed, by name, in the deck's setting; a line says what is skipped, and why."""
    commands = {}
    for name, package in torch_loops.NEEDS.items():
        if importlib.util.find_spec(package) is None:
            print(f"{name} is skipped: {package} is not installed")
            continue
        asked = json.dumps({"name": name, "setting": DECK._asdict(), "steps": deck_steps(quick)})
        # As a file, and with -P not from its folder: as a part of this package it would bring JAX along.
        commands[f"{name}, the deck's"] = [sys.executable, "-P", torch_loops.__file__, asked]
    obstacle = libtorch.obstacle() if sys.platform == "linux" else "it reads its memory on Linux only"
    if obstacle:
        print(f"{LIBTORCH} is skipped: {obstacle}")
    else:
        commands[f"{LIBTORCH}, the deck's"] = _ours(LIBTORCH, quick)
    return commands


def _ours(name: str, quick: bool) -> list[str]:
    """The command that calls ``measure_libtorch`` or ``measure_here``."""
    return [sys.executable, "-m", "dqn_jax.bench.memory", "--one", json.dumps({"name": name, "quick": quick})]


def run_apart(name: str, command: list[str]) -> dict[str, Any]:
    """What a command prints in its last line, JSON as ``measure_here`` gives it, and the ``seconds`` that it took from start to end unless
    it tells them.

    Raises:
      RuntimeError: if it fails.
    """
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {name} failed:\n{done.stderr}")
    return {"seconds": time.perf_counter() - begin} | json.loads(done.stdout.splitlines()[-1])


def measure(quick: bool = False, others: dict[str, list[str]] | None = None) -> dict[str, Any]:
    """Memory, for each case in a fresh process.

    Args:
      quick: the deck's setting alone, and few steps.
      others: contenders by name, each a command that prints in its last line ``{"marks": {stage: bytes}}`` with all of STAGES as JSON,
        and what else of ``measure_here`` it knows.

    Returns:
      For each what ``measure_here`` gives; ``added``: what each mark lies above the one before, in bytes; ``seconds``: from the start of
      its process to the end. Of one that failed the error alone, ``failed``. The deck's setting comes first, then the contenders, then
      the other cases.
    """
    deck, *rest = CASES
    commands = {deck: _ours(deck, quick)} | (others or {}) | {name: _ours(name, quick) for name in rest if not quick}
    measured: dict[str, Any] = {}
    for name, command in commands.items():
        try:
            result = run_apart(name, command)
            measured[name] = result | {"added": _added(result["marks"])}
        except RuntimeError as error:
            measured[name] = {"failed": str(error)}
    return measured


def _added(marks: dict[str, int]) -> dict[str, int]:
    before = 0
    added = {}
    for stage in STAGES:
        added[stage], before = marks[stage] - before, marks[stage]
    return added


def show(measured: dict[str, Any]) -> None:
    """Prints what ``measure`` gives."""
    rows, sizes = [], []
    for name, result in measured.items():
        if "failed" in result:
            print(f"FAILED: {result['failed']}")
            continue
        marks, added = result["marks"], result["added"]
        rows.append((name, *(f"{marks[stage] / 1e6:,.0f} (+{added[stage] / 1e6:,.0f})" for stage in STAGES)))
        if result.get("device_marks"):
            peaks = result["device_marks"]
            rows.append((f"  on {result['device']}", *(f"{peaks[stage] / 1e6:,.0f}" if stage in peaks else "-" for stage in STAGES)))
        known = [result.get(f"{part}_bytes") for part in ("replay", "parameter", "learner")]
        if any(size is not None for size in known):
            sizes.append((name, *("-" if size is None else f"{size / 1e6:,.2f}" for size in known)))
    report.table("most memory held so far by the process, MB (and added since the stage before)", ("", *STAGES), rows)
    updates = {name: result["updates"] for name, result in measured.items() if "the deck's" in name and "updates" in result}
    if updates:  # The newest step is stored with its outcome: here before the next action, elsewhere after it.
        made = ", ".join(f"{name.split(',')[0]} {number:,}" for name, number in updates.items())
        print(
            f"  updates in the deck's setting: {made}"
            + ("" if max(updates.values()) - min(updates.values()) <= 1 else ": NOT THE SAME WORK")
        )
    report.table("of that by their shapes, MB", ("", "replay", "parameters", "with target and optimizer"), sizes)


def main() -> None:
    """Measures, prints tables, and writes everything to ``--out``."""
    options = report.options(Options, __doc__)
    if options.one:
        asked = json.loads(options.one)
        name, quick = asked["name"], asked["quick"]
        print(json.dumps(measure_libtorch(quick) if name == LIBTORCH else measure_here(name, quick)))
        return
    measured = report.run(lambda quick: measure(quick, peers(quick)), show, options.quick, options.out)
    if failed := [name for name, result in measured.items() if "failed" in result]:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    report.command(main)
