"""A run from the first step to its summary: folder, progress, evaluations, checkpoints, interrupts, resume.

The folder of a run holds ``config.json``, ``metrics.csv`` (a row for each chunk and seed), ``last.safetensors`` (everything, to go on
from), ``previous.safetensors`` (the one before it, should it be damaged), ``best.safetensors`` (for each seed what it had learnt when it
evaluated best), ``summary.json`` and, where matplotlib is installed, ``curve.png``.
"""

import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from dqn_jax import checkpoint, footprint
from dqn_jax.log import Log, say, write_json
from dqn_jax.runs import CompiledRuns, HostRuns, Task, make_runs
from dqn_jax.statistics import bootstrap_interval, iqm

EVALUATIONS = 10
SAVE_EVERY = 300.0  # Seconds after which the end of a chunk is saved though no evaluation is due.


def train(task: Task, folder: Path, *, resume: bool = False, rollback: bool = False, fork: Path | None = None) -> dict[str, Any]:
    """Runs ``task`` to its end, or to an interrupt, and leaves a folder from which it can go on.

    Args:
      task: what to run.
      folder: of the run.
      resume: go on from the folder's last checkpoint.
      rollback: go on from the checkpoint before the last instead, which then takes the place of the last; of a run to fork, begin there.
      fork: the folder of another run, whose last state this new one begins with; its options may differ where the state still fits.

    Returns:
      The summary, a dict of JSON values; see ``summarise``.

    Raises:
      FileExistsError: if the folder holds a run and ``resume`` is False.
      ValueError: if a run to fork has made all of the task's steps.
      dqn_jax.NonFiniteError: if nothing is learnt any more, since losses are not finite; the run has been saved up to there.
      FileNotFoundError, dqn_jax.CheckpointError: if there is nothing sound to resume from.
    """
    if not resume:
        _require_counts(task, fork is None)
    say(describe_device())
    if not resume and (folder / "config.json").exists():
        raise FileExistsError(f"{folder} holds a run: choose another --name, or go on with --resume {folder}")
    runs = make_runs(task)
    say("compiling ...")
    start = time.perf_counter()
    runs.compile()
    compile_seconds = time.perf_counter() - start
    log = Log(folder, task)
    origin: dict[str, Any] = {}
    if resume:
        origin = log.restore(runs, rollback)
    elif fork is not None:
        origin = log.begin_with(runs, fork, rollback)
    # What is bad has ended above, before anything is written.
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", task._asdict() | origin)
    if fork is not None:
        log.save(runs, True)
    if runs.steps >= task.steps:
        say(f"the run has made {runs.steps:,} steps already: to go on, ask for more in all with --steps")
    first = runs.steps
    seconds, interrupt = _loop(task, runs, log)
    speed = (runs.steps - first) * task.seeds / seconds if seconds else math.nan
    summary = summarise(task, folder, runs, log, speed, compile_seconds) | {"interrupt": interrupt}
    write_json(folder / "summary.json", summary)
    draw_curve(log.rows, folder / "curve.png")
    return summary


def _loop(task: Task, runs: HostRuns | CompiledRuns, log: "Log") -> tuple[float, int | None]:
    """Trains until the steps are done or somebody interrupts. Returns the seconds spent training, evaluations apart, and the number of the
    signal that interrupted.
    """
    seconds = 0.0
    first = runs.steps
    whole = True  # Whether no chunk is half done.
    every = task.steps / EVALUATIONS
    bar = tqdm(total=max(task.steps, runs.steps), initial=runs.steps, unit="step", unit_scale=True, file=sys.stderr, dynamic_ncols=True)
    with bar, interrupts() as interrupted:
        try:
            while runs.steps < task.steps and not interrupted():
                before, start = runs.steps, time.perf_counter()
                whole = False
                curve = runs.advance()
                whole = True
                seconds += time.perf_counter() - start
                due = runs.steps // every > before // every or runs.steps >= task.steps
                log.add(runs, curve, runs.evaluate() if due else None)
                bar.set_postfix(log.latest(), refresh=False)
                bar.total = max(bar.total, runs.steps)
                bar.update(runs.steps - before)
                if due or log.age() > SAVE_EVERY:
                    log.save(runs, whole)
        except BaseException:  # Of the environment, say: nothing that was learnt is lost.
            if runs.steps > first:
                log.save(runs, whole)
                say(f"\nsaved at step {runs.steps:,}: --resume {log.folder} goes on from there, with --rollback from the checkpoint before")
            raise
        if runs.steps > first:
            log.save(runs, whole)
    return seconds, interrupted()


def summarise(
    task: Task, folder: Path, runs: HostRuns | CompiledRuns, log: Log, steps_per_second: float, compile_seconds: float
) -> dict[str, Any]:
    """The summary of a run.

    Returns:
      ``algo, env, steps`` (each agent's), ``seeds``; ``eval_return`` (for each seed the mean of greedy episodes with the final
      parameters), ``best_eval_return`` (the highest seen on the way: biased upwards), ``online_return`` (for each seed the mean over
      the last tenth of training), the IQM over seeds and its 95 % bootstrap interval of the first and the last;
      ``steps_per_second`` (all seeds together, compilation and evaluation apart), ``compile_seconds, peak_memory_mb, updates``
      (each agent's), ``state_sha256``, ``run``, ``device`` and ``complete``. What is unknown is None.
    """
    evaluated = runs.evaluate()
    online = log.online_returns() if log.rows else [math.nan] * task.seeds
    return {
        "algo": task.algo,
        "env": task.env,
        "steps": runs.steps,
        "seeds": task.seeds,
        "eval_return": evaluated.tolist(),
        "best_eval_return": [_known(value) for value in log.best],
        "online_return": [_known(value) for value in online],
        **_over_seeds("eval", evaluated),
        **_over_seeds("online", np.array(online)),
        "steps_per_second": _known(steps_per_second),
        "compile_seconds": round(compile_seconds, 2),
        "peak_memory_mb": round(peak_memory_mb()),
        "updates": runs.updates,
        "state_sha256": checkpoint.digest(runs.state()),
        "run": str(folder),
        "device": str(jax.devices()[0]),
        "complete": runs.steps >= task.steps,
    }


def describe_device() -> str:
    """The device that JAX computes on, and a warning where a GPU is visible and unused."""
    device = jax.devices()[0]
    line = f"device: {device.device_kind} ({device.platform})"
    if device.platform == "cpu" and (shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists()):
        line += "\nwarning: a GPU is visible and JAX runs on the CPU: pip install 'dqn_jax[cuda]'"
    return line


def peak_memory_mb() -> float:
    """The most memory that this process has held, in MB."""
    return footprint.peak_bytes() / 1e6


@contextmanager
def interrupts() -> Iterator[Any]:
    """Within it Ctrl-C and SIGTERM are only noted: to call what it yields gives the signal's number, or None. A second one interrupts."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)
        say("\nstopping after this chunk ...")

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # Not in the main thread: Python delivers no signal here.
        before = {}
    try:
        yield lambda: seen[0] if seen else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def draw_curve(rows: list[dict[str, float]], path: Path) -> None:
    """The learning curve as a picture, where matplotlib is installed: evaluations and training returns, means over the seeds."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label in (("return", "training"), ("eval_return", "greedy")):
        by_steps: dict[float, list[float]] = {}
        for row in rows:
            if not math.isnan(row[name]):
                by_steps.setdefault(row["steps"], []).append(row[name])
        if by_steps:
            steps, values = list(by_steps), list(by_steps.values())
            (line,) = axes.plot(steps, [np.mean(v) for v in values], label=label, marker="o" if name == "eval_return" else "")
            axes.fill_between(steps, [min(v) for v in values], [max(v) for v in values], alpha=0.2, color=line.get_color())
    axes.set(xlabel="steps", ylabel="return (mean and range over seeds)")
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=120)


def _require_counts(task: Task, begins: bool) -> None:
    """Raises ValueError on counts that make no sense; where a run ``begins`` anew, also where it would end before it learns."""
    lowest = {"steps": 1, "seeds": 1, "num_envs": 1, "eval_episodes": 1, "seed": 0}
    for name, low in lowest.items():
        if getattr(task, name) < low:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {low}, got {getattr(task, name)}")
    if not begins:
        return
    if task.steps <= task.options.get("replay_start_size", 0):
        raise ValueError(
            f"--steps {task.steps} end before learning starts: ask for more than --replay-start-size {task.options['replay_start_size']}, "
            "or lower that"
        )
    if "rollout_length" in task.options and task.steps <= task.options["rollout_length"] * task.num_envs:
        raise ValueError(
            f"--steps {task.steps} end before learning starts: ask for more than --rollout-length {task.options['rollout_length']} times "
            f"--num-envs {task.num_envs}, or lower these"
        )


def _over_seeds(name: str, values: np.ndarray) -> dict[str, Any]:
    values = values[~np.isnan(values)]
    if not len(values):
        return {f"{name}_iqm": None, f"{name}_interval": None}
    return {f"{name}_iqm": iqm(values), f"{name}_interval": list(bootstrap_interval(values))}


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
