"""Check that a checkpoint belongs to the run that resumes from it."""

from typing import Any

import yaml  # type: ignore[import-untyped]
from fvcore.common.config import CfgNode

from relvit_d2.config.config_file import flat
from relvit_d2.utils.errors import UserError

# Prefixes of the keys that a resumed run may change, since they do not affect training.
FREE_ON_RESUME = (
    "VERSION",
    "OUTPUT_DIR",
    "MODEL.DEVICE",
    "MODEL.ALLOW_PICKLE",
    "MODEL.ACTIVATION_CHECKPOINT",
    "MODEL.COMPILE",
    "MODEL.WEIGHTS",  # used at the start only
    "CUDNN_BENCHMARK",
    "DATALOADER.NUM_WORKERS",
    "DATALOADER.TIMEOUT",
    "DATASETS.DOWNLOAD",
    "DATASETS.TEST",
    "TEST.",
    "SOLVER.CHECKPOINT_",
)


def check_same_run(cfg: CfgNode, samples: int, allow_changes: bool, checkpoint: dict[str, Any]) -> None:
    """Compare a run with the one that wrote a checkpoint.

    Args:
        cfg: config of this run.
        samples: number of its training images.
        allow_changes: accept another config and number of images.
        checkpoint: content of the file.

    Raises:
        UserError: an entry is missing, or a key that affects training (all but ``FREE_ON_RESUME``) differs.
    """
    if absent := [key for key in ("config", "samples", "iteration", "scalars", "processes") if key not in checkpoint]:
        raise UserError(
            f"the checkpoint in OUTPUT_DIR '{cfg.OUTPUT_DIR}' was not written by this trainer (it has no "
            f"'{absent[0]}'): start without --resume, with the file as MODEL.WEIGHTS"
        )
    if allow_changes:
        return
    saved, current = (flat(yaml.safe_load(text)) for text in (checkpoint["config"], cfg.dump()))
    saved["the number of training images"], current["the number of training images"] = checkpoint["samples"], samples
    for key in current:
        if key in saved and saved[key] != current[key] and not key.startswith(FREE_ON_RESUME):
            raise UserError(
                f"OUTPUT_DIR '{cfg.OUTPUT_DIR}' holds a run with {key} {saved[key]}, but now it is {current[key]}: "
                "restore the value, choose another OUTPUT_DIR, or accept the change with --resume --allow-changes"
            )
