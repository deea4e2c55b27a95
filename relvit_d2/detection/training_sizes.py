"""The sizes of training images and of their objects, kept in the run's folder for detection in tiles."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.structures import BoxMode
from fvcore.common.config import CfgNode

from relvit_d2.detection.detections import TrainingSizes
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import write_json

FILE = "training_sizes.json"
EXAMINED = 2_000  # images at most, evenly spaced
LARGE = 95  # percentile of the sides of boxes


def training_sizes(cfg: CfgNode, records: Sequence[dict[str, Any]]) -> TrainingSizes:
    """Return the sizes in training images: their medians, and a large object's side."""
    chosen = records[:: -(-len(records) // EXAMINED)]
    height, width = np.median([(record["height"], record["width"]) for record in chosen], axis=0).round().astype(int)
    if cfg.INPUT.CROP.ENABLED and not cfg.INPUT.LSJ.SIZE:
        height, width = _median_crop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE, height, width)
    boxes = [
        BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYXY_ABS)
        for record in chosen
        for a in record["annotations"]
        if not a.get("iscrowd")
    ]
    corners = np.array(boxes, np.float64).reshape(-1, 2, 2)
    sides = (corners[:, 1] - corners[:, 0]).max(axis=1)
    return TrainingSizes(int(width), int(height), round(np.percentile(sides, LARGE)) if len(sides) else 0)


def write_training_sizes(cfg: CfgNode, records: Sequence[dict[str, Any]]) -> None:
    """Write the sizes in training images into ``OUTPUT_DIR``."""
    write_json(Path(cfg.OUTPUT_DIR) / FILE, training_sizes(cfg, records)._asdict())


def _median_crop(kind: str, size: Sequence[float], height: int, width: int) -> tuple[float, float]:
    """Return the median height and width of the crops of ``INPUT.CROP``, as Detectron2's ``RandomCrop`` draws them."""
    if kind == "relative":
        return height * size[0], width * size[1]
    if kind == "relative_range":
        return height * (1 + size[0]) / 2, width * (1 + size[1]) / 2
    down, across = size if kind == "absolute" else [sum(size) / 2] * 2
    return min(height, down), min(width, across)


def read_training_sizes(weights: str | Path) -> TrainingSizes | None:
    """Return the sizes in the training images of a run, its folder or a checkpoint in it; None if they are not known.

    Raises:
        UserError: the file is damaged.
    """
    path = Path(weights)
    file = (path if path.is_dir() else path.parent) / FILE
    if not file.is_file():
        return None
    try:
        return TrainingSizes(**{key: int(value) for key, value in json.loads(file.read_text("utf-8")).items()})
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"'{file}' is damaged: remove it; tiles then need a size") from error
