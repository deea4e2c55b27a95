"""The arguments that pretrain, train and classify share, which are Detectron2's, and the start of their processes."""

import argparse
import logging
from collections.abc import Callable

from relvit_d2.engine.error_reporting import guard
from relvit_d2.utils.config_paths import find_config
from relvit_d2.utils.errors import UserError


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of Detectron2's ``default_argument_parser``, and ``--allow-changes``."""
    parser.add_argument("--config-file", default="", metavar="FILE", help="the config")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in OUTPUT_DIR")
    parser.add_argument(
        "--allow-changes", action="store_true", help="with --resume: continue although the config has changed"
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate only")
    parser.add_argument("--num-gpus", type=int, default=1, help="number of GPUs per machine (default 1)")
    parser.add_argument("--num-machines", type=int, default=1, help="number of machines (default 1)")
    parser.add_argument("--machine-rank", type=int, default=0, help="index of this machine, from 0")
    parser.add_argument(
        "--dist-url",
        default="auto",
        help="tcp://FIRST_MACHINE:PORT, where several machines connect (default: a free port of this machine)",
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs that override the config")


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add ``--data``, for commands that take a user's own folder."""
    parser.add_argument(
        "--data", help="a folder of your own data, in place of DATASETS.TRAIN and DATASETS.TEST: docs/custom_data.md"
    )


def launch(process: Callable[[argparse.Namespace], None], args: argparse.Namespace, example: str) -> int:
    """Run ``process`` in as many processes as the arguments ask for; return the exit status.

    Args:
        process: run by each process; importable by name, since processes are spawned.
        args: those of :func:`add_training_arguments`.
        example: a valid command line, for the error.

    Raises:
        UserError: if the config file is missing.
    """
    if not args.config_file:
        raise UserError(f"--config-file is missing; for example: {example}")
    find_config(args.config_file)
    logging.raiseExceptions = False  # a log that cannot be written must not hide why
    from relvit_d2.engine import distributed

    return guard(lambda: distributed.run(process, args), resumes=True)
