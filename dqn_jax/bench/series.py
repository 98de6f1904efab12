"""Series of measurements along a count, such as that of seeds: at each the contenders take turns, and what they did must be the same."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dqn_jax.bench import report

STEPS, UPDATES = "steps", "updates"


class Done(NamedTuple):
    """What one measurement did.

    Attributes:
      steps: transitions stored, of all environments or seeds together.
      updates: made, of all seeds together.
      seconds: that it took.
    """

    steps: int
    updates: int
    seconds: float


class Contender(NamedTuple):
    """What is measured at one count, built and compiled.

    Attributes:
      measure: one measurement, from its number.
      compile_seconds: what compilation took.
      replay_bytes: of all replays together, None where that is not told.
      returns: the mean greedy return of what the last measurement has learnt, or () where nobody asks.
    """

    measure: Callable[[int], Done]
    compile_seconds: float
    replay_bytes: int | None
    returns: Callable[[], float] | tuple[()] = ()


class Group(NamedTuple):
    """Series along the same count.

    Attributes:
      axis: what is counted.
      unit: of what is measured.
      points: for one count after the other what ``in_turns`` gives. They are measured when they are asked for.
    """

    axis: str
    unit: str
    points: Iterator[dict[str, dict[str, Any]]]


def in_turns(count: int, contenders: dict[str, Contender], repeats: int, counted: str = STEPS) -> dict[str, dict[str, Any]]:
    """Measures the contenders, which take turns; every other round goes through them backwards, so that what drifts hits all alike.

    Args:
      count: of environments or seeds, or the batch size.
      contenders: by the name of the series.
      repeats: rounds.
      counted: the field of ``Done`` that is counted by the second.

    Returns:
      For each contender ``count``; ``steps`` and ``updates`` of each measurement; ``compile_seconds``; ``replay_bytes``; the ``median``,
      ``min`` and ``max`` of what was done in a second; ``return`` where it tells; and, but for the first, ``ratio``: the ``median``,
      ``min`` and ``max`` of how many times as fast the first one was in the same round.

    Raises:
      AssertionError: if the measurements made different numbers of steps or updates.
    """
    rounds: list[dict[str, Done]] = []
    for number in range(repeats):
        names = [*contenders][:: -1 if number % 2 else 1]
        rounds.append({name: contenders[name].measure(number) for name in names})
    made = {one._replace(seconds=0.0) for done in rounds for one in done.values()}
    if len(made) != 1:
        raise AssertionError(f"the measurements with {count} differ in what they did, {sorted(made)}: their times do not compare")
    (one,) = made
    first, points = next(iter(contenders)), {}
    for name, contender in contenders.items():
        point: dict[str, Any] = {"count": count, "steps": one.steps, "updates": one.updates}
        point |= {"compile_seconds": contender.compile_seconds, "replay_bytes": contender.replay_bytes}
        point |= report.spread([getattr(done[name], counted) / done[name].seconds for done in rounds])
        if contender.returns:
            point["return"] = contender.returns()
        if name != first:
            point["ratio"] = report.spread([done[name].seconds / done[first].seconds for done in rounds])
        points[name] = point
    return points


def measure(groups: list[Group], measured: dict[str, Any], keep: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Measures all points of all groups.

    Args:
      groups: of series.
      measured: what the section has to say beside.
      keep: is given what has been measured so far, after each count.

    Returns:
      ``measured``, and ``series``: by name the ``axis``, the ``unit`` and the ``points``.
    """
    series: dict[str, Any] = {}
    measured = {**measured, "series": series}
    for axis, unit, points in groups:
        for together in points:
            for name, point in together.items():
                series.setdefault(name, {"axis": axis, "unit": unit, "points": []})["points"].append(point)
            if keep is not None:
                keep(measured)
    return measured


def curves(measured: dict[str, Any]) -> dict[str, tuple[list[int], list[float]]]:
    """What ``measure`` gives, for plotting: for each series the counts, and the medians, in the series' unit."""
    return {
        name: ([one["count"] for one in series["points"]], [one["median"] for one in series["points"]])
        for name, series in measured["series"].items()
    }


def show(measured: dict[str, Any]) -> None:
    """Prints what ``measure`` gives."""
    for name, series in measured["series"].items():
        head = (series["axis"], series["unit"], "range", "compile s", "steps", "updates", "replay MB", "greedy return", "the first is")
        rows = [
            (
                f"{one['count']:,}",
                f"{one['median']:,.1f}",
                f"{one['min']:,.1f}-{one['max']:,.1f}",
                f"{one['compile_seconds']:.1f}",
                f"{one['steps']:,}",
                f"{one['updates']:,}",
                "-" if one["replay_bytes"] is None else f"{one['replay_bytes'] / 1e6:,.1f}",
                f"{one['return']:,.1f}" if "return" in one else "-",
                f"{report.ranged(one['ratio'], '.2f')} times as fast" if "ratio" in one else "-",
            )
            for one in series["points"]
        ]
        report.table(f"{name}, on {measured['device']}", head, rows)
    for name, why in measured["left_out"].items():
        print(f"\n{name} is left out: {why}", flush=True)


def run(measure: Callable[..., dict[str, Any]], quick: bool, out: Path | None, **beside: Any) -> None:
    """What the command of a section of series does: as ``report.run``, but the file is written after each count.

    Args:
      measure: from ``quick`` and ``keep``, as above, to what ``measure`` gives.
      quick: a little of everything.
      out: the file, or None.
      **beside: what else is to stand in it.
    """
    keep = functools.partial(_keep, out, beside)
    report.run(lambda quick: measure(quick=quick, keep=keep), show, quick, out, **beside)


def _keep(out: Path | None, beside: dict[str, Any], measured: dict[str, Any]) -> None:
    report.write(out, {**beside, **measured})
