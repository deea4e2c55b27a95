"""Pre-training's data, training and held-out figures, from a config."""

import logging
import math
from collections.abc import Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from fvcore.common.config import CfgNode
from torch import Tensor

from relvit_d2.data import catalog
from relvit_d2.data.folder import list_images, readable
from relvit_d2.data.loader import EndlessBatches, EndlessOrder, ordered_batches
from relvit_d2.data.mapper import ImageReader, pad_images
from relvit_d2.engine.precision import choose_precision
from relvit_d2.engine.randomness import torch_generator
from relvit_d2.engine.trainer import Trainer
from relvit_d2.errors import UserError
from relvit_d2.files import write_json
from relvit_d2.pretext.monitor import knn_accuracy
from relvit_d2.pretraining.model import PretrainingModel, evaluate_pretext, image_features

UNHELD = 256  # training images that figures are taken of where no images are held out
LEAK = 0.95  # accuracy in the first epoch beyond which a task is no task
LEAK_WINDOW = 20  # iterations that it is the mean of

logger = logging.getLogger(__name__)


def image_files(key: str, names: Sequence[str], skip_missing: bool) -> list[Any]:
    """Return the image files of registered data sets and of whatever else holds images; no label is read.

    Images whose headers cannot be read are left out, with a word in the log.

    Args:
        key: the config key that names them, for the message.
        names: what :func:`relvit_d2.data.catalog.get_images` takes.
        skip_missing: leave out images that are listed but absent.

    Raises:
        UserError: if a name is neither a data set nor holds images, or there is none.
    """
    files = [path for name in names for path in catalog.get_images(name, skip_missing)]
    if not files:
        raise UserError(f"{key} names no image; give a data set or a folder, such as \"('path/to/images',)\"")
    return readable(files)


def labelled_images(folder: str) -> tuple[list[Path], Tensor]:
    """Return the images of ``PRETEXT.KNN`` and their classes, ``(n,)`` int64: one folder a class, in order of name.

    Raises:
        UserError: if there are no two classes of images.
    """
    root = Path(folder)
    classes = [list_images(c) for c in sorted(root.iterdir()) if c.is_dir()] if root.is_dir() else []
    if len(classes) < 2:
        raise UserError(
            f"PRETEXT.KNN '{folder}' holds no classes: give a folder with a folder of images for each class"
        )
    labels = [torch.full((len(files),), label) for label, files in enumerate(classes)]
    return [file for files in classes for file in files], torch.cat(labels)


def build_trainer(cfg: CfgNode, model: PretrainingModel, files: list[Any], tests: list[Any]) -> Trainer:
    """Return the trainer of pre-training on the images ``files``, with figures on ``tests``.

    Without ``tests`` the figures are those of the first training images.
    """
    measure = partial(evaluate, cfg, model, tests or files[:UNHELD], "held_out" if tests else "training_images")
    trainer = Trainer(cfg, model, len(files), partial(TrainingBatches, cfg, files), measure, "pretrain_ssl.py")
    trainer.register_hooks([LeakAlarm(math.ceil(len(files) / cfg.SOLVER.IMS_PER_BATCH))])
    return trainer


class LeakAlarm(HookBase):
    """Says once that a task is solved before anything can have been learnt.

    Args:
        epoch: iterations of the first epoch, in which it listens.
    """

    trainer: Trainer

    def __init__(self, epoch: int) -> None:
        self._epoch, self._said = epoch, False

    def after_step(self) -> None:
        """See the class."""
        storage = self.trainer.storage
        if self._said or self.trainer.iter >= self._epoch:
            return
        for name, history in storage.histories().items():
            count = storage.count_samples(name, LEAK_WINDOW)
            if name.startswith("accuracy_") and count and history.avg(count) > LEAK:
                self._said = True
                logger.warning(
                    f"{name} is {history.avg(count):.1%} in the first epoch: the positions leak, so there is nothing "
                    "to learn. An encoder that carries positions needs permuted patches: set PRETEXT.PERMUTE always, "
                    "or MODEL.ENCODER.POS_EMBED False for a ViT"
                )
                return


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
        workers = cfg.DATALOADER.NUM_WORKERS
        super().__init__(files, ImageReader.of(cfg), pad_images, order, cfg.SEED, workers, replaces=True)

    def __iter__(self) -> Generator[dict[str, Any], None, None]:
        for number, batch in enumerate(super().__iter__()):
            iterations, part = divmod(number, self._order.parts)
            generator = torch_generator(self._seed, "views", self._order.start + iterations)
            yield batch | {"generator": generator, "share": (*self._order.share(part), self._size)}


def evaluate(
    cfg: CfgNode, model: PretrainingModel, files: list[Any], name: str = "held_out"
) -> dict[str, dict[str, float]]:
    """Return ``{name: figures}`` of the images ``files`` with fixed views; write ``inference/results.json``.

    The figures are those of :func:`relvit_d2.pretraining.model.evaluate_pretext`, and with ``PRETEXT.KNN``
    ``accuracy_knn`` and ``chance_knn``, the share of the largest class. The processes share the ``files``; the result
    is empty in all but the first.
    """
    with choose_precision(cfg.SOLVER.PRECISION, next(model.parameters()).device).autocast():
        figures = evaluate_pretext(model, _fixed_batches(cfg, files))
        if cfg.PRETEXT.KNN:
            images, labels = labelled_images(cfg.PRETEXT.KNN)
            features = comm.gather(image_features(model, _fixed_batches(cfg, images)))
            if features:
                figures["accuracy_knn"] = knn_accuracy(torch.cat(features), labels)
                figures["chance_knn"] = labels.bincount().max().item() / len(labels)
    if not comm.is_main_process():
        return {}
    logger.info(f"{name.replace('_', ' ')}: {describe(figures, model.encoder.dim)}; {len(files)} images")
    results = {name: figures}
    write_json(Path(cfg.OUTPUT_DIR) / "inference" / "results.json", results)
    return results


def describe(figures: dict[str, float], dim: int) -> str:
    """Put the figures of :func:`evaluate` into words; ``dim`` is the width of a token."""
    parts = []
    for key, chance in figures.items():
        task = key.removeprefix("chance_")
        if f"accuracy_{task}" in figures:
            parts.append(f"{task} accuracy {figures[f'accuracy_{task}']:.1%} (chance {chance:.1%})")
        elif f"error_{task}" in figures:
            parts.append(f"{task} error {figures[f'error_{task}']:.3f} (chance {chance:.3f})")
    parts.append(
        f"features: std {figures['feature_std']:.2f} of 1, effective rank {figures['feature_rank']:.0f} of {dim}"
    )
    return ", ".join(parts)


def _fixed_batches(cfg: CfgNode, files: list[Any]) -> Generator[dict[str, Any], None, None]:
    """Give this process's share of the images in batches, with the numbers that decide their views."""
    rank, world = comm.get_rank(), comm.get_world_size()
    size = max(1, cfg.SOLVER.IMS_PER_BATCH // (world * cfg.SOLVER.ACCUMULATE))
    workers = cfg.DATALOADER.NUM_WORKERS
    batches = ordered_batches(files, ImageReader.of(cfg), pad_images, size, workers, rank, world, replaces=True)
    first = batches.first
    for batch in batches:
        end = first + len(batch["sizes"])
        yield batch | {"keys": torch.arange(first, end)}
        first = end
