"""Means over runs and their differences: SciPy as the oracle, coverage against random draws."""

import math

import pytest
import torch
from scipy.stats import ttest_ind

from relvit_d2.experiments.statistics import RunStatistics, difference


@pytest.mark.parametrize("first", [[10.0, 11, 12], [3.0, 3.1], [1.0, 4, 2, 8]])
@pytest.mark.parametrize("second", [[13.0, 13.5, 14], [2.5, 9.0]])
def test_the_interval_is_welchs(first: list[float], second: list[float]) -> None:
    expected = ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    found = difference(RunStatistics.of(first), RunStatistics.of(second))
    assert found.margin is not None
    assert (found.value - found.margin, found.value + found.margin) == pytest.approx((expected.low, expected.high))


def test_a_difference_is_judged_by_the_spread_of_runs() -> None:
    ours, theirs = RunStatistics.of([10.0, 11, 12]), RunStatistics.of([13.0, 13.5, 14])
    assert (ours.mean, ours.std, ours.count) == (11, 1, 3)
    found = difference(ours, theirs)
    # By hand: variances of the means 1/3 and 1/12, degrees of freedom (5/12)^2 / (1/18 + 1/288) = 2.94.
    assert found.value == -2.5 and 3.182 < found.margin / math.sqrt(5 / 12) < 4.303  # type: ignore[operator]
    assert not found.within_noise
    # Against one published run: it is taken to spread as ours do.
    single = difference(ours, RunStatistics(20.0))
    assert single.margin == pytest.approx(4.303 * math.sqrt(1 / 3 + 1), rel=1e-4) and single.within_noise is False
    assert difference(RunStatistics(3.0), RunStatistics(9.0)) == (-6.0, None)
    assert difference(RunStatistics(3.0), RunStatistics(9.0)).within_noise is None


def test_runs_that_differ_by_chance_are_within_noise_in_95_of_100_cases() -> None:
    draws = torch.randn(2000, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    within = [difference(RunStatistics.of(a), RunStatistics.of(b)).within_noise for a, b in draws]
    assert 0.94 < sum(map(bool, within)) / len(within) < 0.96
