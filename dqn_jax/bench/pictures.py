"""The benchmark's pictures, where matplotlib is installed: bars for the loops, curves for how they scale."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dqn_jax.bench import series

OURS, OTHERS = "tab:blue", "tab:gray"


def draw(measured: dict[str, Any], folder: Path) -> list[Path]:
    """Draws what there is to draw into ``folder``, as PNG; a line says how to get matplotlib where it is missing.

    Args:
      measured: what the sections measured, by name.
      folder: where the pictures go.

    Returns:
      The pictures: ``loops.png``, and ``scaling.png`` of the sections that measure series, of those of them that have been measured.
    """
    reports = measured.get("loops", {}).get("reports", [])
    scaled = {name: section for name, section in measured.items() if name.startswith(("scaling", "nature"))}
    if not reports and not scaled:
        return []
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError:
        print("\nno pictures: they need matplotlib, pip install 'dqn_jax[plots]'", flush=True)
        return []
    drawn = []
    if reports:
        drawn.append(draw_loops(reports, folder / "loops.png"))
    if scaled:
        drawn.append(draw_scaling(scaled, folder / "scaling.png"))
    return drawn


def draw_loops(reports: list[dict[str, Any]], path: Path) -> Path:
    """Steps per second of every contender, medians as bars and ranges as whiskers, ours on top, for each of the section's reports."""
    from matplotlib.figure import Figure

    heights = [len(one["summary"]) + 2 for one in reports]
    figure = Figure(figsize=(9, 0.25 * sum(heights) + 0.5), layout="constrained")
    panels: Iterable[Any] = figure.subplots(len(reports), height_ratios=heights, squeeze=False)[:, 0]
    for axes, one in zip(panels, reports, strict=True):
        # Stable: the others stay in their order.
        lines = sorted(one["summary"], key=lambda line: not line["contender"].startswith("ours"))
        names, speeds = [line["contender"] for line in lines], [line["steps_per_second"] for line in lines]
        medians = [speed["median"] for speed in speeds]
        ranges = [[speed["median"] - speed["min"] for speed in speeds], [speed["max"] - speed["median"] for speed in speeds]]
        colors = [OURS if name.startswith("ours") else OTHERS for name in names]
        axes.barh(names, medians, xerr=ranges, color=colors, ecolor="black", capsize=2)
        axes.invert_yaxis()
        axes.set_title(one["title"], loc="left", fontsize="medium")
        axes.set_xlabel("environment steps per second (median and range)")
        axes.xaxis.set_major_formatter("{x:,.0f}")
    figure.savefig(path, dpi=120)
    return path


def draw_scaling(sections: dict[str, dict[str, Any]], path: Path) -> Path:
    """The curves of the sections, both axes logarithmic: for each of its entries a row of panels, and for each unit a panel in it."""
    from matplotlib.figure import Figure

    units = list(dict.fromkeys(one["unit"] for section in sections.values() for one in section["series"].values()))
    figure = Figure(figsize=(6.5 * len(units), 4.5 * len(sections)), layout="constrained")
    grid = figure.subplots(len(sections), len(units), sharex="col", sharey="col", squeeze=False)
    for row, (entry, section) in zip(grid, sections.items(), strict=True):
        for axes, unit in zip(row, units, strict=True):
            chosen = {name: one for name, one in section["series"].items() if one["unit"] == unit}
            for name, (counts, medians) in series.curves(section | {"series": chosen}).items():
                axes.loglog(counts, medians, marker="o", label=name)
            if not chosen:  # The section has none of this unit, or failed on its way.
                axes.set_visible(False)
                continue
            axes.legend()
            axes.set(title=entry, xlabel=" or ".join(dict.fromkeys(one["axis"] for one in chosen.values())), ylabel=f"{unit} (median)")
    figure.savefig(path, dpi=120)
    return path
