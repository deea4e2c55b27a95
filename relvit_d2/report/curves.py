"""Pictures of the report page: line charts as SVG in the page's colours, images as JPEG."""

import base64
import io
import re
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter, StrMethodFormatter
from PIL import Image

from relvit_d2.utils.printing import printable

MAX_POINTS = 240  # of a line; more are averaged
_LINES = [f"#a0000{index}" for index in range(7)]
_TEXT, _GRID = "#b00000", "#b00001"
# The drawn colours are placeholders for variables of page.css, so that charts follow light and dark mode.
_VARIABLES = {color: f"var(--c{index})" for index, color in enumerate(_LINES)}
_VARIABLES |= {_TEXT: "var(--soft)", _GRID: "var(--rule)"}
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 8.5,
    "axes.autolimit_mode": "round_numbers",  # the first and the last tick enclose the data
    "axes.xmargin": 0,
    "axes.ymargin": 0,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _TEXT,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "grid.color": _GRID,
}


class Line(NamedTuple):
    """One line of a chart."""

    name: str
    x: np.ndarray  # (n,) rising
    y: np.ndarray  # (n,)
    color: int  # index of a colour of the page
    dashed: bool = False
    margin: np.ndarray | None = None  # (n,) half the length of a vertical line at each point, NaN: no line


class Chart(NamedTuple):
    """A chart and its title, which is not part of the SVG."""

    title: str
    svg: Markup


class Picture(NamedTuple):
    """An image as a URL that contains it."""

    caption: str
    data: str

    @classmethod
    def of(cls, image: Image.Image, caption: str) -> "Picture":
        """Encode an image as JPEG, which has a fifth of the size of a PNG."""
        file = io.BytesIO()
        image.convert("RGB").save(file, "JPEG", quality=88)
        return cls(caption, f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}")


def chart(
    title: str,
    lines: Sequence[Line],
    x_name: str = "iteration",
    percent: bool = False,
    x_ticks: Sequence[float] = (),
    bounds: tuple[float, float] = (-np.inf, np.inf),
    legend: bool = False,
) -> Chart:
    """Draw lines, in their order; of more than :data:`MAX_POINTS` points, means over equal intervals.

    Args:
        title: also part of the text for screen readers.
        lines: at least one with a point.
        x_name: label of the horizontal axis.
        percent: whether the values are fractions, shown in percent.
        x_ticks: tick values of a logarithmic horizontal axis; empty: a linear axis.
        bounds: limits to which the vertical lines are clipped.
        legend: whether to show the names of the lines.
    """
    drawn = [line for line in lines if len(line.x)]
    with rc_context(_STYLE):
        figure = Figure(figsize=(4.2, 2.3))
        axes = figure.add_axes((0.16, 0.17, 0.8, 0.78))
        for line in drawn:
            single = len(line.x) == 1  # drawn as a line without length, whose round ends are a point
            x, y = (np.repeat(values, 2) if single else thinned(values) for values in (line.x, line.y))
            color, width = _LINES[line.color % 7], 4 if single else 1.2 if line.dashed else 1.6
            style = "--" if line.dashed else "-"
            axes.plot(x, y, style, color=color, linewidth=width, solid_capstyle="round", clip_on=False, label=line.name)
            for x, y, margin in zip(line.x, line.y, () if line.margin is None else line.margin, strict=False):
                if np.isfinite(margin):
                    ends = np.clip([y - margin, y + margin], *bounds)
                    axes.plot([x, x], ends, color=color, linewidth=1.2, clip_on=False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        if x_ticks:
            axes.set_xscale("log")
            axes.set_xlim(min(x_ticks) / 1.2, max(x_ticks) * 1.2)
            axes.set_xticks(x_ticks, [f"{tick:g}" for tick in x_ticks])
            axes.xaxis.set_minor_locator(NullLocator())
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(axis="y")
        axes.spines[["left", "top", "right"]].set_visible(False)
        axes.tick_params(left=False, bottom=False)
        axes.set_xlabel(x_name)
        if legend:
            axes.legend(frameon=False, labelcolor=_TEXT)
        file = io.StringIO()
        without = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=without)
    ends = "; ".join(f"{line.name} ends at {line.y[-1]:{'.1%' if percent else '.4g'}}" for line in drawn)
    return Chart(title, _inline(file.getvalue(), f"{title}: {ends}"))


def _inline(svg: str, label: str) -> Markup:
    """Return matplotlib's SVG file as an element of a page: without size, style sheet, fonts, ids and uses of them."""
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view
    body = svg[svg.index(">", view.end()) + 1 :]
    body = re.sub(r"<defs>.*?</defs>", "", body, flags=re.DOTALL)
    body = re.sub(r""" (id|clip-path)="[^"]*"| font-family: [^;"]*;""", "", body)
    for color, variable in _VARIABLES.items():
        body = body.replace(color, variable)
    return Markup(f'<svg class="chart" {view[0]} role="img" aria-label="{escape(printable(label))}">{body}')


def thinned(values: np.ndarray) -> np.ndarray:
    """Return at most :data:`MAX_POINTS` values: the means of intervals of equal length, the last one shorter."""
    starts = np.arange(0, len(values), -(-len(values) // MAX_POINTS))
    return np.add.reduceat(values, starts) / np.diff(np.append(starts, len(values)))
