"""Results of runs as sentences and as rows of the report page's tables."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from relvit_d2.data.images.seen import SEEN, seen_sentence
from relvit_d2.evaluation.average_precision import COCO_LIMIT
from relvit_d2.evaluation.base import UNREADABLE
from relvit_d2.report.runs import Run
from relvit_d2.utils.metrics import from_scalars

UNNAMED = ("held_out", "training_images")  # entries of results.json that are not names of data sets

Key = tuple[str, str, str]  # data set; task, empty in a pre-training; metric


def summary(run: Run) -> list[str]:
    """Return the first metric of each task and data set; accuracies and errors with their level of chance.

    The number of test images on which the initial weights were trained follows.
    """
    sentences = []
    for name, values in run.results.items():
        where = f"on {name.replace('_', ' ') if name in UNNAMED else name}"
        for key, value in values.items():
            if key == SEEN:
                sentences.append(seen_sentence(name, **value))
            elif key == UNREADABLE:
                sentences.append(f"{value['images']} images of {name} cannot be read and are left out")
            elif isinstance(value, dict) and value:
                sentences.append(f"{_task(run, key)} {_first(*next(iter(value.items())))} {where}")
            elif key == "top1":
                sentences.append(f"{_first(key, value)} {where}")
        for task, metric in from_scalars(values).items():
            if isinstance(metric.value, float) and isinstance(metric.chance, float):
                sentences.append(f"{task} {metric.kind} {metric} {where}")
    return sentences


def result_rows(runs: Sequence[Run]) -> list[list[Any]]:
    """Return a row for each metric: its name, and for each run the value and its difference to the first run."""
    all_values = [_values(run) for run in runs]
    keys = list(dict.fromkeys(key for values in all_values for key in values if "-" not in key[2]))
    chances = _chances(keys)
    rows = []
    for key in keys:
        first, *others = (values.get(key) for values in all_values)
        cells = [(_text(first), "")]
        for value in others:
            compared = value is not None and first is not None and key[1] not in chances
            cells.append((_text(value), f"{value - first:+.3g}" if compared else ""))  # type: ignore[operator]
        rows.append([_label(*key), *cells])
    return rows


def training_rows(runs: Sequence[Run]) -> list[list[Any]]:
    """Return a row for each metric on training images, as :func:`result_rows`, without those of single classes."""
    keys = {
        (task, metric): None
        for run in runs
        for task, metrics in run.training.items()
        if isinstance(metrics, dict)
        for metric in metrics
        if "-" not in metric
    }
    counts = ", ".join(dict.fromkeys(str(run.training["images"]) for run in runs if run.training))
    return [
        [
            f"{counts} training images {task} {metric}",
            *((_text(run.training.get(task, {}).get(metric)), "") for run in runs),
        ]
        for task, metric in keys
    ]


def seed_rows(runs: Sequence[Run]) -> list[list[str]]:
    """Return arm, metric, mean, standard deviation and seeds for each metric of runs that differ in their seed only."""
    arms: dict[str, list[Run]] = {}
    for run in runs:
        arms.setdefault(run.arm, []).append(run)
    rows = []
    for arm in arms.values():
        all_values = [_values(run) for run in arm]
        chances = _chances(all_values[0])
        for key in all_values[0]:
            values = [value for found in all_values if (value := found.get(key)) is not None]
            if "-" not in key[2] and key[1] not in chances and len(values) > 1:
                seeds = ", ".join(str(run.config.get("SEED")) for run in arm)
                spread = _text(statistics.stdev(values))
                row = [arm[0].name, _label(*key), _text(statistics.mean(values)), spread, f"{len(values)} ({seeds})"]
                rows.append(row)
    return rows


def class_rows(runs: Sequence[Run]) -> list[tuple[str, list[list[Any]]]]:
    """Return heading and rows for each metric of single classes; a row has the class and a value of each run."""
    all_values = [_values(run) for run in runs]
    tables: dict[Key, dict[str, None]] = {}
    for values in all_values:
        for name, task, key in values:
            metric, dash, label = key.partition("-")
            if dash:
                tables.setdefault((name, task, metric), {})[label] = None
    return [
        (
            f"{metric} on {name}, {task}",
            [
                [label, *(_finite(values.get((name, task, f"{metric}-{label}"))) for values in all_values)]
                for label in labels
            ],
        )
        for (name, task, metric), labels in tables.items()
    ]


def _values(run: Run) -> dict[Key, float | None]:
    values: dict[Key, float | None] = {}
    for name, tasks in run.results.items():
        for task, metrics in tasks.items():
            if task in (SEEN, UNREADABLE):  # a sentence of the summary
                continue
            for key, value in metrics.items() if isinstance(metrics, dict) else [("", metrics)]:
                if value is None or isinstance(value, int | float):
                    values[name, _task(run, task), key] = value
    return values


def _chances(keys: Iterable[Key]) -> set[str | None]:
    """Return the names of the levels of chance among the tasks of keys."""
    return {metric.chance for metric in from_scalars({task: task for _, task, _ in keys}).values()}


def _task(run: Run, task: str) -> str:
    """Return the name of a task, with the number of detections that its AP counts where it is not COCO's."""
    limited = task in ("bbox", "segm") and run.detection_limit != COCO_LIMIT
    return f"{task} (at most {run.detection_limit} detections an image)" if limited else task


def _first(key: str, value: float | None) -> str:
    if not isinstance(value, int | float):
        return f"{key}: no objects"
    return f"{key} {value:.1f}{' %' if key == 'top1' else ''}"


def _label(name: str, task: str, metric: str) -> str:
    where = "" if name in UNNAMED else name
    return " ".join(word for word in (where, task.replace("_", " "), metric) if word)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _text(value: float | None) -> str:
    if _finite(value) is None:
        return "-"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4g}"  # type: ignore[arg-type]
