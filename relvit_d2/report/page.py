"""One self-contained HTML page on one or several runs: no network, no server, no script."""

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from relvit_d2.report.curves import MAX_POINTS, Chart, Line, Picture, chart
from relvit_d2.report.detection_sections import detection_sections
from relvit_d2.report.detections import MIN_IOU, MIN_SCORE
from relvit_d2.report.pretext import sheet_of_run
from relvit_d2.report.results import UNNAMED, class_rows, result_rows, seed_rows, summary, training_rows
from relvit_d2.report.runs import Run, read_runs
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import write_text
from relvit_d2.utils.metrics import from_scalars
from relvit_d2.utils.printing import LAYOUT, printable

# Scalars whose charts are shown first, in this order.
_MAIN_SCALARS = (r"total_loss$", r"loss", r"accuracy", r".*/(AP|accuracy|loss|error)", r"error", r"lr$")

logger = logging.getLogger(__name__)


def write_report(folders: Sequence[Path], path: Path) -> None:
    """Write the report page.

    Args:
        folders: OUTPUT_DIRs of one run, or of several to compare; differences are those to the first.
        path: the HTML file; it appears whole or not at all.

    Raises:
        UserError: if a folder is not that of a run or is damaged, or the page cannot be written.
    """
    runs = read_runs(list(folders))
    curves, more_curves = _curves(runs)
    page = (
        environment()
        .get_template("page.html")
        .render(
            runs=runs,
            verdicts=[(run.name, _verdict(run)) for run in runs],
            facts=_facts(runs),
            differences=_differences(runs),
            results=[*result_rows(runs), *training_rows(runs)],
            with_training=any(run.training for run in runs),
            held_out=any(name.startswith("held_out/") for run in runs for name in run.scalars),
            seeds=seed_rows(runs),
            classes=class_rows(runs),
            curves=curves,
            more_curves=more_curves,
            max_points=MAX_POINTS,
            detections=list(detection_sections(runs)),
            min_iou=MIN_IOU,
            min_score=MIN_SCORE,
            pictures=_pretraining_pictures(runs),
        )
    )
    write_text(path, page)


def environment() -> Environment:
    """Return the jinja2 environment of the templates in this package."""
    return Environment(
        loader=PackageLoader("relvit_d2.report", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=lambda value: value if hasattr(value, "__html__") else printable(value, LAYOUT),
    )


def _verdict(run: Run) -> str:
    last = f"after {int(run.rows[-1]['iteration']) + 1} iterations: " if run.rows else ""
    return last + ("; ".join(summary(run)) or "no evaluation yet")


def _pretraining_pictures(runs: Sequence[Run]) -> list[Picture]:
    pictures = []
    for run in runs:
        if not run.pretrains:
            continue
        try:
            sheet = sheet_of_run(run.folder)
        except UserError as error:
            logger.warning(f"the report has no picture of the views of '{run.folder}': {error}")
        else:
            pictures.append(Picture.of(sheet, f"{run.name}: images, their views, and the predictions for them"))
    return pictures


def _facts(runs: Sequence[Run]) -> list[list[Any]]:
    """Return a row for each fact that a run has: its name, and for each run the text and whether the runs differ."""

    def info(key: str) -> Callable[[Run], Any]:
        return lambda run: run.info.get(key, "")

    def config(*keys: str) -> Callable[[Run], Any]:
        return lambda run: ", ".join(str(run.config[key]) for key in keys if run.config.get(key) not in (None, ""))

    def data_sets(key: str) -> Callable[[Run], Any]:
        return lambda run: ", ".join(run.config.get(key) or ())

    facts: dict[str, Callable[[Run], Any]] = {
        "folder": lambda run: run.folder,
        "command": info("command"),
        "encoder": config("MODEL.ENCODER.NAME", "MODEL.ENCODER.PATCH_SIZE"),
        "initial weights": lambda run: run.config.get("MODEL.WEIGHTS") or "random",
        "training data": data_sets("DATASETS.TRAIN"),
        "evaluation data": data_sets("DATASETS.TEST"),
        "iterations, batch size": config("SOLVER.MAX_ITER", "SOLVER.IMS_PER_BATCH"),
        "seed": config("SEED"),
        "precision": info("precision"),
        "hardware": info("machine"),
        "versions": info("versions"),
        "commit": info("commit"),
        "start": info("started"),
    }
    rows = []
    for name, value_of in facts.items():
        values = [str(value_of(run)) for run in runs]
        if any(values):
            rows.append([name, *((value, len(set(values)) > 1) for value in values)])
    return rows


def _differences(runs: Sequence[Run]) -> list[list[str]]:
    """Return key and values of each config key but OUTPUT_DIR in which runs that have it differ."""
    keys = sorted({key for run in runs for key in run.config} - {"OUTPUT_DIR"})
    differ = [key for key in keys if len({str(run.config[key]) for run in runs if key in run.config}) > 1]
    return [[key, *(str(run.config.get(key, "-")) for run in runs)] for key in differ]


def _curves(runs: Sequence[Run]) -> tuple[list[Chart], list[Chart]]:
    """Draw each scalar, metrics with their chance as a dashed line; return the main charts and the others."""
    names = {name for run in runs for name in run.scalars}
    metrics = from_scalars({name: name for name in names})
    chances = {metric.value: metric.chance for metric in metrics.values()}
    # A metric of the training batches and the same one on other images share a chart.
    others = {name: name.rpartition("/")[2] for name in chances if name.startswith(tuple(f"{key}/" for key in UNNAMED))}
    others = {name: base for name, base in others.items() if base in names}
    main: list[Chart] = []
    rest: list[Chart] = []
    for name in sorted(names - {*chances.values()} - {*others}, key=lambda name: (_rank(name), name)):
        last = name.rpartition("/")[2]
        if "-" in last or name in ("data_time", "eta_seconds"):  # AP of one class; times of the machine
            continue
        evaluated = [other for other, base in others.items() if base == name]
        lines = [
            Line(f"training ({run.name})" if evaluated else run.name, *run.series(name), i)
            for i, run in enumerate(runs)
        ]
        for other in evaluated:
            label = other.partition("/")[0].replace("_", " ")
            lines += [Line(f"{label} ({run.name})", *run.series(other), len(runs) + i) for i, run in enumerate(runs)]
        if chance := chances.get(name):
            lines += [Line(f"chance ({run.name})", *run.series(chance), i, dashed=True) for i, run in enumerate(runs)]
        if any(len(line.x) > 1 for line in lines):
            percent = "accuracy" in last and max(line.y.max() for line in lines if len(line.y)) <= 1
            drawn = chart(name.replace("_", " "), lines, percent=percent, legend=bool(evaluated))
            (main if _rank(name) < len(_MAIN_SCALARS) else rest).append(drawn)
    return main, rest


def _rank(name: str) -> int:
    return next((i for i, kind in enumerate(_MAIN_SCALARS) if re.match(kind, name)), len(_MAIN_SCALARS))
