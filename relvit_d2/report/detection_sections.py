"""Sections of the report page on detections: precision and recall, best and worst images, confusion of classes."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from relvit_d2.data.images.decode import PixelFormat
from relvit_d2.report.curves import Chart, Line, Picture, chart
from relvit_d2.report.detections import MIN_IOU, MIN_SCORE, DetectionAnalysis, analyze_detections
from relvit_d2.report.predictions import DetectionRow, detections_sheet, in_rgb
from relvit_d2.report.runs import Run
from relvit_d2.utils.errors import UserError

MAX_IMAGES = 6  # best and worst images each
MAX_CLASSES = 30  # in a confusion table and of precision-recall charts; of more classes, the most confused pairs
MAX_PAIRS = 20


class Confusion(NamedTuple):
    """A table; cells are texts, or dicts of ``count``, ``percent`` and whether they are ``correct``."""

    head: list[str]
    rows: list[list[Any]]


class DetectionSection(NamedTuple):
    """What ``page.html`` shows of the detections of a run on a data set.

    Attributes:
        certainty: how uncertain AP is, or empty.
        shared: the test images that are in the training set too.
        curves: precision over recall of the mean of all classes, then of single classes; none without objects.
        pictures: headings and sheets.
        missing: why there are no pictures, or empty.
    """

    run: str
    dataset: str
    certainty: str
    shared: list[str]
    curves: list[Chart]
    pictures: list[tuple[str, Picture]]
    missing: str
    confusion: Confusion


def detection_sections(runs: Sequence[Run]) -> Iterable[DetectionSection]:
    """Yield a section for each data set whose detections and ground truth exist."""
    for run in runs:
        if not run.detects:
            continue
        pixels = PixelFormat(run.config.get("INPUT.CHANNELS", 3), run.config.get("INPUT.MAX_VALUE", 0.0))
        for name in run.results:  # DATASETS.TEST may have been another one when they were written
            folder = run.folder / "inference" / (name if len(run.results) > 1 else "")
            analysis = analyze_detections(folder, name, run.detection_limit)
            if analysis is not None:
                pictures, missing = _pictures(analysis, pixels)
                yield DetectionSection(
                    run.name,
                    name,
                    _certainty(run, name, analysis),
                    run.shared.get(name, []),
                    _curves(analysis),
                    pictures,
                    missing,
                    _confusion(analysis),
                )


def _certainty(run: Run, name: str, analysis: DetectionAnalysis) -> str:
    ap = run.results[name].get("bbox", {}).get("AP")
    if ap is None or analysis.interval is None:
        return ""
    low, high = analysis.interval
    return (
        f"Box AP is {ap:.1f}; with other images of the same kind it would be between {low:.1f} and {high:.1f} (95 % "
        f"interval, bootstrap over the {analysis.count} images)"
    )


def _curves(analysis: DetectionAnalysis) -> list[Chart]:
    with_objects = np.flatnonzero(~np.isnan(analysis.precision).any(1))
    if not len(with_objects):
        return []
    curves = [("mean of all classes", analysis.precision[with_objects].mean(0))]
    curves += [(analysis.classes[index], analysis.precision[index]) for index in with_objects[:MAX_CLASSES]]
    return [chart(name, [Line("precision", analysis.recall, values, 0)], "recall") for name, values in curves]


def _pictures(analysis: DetectionAnalysis, pixels: PixelFormat) -> tuple[list[tuple[str, Picture]], str]:
    """Return headings and sheets of the best and the worst images, or why there are none."""
    best = analysis.images[: min(MAX_IMAGES, -(-len(analysis.images) // 2))]
    worst = analysis.images[max(len(best), len(analysis.images) - MAX_IMAGES) :][::-1]
    pictures = []
    for heading, images in (("Best images", best), ("Worst images", worst)):
        if not images:
            continue
        try:
            rows = [DetectionRow(in_rgb(pixels.read(image.path)), *image.objects) for image in images]
        except UserError as error:
            return [], str(error)
        scores = ", ".join(f"{image.path.name} {image.f1:.2f}" for image in images)
        caption = f"Ground truth and detections of score {MIN_SCORE} or more; F1 at IoU {MIN_IOU}: {scores}"
        pictures.append((heading, Picture.of(detections_sheet(rows, analysis.classes), caption)))
    return pictures, ""


def _confusion(analysis: DetectionAnalysis) -> Confusion:
    """Return the table of true and detected classes; of many classes, the pairs most often confused."""
    counts, classes = analysis.confusion, analysis.classes
    totals = np.maximum(counts.sum(1), 1)
    if len(classes) > MAX_CLASSES:
        wrong = counts[:-1, :-1] * (1 - np.eye(len(classes), dtype=np.int64))
        pairs = [divmod(int(i), len(classes)) for i in np.argsort(-wrong, axis=None, kind="stable")[:MAX_PAIRS]]
        rows: list[list[Any]] = [
            [classes[true], classes[found], str(wrong[true, found]), f"{wrong[true, found] / totals[true]:.0%}"]
            for true, found in pairs
            if wrong[true, found]
        ]
        return Confusion(["true class", "detected class", "detections", "of the class's objects"], rows)
    rows = [
        [name, *({"count": int(v), "percent": round(100 * v / total), "correct": i == j} for j, v in enumerate(row))]
        for i, (name, row, total) in enumerate(zip([*classes, "(background)"], counts, totals, strict=True))
    ]
    rows[-1][-1] = ""
    return Confusion(["true \\ detected", *classes, "(missed)"], rows)
