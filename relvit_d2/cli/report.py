"""Write one HTML page on one or several runs that needs no network and no server.

It shows configuration and machine; results with differences to the first run and, for several seeds, mean and spread;
figures of each class; learning curves with the level of chance; of detectors precision and recall, the best and worst
images and confusions; of a pre-training its input and predictions.
"""

import argparse
import logging
from pathlib import Path

from relvit_d2.utils.errors import UserError

EXAMPLE = "relvit-d2 report output/demo/finetune output/demo/supervised --output report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="OUTPUT_DIR of a training")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="the page (default report.html)")


def run(args: argparse.Namespace) -> None:
    """Write the page.

    Raises:
        UserError: if a folder holds no run, or the page cannot be written.
    """
    if not args.output.parent.is_dir():
        raise UserError(f"--output '{args.output}': the folder '{args.output.parent}' does not exist; make it first")
    from relvit_d2.engine.run_setup import silence_warnings
    from relvit_d2.report.page import write_report

    silence_warnings()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    write_report(args.runs, args.output)
    print(f"written: {args.output}")
