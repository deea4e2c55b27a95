"""Pre-train an encoder from images alone, on the spatial relations of their patches."""

import argparse

from relvit_d2.cli.training import add_data, add_training_arguments, launch

EXAMPLE = "relvit-d2 pretrain --config-file configs/demo/ssl_streets.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_training_arguments(parser)
    add_data(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    return launch(process, args, EXAMPLE)


def process(args: argparse.Namespace) -> None:
    """Run one of its processes."""
    from relvit_d2.data.detection.custom import config_pairs
    from relvit_d2.pretraining.run import run_process
    from relvit_d2.report.run_summary import end_run
    from relvit_d2.tasks import load_config

    run_process(
        load_config(args.config_file, [*config_pairs(args.data, "pretrain"), *args.opts], "pretrain"), args, end_run
    )
