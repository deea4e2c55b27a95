"""Write a self-contained HTML report on one or more runs.

It shows the configuration and the machine, the results and their differences from the first run (mean and standard
deviation over seeds), per-class results, and learning curves with chance level. Detection runs add precision-recall
curves, the best and worst images and confusions; pre-training runs add inputs and predictions.
"""

import argparse
import logging
from pathlib import Path

from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import check_target

EXAMPLE = "relvit-d2 report output/demo/finetune output/demo/supervised --output report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="OUTPUT_DIR of a run")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("report.html"),
        help="the file (default report.html); an earlier report is replaced, no other file",
    )


def run(args: argparse.Namespace) -> None:
    """Write the page."""
    check_target(args.output)
    check_page(args.output)
    from relvit_d2.engine.run_setup import silence_warnings
    from relvit_d2.report.page import write_report

    silence_warnings()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    write_report(args.runs, args.output)
    print(f"written: {args.output}")


def check_page(path: Path) -> None:
    """Raise a :class:`UserError` if a file exists that is not a report."""
    if not path.exists():
        return
    try:
        with path.open("rb") as file:
            start = file.read(4096)
    except OSError as error:
        raise UserError(f"'{path}' cannot be replaced ({error.strerror}): choose another --output") from error
    if b"<title>relvit_d2" not in start:
        raise UserError(f"'{path}' exists and is not a report of relvit-d2: choose another --output, or move it away")
