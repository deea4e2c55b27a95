"""One self-contained HTML page on one or several runs: no network, no server, no script."""

import base64
import io
import logging
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from relvit_d2.data.decode import read_rgb
from relvit_d2.errors import UserError
from relvit_d2.files import write_text
from relvit_d2.report.curves import MOST, Line, chart
from relvit_d2.report.detections import MIN_IOU, MIN_SCORE, Judged, JudgedImage, judge
from relvit_d2.report.predictions import DetectionRow, detections_sheet
from relvit_d2.report.pretext import sheet_of_run
from relvit_d2.report.runs import Run, read_runs
from relvit_d2.report.style import STYLE

logger = logging.getLogger(__name__)

SHOWN = 6  # best and worst images each
MOST_CLASSES = 30  # rows of a confusion table; of more classes, the most confused


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


def report_run(folder: Path) -> None:
    """Write ``report.html`` on the run in ``folder`` into it; a fault is told and spoils nothing."""
    try:
        write_report([folder], folder / "report.html")
    except UserError as error:
        logger.warning(f"no report was written: {error}")
    else:
        logger.info(f"report: {folder / 'report.html'}")


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
        ("Results", _results(runs)),
        ("Seeds", _seeds(runs)),
        ("Per class", _per_class(runs)),
        ("Learning curves", _curves(runs)),
        *(
            (f"Detections: {run.name}, {name}" if len(runs) > 1 else f"Detections: {name}", text)
            for run, name, text in _detections(runs)
        ),
        (
            "What pre-training sees and answers",
            "".join(_figure(picture, caption) for caption, picture in (pictures or {}).items()),
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
        f"<header><h1>{escape(title)}: {escape(names)}</h1>{_verdict(runs)}{_legend(runs)}<nav>{toc}</nav></header>"
        f"<main>{body}</main></body></html>\n",
    )


def _verdict(runs: Sequence[Run]) -> str:
    """Say each run's result in a sentence."""
    sentences = []
    for run in runs:
        said = [
            f"{task} {key} {value:.1f} on {name}"
            for name, tasks in run.results.items()
            for task, figures in tasks.items()
            if isinstance(figures, dict) and (key := next(iter(figures), None)) and isinstance(figures[key], float)
            for value in [figures[key]]
        ]
        for name, figures in run.results.items():
            for task in ("relation", "position"):
                accuracy, chance = figures.get(f"accuracy_{task}"), figures.get(f"chance_{task}")
                if isinstance(accuracy, float) and isinstance(chance, float):
                    said.append(f"{task} accuracy {accuracy:.1%} (chance {chance:.1%}) on {name.replace('_', ' ')}")
        last = f" after {int(run.rows[-1]['iteration']) + 1} iterations" if run.rows else ""
        sentences.append(f"<li><b>{escape(run.name)}</b>: {escape('; '.join(said) or 'no evaluation yet')}{last}</li>")
    return f"<ul class='verdict'>{''.join(sentences)}</ul>"


def _legend(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return ""
    return f"<p class='legend'>{''.join(_key(run.name, i) for i, run in enumerate(runs))}</p>"


def _key(name: str, color: int) -> str:
    line = f'<svg viewBox="0 0 22 8"><polyline class="c{color % 7}" points="0,4 22,4"/></svg>'
    return f'<span class="key">{line}{escape(name)}</span>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = True) -> str:
    """Return a table whose cells are HTML already."""
    cells = "".join(
        f"<tr><th scope='row'>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>" for row in rows
    )
    heads = "".join(f"<th scope='col'>{name}</th>" for name in head)
    kind = " class='numbers'" if numbers else ""
    return f"<div class='scroll'><table{kind}><thead><tr>{heads}</tr></thead><tbody>{cells}</tbody></table></div>"


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
    return _table(["", *(escape(run.name) for run in runs)], rows, numbers=False) + _differences(runs)


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
    return "<h3>Keys that differ</h3>" + _table(["key", *(escape(run.name) for run in runs)], rows, numbers=False)


def _flat_results(run: Run) -> dict[tuple[str, str, str], float | None]:
    """Return (data set, task, figure) -> value; a pre-training's figures have no task."""
    flat: dict[tuple[str, str, str], float | None] = {}
    for name, tasks in run.results.items():
        for task, figures in tasks.items():
            for key, value in figures.items() if isinstance(figures, dict) else [("", figures)]:
                if value is None or isinstance(value, int | float):
                    flat[name, task, key] = value
    return flat


def _results(runs: Sequence[Run]) -> str:
    flats = [_flat_results(run) for run in runs]
    keys = list(dict.fromkeys(key for flat in flats for key in flat if "-" not in key[2]))
    if not keys:
        return ""
    rows = []
    for name, task, figure in keys:
        label = escape(_label(name, task, figure))
        values = [flat.get((name, task, figure)) for flat in flats]
        cells = [_value(value) for value in values]
        for i, value in enumerate(values[1:], start=1):
            if value is not None and values[0] is not None and not task.startswith("chance"):
                cells[i] += f" <span class='difference'>({value - values[0]:+.3g})</span>"
        rows.append([label, *cells])
    note = "" if len(runs) == 1 else f"<p>In brackets: the difference to {escape(runs[0].name)}.</p>"
    note += "<p>AP figures are in percent; accuracies and chances are fractions. “-”: there was nothing to find.</p>"
    return _table(["", *(escape(run.name) for run in runs)], rows) + note


def _label(name: str, task: str, figure: str) -> str:
    """Name a figure of :func:`_flat_results`; a data set keeps its name as it is."""
    where = "" if name in ("held_out", "training_images") else name
    return " ".join(word for word in (where, task.replace("_", " "), figure) if word)


def _value(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4g}"


def _seeds(runs: Sequence[Run]) -> str:
    """Return the mean and spread of each arm of several runs that differ in the seed alone."""
    arms: dict[str, list[Run]] = {}
    for run in runs:
        arms.setdefault(run.arm, []).append(run)
    several = [arm for arm in arms.values() if len(arm) > 1]
    if not several:
        return ""
    rows = []
    for arm in several:
        for key in _flat_results(arm[0]):
            found = [flat[key] for run in arm if key in (flat := _flat_results(run))]
            values = [value for value in found if value is not None]
            if "-" not in key[2] and not key[1].startswith("chance") and len(values) > 1:
                mean, spread = statistics.mean(values), statistics.stdev(values)
                seeds = ", ".join(str(run.config.get("SEED")) for run in arm)
                rows.append(
                    [
                        escape(arm[0].name),
                        escape(_label(*key)),
                        _value(mean),
                        _value(spread),
                        f"{len(values)} ({seeds})",
                    ]
                )
    heads = ["arm, by its first run", "figure", "mean", "standard deviation", "runs (seeds)"]
    return _table(heads, rows) + "<p>Runs of one arm have the same config but for the seed.</p>"


def _per_class(runs: Sequence[Run]) -> str:
    tables = []
    flats = [_flat_results(run) for run in runs]
    groups = dict.fromkeys((n, t, f.partition("-")[0]) for flat in flats for n, t, f in flat if "-" in f)
    for name, task, figure in groups:
        classes = dict.fromkeys(
            f.partition("-")[2]
            for flat in flats
            for n, t, f in flat
            if (n, t) == (name, task) and f.startswith(f"{figure}-")
        )
        rows = []
        for label in classes:
            values = [flat.get((name, task, f"{figure}-{label}")) for flat in flats]
            rows.append([escape(label), *(_bar(value) for value in values)])
        heading = f"<h3>{escape(f'{figure} of {name}, {task}')}</h3>"
        tables.append(heading + _table(["class", *(escape(run.name) for run in runs)], rows))
    return "".join(tables)


def _bar(value: float | None) -> str:
    """Return a percentage with a bar behind it."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"<span class='bar' style='--share:{min(max(value, 0), 100):.0f}%'>{value:.1f}</span>"


def _curves(runs: Sequence[Run]) -> str:
    """Return a chart for each scalar, accuracies with the level of chance as a dashed line."""
    first: list[str] = []
    rest: list[str] = []
    for name in sorted({name for run in runs for name in run.scalars}, key=_order):
        head, _, last = name.rpartition("/")
        if last.startswith("chance_") or "-" in last or name in ("data_time", "eta_seconds"):
            continue
        lines = [Line(run.name, *run.series(name), i) for i, run in enumerate(runs)]
        for kind in ("accuracy_", "error_"):
            if last.startswith(kind):
                chance = f"{head}/" * bool(head) + last.replace(kind, "chance_")
                lines += [
                    Line(f"chance ({run.name})", *run.series(chance), i, dashed=True) for i, run in enumerate(runs)
                ]
        if any(len(line.x) > 1 for line in lines):
            percent = "accuracy" in last and max(line.y.max() for line in lines if len(line.y)) <= 1
            drawn = chart(name.replace("_", " "), lines, unit="%" if percent else "")
            (first if _order(name)[0] < len(_KINDS) else rest).append(drawn)
    if not first + rest:
        return ""
    note = "Dashed: the level of chance. " if any("dashed" in text for text in first) else ""
    more = f"<details><summary>{len(rest)} more</summary>{_grid(rest)}</details>" if rest else ""
    return f"<p>{note}Lines of more than {MOST} points show means of equal runs of points.</p>{_grid(first)}{more}"


def _grid(charts: Sequence[str]) -> str:
    return f"<div class='charts'>{''.join(charts)}</div>"


# What comes first among curves, in this order.
_KINDS = (r"total_loss$", r"loss", r"accuracy", r".*/(AP|accuracy|loss|error)", r"error", r"lr$")


def _order(name: str) -> tuple[int, str]:
    return next((i for i, kind in enumerate(_KINDS) if re.match(kind, name)), len(_KINDS)), name


def _detections(runs: Sequence[Run]) -> Iterable[tuple[Run, str, str]]:
    for run in runs:
        if not run.detects:
            continue
        for name in run.config.get("DATASETS.TEST") or ():
            folder = run.folder / "inference"
            inner = folder / name if (folder / name).is_dir() else folder
            if (judged := judge(inner, name)) is not None:
                yield run, name, _precision_recall(judged) + _images(judged) + _confusion(judged)


def _precision_recall(judged: Judged) -> str:
    known = np.flatnonzero(~np.isnan(judged.precision).any(1))
    if not len(known):
        return ""
    mean = judged.precision[known].mean(0)
    mean_chart = chart("mean of all classes", [Line("precision", judged.recall, mean, 0)], "recall")
    charts = [
        chart(judged.classes[index], [Line("precision", judged.recall, judged.precision[index], 0)], "recall")
        for index in known[:MOST_CLASSES]
    ]
    which = "each class" if len(known) <= MOST_CLASSES else f"the first {MOST_CLASSES} classes"
    each = f"<details><summary>{which}</summary>{_grid(charts)}</details>"
    return f"<h3>Precision over recall at IoU {MIN_IOU}</h3>{_grid([mean_chart])}{each}"


def _images(judged: Judged) -> str:
    """Return pictures of the best and the worst images, or why there are none."""
    count = min(SHOWN, -(-len(judged.images) // 2))
    best, worst = judged.images[:count], judged.images[len(judged.images) - min(count, len(judged.images) - count) :]
    parts = []
    for title, images in (("Best images", best), ("Worst images", worst[::-1])):
        try:
            rows = [_row(image) for image in images]
        except UserError as error:
            return f"<p>The images are not there any more, so none is shown: {escape(str(error))}.</p>"
        if rows:
            scores = ", ".join(f"{image.path.name} {image.f1:.2f}" for image in images)
            caption = f"Truth beside detections of score {MIN_SCORE} or more; F1 at IoU {MIN_IOU}: {scores}"
            parts.append(f"<h3>{title}</h3>{_figure(detections_sheet(rows, judged.classes), caption)}")
    return "".join(parts)


def _row(image: JudgedImage) -> DetectionRow:
    return DetectionRow(
        read_rgb(image.path), image.truth_boxes, image.truth_classes, image.boxes, image.labels, image.scores
    )


def _figure(picture: Image.Image, caption: str) -> str:
    """Return a picture as a JPEG within the page, a fifth of the size of a PNG."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode()
    text = escape(caption)
    return f'<figure><img alt="{text}" src="data:image/jpeg;base64,{data}"><figcaption>{text}</figcaption></figure>'


def _confusion(judged: Judged) -> str:
    """Return the table of true and detected classes; of many classes, the pairs most often confused."""
    counts, classes = judged.confusion, judged.classes
    heading = f"<h3>Confusion of classes</h3><p>Detections of score {MIN_SCORE} or more, matched at IoU {MIN_IOU}.</p>"
    if len(classes) > MOST_CLASSES:
        wrong = counts[:-1, :-1] * (1 - np.eye(len(classes), dtype=np.int64))
        pairs = [divmod(int(i), len(classes)) for i in np.argsort(-wrong, axis=None, kind="stable")[:20]]
        rows = [
            [escape(classes[t]), escape(classes[d]), str(wrong[t, d]), f"{wrong[t, d] / max(counts[t].sum(), 1):.0%}"]
            for t, d in pairs
            if wrong[t, d]
        ]
        return heading + _table(["true class", "taken for", "times", "of its objects"], rows) if rows else ""
    rows = []
    for i, row in enumerate(counts):
        total = max(int(row.sum()), 1)
        cells = [
            f"<span class='cell{' right' * (i == j)}' style='--share:{100 * value / total:.0f}%'>{value or ''}</span>"
            for j, value in enumerate(row)
        ]
        if i == len(classes):
            cells[-1] = ""
        rows.append([escape(classes[i]) if i < len(classes) else "<i>background</i>", *cells])
    head = ["true \\ detected", *map(escape, classes), "<i>missed</i>"]
    return heading + _table(head, rows)


def _all_keys(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        rows = [
            [f"<code>{escape(key)}</code>", f"<code>{escape(str(run.config[key]))}</code>"]
            for key in sorted(run.config)
        ]
        table = _table(["key", "value"], rows, numbers=False)
        parts.append(f"<details><summary>{escape(run.name)}: {len(rows)} keys</summary>{table}</details>")
    return "".join(parts)
