"""Means over seeds, and whether a difference of two is more than the spread between runs explains."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Runs:
    """Figures of equal runs that differ in their seed.

    Attributes:
        mean: of the figures.
        spread: their sample standard deviation (n - 1); None of a single run.
        count: number of runs.
    """

    mean: float
    spread: float | None = None
    count: int = 1

    @classmethod
    def of(cls, figures: Sequence[float]) -> "Runs":
        """Sum up at least one figure."""
        return cls(statistics.fmean(figures), statistics.stdev(figures) if len(figures) > 1 else None, len(figures))


class Difference(NamedTuple):
    """Of two means.

    Attributes:
        value: the first less the second.
        margin: what runs with other seeds would differ by at most, in 95 of 100 cases, if nothing else were different;
            None where no spread is known.
    """

    value: float
    margin: float | None

    @property
    def within_noise(self) -> bool | None:
        """Whether the spread between runs explains it; None where no spread is known."""
        return None if self.margin is None else abs(self.value) <= self.margin


def difference(ours: Runs, other: Runs) -> Difference:
    """Compare two means of runs by Welch's t interval at 95 % (B. L. Welch, "The generalization of Student's problem
    when several different population variances are involved", 1947).

    Where only one spread is known, as against a figure of one run, both are taken to have it.
    """
    value = ours.mean - other.mean
    known = [(runs.spread, runs.count) for runs in (ours, other) if runs.spread is not None]
    if not known:
        return Difference(value, None)
    if len(known) == 1:
        (spread, count) = known[0]
        return Difference(value, _quantile(count - 1) * spread * math.sqrt(1 / ours.count + 1 / other.count))
    parts = [(spread**2 / count, count - 1) for spread, count in known]
    error = sum(part for part, _ in parts)
    if error == 0:
        return Difference(value, 0.0)
    freedom = error**2 / sum(part**2 / free for part, free in parts)
    return Difference(value, _quantile(freedom) * math.sqrt(error))


def _quantile(freedom: float) -> float:
    """Return the two-sided 95 % quantile of Student's t distribution."""
    from scipy.special import stdtrit  # here, since --help imports this module

    return float(stdtrit(freedom, 0.975))
