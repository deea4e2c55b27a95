"""Sections of the report page on the figures of runs: results, spread over seeds, classes."""

import math
import statistics
from collections.abc import Iterable, Sequence
from html import escape

from relvit_d2.evaluation.average_precision import COCO_LIMIT
from relvit_d2.report.html import table
from relvit_d2.report.runs import Run
from relvit_d2.utils.metrics import from_scalars

UNNAMED = ("held_out", "training_images")  # images that stand in results without the name of their set


def verdict(run: Run) -> list[str]:
    """Return the first figure of each task on each data set, and accuracies and errors beside their chance."""
    said = []
    for name, figures in run.results.items():
        where = f"on {name.replace('_', ' ') if name in UNNAMED else name}"
        for key, value in figures.items():
            if isinstance(value, dict) and value:
                said.append(f"{_task(run, key)} {_first(*next(iter(value.items())))} {where}")
            elif key == "top1":
                said.append(f"{_first(key, value)} {where}")
        for task, metric in from_scalars(figures).items():
            if isinstance(metric.value, float) and isinstance(metric.chance, float):
                said.append(f"{task} {metric.kind} {metric} {where}")
    return said


def _chances(keys: Iterable[tuple[str, str, str]]) -> set[str | None]:
    """Return the names of the chances among the figures of :func:`_flat_results`."""
    return {metric.chance for metric in from_scalars({task: task for _, task, _ in keys}).values()}


def _task(run: Run, task: str) -> str:
    """Return the name of a task, with the limit of detections an image where COCO's AP has another one than COCO's."""
    limited = task in ("bbox", "segm") and run.detection_limit != COCO_LIMIT
    return f"{task} (at most {run.detection_limit} detections an image)" if limited else task


def _first(key: str, value: float | None) -> str:
    """Put a figure into words; null stands for NaN."""
    if not isinstance(value, int | float):
        return f"{key}: nothing to find"
    return f"{key} {value:.1f}{' %' if key == 'top1' else ''}"


def result_table(runs: Sequence[Run]) -> str:
    """Return every figure of every run beside its difference to the first run."""
    flats = [_flat_results(run) for run in runs]
    keys = list(dict.fromkeys(key for flat in flats for key in flat if "-" not in key[2]))
    if not keys:
        return ""
    chances = _chances(keys)
    rows = []
    for name, task, figure in keys:
        label = escape(_label(name, task, figure))
        values = [flat.get((name, task, figure)) for flat in flats]
        cells = [_value(value) for value in values]
        for i, value in enumerate(values[1:], start=1):
            if value is not None and values[0] is not None and task not in chances:
                cells[i] += f" <span class='difference'>({value - values[0]:+.3g})</span>"
        rows.append([label, *cells])
    note = "" if len(runs) == 1 else f"<p>In brackets: the difference to {escape(runs[0].name)}.</p>"
    note += "<p>AP figures and top1 are in percent; accuracies and chances are fractions. "
    note += "“-”: there was nothing to find.</p>"
    return table(["", *(escape(run.name) for run in runs)], rows) + note


def seed_table(runs: Sequence[Run]) -> str:
    """Return the mean and spread of each arm of several runs that differ in the seed alone."""
    arms: dict[str, list[Run]] = {}
    for run in runs:
        arms.setdefault(run.arm, []).append(run)
    several = [arm for arm in arms.values() if len(arm) > 1]
    if not several:
        return ""
    rows = []
    for arm in several:
        chances = _chances(_flat_results(arm[0]))
        for key in _flat_results(arm[0]):
            found = [flat[key] for run in arm if key in (flat := _flat_results(run))]
            values = [value for value in found if value is not None]
            if "-" not in key[2] and key[1] not in chances and len(values) > 1:
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
    return table(heads, rows) + "<p>Runs of one arm have the same config but for the seed.</p>"


def class_tables(runs: Sequence[Run]) -> str:
    """Return a table of the classes for each figure that the runs have for each class."""
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
        tables.append(heading + table(["class", *(escape(run.name) for run in runs)], rows))
    return "".join(tables)


def _flat_results(run: Run) -> dict[tuple[str, str, str], float | None]:
    """Return (data set, task, figure) -> value; a pre-training's figures have no task."""
    flat: dict[tuple[str, str, str], float | None] = {}
    for name, tasks in run.results.items():
        for task, figures in tasks.items():
            for key, value in figures.items() if isinstance(figures, dict) else [("", figures)]:
                if value is None or isinstance(value, int | float):
                    flat[name, _task(run, task), key] = value
    return flat


def _label(name: str, task: str, figure: str) -> str:
    """Name a figure of :func:`_flat_results`; a data set keeps its name as it is."""
    where = "" if name in UNNAMED else name
    return " ".join(word for word in (where, task.replace("_", " "), figure) if word)


def _value(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4g}"


def _bar(value: float | None) -> str:
    """Return a percentage with a bar behind it."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"<span class='bar' style='--share:{min(max(value, 0), 100):.0f}%'>{value:.1f}</span>"
