"""The commands that train: Detectron2's arguments, and the start of their processes."""

import argparse
import gc
import logging
from contextlib import nullcontext, suppress
from importlib import import_module
from pathlib import Path
from traceback import clear_frames
from typing import TYPE_CHECKING

from relvit_d2.engine.error_reporting import guard
from relvit_d2.utils.config_paths import find_config
from relvit_d2.utils.errors import ResumableError, UserError, is_out_of_memory

if TYPE_CHECKING:
    from fvcore.common.config import CfgNode

_PACKAGES = {"pretrain": "pretraining", "detection": "detection", "classification": "classification"}


def add_training_arguments(parser: argparse.ArgumentParser, task: str) -> None:
    """Add the arguments of Detectron2's ``default_argument_parser`` and those of a task (a value of ``TASK``)."""
    parser.set_defaults(task=task, data=None)
    parser.add_argument("--config-file", default="", metavar="FILE", help="the config")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in OUTPUT_DIR")
    parser.add_argument(
        "--allow-changes",
        action="store_true",
        help="with --resume: continue although the config or the training data have changed",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the run in OUTPUT_DIR, if there is one")
    parser.add_argument("--eval-only", action="store_true", help="evaluate only")
    parser.add_argument("--num-gpus", type=int, default=1, help="number of GPUs per machine (default 1)")
    parser.add_argument("--num-machines", type=int, default=1, help="number of machines (default 1)")
    parser.add_argument("--machine-rank", type=int, default=0, help="index of this machine, from 0")
    parser.add_argument(
        "--dist-url",
        default="auto",
        help="tcp://HOST:PORT of the first machine, if there are several (default: a free port of this machine)",
    )
    if task == "classification":
        parser.add_argument(
            "--eval", choices=("knn", "linear"), help="do not train: probe the frozen encoder on the training images"
        )
    else:
        parser.add_argument(
            "--data",
            help="folder of a custom data set, in place of DATASETS.TRAIN and TEST; see docs/custom_data.md",
        )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs that override the config")


def run_training(args: argparse.Namespace, example: str) -> int:
    """Run the task in ``--num-gpus`` processes and return the exit status.

    Args:
        args: those of :func:`add_training_arguments`.
        example: valid command lines, for the error of a missing config.
    """
    if not args.config_file:
        if args.opts and Path(args.opts[0]).exists() and args.task != "classification":
            option = "--data" if Path(args.opts[0]).is_dir() else "--config-file"
            raise UserError(f"'{args.opts[0]}' is not a config key: give it as {option} {args.opts[0]}")
        raise UserError(f"--config-file is missing; for example: {example}")
    find_config(args.config_file)
    from relvit_d2.engine import distributed

    return guard(lambda: distributed.run(_run_command, args), resumes=not args.eval_only)


def _run_command(args: argparse.Namespace) -> None:
    import relvit_d2.data.detection.custom
    import relvit_d2.tasks  # noqa: F401

    # A collection would visit all imported modules again and again while records are read. Not in run_process, which a
    # user's own process may call.
    gc.freeze()
    run_process(args)


def run_process(args: argparse.Namespace) -> None:
    """Run one of the processes."""
    logging.raiseExceptions = False  # a failing log handler must not hide the original error
    from relvit_d2.data.detection.custom import config_pairs
    from relvit_d2.engine.loggers import check_loggers
    from relvit_d2.engine.run_lock import run_lock
    from relvit_d2.tasks import load_config

    cfg = load_config(args.config_file, [*config_pairs(args.data, args.task), *args.opts], args.task)
    trains = not args.eval_only and not getattr(args, "eval", None)
    if trains:
        check_loggers(cfg.LOGGERS)
    try:
        # The start of the run refuses an empty name, which would lock the working directory.
        with run_lock(Path(cfg.OUTPUT_DIR)) if trains and cfg.OUTPUT_DIR.strip() else nullcontext():
            import_module(f"relvit_d2.{_PACKAGES[args.task]}.run").run_process(cfg, args, _end_run)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        clear_frames(error.__traceback__)  # releases the model and its batch
        if args.eval_only:
            raise UserError("out of memory: lower TEST.BATCH_SIZE or the size of the images") from error
        raise ResumableError(
            "out of memory; the last checkpoint is intact: raise SOLVER.GRAD_ACCUM_STEPS (now "
            f"{cfg.SOLVER.GRAD_ACCUM_STEPS}) or lower SOLVER.IMS_PER_BATCH (now {cfg.SOLVER.IMS_PER_BATCH}; "
            f"{_fitting_batch(cfg)})"
        ) from error


def _end_run(folder: Path, command: str) -> None:
    from relvit_d2.report.run_summary import end_run  # draws with matplotlib, which is not needed before

    end_run(folder, command)


def _fitting_batch(cfg: "CfgNode") -> str:
    import torch
    from detectron2.utils import comm

    from relvit_d2.analysis.model_cost import fitting_batch
    from relvit_d2.cli.analyze import subject_of

    if comm.get_world_size() == 1:  # other processes would wait for this one
        torch.cuda.empty_cache()
        with suppress(Exception):  # again out of memory
            return f"about {fitting_batch(subject_of(cfg))} fit at a time"
    return "relvit-d2 analyze measures how many fit"
