"""Check that a detector can learn: train it on a few images until it finds their objects.

Trains without augmentation on the first images of the config's training set, in rounds; after each round
`relvit-d2 train --eval-only` measures box AP50 on those same images from the checkpoint. The exit status is 0 once AP50
passes 95, and 1 if it has not after the last round.
"""

import argparse

from relvit_d2.utils.config_paths import find_config
from relvit_d2.utils.errors import UserError

EXAMPLE = "relvit-d2 overfit-check --config-file configs/paper/voc_vit_s_224.yaml --images 8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--config-file", required=True, help="a detection config; its first training set is used")
    parser.add_argument("--images", type=int, default=8, help="number of images to train on (default 8)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs over the config")


def run(args: argparse.Namespace) -> None:
    """Run the check.

    Raises:
        UserError: if AP50 does not pass.
    """
    if args.images < 1:
        raise UserError(f"--images {args.images}: give at least 1")
    find_config(args.config_file)
    from relvit_d2.experiments.overfit import overfit_check

    overfit_check(args.config_file, args.images, args.opts)
