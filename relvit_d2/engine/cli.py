"""What the scripts share: arguments, the config, the log, errors as one sentence."""

import argparse
import logging
import os
import platform
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from detectron2.engine import default_argument_parser, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from fvcore.common.config import CfgNode
from torch.multiprocessing import ProcessExitedException

from relvit_d2 import __version__
from relvit_d2.engine.machine import device_name
from relvit_d2.engine.randomness import seed_everything
from relvit_d2.errors import UserError
from relvit_d2.files import remove_leftovers, write_text

logger = logging.getLogger(__name__)


def guard(function: Callable[[], None]) -> int:
    """Run ``function`` and return the exit status: 0, or 1 after printing the sentence of a :class:`UserError`.

    ``RELVIT_DEBUG=1`` shows the traceback instead.
    """
    try:
        function()
    except UserError as error:
        if os.environ.get("RELVIT_DEBUG") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ProcessExitedException:  # that process said its sentence already
        return 1
    return 0


def run_script(main: Callable[[argparse.Namespace], None], example: str) -> int:
    """Parse Detectron2's command line and run ``main`` in as many processes as it asks for.

    Args:
        main: what a process does with the arguments; importable by name, since processes are spawned.
        example: a command line that runs, for ``--help``.

    Returns:
        The exit status.
    """
    parser = default_argument_parser(epilog=f"example:\n  {example}")
    args = parser.parse_args()

    def start() -> None:
        if not args.config_file:
            raise UserError(f"--config-file is missing; for example: {example}")
        if torch.cuda.is_available() and args.num_gpus > torch.cuda.device_count():
            raise UserError(f"--num-gpus {args.num_gpus}: this machine has {torch.cuda.device_count()} GPUs")
        if args.num_gpus * args.num_machines > 1:
            launch(
                _process,
                args.num_gpus,
                args.num_machines,
                args.machine_rank,
                args.dist_url,
                args=(main, args),
            )
        else:
            main(args)

    return guard(start)


def _process(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """One of several processes: the sentence of an error is printed here, the parent sees the exit status."""
    status = guard(lambda: main(args))
    if status:
        sys.exit(status)
    # A process that leaves while another still talks to it takes that one down.
    comm.synchronize()
    torch.distributed.destroy_process_group()


def start_run(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Make ``OUTPUT_DIR``, start its log, say what runs on what, keep the config, seed the generators.

    Raises:
        UserError: if ``OUTPUT_DIR`` cannot be written or the device is not there.
    """
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"MODEL.DEVICE '{cfg.MODEL.DEVICE}' is asked for, but torch sees no GPU; set MODEL.DEVICE cpu")
    if cfg.SEED < 0:
        raise UserError(f"SEED {cfg.SEED} is negative; every draw is a function of it, so give 0 or more")
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    if cfg.SOLVER.IMS_PER_BATCH < 1:
        raise UserError(f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} is no number of images; give 1 or more")
    if cfg.SOLVER.IMS_PER_BATCH % comm.get_world_size():
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} is no multiple of the {comm.get_world_size()} processes"
        )
    output = Path(cfg.OUTPUT_DIR)
    try:
        output.mkdir(parents=True, exist_ok=True)
        setup_logger(str(output), distributed_rank=comm.get_rank(), name="relvit_d2", abbrev_name="relvit")
        setup_logger(str(output), distributed_rank=comm.get_rank(), name="detectron2", abbrev_name="d2")
        setup_logger(str(output), distributed_rank=comm.get_rank(), name="fvcore")
        if comm.is_main_process():
            remove_leftovers(output)
            if not (args.eval_only and (output / "config.yaml").exists()):  # that one is the training's
                write_text(output / "config.yaml", cfg.dump())
    except OSError as error:
        raise UserError(f"OUTPUT_DIR '{output}' cannot be written ({error.strerror}); choose another folder") from error
    # Said at every start by code of Detectron2 and fvcore that a user of this project cannot mend.
    warnings.filterwarnings("ignore", message="torch.meshgrid: in an upcoming release")
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    device = f"{device_name(cfg.MODEL.DEVICE)}, {torch.get_num_threads()} threads"
    logger.info(f"relvit_d2 {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {device}")
    logger.info(f"command: {' '.join(sys.argv)}")
    seed_everything(cfg.SEED, "model")
