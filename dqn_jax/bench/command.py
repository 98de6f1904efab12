"""All sections of the benchmark in one command, ``dqn-jax bench``: what they measured in one file, beside the slide deck and earlier runs.

Each section is a process of its own, ``python -m dqn_jax.bench.SECTION``: threads are chosen before JAX starts, and marks of memory are
those of a fresh process. What has been measured is written after every section, so neither a failure nor an interrupt loses it.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from dqn_jax.bench import machine, pictures, report
from dqn_jax.bench.one_loop import INLINE, SPREAD

SECTIONS = ("size", "memory", "loops", "latency", "scaling", "nature", "roofline", "pixels", "family", "policies", "curiosity")
# In which other ways sections run where JAX computes on the CPU; loops measures all ways by itself.
WAYS = {
    "latency": {INLINE: "--inline"},
    "scaling": {INLINE: "--inline", SPREAD: "--spread"},
    "nature": {INLINE: "--inline"},
    "roofline": {INLINE: "--inline"},
    "family": {INLINE: "--inline"},
    "policies": {INLINE: "--inline", SPREAD: "--spread"},
    "curiosity": {INLINE: "--inline"},
}
PATIENCE = 10.0  # Seconds in which an interrupted section should have ended.
CHANGED = 1.2  # From this ratio on, either way, a headline counts as changed.

# The rows of the table beside the deck: what is installed for it, and its name in the sections memory and loops.
CONTENDERS = {
    "ours": ("dqn_jax", "ours"),
    "libtorch (C++)": ("libtorch", "libtorch"),
    "PyTorch": ("torch", "torch"),
    "PFRL": ("pfrl", "pfrl"),
    "SB3": ("stable_baselines3", "sb3"),
}
CLAIMED = (
    ("with tch-rs", "1,700", "slightly better, no figure", "slightly better, no figure"),
    ("with candle", "800", "no figure", "no figure"),
)


def bench(sections: Collection[str], quick: bool, repeats: int, folder: Path) -> dict[str, Any]:
    """Runs the sections one after the other, prints what they print, and leaves a folder of this run in ``folder``.

    Args:
      sections: which of SECTIONS; they run in that order.
      quick: a little of everything, to see that it runs.
      repeats: measurements of each contender in the section loops.
      folder: where the run's folder goes, beside those of earlier runs: ``TIME/results.json``, and pictures where matplotlib is there.

    Returns:
      ``results``: the path of the file; ``failures``: the error of each section that failed; ``headlines`` as the function of that name
      gives them.

    Raises:
      ValueError: if there is nothing to run, or nowhere to keep the results.
      ChildProcessError: if JAX finds no device.
      KeyboardInterrupt: if somebody interrupts; what was measured is in the file then, and that has been said.
    """
    _require_sound(sections, repeats, folder)
    device = machine.find_device()
    planned = plan(sections, quick, repeats, device["platform"] == "cpu")
    path = _new_folder(folder) / "results.json"
    results: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "quick": quick,
        "repeats": repeats,
        "machine": machine.describe(),
        "device": device,
        "failures": dict.fromkeys(planned, "interrupted"),  # Until it has run.
        "measured": {},
    }
    try:
        for number, (name, words) in enumerate(planned.items(), 1):
            print(f"\n== {name} ({number} of {len(planned)}) ==", flush=True)
            _add(results, name, words)
            _write(path, results)
    except KeyboardInterrupt:
        _write(path, results)
        print(f"\nwhat was measured until now is kept in {path}", file=sys.stderr, flush=True)
        raise
    measured, failures, now = results["measured"], results["failures"], headlines(results["measured"])
    show_deck(measured)
    show_changes(previous(path, results), now)
    pictures.draw(measured, path.parent)
    print(f"\neverything measured is in {path}{'; it was quick, so the numbers are no result' if quick else ''}", flush=True)
    for name, error in failures.items():
        print(f"FAILED: {name}: {error}", flush=True)
    return {"results": str(path), "failures": failures, "headlines": now}


def _require_sound(sections: Collection[str], repeats: int, folder: Path) -> None:
    if not sections:
        raise ValueError(f"--sections is empty: name some of {', '.join(SECTIONS)}, or leave it out for all")
    if repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {repeats}")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--folder must be a folder, and {folder} is a file: name another")


def _new_folder(folder: Path) -> Path:
    name = time.strftime("%Y%m%d-%H%M%S")
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    new = next(folder / name for name in names if not (folder / name).exists())
    try:
        new.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"--folder {folder}: no folder can be made there ({error.strerror}): name another") from error
    return new


def plan(sections: Collection[str], quick: bool, repeats: int, is_cpu: bool) -> dict[str, list[str]]:
    """For each entry of the results, in order, the section and its options. On an accelerator there is one way."""
    planned = {}
    for section in (section for section in SECTIONS if section in sections):
        words = [section, *["--quick"] * quick, *(["--repeats", str(repeats)] if section == "loops" else [])]
        planned[section] = words
        for way, flag in WAYS.get(section, {}).items() if is_cpu else ():
            planned[section + way] = [*words, flag]
    return planned


def _add(results: dict[str, Any], name: str, words: list[str]) -> None:
    """Runs a section and adds what it has written to the results, also where it fails or is interrupted on its way."""
    measured, failures = results["measured"], results["failures"]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / f"{words[0]}.json"
        try:
            failures[name] = run_section(words, out)
        finally:
            with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):  # Nothing yet, or cut off.
                measured[name] = json.loads(out.read_text())
                measured[name].pop("machine", None)  # It is the same for all, and stands at the top.
            if not failures[name] and name in measured:
                del failures[name]
            elif not failures[name]:
                failures[name] = "it ended well and wrote no results"


def run_section(words: list[str], out: Path) -> str:
    """Runs a section in a process of its own, whose output goes on to the terminal.

    Args:
      words: the section and its options.
      out: where it writes what it measures.

    Returns:
      The error if it failed, else nothing.

    Raises:
      KeyboardInterrupt: if somebody interrupts; the section has ended then.
    """
    section, *options = words
    command = [sys.executable, "-m", f"dqn_jax.bench.{section}", *options, "--out", str(out)]
    said = ""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace") as process:
        try:
            for line in process.stderr or ():
                print(line, end="", file=sys.stderr, flush=True)
                said = line.strip() or said
        except KeyboardInterrupt:
            _interrupt(process)
            raise
    return f"exit status {process.returncode}: {said}" if process.returncode else ""


def _interrupt(process: subprocess.Popen) -> None:
    """Has a section end as by Ctrl-C, and waits for it. The terminal tells it, too; whoever interrupts this process alone does not."""
    while True:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):  # An import may swallow an interrupt: it is told again.
            process.communicate(timeout=PATIENCE)
            return


def _write(path: Path, results: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(partial, path)


def deck_rows(measured: dict[str, Any]) -> list[tuple[str, ...]]:
    """The deck's three numbers as measured here.

    Args:
      measured: what the sections measured, by name.

    Returns:
      For each of CONTENDERS its name, the MB that it takes on disk with what it requires, the most memory that training took in MB, the
      seconds that this took from the start of the process, and steps per second once it learns; "-" where that was not measured, a star
      where other programs were running all the time.
    """
    sizes = measured.get("size", {"installed": {}, "libtorch_bytes": None})
    installed = {"libtorch": sizes["libtorch_bytes"]} | {name: one["bytes"] for name, one in sizes["installed"].items()}
    cases = {name.split(",")[0]: case for name, case in measured.get("memory", {}).items() if "the deck's" in name and "marks" in case}
    deck = next((one for one in measured.get("loops", {}).get("reports", ()) if one["work"]["deck"]), {"summary": ()})
    speeds = {line["contender"]: f"{line['steps_per_second']['median']:,.0f}{' *' if line.get('loud') else ''}" for line in deck["summary"]}
    rows: list[tuple[str, ...]] = []
    for name, (package, contender) in CONTENDERS.items():
        on_disk, case = installed.get(package), cases.get(contender)
        speed = speeds.get(contender + INLINE, speeds.get(contender))
        in_mb = ["-" if size is None else f"{size / 1e6:,.0f}" for size in (on_disk, case and case["marks"]["end"])]
        rows.append((name, *in_mb, f"{case['seconds']:.1f}" if case else "-", "-" if speed is None else speed))
    return rows


def show_deck(measured: dict[str, Any]) -> None:
    """Prints the deck's three numbers as measured here and as claimed there, if any of the sections that measure them has run."""
    if not {"size", "memory", "loops"} & set(measured):
        return
    head = ("", "installed, MB", "peak memory in training, MB", "run, s", "steps/s")
    rows = deck_rows(measured)
    report.table("the deck's three numbers, measured here in its setting", head, rows)
    steps = next((case["steps"] for case in measured.get("memory", {}).values() if "steps" in case), None)
    print("  installed: with all that it requires, extras left out; of libtorch the shared libraries alone. memory: of the process.")
    if steps is not None:
        print(
            f"  run: {steps:,} steps once, from the start of the process: imports, compilation and exploration included, JAX as it comes."
        )
    print("  steps/s: without these, ours inline where that was measured. The others compute on the CPU, whatever device JAX has.")
    if any(row[-1].endswith("*") for row in rows):
        print("  *: other programs were running during each timing. Measure again.")
    report.table("claimed there; no machine is named, and no protocol", ("", "package, MB", "training memory", "run time"), CLAIMED)


def headlines(measured: dict[str, Any]) -> dict[str, float]:
    """The few numbers of ours that are watched from run to run.

    Args:
      measured: what the sections measured, by name.

    Returns:
      By a name that ends with the unit: the size on disk, the warm import, peak memory for each case, steps per second for each piece of
      work and setting, and for each network and setting the median microseconds of ``act`` and of an update with its smallest batch.
    """
    found: dict[str, float] = {}
    if "size" in measured:
        found["installed, MB"] = measured["size"]["installed"]["dqn_jax"]["bytes"] / 1e6
        found["warm import, s"] = measured["size"]["imports"]["dqn_jax"]["warm"]["median"]
    for case, result in measured.get("memory", {}).items():
        if case.startswith("ours") and "marks" in result:
            found[f"peak memory, {case}, MB"] = result["marks"]["end"] / 1e6
    for one in measured.get("loops", {}).get("reports", ()):
        for line in one["summary"]:
            if line["contender"].partition(", ")[0] == "ours":
                found[f"{one['title']}, {line['contender']}, steps/s"] = line["steps_per_second"]["median"]
    for name in ("latency", "latency" + INLINE):
        how = name.removeprefix("latency")
        for network, kinds in measured.get(name, {}).get("acting", {}).items():
            found[f"act, {network}{how}, us"] = kinds["act"]["p50"]
        for work, kinds in measured.get(name, {}).get("learning", {}).items():  # Uniform and with the smallest batch first.
            found.setdefault(f"update, {work.split(',')[0]}{how}, us", kinds["bare update"]["p50"])
    return found


def previous(path: Path, results: dict[str, Any]) -> tuple[str, dict[str, float]] | None:
    """When the newest earlier run beside ``path`` began that measured the same on the same machine and device, and its headlines."""
    found = []
    for other in path.parent.parent.glob("*/results.json"):
        with contextlib.suppress(ValueError, TypeError, KeyError):  # A foreign or damaged file is no earlier run.
            earlier = json.loads(other.read_text())
            if other != path and _circumstances(earlier) == _circumstances(results):
                found.append((earlier["time"], headlines(earlier["measured"])))
    return max(found, key=lambda run: run[0], default=None)


def _circumstances(results: dict[str, Any]) -> tuple[Any, ...]:
    complete = [name for name in results["measured"] if name not in results["failures"]]
    return results["machine"]["processor"], results["machine"]["usable_cores"], results["device"], results["quick"], complete


def compare(before: dict[str, float], now: dict[str, float]) -> list[tuple[str, ...]]:
    """A row for each headline that both have: its name, before, now, the ratio, and a word where that lies beyond CHANGED."""
    rows: list[tuple[str, ...]] = []
    for name in [name for name in now if name in before]:
        ratio = now[name] / before[name]
        is_better = ratio > 1 if name.endswith("steps/s") else ratio < 1
        word = "" if 1 / CHANGED <= ratio <= CHANGED else "better" if is_better else "WORSE"
        rows.append((name, f"{before[name]:,.4g}", f"{now[name]:,.4g}", f"{ratio:.2f}", word))
    return rows


def show_changes(earlier: tuple[str, dict[str, float]] | None, now: dict[str, float]) -> None:
    """Prints how the headlines stand against those of an earlier run, as ``previous`` gives it, or why there is nothing to compare."""
    if not now:
        print("\nnothing that was measured is watched from run to run")
    elif earlier is None:
        print("\nno earlier run of exactly these sections, on this machine, is there to compare with")
    else:
        report.table(f"against the last one ({earlier[0]})", ("", "before", "now", "ratio", ""), compare(earlier[1], now))
