"""Draw images of street numbers, pre-train on them, then train a detector with and without the pre-trained encoder.

Takes a few minutes and needs no data. Writes results.json, results.md, predictions.png and report.html into
output/demo.
"""

import argparse

EXAMPLE = "relvit-d2 demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("opts", nargs="*", help="KEY VALUE pairs that override both configs, such as SEED 1")


def run(args: argparse.Namespace) -> None:
    """Run the demo."""
    from relvit_d2.experiments.demo import demo

    demo(args.opts)
