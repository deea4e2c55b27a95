"""Put one or several runs into one HTML page that needs no network and no server.

What was run, on what; results with differences to the first run and, for several seeds, mean and spread; figures of
each class; learning curves with the level of chance; precision and recall, the best and worst images and confusions
of detectors; what pre-training sees and answers.
"""

import argparse
import logging
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from relvit_d2.engine.cli import silence  # noqa: E402
from relvit_d2.engine.error_reporting import guard  # noqa: E402
from relvit_d2.report.page import write_report  # noqa: E402
from relvit_d2.utils.errors import UserError  # noqa: E402


def main() -> int:
    """Parse the command line and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python tools/report.py output/demo/finetune output/demo/supervised --output report.html",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="an OUTPUT_DIR of one of the scripts")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="the page (default report.html)")
    args = parser.parse_args()
    return guard(lambda: report(args.runs, args.output))


def report(runs: list[Path], output: Path) -> None:
    """Write the page.

    Raises:
        UserError: if a folder is no run, or the page has no place to go.
    """
    if not output.parent.is_dir():
        raise UserError(f"--output '{output}': the folder '{output.parent}' does not exist; make it first")
    silence()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    write_report(runs, output)
    print(f"written: {output}")


if __name__ == "__main__":
    sys.exit(main())
