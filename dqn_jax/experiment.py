"""A run from the first step to its summary: folder, progress, evaluations, checkpoints, interrupts, resume.

The folder of a run holds ``config.json``, ``metrics.csv`` (a row for each chunk and seed), ``last.safetensors`` (everything, to go on
from), ``previous.safetensors`` (the one before it, should it be damaged), ``best.safetensors`` (for each seed what it had learnt when it
evaluated best), ``summary.json`` and, where matplotlib is installed, ``curve.png``.
"""

import csv
import json
import math
import os
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
    _write_json(folder / "config.json", task._asdict() | origin)
    if fork is not None:
        log.save(runs, True)
    if runs.steps >= task.steps:
        say(f"the run has made {runs.steps:,} steps already: to go on, ask for more in all with --steps")
    first = runs.steps
    seconds, interrupt = _loop(task, runs, log)
    speed = (runs.steps - first) * task.seeds / seconds if seconds else math.nan
    summary = summarise(task, folder, runs, log, speed, compile_seconds) | {"interrupt": interrupt}
    _write_json(folder / "summary.json", summary)
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


class Log:
    """The rows of the learning curve and the checkpoints of one run."""

    def __init__(self, folder: Path, task: Task):
        self.folder = folder
        self.task = task
        self.rows: list[dict[str, float]] = []
        self.best = np.full(task.seeds, -np.inf)
        self._best_learners: Any = None
        self._saved: int | None = None  # Steps of the last checkpoint, where it is whole.
        self._saved_at = time.perf_counter()
        self._told = False  # That the environment is not saved.

    def add(self, runs: HostRuns | CompiledRuns, curve: list[dict[str, float]], evaluated: np.ndarray | None) -> None:
        """One chunk's rows, one for each seed, and its evaluation, if there was one."""
        for seed, row in enumerate(curve):
            value = math.nan if evaluated is None else float(evaluated[seed])
            self.rows.append({"steps": runs.steps, "seed": self.task.seed + seed, **row, "eval_return": value})
        if evaluated is not None:
            self._keep_best(runs, evaluated)

    def _keep_best(self, runs: HostRuns | CompiledRuns, evaluated: np.ndarray) -> None:
        better = evaluated > self.best
        if not better.any():
            return
        learners = runs.learners()
        if self._best_learners is not None:

            def choose(new: np.ndarray, old: np.ndarray) -> np.ndarray:
                return np.where(better.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

            learners = jax.tree.map(choose, learners, self._best_learners)
        self._best_learners = learners
        self.best = np.where(better, evaluated, self.best)
        checkpoint.save(self.folder / "best.safetensors", learners, {"eval_return": self.best.tolist()})

    def latest(self) -> dict[str, str]:
        """What the progress bar shows: means over the seeds of the newest rows."""
        newest = self.rows[-self.task.seeds :]
        shown = {name: [row.get(name, math.nan) for row in newest] for name in ("return", "loss", "epsilon", "refused")}
        evaluated = [row["eval_return"] for row in self.rows if not math.isnan(row["eval_return"])][-self.task.seeds :]
        means = {name: _mean(values) for name, values in {**shown, "eval": evaluated}.items()}
        return {name: f"{value:.3g}" for name, value in means.items() if not math.isnan(value) and (name != "refused" or value > 0)}

    def age(self) -> float:
        """Seconds since the last checkpoint, or the beginning."""
        return time.perf_counter() - self._saved_at

    def save(self, runs: HostRuns | CompiledRuns, whole: bool) -> None:
        """Writes the rows, and then the state; the state before it is kept. Rows beyond the state's steps are dropped on resume.

        Args:
          runs: what to save.
          whole: whether the environments stand where the agents think they do; where not, their episodes are lost.
        """
        if whole and self._saved == runs.steps:
            return
        partial = self.folder / "metrics.csv.partial"
        with open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, list(self.rows[0]) if self.rows else ["steps"])  # None where the first evaluation failed.
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(partial, self.folder / "metrics.csv")
        last = self.folder / "last.safetensors"
        if last.exists():
            # A second name for the file, so that at every moment there is a whole one under the name of the last.
            second = self.folder / "previous.safetensors.partial"
            second.unlink(missing_ok=True)
            try:
                os.link(last, second)
            except OSError:  # Not every file system has second names.
                shutil.copyfile(last, second)
            os.replace(second, self.folder / "previous.safetensors")
        world = runs.world() if whole else None
        if runs.lost and not self._told:
            self._told = True
            say(f"\nwarning: the environment cannot be saved, and a resumed run will begin new episodes: {runs.lost}")
        info = {"steps": runs.steps, "task": self.task._asdict(), "world": world, "lost": runs.lost}
        checkpoint.save(last, runs.state(), info)
        self._saved = runs.steps if whole else None
        self._saved_at = time.perf_counter()

    def restore(self, runs: HostRuns | CompiledRuns, rollback: bool = False) -> dict[str, Any]:
        """Puts the last checkpoint, or the one before it, into ``runs`` and reads the rows up to it. Returns what the run's ``config.json``
        says beside its task.
        """
        for partial in self.folder.glob("*.partial"):  # Of saves that were killed.
            checkpoint.discard(partial)
        info = _restore(runs, self.folder, rollback)
        if self.task.steps < min(runs.steps, info["task"]["steps"]):
            raise ValueError(f"{self.folder} has made {runs.steps:,} steps already: ask for as many in all, or more, with --steps")
        own = self.task._replace(steps=info["task"]["steps"])._asdict()
        if changed := _changes(info["task"], own):
            raise ValueError(
                f"{self.folder / 'config.json'} says something else than the checkpoint: {'; '.join(changed)}; put that right, or begin a "
                "new run with --fork"
            )
        if rollback:
            os.replace(self.folder / "previous.safetensors", self.folder / "last.safetensors")
            say(f"rolled back to step {info['steps']:,}")
        self.rows = self._read_rows(info["steps"])
        if (self.folder / "best.safetensors").exists():
            try:
                self._best_learners, best = checkpoint.load(self.folder / "best.safetensors", runs.learners())
                self.best = np.array(best["eval_return"])
            except checkpoint.CheckpointError as error:
                say(f"warning: {error}; what evaluated best so far is lost")
        config = json.loads((self.folder / "config.json").read_text())
        return {name: value for name, value in config.items() if name not in Task._fields}

    def begin_with(self, runs: HostRuns | CompiledRuns, other: Path, rollback: bool) -> dict[str, Any]:
        """Puts the last checkpoint of another run, or the one before it, into ``runs``. Returns what ``config.json`` is to say of that."""
        info = _restore(runs, other, rollback)
        if runs.steps >= self.task.steps:
            raise ValueError(f"{other} has made {runs.steps:,} steps already: ask for more in all with --steps")
        changed = _changes(info["task"], self.task._asdict())
        say(f"forked from {other} at step {info['steps']:,}: {'; '.join(changed) or 'nothing changed'}")
        return {"forked_from": {"run": str(other), "steps": info["steps"], "changed": changed}}

    def _read_rows(self, steps: int) -> list[dict[str, float]]:
        """The rows up to these steps."""
        path = self.folder / "metrics.csv"
        try:
            with open(path, newline="") as file:
                rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
            return [{**row, "steps": int(row["steps"]), "seed": int(row["seed"])} for row in rows if row["steps"] <= steps]
        except (OSError, ValueError, TypeError, KeyError) as error:  # Also what is no text, or lacks a column.
            say(f"warning: {path} cannot be read ({error}): the learning curve begins anew")
            return []

    def online_returns(self) -> list[float]:
        """For each seed the mean return of the episodes that ended in the last tenth of training."""
        means = []
        for seed in range(self.task.seed, self.task.seed + self.task.seeds):
            rows = [row for row in self.rows if row["seed"] == seed and row["steps"] > 0.9 * self.rows[-1]["steps"] and row["episodes"]]
            episodes = sum(row["episodes"] for row in rows)
            means.append(sum(row["return"] * row["episodes"] for row in rows) / episodes if episodes else math.nan)
        return means


def _restore(runs: HostRuns | CompiledRuns, folder: Path, rollback: bool) -> dict[str, Any]:
    """Puts the last checkpoint of a folder, or the one before it, into ``runs``. Returns what is told beside it."""
    previous = folder / "previous.safetensors"
    path = previous if rollback else folder / "last.safetensors"
    try:
        state, info = checkpoint.load(path, runs.state())
    except checkpoint.MisfitError as error:
        changed = _changes(checkpoint.read_info(path)["task"], runs.task._asdict())
        told = f"\nof what changes, something gives arrays another shape: {'; '.join(changed)}" if changed else ""
        raise checkpoint.CheckpointError(f"{error}{told}") from error
    except (checkpoint.CheckpointError, FileNotFoundError) as error:
        if rollback or not previous.exists():
            raise
        raise type(error)(f"{error}\nthe checkpoint before it is there: add --rollback to begin with that") from error
    if others := checkpoint.other_versions(path):
        say(f"this may differ in the last bits from a run that never stopped: {', '.join(others)}")
    world, lost = info["world"], None
    if any(info["task"][name] != getattr(runs.task, name) for name in ("env", "env_args")):
        world, lost = None, "it is another environment"
    elif world is None:
        lost = info["lost"] or "the run ended in the middle of a step"
    lost = runs.restore(state, info["steps"], world) or lost
    if lost and isinstance(runs, HostRuns):
        say(f"the environments begin new episodes, so this will differ from a run that never stopped: {lost}")
    return info


def _write_json(path: Path, value: Any) -> None:
    """Writes a file that is never seen in part, nor lost on a full disk."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(partial, path)


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two tasks, a line for each."""
    lines = []
    for name in now:
        old, new = before.get(name), now[name]
        if isinstance(new, dict):
            lines += _changes(old or {}, new)
        elif json.dumps(old) != json.dumps(new):  # A tuple has become a list.
            lines.append(f"{name}: {old} -> {new}")
    return lines


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


def say(text: str) -> None:
    """A line for people: on standard error, so that standard output holds results only."""
    print(text, file=sys.stderr, flush=True)


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


def _mean(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan
