"""Train, fine-tune or evaluate a classifier, or probe an encoder."""

import argparse

from relvit_d2.cli.training import add_training_arguments, launch

EXAMPLE = "relvit-d2 classify --config-file configs/cls/cifar10_vit_s4.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_training_arguments(parser)
    kinds = ("knn", "linear")
    parser.add_argument("--eval", choices=kinds, help="no training: probe the frozen encoder with the training images")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    return launch(process, args, EXAMPLE)


def process(args: argparse.Namespace) -> None:
    """Run one of its processes."""
    from relvit_d2.classification.run import run_process
    from relvit_d2.report.run_summary import end_run
    from relvit_d2.tasks import load_config

    run_process(load_config(args.config_file, args.opts, "classification"), args, end_run)
