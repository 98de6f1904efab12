"""Statistics over runs: the interquartile mean and its bootstrap interval.

Agarwal et al., "Deep reinforcement learning at the edge of the statistical precipice" (2021).
"""

import numpy as np


def iqm(values: np.ndarray) -> float:
    """The mean of the middle half of ``values`` ``[runs]``; a quarter, rounded down, is left out at either end."""
    ordered = np.sort(np.asarray(values, np.float64))
    cut = len(ordered) // 4
    return float(ordered[cut : len(ordered) - cut].mean())


def bootstrap_interval(values: np.ndarray, *, level: float = 0.95, resamples: int = 2_000, seed: int = 0) -> tuple[float, float]:
    """The percentile bootstrap interval of the IQM of ``values`` ``[runs]``.

    Args:
      values: one number for each independent run.
      level: coverage.
      resamples: how often the runs are drawn again, with replacement.
      seed: of the resampling.
    """
    values = np.asarray(values, np.float64)
    drawn = values[np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))]  # [resamples, runs]
    low, high = np.quantile([iqm(row) for row in drawn], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
