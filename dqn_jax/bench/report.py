"""What the benchmarks have in common: their commands, summaries of repeated measurements, tables, and the file of results."""

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tyro

from dqn_jax.bench import machine

Kind = TypeVar("Kind")


def options(kind: type[Kind], description: str | None) -> Kind:
    """A section's options, from the command line. It exits where ``--out`` cannot be written: better now than after an hour."""
    given = tyro.cli(kind, description=description)
    out: Path | None = given.out  # type: ignore[attr-defined]
    try:
        if out is not None:
            out.touch()
    except OSError as error:
        sys.exit(f"--out {out} cannot be written ({error.strerror}): name another file")
    return given


def command(main: Callable[[], None]) -> None:
    """Runs a section as a program, which Ctrl-C ends without a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # As shells have it for SIGINT.


def spread(values: list[float]) -> dict[str, float]:
    """The median and the range of repeated measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ranged(values: dict[str, float], spec: str) -> str:
    """``median (min-max)`` of what ``spread`` gives, each number by a format such as ``,.0f``."""
    return f"{values['median']:{spec}} ({values['min']:{spec}}-{values['max']:{spec}})"


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The 50th, 95th and 99th percentile, in the unit of the values, and how many there were.

    Raises:
      ValueError: if there are no values.
    """
    if not len(values):
        raise ValueError("no values, so no percentiles")
    p50, p95, p99 = np.percentile(np.asarray(values, np.float64), (50, 95, 99)).tolist()
    return {"p50": p50, "p95": p95, "p99": p99, "calls": len(values)}


def show(title: str, measured: dict[str, dict[str, float]]) -> None:
    """Prints a table: a line with median and range for each contender, as ``spread`` gives them."""
    print(f"\n{title}")
    for name, value in measured.items():
        print(f"  {name:32} {value['median']:12,.2f} ({value['min']:,.2f}-{value['max']:,.2f})", flush=True)


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints lines in columns: the first to the left, the others to the right."""
    print(f"\n{title}")
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for first, *others in [head, *rows]:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        print("  " + "  ".join(cells).rstrip(), flush=True)


def run(
    measure: Callable[[bool], dict[str, Any]], show: Callable[[dict[str, Any]], None], quick: bool, out: Path | None, **beside: Any
) -> dict[str, Any]:
    """What the command of a section does: ``measure(quick)``, ``show`` it, and write it to ``out`` with what is said ``beside`` it.

    Returns:
      What was written, but for the machine.
    """
    measured = {**beside, **measure(quick)}
    show(measured)
    write(out, measured)
    return measured


def write(out: Path | None, measured: dict[str, Any]) -> None:
    """Writes what was measured to a JSON file, the machine described beside it; without a file does nothing."""
    if out is not None:
        out.write_text(json.dumps({"machine": machine.describe(), **measured}, indent=2) + "\n")
