"""Means over runs and their differences: SciPy as the oracle, coverage against random draws."""

import math

import pytest
import torch
from scipy.stats import ttest_1samp, ttest_ind, ttest_rel

from relvit_d2.experiments.statistics import RunStatistics, difference, paired_difference, pairs_needed


@pytest.mark.parametrize("first", [[10.0, 11, 12], [3.0, 3.1], [1.0, 4, 2, 8]])
@pytest.mark.parametrize("second", [[13.0, 13.5, 14], [2.5, 9.0]])
def test_the_interval_is_welchs(first: list[float], second: list[float]) -> None:
    expected = ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    found = difference(RunStatistics.of(first), RunStatistics.of(second))
    assert found.margin is not None
    assert (found.value - found.margin, found.value + found.margin) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("first", [[10.0, 11, 12], [3.0, 3.1, 2.5], [1.0, 4, 2]])
def test_the_paired_interval_is_that_of_the_t_test(first: list[float]) -> None:
    second = [4.0, 3.5, 7.0]
    expected = ttest_rel(first, second).confidence_interval(0.95)
    found = paired_difference(first, second)
    assert found.margin is not None
    assert (found.value - found.margin, found.value + found.margin) == pytest.approx((expected.low, expected.high))
    assert paired_difference(first[:1], second[:1]) == (first[0] - 4.0, None)


def test_the_needed_pairs_find_a_difference_in_80_of_100_cases() -> None:
    assert pairs_needed(0.5, 1.0) == 34 and pairs_needed(-0.5, 1.0) == 34  # J. Cohen's tables, paired t test
    assert pairs_needed(1e-3, 1.0) is None and pairs_needed(0.0, 1.0) is None
    count = pairs_needed(2.0, 3.0)
    assert count is not None
    for pairs, enough in ((count, True), (count - 2, False)):
        draws = torch.randn(4000, pairs, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 2
        found = ttest_1samp(draws.numpy(), 0.0, axis=1).pvalue < 0.05
        assert (found.mean() > 0.785) == enough


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
