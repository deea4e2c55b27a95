"""Check that a detector can learn: train it on a few images until it detects their objects.

Trains without augmentation on the first images of the config's training set, in rounds. After each round, box AP50 is
measured on the same images with `relvit-d2 train --eval-only`. Exit status 0 as soon as AP50 exceeds 95, else 1 after
the last round.
"""

import argparse

from relvit_d2.utils.config_paths import find_config
from relvit_d2.utils.errors import UserError

EXAMPLE = "relvit-d2 overfit-check --config-file configs/paper/voc_vit_s_224.yaml --images 8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--config-file", required=True, help="a detection config; its first training set is used")
    parser.add_argument("--data", help="folder of a custom data set, in place of DATASETS.TRAIN")
    parser.add_argument("--images", type=int, default=8, help="number of images to train on (default 8)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs that override the config")


def run(args: argparse.Namespace) -> None:
    """Run the check; raise a UserError if AP50 stays below the bound."""
    if args.images < 1:
        raise UserError(f"--images {args.images}: give at least 1")
    find_config(args.config_file)
    from relvit_d2.config.config_file import override_words
    from relvit_d2.data.detection.custom import config_pairs
    from relvit_d2.experiments.overfit import overfit_check

    pairs = config_pairs(args.data, "detection")
    data = override_words(dict(zip(pairs[::2], pairs[1::2], strict=True)))
    overfit_check(args.config_file, args.images, [*data, *args.opts])
