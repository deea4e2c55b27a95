"""Pre-training from a config: data, training and evaluation."""

import argparse
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from fvcore.common.config import CfgNode

from relvit_d2.data.classification.datasets import get_class_set, is_class_set, list_class_sets
from relvit_d2.data.detection import catalog
from relvit_d2.data.detection.catalog import save_splits
from relvit_d2.data.detection.custom import register_custom
from relvit_d2.data.images.batches import Images, TrainingBatches, count_left_out, fixed_batches, joined
from relvit_d2.data.images.folder import is_image_source, readable
from relvit_d2.data.images.seen import SeenImages, exclude_images, seen_metadata, training_metadata
from relvit_d2.data.listing import data_lines
from relvit_d2.data.subsets import subset
from relvit_d2.engine.precision import choose_precision
from relvit_d2.engine.run_setup import save_config, start_run
from relvit_d2.engine.trainer import Trainer
from relvit_d2.engine.weight_average import SUFFIX, WeightAverage, build_average
from relvit_d2.engine.weights import export_encoder, load_encoder, load_trained
from relvit_d2.evaluation.base import UNREADABLE
from relvit_d2.pretext.monitor import knn_accuracy
from relvit_d2.pretraining.config import FACTORS_WITH_WEIGHTS
from relvit_d2.pretraining.model import (
    PretrainingModel,
    build_pretraining_model,
    evaluate_pretext,
    image_features,
)
from relvit_d2.utils.config_paths import has_config
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import write_json
from relvit_d2.utils.metrics import Metric, as_scalars, from_scalars
from relvit_d2.utils.printing import shell_command

EVALUATED_TRAINING_IMAGES = 256  # without test images
LEAK_ACCURACY = 0.95  # accuracy in the first epoch that only leaked positions can explain
LEAK_WINDOW = 20  # iterations of the mean accuracy

logger = logging.getLogger(__name__)


def image_files(
    key: str,
    names: Sequence[str],
    skip_missing: bool,
    download: bool = False,
    synset_file: str = "",
    skip_unreadable: bool = True,
) -> Images:
    """Return the images of data sets, folders and archives, without labels.

    Args:
        key: config key of the names, for error messages.
        names: classification sets, archives of class folders, or names of
            :func:`relvit_d2.data.detection.catalog.get_images`.
        skip_missing: omit images that are listed but missing.
        download, synset_file: as for :func:`relvit_d2.data.classification.datasets.get_class_set`.
        skip_unreadable: omit and log images with unreadable headers, instead of an error.

    Raises:
        UserError: a name is not a data set and has no images, or ``names`` is empty.
    """

    def read(name: str) -> Images:
        if _has_classes(name):
            sets = list_class_sets(key, [name], download, synset_file)
            return sets.readable(skip_unreadable).decoded(skip_unreadable).images
        return readable(catalog.get_images(name, skip_missing), skip_unreadable)

    parts = [read(name) for name in names]
    if not any(map(len, parts)):
        raise UserError(f"{key} has no images; give a data set or a folder, such as \"('path/to/images',)\"")
    return joined(parts)


def _has_classes(name: str) -> bool:
    """Whether a name is a classification set and not an archive of class folders."""
    return is_class_set(name) and not is_image_source(subset(name)[0])


def next_command(args: argparse.Namespace, cfg: CfgNode, encoder: Path) -> str:
    """Return the command that fine-tunes a pre-trained encoder on the same kind of data.

    Its config has the name of the pre-training config: ``configs/NAME.yaml`` or ``configs/cls/NAME.yaml`` for
    ``configs/ssl/NAME.yaml``; FILE if it does not exist. If the user gave ``OUTPUT_DIR``, the folder ``finetune`` is
    below it, or beside it if its name is ``pretrain``.

    Args:
        args: arguments of the pre-training.
        cfg: its config.
        encoder: its ``encoder.safetensors``.
    """
    classes = all(map(_has_classes, cfg.DATASETS.TRAIN))
    command, folder = ("classify", "cls") if classes else ("train", "")
    ssl = Path(args.config_file)
    names = (ssl.parent.parent / folder / ssl.name, ssl.with_name(ssl.name.removeprefix("ssl_")))
    config = next((str(path) for path in names if path != ssl and has_config(str(path))), "FILE")
    where = ["--data", args.data] if args.data else []
    output: list[str] = []
    if "OUTPUT_DIR" in args.opts[::2]:
        pretrain = Path(cfg.OUTPUT_DIR)
        output = ["OUTPUT_DIR", str((pretrain.parent if pretrain.name == "pretrain" else pretrain) / "finetune")]
    words = ["--config-file", config, *where, "MODEL.WEIGHTS", str(encoder), *output]
    return shell_command(["relvit-d2", command, *words])


def build_trainer(cfg: CfgNode, model: PretrainingModel, files: Images, tests: Images) -> Trainer:
    """Return the trainer on the images ``files``, evaluated on ``tests`` or, if empty, on the first training images."""
    name, images = ("held_out", tests) if len(tests) else ("training_images", files[:EVALUATED_TRAINING_IMAGES])
    average = build_average(cfg, model)
    trainer = Trainer(
        cfg,
        model,
        len(files),
        partial(TrainingBatches, cfg, files),
        partial(evaluate, cfg, model, images, name, average),
        partial(data_lines, files, hash_contents=cfg.DATASETS.HASH_CONTENTS),
        average,
    )
    trainer.register_hooks([PositionLeakWarning(math.ceil(len(files) / cfg.SOLVER.IMS_PER_BATCH))])
    return trainer


class PositionLeakWarning(HookBase):
    """Warns once if a task is solved in the first ``epoch`` iterations."""

    trainer: Trainer

    def __init__(self, epoch: int) -> None:
        self._epoch, self._has_warned = epoch, False

    def after_step(self) -> None:
        storage = self.trainer.storage
        if self._has_warned or self.trainer.iter >= self._epoch:
            return
        for name, metric in from_scalars({name: name for name in storage.histories() if "/" not in name}).items():
            count, history = storage.count_samples(metric.value, LEAK_WINDOW), storage.history(metric.value)
            if metric.kind == "accuracy" and count and history.avg(count) > LEAK_ACCURACY:
                self._has_warned = True
                logger.warning(
                    f"the accuracy of {name} is {history.avg(count):.1%} in the first epoch: positions leak, so "
                    "nothing is learnt. An encoder with position information needs permuted patches: set "
                    "PRETEXT.PERMUTE always, or for a ViT MODEL.ENCODER.POS_EMBED False, REL_POS False and WINDOW 0"
                )
                return


def evaluate(
    cfg: CfgNode,
    model: PretrainingModel,
    files: Images,
    name: str = "held_out",
    average: WeightAverage | None = None,
) -> dict[str, dict[str, float]]:
    """Evaluate the images ``files`` with fixed views, divided among the processes; write ``inference/results.json``.

    Returns:
        ``{name: metrics}`` with the metrics of :func:`relvit_d2.pretraining.model.evaluate_pretext` and, with
        ``PRETEXT.KNN``, the accuracy ``knn``, whose chance level is the fraction of the largest class. With a moving
        average of the weights, its metrics under the name with ``_ema``. {} in all processes but the first.
    """
    found = {name: _measure(cfg, model, files, name)}
    if average:
        with average.applied():
            found[f"{name}{SUFFIX}"] = _measure(cfg, model, files, f"{name}{SUFFIX}")
    if not comm.is_main_process():
        return {}
    results = {
        name: metrics | ({UNREADABLE: {"images": left_out}} if left_out else {})
        for name, (metrics, left_out) in found.items()
    }
    write_json(Path(cfg.OUTPUT_DIR) / "inference" / "results.json", results)
    return {name: metrics for name, (metrics, _) in found.items()}


def _measure(cfg: CfgNode, model: PretrainingModel, files: Images, name: str) -> tuple[dict[str, float], int]:
    """Return the metrics of :func:`evaluate`, which are logged, and the number of images that cannot be read.

    ({}, 0) in all processes but the first.
    """
    with choose_precision(cfg.SOLVER.PRECISION, next(model.parameters()).device).autocast():
        metrics, count = evaluate_pretext(model, _fixed_batches(cfg, files))
        if cfg.PRETEXT.KNN:
            known = get_class_set(cfg.PRETEXT.KNN, skip_unreadable=cfg.DATASETS.SKIP_UNREADABLE)
            if parts := comm.gather(image_features(model, _fixed_batches(cfg, known.images))):
                features, keys = map(torch.cat, zip(*parts, strict=True))
                labels = known.labels[keys]
                chance = labels.bincount().max().item() / len(labels)
                metrics |= as_scalars({"knn": Metric(knn_accuracy(features, labels), chance)})
    if not comm.is_main_process():
        return {}, 0
    left_out = count_left_out(count, len(files), name.replace("_", " "))
    logger.info(f"{name.replace('_', ' ')}: {describe(metrics, model.encoder.dim)}; {count} images")
    return metrics, left_out


def describe(metrics: dict[str, float], dim: int) -> str:
    """Format the metrics of :func:`evaluate` for the log; ``dim`` is the width of a token."""
    parts = [f"{name} {metric.kind} {metric}" for name, metric in from_scalars(metrics).items()]
    std, rank = metrics["feature_std"], metrics["feature_rank"]
    return ", ".join([*parts, f"features: std {std:.2f} of 1, effective rank {rank:.0f} of {dim}"])


def _fixed_batches(cfg: CfgNode, files: Images) -> Iterator[dict[str, Any]]:
    """Yield this process's part of the images in batches."""
    size = max(1, cfg.SOLVER.IMS_PER_BATCH // (comm.get_world_size() * cfg.SOLVER.GRAD_ACCUM_STEPS))
    return fixed_batches(cfg, files, size)


def run_process(cfg: CfgNode, args: argparse.Namespace, end: Callable[[Path, str], None]) -> None:
    """Run one process of a pre-training or its evaluation.

    Args:
        cfg: the config; it is frozen.
        args: arguments of the command ``pretrain``.
        end: called after training, in the first process, with ``OUTPUT_DIR`` and the command of the next step.
    """
    cfg.freeze()
    start_run(cfg, args)
    register_custom(cfg.DATASETS, labels=False)
    data = cfg.DATASETS
    options = (data.SKIP_MISSING, data.DOWNLOAD, data.SYNSETS, data.SKIP_UNREADABLE)
    tests = image_files("DATASETS.TEST", data.TEST, *options) if args.eval_only or data.TEST else []
    files = [] if args.eval_only else image_files("DATASETS.TRAIN", data.TRAIN, *options)
    name = ", ".join(data.TRAIN)
    if data.EXCLUDE and not args.eval_only:
        excluded = image_files("DATASETS.EXCLUDE", data.EXCLUDE, *options)
        files = exclude_images(files, name, excluded, ", ".join(data.EXCLUDE), "DATASETS.TRAIN or EXCLUDE")
    save_splits(data.TEST if args.eval_only else (*data.TRAIN, *data.TEST), Path(cfg.OUTPUT_DIR))
    model = build_pretraining_model(cfg)
    weights = cfg.MODEL.WEIGHTS
    if args.eval_only:
        save_config(cfg)
        load_trained(cfg, model, cfg.OUTPUT_DIR if args.resume else weights)
        evaluate(cfg, model, tests)
        return
    trainer = build_trainer(cfg, model, files, tests)
    resumed = args.resume and trainer.resume(args.allow_changes)
    if weights and not resumed:
        trainer.metadata = seen_metadata(load_encoder(cfg, model.encoder, weights))
        defaults = ", ".join(f"{factor:g} x {key}" for key, factor in FACTORS_WITH_WEIGHTS.items())
        logger.info(
            f"pre-training from MODEL.WEIGHTS with SOLVER.BASE_LR {cfg.SOLVER.BASE_LR:g} and SOLVER.LAYER_DECAY "
            f"{cfg.SOLVER.LAYER_DECAY:g} (default: {defaults} of training from scratch): set both keys to change it"
        )
    trainer.train()
    if comm.is_main_process():
        size = cfg.PRETEXT.IMAGE_SIZE
        seen = training_metadata({name: files}, SeenImages.of_metadata(trainer.metadata))
        export = partial(
            export_encoder, cfg, model.encoder, size, trainer.iter + 1, trainer.results, pretext=cfg.PRETEXT, **seen
        )
        path = export()
        if trainer.average:
            with trainer.average.applied():
                export(suffix=SUFFIX)
        end(path.parent, next_command(args, cfg, path))
