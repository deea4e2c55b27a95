"""Train or evaluate a Mask R-CNN with a vision transformer as its backbone.

With --data and without --config-file, the data are checked, a recipe is made for the data, the machine and the time,
and pre-training, training and evaluation run one after the other.
"""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from relvit_d2.cli.training import add_training_arguments, run_training
from relvit_d2.utils.errors import UserError

if TYPE_CHECKING:
    from relvit_d2.experiments.commands import Runner

EXAMPLE = """\
relvit-d2 train --data path/to/folder --hours 0.5
relvit-d2 train --config-file configs/demo/streets.yaml"""

# Arguments that the recipe does not support.
CONFIG_ONLY = ("resume", "allow_changes", "eval_only", "num_gpus", "num_machines", "machine_rank", "dist_url")

SHORTEST = 1 / 60  # hours; the start of the commands takes longer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    recipe = parser.add_argument_group("recipe for --data without --config-file")
    recipe.add_argument("--hours", type=float, help="time of everything (default: 1 on a GPU, 0.5 on a CPU)")
    start = recipe.add_mutually_exclusive_group()
    start.add_argument(
        "--pretrain", action=argparse.BooleanOptionalAction, help="whether to pre-train (default: if the time allows)"
    )
    start.add_argument("--weights", default="", help="start from timm:NAME, a file or a run's folder")
    parser.add_argument(
        "--unlabelled",
        default="",
        metavar="DIR",
        help="train on images without labels too (SEMI.UNLABELLED); see docs/custom_data.md",
    )
    recipe.add_argument("--dry-run", action="store_true", help="only write and print the recipe and the expected time")
    add_training_arguments(parser, task="detection")
    parser.set_defaults(defaults={name: parser.get_default(name) for name in CONFIG_ONLY})


def run(args: argparse.Namespace) -> int:
    """Run the recipe or the config."""
    if args.unlabelled:
        args.opts = ["SEMI.UNLABELLED", args.unlabelled, *args.opts]
    asked = args.hours is not None or args.pretrain is not None or args.weights or args.dry_run
    if args.config_file or not args.data:
        if asked:
            raise UserError(
                "--hours, --pretrain, --no-pretrain, --weights and --dry-run need --data and no --config-file"
            )
        return run_training(args, EXAMPLE.replace("\n", " or "))
    for name in CONFIG_ONLY:
        if getattr(args, name) != args.defaults[name]:
            raise UserError(
                f"--{name.replace('_', '-')} needs a config: give --config-file with the recipe.yaml of the run"
            )
    run_recipe(args)
    return 0


def run_recipe(args: argparse.Namespace, runner: "Runner | None" = None) -> None:
    """Run the recipe of ``--data``; ``runner`` runs its commands, in subprocesses by default."""
    if args.hours is not None and not 0 < args.hours < math.inf:
        raise UserError(f"--hours {args.hours:g}: give a number above 0, such as 0.5")
    if args.hours is not None and args.hours < SHORTEST:
        raise UserError(f"--hours {args.hours:g} is too short to measure and train: give 0.05 or more")
    elsewhere = args.weights.startswith("timm:") or "://" in args.weights
    if args.weights and not elsewhere and not Path(args.weights).exists():
        raise UserError(f"--weights '{args.weights}' does not exist: give a file, the folder of a run or timm:NAME")
    if len(args.opts) % 2:
        raise UserError(f"overrides are KEY VALUE pairs, but '{args.opts[-1]}' has no value")
    from relvit_d2.experiments.commands import run_command
    from relvit_d2.experiments.custom_run import Request, train_custom

    seconds = None if args.hours is None else 3600 * args.hours
    request = Request(args.data, seconds, args.weights, args.pretrain, tuple(args.opts), args.overwrite)
    train_custom(request, args.dry_run, runner or run_command)
