"""What the benchmarks print of repeated measurements."""

import statistics


def spread(values: list[float]) -> dict[str, float]:
    """The median and the range of repeated measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def show(title: str, measured: dict[str, dict[str, float]]) -> None:
    """Prints a table: a line with median and range for each contender, as ``spread`` gives them."""
    print(f"\n{title}")
    for name, value in measured.items():
        print(f"  {name:32} {value['median']:12,.2f} ({value['min']:,.2f}-{value['max']:,.2f})", flush=True)
