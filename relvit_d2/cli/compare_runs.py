"""Compare the losses of two runs iteration by iteration.

Compares `total_loss` and every value whose name starts with `loss`. Exit status 0 if all are equal, else 1.
"""

import argparse
from pathlib import Path

from relvit_d2.analysis.run_comparison import compare, read_losses
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.printing import print_text

EXAMPLE = "relvit-d2 compare-runs output/demo/finetune output/demo/supervised"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("a", metavar="A", type=Path, help="output folder of a run, or its metrics.json")
    parser.add_argument("b", metavar="B", type=Path, help="the run to compare it with")
    parser.add_argument("--tolerance", metavar="T", type=float, default=0.0, help="relative tolerance (default 0)")


def run(args: argparse.Namespace) -> None:
    """Print that the runs are equal, or print the differences and raise a UserError."""
    if not args.tolerance >= 0:
        raise UserError(f"--tolerance {args.tolerance}: give 0 or more")
    found = compare(read_losses(args.a), read_losses(args.b), args.tolerance)
    if found.differences:
        print_text("\n".join(found.differences))
        raise UserError(f"the runs A '{args.a}' and B '{args.b}' differ")
    largest = f", largest relative difference {found.largest:.3g}" if args.tolerance else ""
    print_text(f"equal: {found.steps} steps, names {', '.join(found.names)}{largest}")
