"""Whether a checkpoint belongs to the run that asks to go on with it."""

from typing import Any

import yaml  # type: ignore[import-untyped]
from fvcore.common.config import CfgNode

from relvit_d2.config.config_file import flat
from relvit_d2.utils.errors import UserError

# Keys that a resumed run may change, by how they begin: they do not decide what is learnt.
FREE_ON_RESUME = (
    "VERSION",
    "OUTPUT_DIR",
    "MODEL.DEVICE",
    "MODEL.ALLOW_PICKLE",
    "MODEL.ACTIVATION_CHECKPOINT",
    "MODEL.COMPILE",
    "MODEL.WEIGHTS",  # read at the start only
    "CUDNN_BENCHMARK",
    "DATALOADER.NUM_WORKERS",
    "DATASETS.DOWNLOAD",
    "DATASETS.TEST",
    "TEST.",
    "SOLVER.CHECKPOINT_",
)


def check_same_run(cfg: CfgNode, samples: int, allow_changes: bool, checkpoint: dict[str, Any]) -> None:
    """Compare a run with the one that wrote a checkpoint.

    Args:
        cfg: the config of this run.
        samples: its number of training images.
        allow_changes: look only whether the trainer can go on with it.
        checkpoint: what the file holds: ``config`` (yaml) and ``samples`` of the other run, and what it goes on with.

    Raises:
        UserError: naming what a file of this trainer holds and this one lacks, or the first key that differs and that
            decides what is learnt (all but ``FREE_ON_RESUME``).
    """
    if absent := [key for key in ("config", "samples", "iteration", "scalars", "processes") if key not in checkpoint]:
        raise UserError(
            f"the checkpoint in OUTPUT_DIR '{cfg.OUTPUT_DIR}' was not written by this trainer (it has no "
            f"'{absent[0]}'): start anew without --resume, with the file as MODEL.WEIGHTS"
        )
    if allow_changes:
        return
    theirs, ours = (flat(yaml.safe_load(text)) for text in (checkpoint["config"], cfg.dump()))
    theirs["the number of training images"], ours["the number of training images"] = checkpoint["samples"], samples
    for key in ours:
        if key in theirs and theirs[key] != ours[key] and not key.startswith(FREE_ON_RESUME):
            raise UserError(
                f"OUTPUT_DIR '{cfg.OUTPUT_DIR}' holds a run with {key} {theirs[key]}, but now it is {ours[key]}: set "
                "it as it was, choose another OUTPUT_DIR, or go on with the change by --resume --allow-changes"
            )
