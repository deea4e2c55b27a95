"""Pre-training's data, training and held-out figures, from a config."""

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

from relvit_d2.data.classification.datasets import get_class_set, get_class_sets, is_class_set
from relvit_d2.data.detection import catalog
from relvit_d2.data.detection.catalog import save_splits
from relvit_d2.data.detection.custom import register_custom
from relvit_d2.data.images.batches import Images, TrainingBatches, fixed_batches, joined
from relvit_d2.data.images.folder import is_image_source, readable
from relvit_d2.engine.precision import choose_precision
from relvit_d2.engine.run_setup import keep_config, start_run
from relvit_d2.engine.trainer import Trainer
from relvit_d2.engine.weights import holds_encoder, load_proved, load_trained
from relvit_d2.pretext.monitor import knn_accuracy
from relvit_d2.pretraining.model import (
    PretrainingModel,
    build_pretraining_model,
    evaluate_pretext,
    export_encoder,
    image_features,
)
from relvit_d2.utils.config_paths import has_config
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import write_json
from relvit_d2.utils.metrics import Metric, as_scalars, from_scalars
from relvit_d2.utils.printing import shell_command

UNHELD = 256  # training images that figures are taken of where no images are held out
LEAK = 0.95  # accuracy in the first epoch beyond which a task is no task
LEAK_WINDOW = 20  # iterations that it is the mean of

logger = logging.getLogger(__name__)


def image_files(
    key: str, names: Sequence[str], skip_missing: bool, download: bool = False, synset_file: str = ""
) -> Images:
    """Return the images of registered data sets and of whatever else holds images; no label is looked at.

    Images whose headers cannot be read are left out, with a word in the log.

    Args:
        key: the config key that names them, for the message.
        names: classification sets, trees of classes in an archive, and what
            :func:`relvit_d2.data.detection.catalog.get_images` takes.
        skip_missing: leave out images that are listed but absent.
        download, synset_file: see :func:`relvit_d2.data.classification.datasets.get_class_set`.

    Raises:
        UserError: if a name is neither a data set nor holds images, or there is none.
    """

    def read(name: str) -> Images:
        if _has_classes(name):
            return get_class_sets(key, [name], download, synset_file).images
        return readable(catalog.get_images(name, skip_missing))

    parts = [read(name) for name in names]
    if not any(map(len, parts)):
        raise UserError(f"{key} names no image; give a data set or a folder, such as \"('path/to/images',)\"")
    return joined(parts)


def _has_classes(name: str) -> bool:
    """Whether a name is that of a classification set, which an archive of classes is too."""
    return is_class_set(name) and not is_image_source(catalog.subset(name)[0])


def next_command(config_file: str, data: str | None, cfg: CfgNode, encoder: Path) -> str:
    """Return the command to type after a pre-training: the training on data of its kind, from its ``encoder``'s file.

    Its config is the one that has the name of ``config_file``, ``configs/NAME.yaml`` or ``configs/cls/NAME.yaml`` after
    ``configs/ssl/NAME.yaml``, and FILE where there is none; ``data`` is what ``--data`` was given.
    """
    classes = all(map(_has_classes, cfg.DATASETS.TRAIN))
    command, folder = ("classify", "cls") if classes else ("train", "")
    own = Path(config_file)
    names = (own.parent.parent / folder / own.name, own.with_name(own.name.removeprefix("ssl_")))
    config = next((str(path) for path in names if path != own and has_config(str(path))), "FILE")
    where = ["--data", data] if data else []
    return shell_command(["relvit-d2", command, "--config-file", config, *where, "MODEL.WEIGHTS", str(encoder)])


def build_trainer(cfg: CfgNode, model: PretrainingModel, files: Images, tests: Images) -> Trainer:
    """Return the trainer of pre-training on the images ``files``, with figures on ``tests``.

    Without ``tests`` the figures are those of the first training images.
    """
    figures_of = ("held_out", tests) if len(tests) else ("training_images", files[:UNHELD])
    measure = partial(evaluate, cfg, model, figures_of[1], figures_of[0])
    trainer = Trainer(cfg, model, len(files), partial(TrainingBatches, cfg, files), measure)
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
        for name, metric in from_scalars({name: name for name in storage.histories() if "/" not in name}).items():
            count, history = storage.count_samples(metric.value, LEAK_WINDOW), storage.history(metric.value)
            if metric.kind == "accuracy" and count and history.avg(count) > LEAK:
                self._said = True
                logger.warning(
                    f"the accuracy of {name} is {history.avg(count):.1%} in the first epoch: the positions leak, so "
                    "there is nothing to learn. An encoder that carries positions needs permuted patches: set "
                    "PRETEXT.PERMUTE always, or MODEL.ENCODER.POS_EMBED False for a ViT"
                )
                return


def evaluate(
    cfg: CfgNode, model: PretrainingModel, files: Images, name: str = "held_out"
) -> dict[str, dict[str, float]]:
    """Return ``{name: figures}`` of the images ``files`` with fixed views; write ``inference/results.json``.

    The figures are those of :func:`relvit_d2.pretraining.model.evaluate_pretext`, and with ``PRETEXT.KNN`` the accuracy
    ``knn``, whose chance is the share of the largest class. The processes share the ``files``; the result is empty in
    all but the first.
    """
    with choose_precision(cfg.SOLVER.PRECISION, next(model.parameters()).device).autocast():
        figures = evaluate_pretext(model, _fixed_batches(cfg, files))
        if cfg.PRETEXT.KNN:
            known = get_class_set(cfg.PRETEXT.KNN)
            features = comm.gather(image_features(model, _fixed_batches(cfg, known.images)))
            if features:
                chance = known.labels.bincount().max().item() / len(known)
                figures |= as_scalars({"knn": Metric(knn_accuracy(torch.cat(features), known.labels), chance)})
    if not comm.is_main_process():
        return {}
    logger.info(f"{name.replace('_', ' ')}: {describe(figures, model.encoder.dim)}; {len(files)} images")
    results = {name: figures}
    write_json(Path(cfg.OUTPUT_DIR) / "inference" / "results.json", results)
    return results


def describe(figures: dict[str, float], dim: int) -> str:
    """Put the figures of :func:`evaluate` into words; ``dim`` is the width of a token."""
    parts = [f"{name} {metric.kind} {metric}" for name, metric in from_scalars(figures).items()]
    parts.append(
        f"features: std {figures['feature_std']:.2f} of 1, effective rank {figures['feature_rank']:.0f} of {dim}"
    )
    return ", ".join(parts)


def _fixed_batches(cfg: CfgNode, files: Images) -> Iterator[dict[str, Any]]:
    """Give this process's share of the images in batches, with the numbers that decide their views."""
    size = max(1, cfg.SOLVER.IMS_PER_BATCH // (comm.get_world_size() * cfg.SOLVER.GRAD_ACCUM_STEPS))
    return fixed_batches(cfg, files, size, replaces=True)


def run_process(cfg: CfgNode, args: argparse.Namespace, end: Callable[[Path, str], None]) -> None:
    """Run one process of a pre-training, or of an evaluation.

    Args:
        cfg: the config; frozen here.
        args: of the command ``pretrain``.
        end: called after a training, in the first process, with ``OUTPUT_DIR`` and the command to type next.

    Raises:
        UserError: if the images or the weights are missing or damaged.
    """
    cfg.freeze()
    start_run(cfg, args)
    register_custom(cfg.DATASETS, labels=False)
    wanted = args.eval_only or cfg.DATASETS.TEST
    data = cfg.DATASETS
    how = (data.SKIP_MISSING, data.DOWNLOAD, data.SYNSETS)
    tests = image_files("DATASETS.TEST", data.TEST, *how) if wanted else []
    files = [] if args.eval_only else image_files("DATASETS.TRAIN", data.TRAIN, *how)
    save_splits(data.TEST if args.eval_only else (*data.TRAIN, *data.TEST), Path(cfg.OUTPUT_DIR))
    model = build_pretraining_model(cfg)
    weights = cfg.MODEL.WEIGHTS
    if args.eval_only:
        keep_config(cfg)
        load_trained(cfg, model, cfg.OUTPUT_DIR if args.resume else weights)
        evaluate(cfg, model, tests)
        return
    trainer = build_trainer(cfg, model, files, tests)
    resumed = args.resume and trainer.resume(args.allow_changes)
    if weights and not resumed:
        if not holds_encoder(weights):
            raise UserError(
                f"MODEL.WEIGHTS '{weights}' is no encoder.safetensors and no timm:NAME; pre-training starts from one "
                "or from scratch"
            )
        load_proved(cfg, model.encoder, weights, "RGB")
    trainer.train()
    if comm.is_main_process():
        path = export_encoder(cfg, model, trainer.iter + 1, trainer.results)
        end(path.parent, next_command(args.config_file, args.data, cfg, path))
