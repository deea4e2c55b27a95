"""Pre-training's data, training and held-out figures, from a config."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

from detectron2.utils import comm
from fvcore.common.config import CfgNode

from relvit_d2.data import catalog
from relvit_d2.data.loader import Batches, EndlessOrder, endless_batches, ordered_batches
from relvit_d2.data.mapper import ImageReader, pad_images
from relvit_d2.engine.precision import choose_precision
from relvit_d2.engine.trainer import Trainer
from relvit_d2.errors import UserError
from relvit_d2.pretraining.model import PretrainingModel, evaluate_pretext

logger = logging.getLogger(__name__)


def image_files(names: Sequence[str]) -> list[Any]:
    """Return the image files of registered data sets and of folders; no label is read.

    Raises:
        UserError: if a name is neither a data set nor a folder, or nothing was found.
    """
    files = [path for name in names for path in catalog.get_images(name)]
    if not files:
        raise UserError("DATASETS.TRAIN names no image; give a data set or a folder, such as \"('path/to/images',)\"")
    return files


def build_trainer(cfg: CfgNode, model: PretrainingModel) -> Trainer:
    """Return the trainer of pre-training on ``DATASETS.TRAIN``, with held-out figures on ``DATASETS.TEST``."""
    files = image_files(cfg.DATASETS.TRAIN)
    held_out = partial(evaluate, cfg, model) if cfg.DATASETS.TEST else None
    return Trainer(cfg, model, len(files), partial(_training_batches, cfg, files), held_out)


def _training_batches(cfg: CfgNode, files: list[Any], start: int) -> Batches:
    order = EndlessOrder(len(files), cfg.SOLVER.IMS_PER_BATCH, cfg.SEED, start, comm.get_rank(), comm.get_world_size())
    reader = ImageReader(cfg.INPUT.LOAD_SIZE)
    return endless_batches(files, reader, pad_images, order, cfg.SEED, cfg.DATALOADER.NUM_WORKERS)


def evaluate(cfg: CfgNode, model: PretrainingModel) -> dict[str, dict[str, float]]:
    """Return ``{"held_out": figures}``: losses and accuracies on the images of ``DATASETS.TEST``, views fixed.

    Every process goes through the whole set; empty in all but the first.
    """
    files = image_files(cfg.DATASETS.TEST)
    batches = ordered_batches(
        files,
        ImageReader(cfg.INPUT.LOAD_SIZE),
        pad_images,
        cfg.SOLVER.IMS_PER_BATCH,
        cfg.DATALOADER.NUM_WORKERS,
    )
    with choose_precision(cfg.SOLVER.PRECISION, next(model.parameters()).device).autocast():
        figures = evaluate_pretext(model, batches)
    for task in (name.removeprefix("accuracy_") for name in figures if name.startswith("accuracy_")):
        logger.info(
            f"held out: {task} accuracy {figures['accuracy_' + task]:.1%} (chance {figures['chance_' + task]:.1%}) "
            f"on {len(files)} images"
        )
    return {"held_out": figures} if comm.is_main_process() else {}
