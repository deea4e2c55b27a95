"""Means over runs and their differences: Student's t against its density, coverage against random draws."""

import math

import pytest
import torch

from relvit_d2.experiments.statistics import _T, RunStatistics, difference


def test_quantiles_are_students() -> None:
    """The density, summed up between the two quantiles, is 95 %."""
    for freedom, quantile in enumerate(_T, start=1):
        scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
        x = torch.linspace(-quantile, quantile, 200_001, dtype=torch.float64)
        density = scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
        assert torch.trapezoid(density, x).item() == pytest.approx(0.95, abs=5e-5)


def test_a_difference_is_judged_by_the_spread_of_runs() -> None:
    ours, theirs = RunStatistics.of([10.0, 11, 12]), RunStatistics.of([13.0, 13.5, 14])
    assert (ours.mean, ours.std, ours.count) == (11, 1, 3)
    # By hand: variances of the means 1/3 and 1/12, degrees of freedom (5/12)^2 / (1/18 + 1/288) = 2.94, rounded down.
    found = difference(ours, theirs)
    assert found.value == -2.5 and found.margin == pytest.approx(4.303 * math.sqrt(5 / 12))
    assert found.within_noise
    # Against one published run: it is taken to spread as ours do.
    single = difference(ours, RunStatistics(20.0))
    assert single.margin == pytest.approx(4.303 * math.sqrt(1 / 3 + 1)) and single.within_noise is False
    assert difference(RunStatistics(3.0), RunStatistics(9.0)) == (-6.0, None)
    assert difference(RunStatistics(3.0), RunStatistics(9.0)).within_noise is None


def test_runs_that_differ_by_chance_are_within_noise_in_95_of_100_cases() -> None:
    draws = torch.randn(2000, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    within = [difference(RunStatistics.of(a), RunStatistics.of(b)).within_noise for a, b in draws]
    assert 0.94 < sum(map(bool, within)) / len(within) < 0.98  # a little wider, for degrees are rounded down
