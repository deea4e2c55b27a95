"""Pre-training's data, training and held-out figures, from a config."""

import logging
from collections.abc import Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.utils import comm
from fvcore.common.config import CfgNode

from relvit_d2.data import catalog
from relvit_d2.data.loader import EndlessBatches, EndlessOrder, ordered_batches
from relvit_d2.data.mapper import ImageReader, pad_images
from relvit_d2.engine.precision import choose_precision
from relvit_d2.engine.randomness import torch_generator
from relvit_d2.engine.trainer import Trainer
from relvit_d2.errors import UserError
from relvit_d2.files import write_json
from relvit_d2.pretraining.model import PretrainingModel, evaluate_pretext

logger = logging.getLogger(__name__)


def image_files(key: str, names: Sequence[str], skip_missing: bool) -> list[Any]:
    """Return the image files of registered data sets and of folders; no label is read.

    Args:
        key: the config key that names them, for the message.
        names: data sets, subsets and paths of folders.
        skip_missing: leave out images that are listed but absent.

    Raises:
        UserError: if a name is neither a data set nor a folder, or there is none.
    """
    files = [path for name in names for path in catalog.get_images(name, skip_missing)]
    if not files:
        raise UserError(f"{key} names no image; give a data set or a folder, such as \"('path/to/images',)\"")
    return files


def build_trainer(cfg: CfgNode, model: PretrainingModel, files: list[Any], tests: list[Any]) -> Trainer:
    """Return the trainer of pre-training on the images ``files``, with held-out figures on ``tests`` if any."""
    held_out = partial(evaluate, cfg, model, tests) if tests else None
    return Trainer(cfg, model, len(files), partial(TrainingBatches, cfg, files), held_out, "pretrain_ssl.py")


class TrainingBatches(EndlessBatches):
    """Pre-training's batches, each with the generator of its views.

    All parts of an iteration, in all processes, get generators of one state, so that they are together the batch that
    one process would read.
    """

    def __init__(self, cfg: CfgNode, files: list[Any], start: int) -> None:
        solver = cfg.SOLVER
        self._seed, self._size = cfg.SEED, solver.IMS_PER_BATCH
        rank, world = comm.get_rank(), comm.get_world_size()
        order = EndlessOrder(len(files), self._size, cfg.SEED, start, rank, world, solver.ACCUMULATE)
        super().__init__(
            files, ImageReader(cfg.INPUT.LOAD_SIZE), pad_images, order, cfg.SEED, cfg.DATALOADER.NUM_WORKERS
        )

    def __iter__(self) -> Generator[dict[str, Any], None, None]:
        for number, batch in enumerate(super().__iter__()):
            iterations, part = divmod(number, self._order.parts)
            generator = torch_generator(self._seed, "views", self._order.start + iterations)
            yield batch | {"generator": generator, "share": (*self._order.share(part), self._size)}


def evaluate(cfg: CfgNode, model: PretrainingModel, files: list[Any]) -> dict[str, dict[str, float]]:
    """Return ``{"held_out": figures}``, losses and accuracies with fixed views; write ``inference/results.json``.

    The processes share the ``files``; the result is empty in all but the first.
    """
    rank, world = comm.get_rank(), comm.get_world_size()
    batch = max(1, cfg.SOLVER.IMS_PER_BATCH // (world * cfg.SOLVER.ACCUMULATE))
    reader = ImageReader(cfg.INPUT.LOAD_SIZE)
    batches = ordered_batches(files, reader, pad_images, batch, cfg.DATALOADER.NUM_WORKERS, rank, world)
    with choose_precision(cfg.SOLVER.PRECISION, next(model.parameters()).device).autocast():
        figures = evaluate_pretext(model, batches)
    if not comm.is_main_process():
        return {}
    for task, chance in model.task.chance().items():
        logger.info(
            f"held out: {task} accuracy {figures['accuracy_' + task]:.1%} (chance {chance:.1%}) on {len(files)} images"
        )
    results = {"held_out": figures}
    write_json(Path(cfg.OUTPUT_DIR) / "inference" / "results.json", results)
    return results
