"""Start of a run: output folder, logging, seeds, checks."""

import argparse
import logging
import os
import shutil
import sys
import warnings
from pathlib import Path

import torch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from fvcore.common.config import CfgNode

from relvit_d2.engine.precision import Precision
from relvit_d2.engine.provenance import VERSIONS, command_line
from relvit_d2.engine.schedule import batch_factor
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import remove_leftovers, write_text
from relvit_d2.utils.hardware import device_name
from relvit_d2.utils.randomness import seed_everything

LOGGERS = {"relvit_d2": "relvit", "detectron2": "d2", "fvcore": "fvcore"}
"""Loggers whose lines a run writes to its log, and their names there."""
RESULTS = ("last_checkpoint", "model_final.pth", "encoder.safetensors")  # files that a run does not overwrite unasked
# What a resumed run and the commands that follow a run read, the pointer first: what is left of a run whose files were
# moved in part is not continued.
RUN_FILES = (
    *RESULTS,
    "encoder_ema.safetensors",
    "model_*.pth",
    "metrics.json",
    "events.out.tfevents.*",
    "training_data.jsonl",
    "config.yaml",
    "run.json",
    "inference",
    "report.html",
)

logger = logging.getLogger(__name__)


def start_run(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Create ``OUTPUT_DIR``, set up logging, log versions, device and command, and seed the generators.

    Raises:
        UserError: ``OUTPUT_DIR`` is empty, holds another run or cannot be written, the device does not exist, or the
            batch cannot be divided among the processes.
    """
    kind = torch.device(cfg.MODEL.DEVICE).type
    if (kind == "cuda" and not torch.cuda.is_available()) or (kind == "mps" and not torch.backends.mps.is_available()):
        raise UserError(f"MODEL.DEVICE '{cfg.MODEL.DEVICE}' needs a GPU, but torch finds none; set MODEL.DEVICE cpu")
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    solver, processes = cfg.SOLVER, comm.get_world_size()
    if not args.eval_only and solver.IMS_PER_BATCH % (processes * solver.GRAD_ACCUM_STEPS):
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} is not a multiple of {processes} processes times "
            f"SOLVER.GRAD_ACCUM_STEPS {solver.GRAD_ACCUM_STEPS}: choose numbers that divide it"
        )
    if processes > 1 and torch.cuda.is_available() and not cfg.MODEL.DEVICE.startswith("cuda"):
        raise UserError(
            f"several processes use the GPUs of this machine, but MODEL.DEVICE is '{cfg.MODEL.DEVICE}': leave it "
            "out, or hide the GPUs with CUDA_VISIBLE_DEVICES=''"
        )
    if not cfg.OUTPUT_DIR.strip():
        raise UserError("OUTPUT_DIR is empty: give a folder for the results of the run")
    output = Path(cfg.OUTPUT_DIR)
    if not (args.eval_only or args.resume or args.overwrite):
        check_unused(output)
    try:
        os.fsencode(cfg.OUTPUT_DIR.encode().decode())  # TensorBoard's writer encodes it as UTF-8
        output.mkdir(parents=True, exist_ok=True)
        for name, short in LOGGERS.items():
            log = setup_logger(str(output), distributed_rank=comm.get_rank(), name=name, abbrev_name=short)
            # Detectron2 opens log.txt in the locale's encoding.
            log.handlers[-1].stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[attr-defined]
        if comm.is_main_process() and not args.eval_only:  # an evaluation may run beside a training
            for folder in (output, output / "inference"):
                remove_leftovers(folder)
    except OSError as error:
        raise UserError(f"OUTPUT_DIR '{output}' cannot be written ({error.strerror}); choose another folder") from error
    except UnicodeEncodeError as error:
        raise UserError(
            f"OUTPUT_DIR '{output}' is not valid in the encoding of this locale, {sys.getfilesystemencoding()}: choose "
            "another folder, or set the environment variable PYTHONUTF8=1"
        ) from error
    silence_warnings()
    device = f"{device_name(cfg.MODEL.DEVICE)}, threads: {torch.get_num_threads()}"
    logger.info(f"{VERSIONS}, {device}")
    if kind == "mps":
        logger.warning("MODEL.DEVICE mps is untested: compare a short run with MODEL.DEVICE cpu")
    logger.info(f"command: {command_line()}")
    seed_everything(cfg.SEED, "model")


def check_unused(output: Path) -> None:
    """Raise a :class:`UserError` if a folder holds a model or a checkpoint of a run."""
    if kept := [name for name in RESULTS if (output / name).exists()]:
        raise UserError(
            f"OUTPUT_DIR '{output}' holds a run ({', '.join(kept)}): continue it with --resume, replace it with "
            "--overwrite, or choose another OUTPUT_DIR"
        )


def move_earlier_run(output: Path) -> None:
    """Move a run in a folder into ``earlier_run``, in place of the one that is there; without a model, move nothing.

    None of its files may be taken for one of the new run. After an interruption the next call moves the rest.
    """
    files = list(dict.fromkeys(path for pattern in RUN_FILES for path in output.glob(pattern)))
    part, target = output / "earlier_run.part", output / "earlier_run"
    if not part.exists() and not any(path.suffix == ".pth" or path.name in RESULTS for path in files):
        return
    part.mkdir(exist_ok=True)
    for path in files:
        if path.is_dir():
            shutil.rmtree(part / path.name, ignore_errors=True)
        path.replace(part / path.name)
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
    logger.warning(f"'{output}' holds an earlier run: its models, metrics and results were moved to '{target}'")


def silence_warnings() -> None:
    """Suppress warnings of torch and Detectron2 that users cannot act on."""
    warnings.filterwarnings("ignore", message="torch.meshgrid: in an upcoming release")
    warnings.filterwarnings("ignore", message="Importing from timm.models.layers is deprecated")
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)


def save_config(cfg: CfgNode) -> None:
    """Write ``config.yaml`` to ``OUTPUT_DIR``, unless a training run has written it."""
    path = Path(cfg.OUTPUT_DIR) / "config.yaml"
    if comm.is_main_process() and not path.exists():
        write_text(path, cfg.dump())


def log_settings(cfg: CfgNode, samples: int, precision: Precision) -> None:
    """Log precision, length and learning rate of a run on ``samples`` images."""
    solver = cfg.SOLVER
    logger.info(f"precision: {precision.name} ({precision.reason})")
    if precision.dtype == torch.float16 and precision.device.type == "cpu":
        logger.warning("SOLVER.PRECISION float16 is slow on a CPU: set auto, or MODEL.DEVICE cuda")
    parts = f", each in {solver.GRAD_ACCUM_STEPS} parts" if solver.GRAD_ACCUM_STEPS > 1 else ""
    logger.info(
        f"{samples} training images; {solver.MAX_ITER} iterations with {solver.IMS_PER_BATCH} images{parts}: "
        f"{solver.MAX_ITER * solver.IMS_PER_BATCH / samples:.1f} epochs"
    )
    if (factor := batch_factor(cfg)) != 1:
        logger.info(
            f"learning rate {factor * solver.BASE_LR:.3g}: SOLVER.BASE_LR {solver.BASE_LR:.3g} times "
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} / SOLVER.REFERENCE_BATCH {solver.REFERENCE_BATCH} "
            "(linear scaling rule; SOLVER.REFERENCE_BATCH 0 turns it off)"
        )
