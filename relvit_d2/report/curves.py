"""Line charts as SVG that follow the page's colours and need nothing but a browser."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

WIDTH, HEIGHT = 420, 250  # units of the drawing, which scales with the page
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 30, 34  # margins of the plot
MOST = 240  # points of a line; more are averaged


class Line(NamedTuple):
    """One line of a chart."""

    name: str
    x: np.ndarray  # (n,) rising
    y: np.ndarray  # (n,)
    color: int  # index of a colour of the page
    dashed: bool = False


def chart(title: str, lines: Sequence[Line], x_name: str = "iteration", unit: str = "") -> str:
    """Return one chart.

    Args:
        title: stands above and is the text for those who do not see the picture.
        lines: drawn in this order; of more than :data:`MOST` points, means over equal runs of points are drawn.
        x_name: what the horizontal axis counts.
        unit: ``"%"`` shows fractions in percent; else put behind the numbers.

    Raises:
        ValueError: if no line has a point.
    """
    drawn = [line._replace(x=thinned(line.x), y=thinned(line.y)) for line in lines if len(line.x)]
    if not drawn:
        raise ValueError("a chart needs a point")
    scale = 100.0 if unit == "%" else 1.0
    xs, ys = np.concatenate([line.x for line in drawn]), np.concatenate([line.y for line in drawn]) * scale
    x_ticks, y_ticks = ticks(float(xs.min()), float(xs.max())), ticks(float(ys.min()), float(ys.max()))
    x0, x1 = min(x_ticks[0], float(xs.min())), max(x_ticks[-1], float(xs.max()))
    y0, y1 = y_ticks[0], y_ticks[-1]

    def across(value: float) -> float:
        return LEFT + (value - x0) / ((x1 - x0) or 1) * (WIDTH - LEFT - RIGHT)

    def up(value: float) -> float:
        return HEIGHT - BOTTOM - (value - y0) / ((y1 - y0) or 1) * (HEIGHT - TOP - BOTTOM)

    ends = "; ".join(f"{line.name} ends at {number(float(line.y[-1]) * scale)}{unit}" for line in drawn)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{title}: {ends}")}">',
        f'<text class="title" x="{LEFT}" y="18">{escape(title)}</text>',
    ]
    for tick in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{up(tick) + 4:.1f}" text-anchor="end">{number(tick)}{unit}</text>'
        )
    for tick in x_ticks:
        place = across(tick)
        anchor = "end" if place > WIDTH - RIGHT - 12 else "middle"
        parts.append(
            f'<text class="tick" x="{place:.1f}" y="{HEIGHT - 18}" text-anchor="{anchor}">{number(tick)}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="tick" x="{middle:.0f}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_name)}</text>')
    for line in drawn:
        style = f"c{line.color % 7}{' dashed' if line.dashed else ''}"
        points = " ".join(f"{across(x):.1f},{up(y * scale):.1f}" for x, y in zip(line.x, line.y, strict=True))
        if len(line.x) == 1:
            x, y = points.split(",")
            parts.append(f'<circle class="{style}" cx="{x}" cy="{y}" r="4"><title>{escape(line.name)}</title></circle>')
        else:
            parts.append(f'<polyline class="{style}" points="{points}"><title>{escape(line.name)}</title></polyline>')
    return "".join([*parts, "</svg>"])


def thinned(values: np.ndarray) -> np.ndarray:
    """Return at most :data:`MOST` values: the means of runs of equal length, the last one shorter."""
    length = -(-len(values) // MOST)
    if length <= 1:
        return values
    starts = np.arange(0, len(values), length)
    return np.add.reduceat(values, starts) / np.diff(np.append(starts, len(values)))


def ticks(low: float, high: float) -> list[float]:
    """Return three to seven round numbers, equally far apart, from at or below ``low`` to at or above ``high``."""
    if not high > low:
        low, high = (low - 0.5, high + 0.5) if low else (0.0, 1.0)
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def number(value: float) -> str:
    """Return a number in few characters: three significant digits, no exponent where it can be avoided."""
    if not math.isfinite(value):
        return "-"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
