"""Check that a checkpoint belongs to the run that resumes from it."""

import hashlib
import json
import logging
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from fvcore.common.config import CfgNode

from relvit_d2.config.config_file import flat
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import write_text

# Prefixes of the keys that a resumed run may change, since they do not affect training.
FREE_ON_RESUME = (
    "VERSION",
    "OUTPUT_DIR",
    "LOGGERS",
    "MODEL.DEVICE",
    "MODEL.ALLOW_PICKLE",
    "MODEL.ACTIVATION_CHECKPOINT",
    "MODEL.COMPILE",
    "MODEL.WEIGHTS",  # used at the start only
    "CUDNN_BENCHMARK",
    "DATALOADER.NUM_WORKERS",
    "DATALOADER.TIMEOUT",
    "DATALOADER.CACHE",  # and CACHE_LIMIT_GB
    "DATASETS.DOWNLOAD",
    "DATASETS.TEST",
    "TEST.",
    "SOLVER.CHECKPOINT_",
)


logger = logging.getLogger(__name__)


class DataList:
    """The training images of a run in their order.

    Args:
        lines: a line of JSON for each image; see :func:`relvit_d2.data.listing.data_lines`.

    Attributes:
        digest: SHA-256 digest of the lines.
    """

    NAME = "training_data.jsonl"

    def __init__(self, lines: list[str]) -> None:
        self._lines = lines
        self.digest = _digest(lines)

    def write(self, output: Path) -> None:
        """Write the lines to ``output`` and free their memory."""
        write_text(output / self.NAME, "".join(f"{line}\n" for line in self._lines))
        self._lines = []

    def difference(self, output: Path, digest: str) -> str:
        """Describe the first difference from the list in ``output``, which has the digest ``digest``."""
        try:
            saved = (output / self.NAME).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError):
            saved = []
        if _digest(saved) != digest:
            return f"the first difference is not known, since '{output / self.NAME}' is missing or has changed"
        old, new = next(pair for pair in zip_longest(saved, self._lines) if pair[0] != pair[1])
        before, after = (json.loads(line) if line else [None] * 4 for line in (old, new))
        if before[0] == after[0]:
            parts = ("its name", "its size", "its contents or modification time", "its annotations")
            changed = [part for part, a, b in zip(parts, before, after, strict=True) if a != b]
            return f"'{after[0]}' has changed ({', '.join(changed)})"
        if before[0] is not None and before[0] not in map(_name, self._lines):
            return f"'{before[0]}' is missing"
        if after[0] is not None and after[0] not in map(_name, saved):
            return f"'{after[0]}' was added"
        return f"the order has changed, beginning with '{after[0] or before[0]}'"


def _name(line: str) -> str:
    return json.loads(line)[0]


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def check_same_run(
    cfg: CfgNode, samples: int, data: DataList | None, allow_changes: bool, checkpoint: dict[str, Any]
) -> None:
    """Compare a run with the one that wrote a checkpoint.

    Args:
        samples: number of its training images.
        data: the images; None: only their number is compared.
        allow_changes: accept another config and other images.
        checkpoint: content of the file.

    Raises:
        UserError: an entry is missing, or the images or keys that affect training (all but ``FREE_ON_RESUME``) differ.
    """
    if absent := [key for key in ("config", "samples", "iteration", "scalars", "processes") if key not in checkpoint]:
        raise UserError(
            f"the checkpoint in OUTPUT_DIR '{cfg.OUTPUT_DIR}' was not written by this trainer (it has no "
            f"'{absent[0]}'): start without --resume, with the file as MODEL.WEIGHTS"
        )
    keep = "choose another OUTPUT_DIR, or accept the change with --resume --allow-changes"
    saved, current = (flat(yaml.safe_load(text)) for text in (checkpoint["config"], cfg.dump()))
    digest: Any = checkpoint.get("data")
    if digest is None:
        saved["the number of training images"], current["the number of training images"] = (
            checkpoint["samples"],
            samples,
        )
    for key in current if not allow_changes else ():
        if key in saved and saved[key] != current[key] and not key.startswith(FREE_ON_RESUME):
            raise UserError(
                f"OUTPUT_DIR '{cfg.OUTPUT_DIR}' holds a run with {key} {saved[key]}, but now it is {current[key]}: "
                f"restore the value, {keep}"
            )
    if data is not None and digest is None:
        logger.info("the checkpoint has no digest of the training data: only their number is compared")
    elif data is not None and digest != data.digest:
        difference = data.difference(Path(cfg.OUTPUT_DIR), digest)
        if not allow_changes:
            raise UserError(
                f"the training data of the run in OUTPUT_DIR '{cfg.OUTPUT_DIR}' have changed: {difference}; restore "
                f"them, {keep}"
            )
        logger.warning(f"the training data of the run have changed: {difference}")
