"""One self-contained HTML page on one or several runs: no network, no server, no script."""

import logging
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from relvit_d2.report.curves import MOST, Line, chart
from relvit_d2.report.detection_sections import detection_sections
from relvit_d2.report.html import figure, grid, table
from relvit_d2.report.pretext import sheet_of_run
from relvit_d2.report.result_sections import class_tables, result_table, seed_table, verdict
from relvit_d2.report.runs import Run, read_runs
from relvit_d2.report.style import STYLE
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import write_text
from relvit_d2.utils.metrics import from_scalars

logger = logging.getLogger(__name__)


def write_report(folders: Sequence[Path], path: Path) -> None:
    """Write the page on the runs in ``folders``, with what pre-training sees and answers for runs of it.

    Raises:
        UserError: if a folder is none of a run, or the page cannot be written.
    """
    runs = read_runs(list(folders))
    pictures = {}
    for run in runs:
        if not run.pretrains:
            continue
        try:
            sheet = sheet_of_run(run.folder)
        except UserError as error:
            logger.warning(f"no picture of what '{run.folder}' sees: {error}")
        else:
            pictures[f"{run.name}: images, what the encoder sees of them, and what it answers"] = sheet
    write_page(runs, path, pictures)


def write_page(runs: Sequence[Run], path: Path, pictures: dict[str, Image.Image] | None = None) -> None:
    """Write the page.

    Args:
        runs: one, or several to compare; differences are those to the first.
        path: the HTML file; it appears whole or not at all.
        pictures: further pictures by caption.
    """
    title = "One run" if len(runs) == 1 else f"{len(runs)} runs"
    sections = [
        ("What was run", _what_was_run(runs)),
        ("Results", result_table(runs)),
        ("Seeds", seed_table(runs)),
        ("Per class", class_tables(runs)),
        ("Learning curves", _curves(runs)),
        *(
            (f"Detections: {run.name}, {name}" if len(runs) > 1 else f"Detections: {name}", text)
            for run, name, text in detection_sections(runs)
        ),
        (
            "What pre-training sees and answers",
            "".join(figure(picture, caption) for caption, picture in (pictures or {}).items()),
        ),
        ("All keys", _all_keys(runs)),
    ]
    shown = [(heading, text) for heading, text in sections if text]
    toc = "".join(f'<a href="#s{i}">{escape(heading)}</a>' for i, (heading, _) in enumerate(shown))
    body = "".join(
        f'<section id="s{i}"><h2>{escape(heading)}</h2>{text}</section>' for i, (heading, text) in enumerate(shown)
    )
    names = ", ".join(run.name for run in runs)
    write_text(
        path,
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>relvit_d2: {escape(names)}</title><style>{STYLE}</style></head><body>"
        f"<header><h1>{escape(title)}: {escape(names)}</h1>{_verdicts(runs)}{_legend(runs)}<nav>{toc}</nav></header>"
        f"<main>{body}</main></body></html>\n",
    )


def _verdicts(runs: Sequence[Run]) -> str:
    """Say each run's result in a sentence."""
    sentences = []
    for run in runs:
        last = f" after {int(run.rows[-1]['iteration']) + 1} iterations" if run.rows else ""
        said = escape("; ".join(verdict(run)) or "no evaluation yet")
        sentences.append(f"<li><b>{escape(run.name)}</b>: {said}{last}</li>")
    return f"<ul class='verdict'>{''.join(sentences)}</ul>"


def _legend(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return ""
    return f"<p class='legend'>{''.join(_key(run.name, i) for i, run in enumerate(runs))}</p>"


def _key(name: str, color: int) -> str:
    line = f'<svg viewBox="0 0 22 8"><polyline class="c{color % 7}" points="0,4 22,4"/></svg>'
    return f'<span class="key">{line}{escape(name)}</span>'


def _what_was_run(runs: Sequence[Run]) -> str:
    def told(key: str) -> Callable[[Run], Any]:
        return lambda run: run.info.get(key, "")

    def keyed(*keys: str) -> Callable[[Run], Any]:
        return lambda run: ", ".join(str(run.config[key]) for key in keys if run.config.get(key) not in (None, ""))

    facts: list[tuple[str, Callable[[Run], Any]]] = [
        ("folder", lambda run: run.folder),
        ("command", told("command")),
        ("encoder", keyed("MODEL.ENCODER.NAME", "MODEL.ENCODER.PATCH_SIZE")),
        ("weights at the start", lambda run: run.config.get("MODEL.WEIGHTS") or "from scratch"),
        ("trained on", lambda run: ", ".join(run.config.get("DATASETS.TRAIN") or ())),
        ("evaluated on", lambda run: ", ".join(run.config.get("DATASETS.TEST") or ())),
        (
            "iterations x batch",
            lambda run: f"{run.config.get('SOLVER.MAX_ITER')} x {run.config.get('SOLVER.IMS_PER_BATCH')}",
        ),
        ("seed", keyed("SEED")),
        ("precision", told("precision")),
        ("machine", told("machine")),
        ("versions", told("versions")),
        ("commit", told("commit")),
        ("started", told("started")),
    ]
    rows = []
    for name, tell in facts:
        values = [str(tell(run)) for run in runs]
        if any(values):
            differ = len(set(values)) > 1
            rows.append(
                [name, *(f"<span class='{'differs' if differ else ''}'>{escape(v) or '-'}</span>" for v in values)]
            )
    return table(["", *(escape(run.name) for run in runs)], rows, numbers=False) + _differences(runs)


def _differences(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return ""
    keys = sorted({key for run in runs for key in run.config if key not in ("OUTPUT_DIR",)})
    rows = []
    for key in keys:
        values = [run.config.get(key, "-") for run in runs]
        if any(value != values[0] for value in values):
            rows.append([f"<code>{escape(key)}</code>", *(escape(str(value)) for value in values)])
    if not rows:
        return "<p>The configs are the same.</p>"
    return "<h3>Keys that differ</h3>" + table(["key", *(escape(run.name) for run in runs)], rows, numbers=False)


def _curves(runs: Sequence[Run]) -> str:
    """Return a chart for each scalar, accuracies with the level of chance as a dashed line."""
    first: list[str] = []
    rest: list[str] = []
    names = {name for run in runs for name in run.scalars}
    chances = {metric.value: metric.chance for metric in from_scalars({name: name for name in names}).values()}
    for name in sorted(names - {*chances.values()}, key=_order):
        last = name.rpartition("/")[2]
        if "-" in last or name in ("data_time", "eta_seconds"):
            continue
        lines = [Line(run.name, *run.series(name), i) for i, run in enumerate(runs)]
        if chance := chances.get(name):
            lines += [Line(f"chance ({run.name})", *run.series(chance), i, dashed=True) for i, run in enumerate(runs)]
        if any(len(line.x) > 1 for line in lines):
            percent = "accuracy" in last and max(line.y.max() for line in lines if len(line.y)) <= 1
            drawn = chart(name.replace("_", " "), lines, unit="%" if percent else "")
            (first if _order(name)[0] < len(_KINDS) else rest).append(drawn)
    if not first + rest:
        return ""
    note = "Dashed: the level of chance. " if any("dashed" in text for text in first) else ""
    more = f"<details><summary>{len(rest)} more</summary>{grid(rest)}</details>" if rest else ""
    return f"<p>{note}Lines of more than {MOST} points show means of equal runs of points.</p>{grid(first)}{more}"


# What comes first among curves, in this order.
_KINDS = (r"total_loss$", r"loss", r"accuracy", r".*/(AP|accuracy|loss|error)", r"error", r"lr$")


def _order(name: str) -> tuple[int, str]:
    return next((i for i, kind in enumerate(_KINDS) if re.match(kind, name)), len(_KINDS)), name


def _all_keys(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        rows = [
            [f"<code>{escape(key)}</code>", f"<code>{escape(str(run.config[key]))}</code>"]
            for key in sorted(run.config)
        ]
        keys = table(["key", "value"], rows, numbers=False)
        parts.append(f"<details><summary>{escape(run.name)}: {len(rows)} keys</summary>{keys}</details>")
    return "".join(parts)
