"""Sections of the report page on a detector's detections: precision and recall, images, confusions."""

from collections.abc import Iterable, Sequence
from html import escape

import numpy as np

from relvit_d2.data.images.decode import PixelFormat
from relvit_d2.report.curves import Line, chart
from relvit_d2.report.detections import MIN_IOU, MIN_SCORE, Judged, JudgedImage, judge
from relvit_d2.report.html import figure, grid, table
from relvit_d2.report.predictions import DetectionRow, detections_sheet, in_rgb
from relvit_d2.report.runs import Run
from relvit_d2.utils.errors import UserError

SHOWN = 6  # best and worst images each
MOST_CLASSES = 30  # rows of a confusion table; of more classes, the most confused


def detection_sections(runs: Sequence[Run]) -> Iterable[tuple[Run, str, str]]:
    """Yield run, data set and section for each data set whose detections and truth are there.

    Raises:
        UserError: if the files of one are damaged.
    """
    for run in runs:
        if not run.detects:
            continue
        pixels = PixelFormat(run.config.get("INPUT.CHANNELS", 3), run.config.get("INPUT.MAX_VALUE", 0.0))
        for name in run.results:  # DATASETS.TEST may have been another one when they were written
            folder = run.folder / "inference" / (name if len(run.results) > 1 else "")
            if (judged := judge(folder, name, run.detection_limit)) is not None:
                yield run, name, _precision_recall(judged) + _images(judged, pixels) + _confusion(judged)


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
    each = f"<details><summary>{which}</summary>{grid(charts)}</details>"
    return f"<h3>Precision over recall at IoU {MIN_IOU}</h3>{grid([mean_chart])}{each}"


def _images(judged: Judged, pixels: PixelFormat) -> str:
    """Return pictures of the best and the worst images, or why there are none."""
    count = min(SHOWN, -(-len(judged.images) // 2))
    best, worst = judged.images[:count], judged.images[len(judged.images) - min(count, len(judged.images) - count) :]
    parts = []
    for title, images in (("Best images", best), ("Worst images", worst[::-1])):
        try:
            rows = [_row(image, pixels) for image in images]
        except UserError as error:
            return f"<p>The images are not there any more, so none is shown: {escape(str(error))}.</p>"
        if rows:
            scores = ", ".join(f"{image.path.name} {image.f1:.2f}" for image in images)
            caption = f"Truth beside detections of score {MIN_SCORE} or more; F1 at IoU {MIN_IOU}: {scores}"
            parts.append(f"<h3>{title}</h3>{figure(detections_sheet(rows, judged.classes), caption)}")
    return "".join(parts)


def _row(image: JudgedImage, pixels: PixelFormat) -> DetectionRow:
    return DetectionRow(
        in_rgb(pixels.read(image.path)),
        image.truth_boxes,
        image.truth_classes,
        image.boxes,
        image.labels,
        image.scores,
    )


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
        return heading + table(["true class", "taken for", "times", "of its objects"], rows) if rows else ""
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
    return heading + table(head, rows)
