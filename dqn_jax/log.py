"""What a run keeps in its folder: the rows of its learning curve, its checkpoints, and what is said to people on the way.

Nothing is written in place: every file appears whole under its name.
"""

import csv
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dqn_jax import checkpoint
from dqn_jax.runs import CompiledRuns, HostRuns, Task


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


def say(text: str) -> None:
    """A line for people: on standard error, so that standard output holds results only."""
    print(text, file=sys.stderr, flush=True)


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


def write_json(path: Path, value: Any) -> None:
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


def _mean(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan
