"""Statistics over runs: the interquartile mean against hand examples, and what its bootstrap interval promises."""

import numpy as np
import pytest

from dqn_jax.statistics import bootstrap_interval, iqm


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([7.0], 7.0),
        ([1.0, 2.0, 6.0], 3.0),  # A quarter of three, rounded down, is none: the mean of all.
        ([1000.0, 2.0, 4.0, -1000.0], 3.0),  # The order in which runs come does not matter.
        ([0.0, 0.0, 1.0, 2.0, 3.0, 6.0, 100.0, 100.0], 3.0),
        (np.arange(100.0) ** 2, np.mean(np.arange(25.0, 75.0) ** 2)),
    ],
    ids=["1", "3", "4", "8", "100"],
)
def test_iqm_is_the_mean_of_the_middle_half(values, expected):
    assert iqm(np.array(values)) == pytest.approx(expected)


def test_iqm_leaves_its_argument_alone():
    values = np.array([3.0, 1.0, 2.0, 0.0])
    iqm(values)
    bootstrap_interval(values)
    np.testing.assert_array_equal(values, [3.0, 1.0, 2.0, 0.0])


@pytest.mark.parametrize("runs", [3, 10, 50])
def test_interval_contains_the_iqm(runs):
    values = np.random.default_rng(runs).exponential(size=runs)
    low, high = bootstrap_interval(values)
    assert low < iqm(values) < high
    assert values.min() <= low and high <= values.max()


def test_one_run_or_equal_runs_have_no_width():
    assert bootstrap_interval(np.array([5.0])) == (5.0, 5.0)
    assert bootstrap_interval(np.full(6, 2.0)) == (2.0, 2.0)


def test_interval_is_a_function_of_its_arguments():
    values = np.random.default_rng(0).normal(size=10)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values) != bootstrap_interval(values, seed=1)


def test_interval_shifts_and_scales_with_the_values():
    values = np.random.default_rng(0).normal(size=10)
    low, high = bootstrap_interval(values)
    assert bootstrap_interval(3 * values + 100) == pytest.approx((3 * low + 100, 3 * high + 100))


def test_a_higher_level_is_a_wider_interval():
    values = np.random.default_rng(0).normal(size=20)
    low, high = bootstrap_interval(values, level=0.5)
    lower, higher = bootstrap_interval(values, level=0.95)
    assert lower < low < high < higher


def test_interval_shrinks_as_runs_are_added():
    random = np.random.default_rng(0)
    widths = [np.mean([np.ptp(bootstrap_interval(random.normal(size=runs), resamples=200)) for _ in range(10)]) for runs in (5, 20, 80)]
    # Errors of a mean go down with the root of the runs: by 2 from one count to the next. Half of that is asked for.
    assert widths[0] > 1.4 * widths[1] > 1.4 * 1.4 * widths[2]


def test_coverage_is_about_the_level():
    random = np.random.default_rng(0)
    intervals = [bootstrap_interval(random.normal(loc=3.0, size=30), level=0.9, resamples=200) for _ in range(200)]
    covered = np.mean([low <= 3.0 <= high for low, high in intervals])
    # 200 trials have a standard error of 0.02; the percentile bootstrap is known to cover somewhat less than it says.
    assert 0.80 <= covered <= 0.97
