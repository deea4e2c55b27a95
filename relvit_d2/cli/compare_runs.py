"""Compare the losses of two runs step by step.

A run is an output folder with a `metrics.json`, or a file in that format. Compared are `total_loss` and every name that
starts with `loss`, at every step; the exit status is 0 if all are equal and 1 if not.
"""

import argparse
from pathlib import Path

from relvit_d2.analysis.run_comparison import compare, read_losses
from relvit_d2.utils.errors import UserError

EXAMPLE = "relvit-d2 compare-runs output/demo/finetune output/demo/supervised"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("a", metavar="A", type=Path, help="output folder of a run, or its metrics.json")
    parser.add_argument("b", metavar="B", type=Path, help="the run to compare it with")
    parser.add_argument(
        "--tolerance",
        metavar="T",
        type=float,
        default=0.0,
        help="relative difference that counts as equal (default 0)",
    )


def run(args: argparse.Namespace) -> None:
    """Print that the runs are equal, or what differs.

    Raises:
        UserError: if they are not equal.
    """
    if not args.tolerance >= 0:
        raise UserError(f"--tolerance {args.tolerance}: give 0 or more")
    found = compare(read_losses(args.a), read_losses(args.b), args.tolerance)
    if found.differences:
        print("\n".join(found.differences))
        raise UserError(f"the runs A '{args.a}' and B '{args.b}' differ")
    within = f", largest relative difference {found.largest:.3g}" if args.tolerance else ""
    print(f"equal: {found.steps} steps, names {', '.join(found.names)}{within}")
