"""Summary of a finished run: its report page, and a table with the next command in the log."""

import datetime
import json
import logging
from pathlib import Path

from tabulate import tabulate  # type: ignore[import-untyped]

from relvit_d2.engine.weight_average import SUFFIX
from relvit_d2.engine.writers import PERIOD
from relvit_d2.report.page import write_report
from relvit_d2.report.results import summary
from relvit_d2.report.runs import Run, read_runs
from relvit_d2.utils.errors import UserError, one_line
from relvit_d2.utils.files import write_json

_MODELS = ("model_best{}.pth", "model_final{}.pth", "encoder{}.safetensors")
FILES = (*(name.format(suffix) for name in _MODELS for suffix in ("", SUFFIX)), "report.html")

logger = logging.getLogger(__name__)


def end_run(folder: Path, command: str) -> None:
    """Write the run's ``report.html`` and log its summary; an error is logged and does not end the process.

    The next command is added to ``run.json``, from which the report takes it.

    Args:
        folder: the run's OUTPUT_DIR.
        command: the next command.
    """
    table = f"next: {command}"
    try:
        try:
            path = folder / "run.json"
            info = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            write_json(path, info | {"next": command})
            write_report([folder], folder / "report.html")
        finally:
            table = summary_table(read_runs([folder])[0], command)
    except Exception as error:
        message = one_line(error)
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        logger.warning(f"the report could not be written: {kind}{message}")
    logger.info(f"run finished\n{table}")


def summary_table(run: Run, command: str) -> str:
    """Return training time, losses, results, files and the next command, a line each."""
    nothing = "no metrics" if run.results else "no evaluation: DATASETS.TEST is empty"
    batch, seconds, loss = run.config["SOLVER.IMS_PER_BATCH"], run.series("time")[1], run.series("total_loss")[1]
    rows = []
    if len(seconds) and len(loss):
        taken, speed = datetime.timedelta(seconds=round(seconds.sum())), len(seconds) * batch / seconds.sum()
        few = min(PERIOD, -(-len(loss) // 2))
        ends = [f"{part.mean():.4g}" for part in (loss[:few], loss[-few:])]
        rows = [
            ("trained", f"{len(loss):,} iterations of {batch} images in {taken}, {speed:.1f} images/s"),
            ("loss", f"{ends[0]} first, {ends[1]} last (means of {few} iterations)"),
        ]
    rows += [
        ("result", "\n".join(summary(run)) or nothing),
        ("written", ", ".join(name for name in FILES if (run.folder / name).exists()) + f" in {run.folder}"),
        ("next", command),
    ]
    return tabulate(rows, tablefmt="plain", disable_numparse=True)
