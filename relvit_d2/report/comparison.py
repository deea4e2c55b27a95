"""The page of a comparison of training procedures, one HTML file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from relvit_d2.report.curves import Line, chart
from relvit_d2.report.page import environment
from relvit_d2.utils.files import write_text


class Point(NamedTuple):
    """Mean of a metric over seeds.

    Attributes:
        share: share of the labels in percent.
        mean: mean of the metric in percent.
        margin: half the width of its 95 % interval; None for one seed.
    """

    share: float
    mean: float
    margin: float | None


Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]  # heading, heads of the columns, rows


def write_comparison(
    title: str,
    sentences: Sequence[str],
    curves: Mapping[str, Mapping[str, Sequence[Point]]],
    tables: Sequence[Table],
    notes: Sequence[str],
    path: Path,
) -> None:
    """Write the page.

    Args:
        title: heading of the page.
        sentences: the verdict.
        curves: points of each arm by ascending share, for each metric; a metric without points is not drawn.
        tables: tables in their order on the page.
        notes: paragraphs on data, machine and command.
        path: the HTML file, written atomically.
    """
    arms = list(dict.fromkeys(arm for points in curves.values() for arm in points))
    shares = sorted({point.share for arm in curves.values() for points in arm.values() for point in points})
    charts = []
    for metric, by_arm in curves.items():
        lines = [_line(arm, by_arm.get(arm, ()), color, color - (len(arms) - 1) / 2) for color, arm in enumerate(arms)]
        if any(len(line.x) for line in lines):
            charts.append(chart(metric, lines, "labelled images, percent", x_ticks=shares, bounds=(0, 100)))
    page = environment().get_template("comparison.html")
    shown = {"title": title, "sentences": sentences, "arms": arms, "charts": charts, "tables": tables, "notes": notes}
    write_text(path, page.render(shown))


def _line(arm: str, points: Sequence[Point], color: int, shift: float) -> Line:
    """Return the line of an arm, shifted horizontally so that intervals do not overlap."""
    x, y, margin = np.array(points, dtype=np.float64).reshape(-1, 3).T
    return Line(arm, x * 1.03**shift, y, color, margin=margin)
