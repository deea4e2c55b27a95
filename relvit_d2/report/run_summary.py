"""The end of a run: its report page, a small table, and the command to type next."""

import datetime
import logging
from pathlib import Path

from tabulate import tabulate  # type: ignore[import-untyped]

from relvit_d2.engine.writers import PERIOD
from relvit_d2.report.page import write_report
from relvit_d2.report.result_sections import verdict
from relvit_d2.report.runs import Run, read_runs
from relvit_d2.utils.errors import UserError

FILES = ("model_best.pth", "model_final.pth", "encoder.safetensors", "report.html")

logger = logging.getLogger(__name__)


def end_run(folder: Path, command: str) -> None:
    """Write ``report.html`` on the run in ``folder`` into it and log its table; a fault is told and spoils nothing.

    Args:
        folder: the run's OUTPUT_DIR.
        command: what is typed next.
    """
    table = f"next: {command}"
    try:
        try:
            write_report([folder], folder / "report.html")
        finally:
            table = closing_table(read_runs([folder])[0], command)
    except Exception as error:
        words = " ".join(str(error).split())
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        logger.warning(f"the report is not whole: {kind}{words}")
    logger.info(f"the run has ended\n{table}")


def closing_table(run: Run, command: str) -> str:
    """Return what a run took, what it reached, what it left and the command to type next, a line each."""
    nothing = "no figures" if run.results else "no evaluation: DATASETS.TEST is empty"
    batch, seconds, loss = run.config["SOLVER.IMS_PER_BATCH"], run.series("time")[1], run.series("total_loss")[1]
    rows = []
    if len(seconds) and len(loss):
        taken, speed = datetime.timedelta(seconds=round(seconds.sum())), len(seconds) * batch / seconds.sum()
        few = min(PERIOD, -(-len(loss) // 2))
        ends = [f"{part.mean():.4g}" for part in (loss[:few], loss[-few:])]
        rows = [
            ("trained", f"{len(loss):,} iterations of {batch} images in {taken}, {speed:.1f} images/s"),
            ("loss", f"{ends[0]} at first, {ends[1]} at last (means of {few})"),
        ]
    rows += [
        ("result", "\n".join(verdict(run)) or nothing),
        ("written", ", ".join(name for name in FILES if (run.folder / name).exists()) + f" in {run.folder}"),
        ("next", command),
    ]
    return tabulate(rows, tablefmt="plain", disable_numparse=True)
