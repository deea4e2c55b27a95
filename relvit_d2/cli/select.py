"""Choose the images to label next, from the features of relvit-d2 embed.

Each image is the one farthest from all labelled and chosen images in the space of the features, so that they cover the
data; of nearly equal images one is chosen. With --detector, only the images of which the detector is least certain can
be chosen.

Writes `OUTPUT/selected.txt`, one path per line; `OUTPUT/selected.json`, with the reason for each image; and
`OUTPUT/selected.png`, which shows them.
"""

import argparse
from pathlib import Path

from relvit_d2.utils.errors import UserError
from relvit_d2.utils.printing import print_text

EXAMPLE = """\
relvit-d2 select --features features.parquet --count 100
relvit-d2 select --features features.parquet --count 100 --labelled labelled.txt --detector output/DATA/detector"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--features", type=Path, required=True, help="file of relvit-d2 embed")
    parser.add_argument("--count", type=int, required=True, help="number of images to choose")
    parser.add_argument("--labelled", nargs="+", default=[], help="images that have labels: folders, patterns or lists")
    parser.add_argument("--detector", default="", help="model_*.pth of a detector, or the output folder of its run")
    parser.add_argument("--output", type=Path, default=Path("selection"), help="folder (default: selection)")


def run(args: argparse.Namespace) -> None:
    """Choose and write."""
    if args.count < 1:
        raise UserError(f"--count {args.count}: give at least 1")
    from relvit_d2.report.selection import select

    print_text(select(args.features, args.count, args.labelled, args.detector, args.output))
