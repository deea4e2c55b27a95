"""Means over seeds, and whether a difference of two means exceeds the variation between runs."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

POWER = 0.8  # of the test in pairs_needed
MAX_PAIRS = 1000  # more seeds than can be run


@dataclass(frozen=True)
class RunStatistics:
    """Mean of a metric over runs that differ in their seed only.

    Attributes:
        mean: mean of the values.
        std: sample standard deviation (n - 1); None for a single run.
        count: number of runs.
    """

    mean: float
    std: float | None = None
    count: int = 1

    @classmethod
    def of(cls, values: Sequence[float]) -> "RunStatistics":
        """Return the statistics of at least one value."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


class Difference(NamedTuple):
    """Difference of two means.

    Attributes:
        value: the first mean minus the second.
        margin: half the width of the 95 % confidence interval; None where no standard deviation is known.
    """

    value: float
    margin: float | None

    @property
    def within_noise(self) -> bool | None:
        """Whether the interval contains zero; None where no standard deviation is known."""
        return None if self.margin is None else abs(self.value) <= self.margin


def difference(first: RunStatistics, second: RunStatistics) -> Difference:
    """Compare two means by Welch's t interval at 95 %.

    Source: B. L. Welch, "The generalization of Student's problem when several different population variances are
    involved", 1947. If only one standard deviation is known, as against a single published run, it is used for both.
    """
    value = first.mean - second.mean
    known = [(runs.std, runs.count) for runs in (first, second) if runs.std is not None]
    if not known:
        return Difference(value, None)
    if len(known) == 1:
        ((std, count),) = known
        return Difference(value, _t_quantile(count - 1) * std * math.sqrt(1 / first.count + 1 / second.count))
    parts = [(std**2 / count, count - 1) for std, count in known]
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return Difference(value, 0.0)
    freedom = variance**2 / sum(part**2 / free for part, free in parts)  # Welch-Satterthwaite
    return Difference(value, _t_quantile(freedom) * math.sqrt(variance))


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Compare runs that differ within each pair in one setting by the paired t interval at 95 %.

    A single pair has no margin.
    """
    pairs = RunStatistics.of([a - b for a, b in zip(first, second, strict=True)])
    if pairs.std is None:
        return Difference(pairs.mean, None)
    return Difference(pairs.mean, _t_quantile(pairs.count - 1) * pairs.std / math.sqrt(pairs.count))


def pairs_needed(difference: float, std: float) -> int | None:
    """Return the number of pairs with which a two-sided paired t test at 5 % has the power ``POWER``.

    The power is computed from the noncentral t distribution. None if more than ``MAX_PAIRS`` are needed.

    Args:
        difference: mean difference within pairs.
        std: standard deviation of the differences.
    """
    from scipy.stats import nct, t  # here, since the import takes a second

    for count in range(2, MAX_PAIRS + 1):
        limit, shift = t.ppf(0.975, count - 1), abs(difference) * math.sqrt(count) / std if std else math.inf
        if math.isinf(shift) or nct.sf(limit, count - 1, shift) + nct.cdf(-limit, count - 1, shift) >= POWER:
            return count
    return None


def _t_quantile(freedom: float) -> float:
    """Return the two-sided 95 % quantile of Student's t distribution."""
    from scipy.special import stdtrit  # here, since --help imports this module

    return float(stdtrit(freedom, 0.975))
