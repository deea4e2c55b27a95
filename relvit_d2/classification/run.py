"""A classifier's data, training and evaluation, from a config."""

import argparse
import hashlib
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.utils import comm
from fvcore.common.config import CfgNode

from relvit_d2.classification.model import ClassificationModel, build_classifier
from relvit_d2.classification.probes import features, linear_probe
from relvit_d2.data.cache import remembered
from relvit_d2.data.classification.datasets import list_class_sets
from relvit_d2.data.classification.image_folder import LabelledImages, check_same_classes, rank_in_class
from relvit_d2.data.detection.splits import hold_out, warn_once
from relvit_d2.data.images.batches import ImageStack, TrainingBatches, fixed_batches
from relvit_d2.data.images.decode import image_size
from relvit_d2.data.images.similarity import NEAR, VERSION, file_state, fingerprint, fingerprints
from relvit_d2.engine.precision import choose_precision
from relvit_d2.engine.run_setup import keep_config, start_run
from relvit_d2.engine.trainer import Trainer
from relvit_d2.engine.weights import export_encoder, holds_encoder, load_trained, load_weights
from relvit_d2.pretext.monitor import knn_accuracy
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import write_json
from relvit_d2.utils.printing import shell_command
from relvit_d2.utils.randomness import generator

WATCHED = "watched_test"  # the test set's name where it chooses the model
COMPARED = 200_000  # images at most that are decoded to find equal ones, which takes minutes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassificationData:
    """The sets of a run; what it does not need is None."""

    train: LabelledImages | None
    validation: LabelledImages | None
    test: LabelledImages | None

    @property
    def classes(self) -> int:
        """How many there are."""
        return len(next(part for part in (self.train, self.test) if part).classes)


def list_data(cfg: CfgNode, training: bool) -> ClassificationData:
    """Return the sets of ``DATASETS`` less what ``DATASETS.VALIDATION`` holds out; images in files are not decoded.

    Args:
        cfg: the config.
        training: whether the training set is needed.

    Raises:
        UserError: if they are missing or damaged, or their classes differ.
    """
    data = cfg.DATASETS
    how = (data.DOWNLOAD, data.SYNSETS)
    train = list_class_sets("DATASETS.TRAIN", data.TRAIN, *how) if training else None
    validation = None
    if train and data.VALIDATION:
        if share := re.fullmatch(r"(\d+(?:\.\d+)?)%", data.VALIDATION):
            train, validation = split(train, float(share[1]) / 100, cfg.SEED)
        else:
            validation = list_class_sets("DATASETS.VALIDATION", [data.VALIDATION], *how)
    test = list_class_sets("DATASETS.TEST", data.TEST, *how) if data.TEST or not training else None
    parts = [part for part in (train, validation, test) if part]
    for part in parts:
        check_same_classes(parts[0], part)
    return ClassificationData(train, validation, test)


def load_data(cfg: CfgNode, training: bool) -> ClassificationData:
    """Return the sets of :func:`list_data`, small images decoded.

    Args:
        cfg: the config.
        training: whether the training set is needed.

    Raises:
        UserError: as :func:`list_data`, or if the images do not fit ``INPUT.VIEW``.
    """
    listed = list_data(cfg, training)
    data = ClassificationData(*(part and part.decoded() for part in (listed.train, listed.validation, listed.test)))
    parts = [part for part in (data.train, data.validation, data.test) if part]
    for name, note in {part.name: part.note for part in parts if part.note}.items():
        logger.warning(f"data set '{name}': {note}")
    if data.train and cfg.INPUT.VIEW.CROP == "pad":
        _check_sizes(data.train, cfg.INPUT.VIEW.SIZE)
    return data


def _check_sizes(data: LabelledImages, size: int) -> None:
    """Refuse images that a window of ``size`` pixels does not fit."""
    images = data.images
    shape = tuple(images.pixels.shape[2:]) if isinstance(images, ImageStack) else None
    odd = data.name if shape else next((file for file in images if image_size(file) != (size, size)), None)
    if shape != (size, size) and odd is not None:
        width, height = shape[::-1] if shape else image_size(odd)
        raise UserError(
            f"'{odd}' is {width}x{height} pixels, but INPUT.VIEW.CROP pad wants all images at INPUT.VIEW.SIZE {size}: "
            "set the size to that of all images, or INPUT.VIEW.CROP resized"
        )


def split(data: LabelledImages, share: float, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """Return what stays for training and what is held out: ``share``, 0..1, of all images, and so of each class.

    Equal and nearly equal images stay together, see :func:`relvit_d2.data.detection.splits.hold_out`; where there are
    none, or with more than ``COMPARED`` images, which are not compared, the shares are exact. In a run of several
    processes the first one compares the images, and the others read the result from the user's cache.

    Raises:
        UserError: if nothing would be held out, or nothing stay.
    """
    order = torch.from_numpy(generator(seed, "validation").permutation(len(data)))
    shuffled = data.labels[order]
    quantile = (rank_in_class(shuffled) + 0.5) / shuffled.bincount()[shuffled]
    order, count = order[quantile.argsort(stable=True)], round(share * len(data))
    chosen: list[int] = []
    if 0 < count < len(data):
        chosen = order[:count].tolist() if len(data) > COMPARED else _hold_out_groups(data, order, count)
        if len(data) > COMPARED:
            logger.info(
                f"data set '{data.name}' has more than {COMPARED} images, which are not compared: equal ones may be "
                "both trained on and held out"
            )
    if not chosen:
        why = ", since equal images stay together" if 0 < count < len(data) else ""
        raise UserError(
            f"DATASETS.VALIDATION {share:.3%} holds out {count if not why else 0} of the {len(data)} images of "
            f"'{data.name}'{why}: give another share, or '' for none"
        )
    held = torch.zeros(len(data), dtype=torch.bool)
    held[chosen] = True
    return data.take((~held).nonzero()[:, 0]), data.take(held.nonzero()[:, 0])


def _hold_out_groups(data: LabelledImages, order: torch.Tensor, count: int) -> list[int]:
    """Return the numbers of about ``count`` images to hold out, the first of ``order``, copies all or none."""
    images = data.images
    total = hashlib.blake2b(f"{VERSION} {NEAR} {count}\0".encode(), digest_size=16)
    total.update(order.numpy().tobytes())
    if isinstance(images, ImageStack):
        pixels = images.pixels.cpu().numpy()
        total.update(f"{pixels.shape}".encode())
        total.update(np.ascontiguousarray(pixels).data.cast("B"))
    else:
        total.update("\n".join(map(file_state, images)).encode(errors="surrogateescape"))

    def make() -> tuple[list[int], str]:
        if isinstance(images, ImageStack):
            prints = [fingerprint(image.permute(1, 2, 0).contiguous().cpu().numpy()) for image in images]
        else:
            prints = fingerprints(images, Path(data.name))
        ranks = order.argsort().tolist()
        held, warning = hold_out(prints, count, lambda group: min(ranks[i] for i in group), f"'{data.name}'")
        return sorted(held), warning

    if not comm.is_main_process():
        comm.synchronize()  # until the first process has filled the cache
    held, warning = remembered("held_out", total.hexdigest(), make)
    if comm.is_main_process():
        comm.synchronize()
    if warning:
        warn_once(warning)
    return held


def resolve_config(cfg: CfgNode, data: ClassificationData) -> CfgNode:
    """Return the config with ``TEST.BEST_METRIC``: the ``top1`` on what chooses the model, where something does.

    Raises:
        UserError: if the model shall be chosen on a test set that there is none of.
    """
    cfg = cfg.clone()
    if cfg.TEST.BEST_ON_TEST and data.test is None:
        raise UserError("TEST.BEST_ON_TEST chooses the model on DATASETS.TEST, which is empty: name a set")
    chooses = WATCHED if cfg.TEST.BEST_ON_TEST else "validation" if data.validation else ""
    if chooses and cfg.TEST.EVAL_PERIOD > 0 and not cfg.TEST.BEST_METRIC:
        cfg.TEST.BEST_METRIC = f"{chooses}/top1"
    cfg.freeze()
    return cfg


def build_trainer(cfg: CfgNode, model: ClassificationModel, data: ClassificationData) -> Trainer:
    """Return the trainer of a classifier, with evaluation on what chooses the model."""
    train = data.train
    assert train is not None
    watched = {WATCHED: data.test} if cfg.TEST.BEST_ON_TEST else {"validation": data.validation}
    sets = {name: part for name, part in watched.items() if part}
    measure = partial(_measure, cfg, model, sets) if sets else None
    make_batches = partial(TrainingBatches, cfg, train.images, labels=train.labels)
    trainer = Trainer(cfg, model, len(train), make_batches, measure)
    trainer.optimizer.register_step_post_hook(lambda *_: model.follow())
    return trainer


def _measure(cfg: CfgNode, model: ClassificationModel, sets: dict[str, LabelledImages]) -> dict[str, Any]:
    results = {}
    for name, part in sets.items():
        if figures := evaluate(cfg, model, part):
            results[name] = figures
            logger.info(f"{name.replace('_', ' ')}: {_words(figures)}; {len(part)} images")
    return results


def _words(figures: dict[str, float]) -> str:
    return ", ".join(
        f"{name} {value:.2f} %" if "top1" in name else f"{name} {value:.4g}" for name, value in figures.items()
    )


def evaluate(cfg: CfgNode, model: ClassificationModel, data: LabelledImages) -> dict[str, float]:
    """Return ``top1``, percent of right answers, and ``loss``, the mean cross entropy.

    Empty in all processes but the first.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    with model.evaluating(), choose_precision(cfg.SOLVER.PRECISION, model.device).autocast():
        for batch in fixed_batches(cfg, data.images, cfg.TEST.BATCH_SIZE):
            labels = data.labels[batch["keys"]].to(model.device)
            scores, _ = model.evaluated(batch)
            hits = (scores.argmax(1) == labels).sum()
            loss = F.cross_entropy(scores, labels, reduction="sum")
            sums += torch.stack((hits.double(), loss.double(), hits.new_tensor(len(labels)).double())).cpu()
    parts = comm.gather(sums)
    if not parts:
        return {}
    hits, loss, count = torch.stack(parts).sum(0).tolist()
    return {"top1": 100 * hits / count, "loss": loss / count}


def finish(cfg: CfgNode, model: ClassificationModel, trainer: Trainer, data: ClassificationData) -> None:
    """Take the best model, if one was chosen, look at the test set once, write results and the encoder.

    The figures are called ``test``, or ``best_on_test`` where the test set chose the model.
    """
    chosen, metric = "the last one", cfg.TEST.BEST_METRIC
    if metric:
        best = Path(cfg.OUTPUT_DIR) / "model_best.pth"
        extra = load_trained(cfg, model, best)
        chosen = f"the best by {metric} ({extra['value']:.2f}), after iteration {extra['iteration']}"
    name = "best_on_test" if cfg.TEST.BEST_ON_TEST else "test"
    figures = evaluate(cfg, model, data.test) if data.test else {}
    if comm.is_main_process():
        results = trainer.results | {name: figures}
        export_encoder(cfg, model.encoder, cfg.INPUT.VIEW.SIZE, trainer.iter + 1, results)
    log_results(cfg, {name: figures} if data.test else {}, data.test, trainer.results | {"model": chosen})


def log_results(
    cfg: CfgNode,
    figures: dict[str, Any],
    test: LabelledImages | None,
    more: dict[str, Any] | None = None,
    file: str = "results.json",
) -> None:
    """Log the figures on the test set and write them into a ``file`` of ``inference``, in the first process.

    It holds under the name of the test set the ``figures``, the number of ``images`` and the ``note`` that has to be
    said beside a figure of it, if there is one; and ``more``.
    """
    if not comm.is_main_process():
        return
    results: dict[str, Any] = dict(more or {})
    if test:
        for name, values in figures.items():
            logger.info(f"{name.replace('_', ' ')}: {_words(values)}; {len(test)} images of {test.name}")
        note = {"note": test.note} if test.note else {}
        results[", ".join(cfg.DATASETS.TEST)] = {**figures, "images": len(test), **note}
    write_json(Path(cfg.OUTPUT_DIR) / "inference" / file, results)


def probe(cfg: CfgNode, model: ClassificationModel, data: ClassificationData, kind: str) -> dict[str, Any]:
    """Return ``{kind: figures}`` of the frozen encoder on the test set; ``kind`` is ``knn`` or ``linear``.

    Empty in all processes but the first.

    Raises:
        UserError: if a linear probe has no validation images to choose by.
    """
    assert data.train is not None and data.test is not None
    if kind == "linear" and data.validation is None:
        raise UserError("a linear probe chooses its penalty on validation images: set DATASETS.VALIDATION, such as 10%")

    def read(part: LabelledImages) -> tuple[torch.Tensor, torch.Tensor]:
        with choose_precision(cfg.SOLVER.PRECISION, model.device).autocast():
            found = features(model, fixed_batches(cfg, part.images, cfg.TEST.BATCH_SIZE))
        return found.to(model.device), part.labels.to(model.device)

    known, unseen = read(data.train), read(data.test)
    held = read(data.validation) if kind == "linear" and data.validation else None
    if not comm.is_main_process():
        return {}
    if held:
        return {kind: linear_probe(known, held, unseen, data.classes)}
    return {kind: {"top1": 100 * knn_accuracy(*unseen, known=known)}}


def next_command(cfg: CfgNode, data: ClassificationData) -> str:
    """Return the command to type after a training: its probe, or its report page if it has no test set."""
    output = Path(cfg.OUTPUT_DIR)
    if data.test is None:
        return shell_command(["relvit-d2", "report", str(output), "--output", "report.html"])
    kind = "linear" if data.validation else "knn"
    probe = ["relvit-d2", "classify", "--config-file", str(output / "config.yaml"), "--eval", kind]
    return shell_command([*probe, "MODEL.WEIGHTS", str(output / "encoder.safetensors")])


def run_process(asked: CfgNode, args: argparse.Namespace, end: Callable[[Path, str], None]) -> None:
    """Run one process of a training of a classifier, or of an evaluation.

    Args:
        asked: the config, before the data decide on the number of classes.
        args: of the command ``classify``.
        end: called after a training, in the first process, with ``OUTPUT_DIR`` and the command to type next.

    Raises:
        UserError: if the data are missing or damaged.
    """
    args.eval_only |= bool(args.eval)
    start_run(asked, args)
    data = load_data(asked, training=not args.eval_only or bool(args.eval))
    cfg = resolve_config(asked, data)
    model = build_classifier(cfg, data.classes)
    encoder = model.network.encoder
    if args.eval_only:
        if data.test is None:
            raise UserError("DATASETS.TEST is empty; name a set to evaluate on, such as ('cifar10_test',)")
        keep_config(cfg)
        if args.eval and not args.resume and holds_encoder(cfg.MODEL.WEIGHTS):
            load_weights(cfg, model, encoder, "RGB")
            model.restart_average()
        else:
            load_trained(cfg, model, cfg.OUTPUT_DIR if args.resume else cfg.MODEL.WEIGHTS)
        if args.eval:
            log_results(cfg, probe(cfg, model, data, args.eval), data.test, file=f"{args.eval}.json")
        else:
            log_results(cfg, {"test": evaluate(cfg, model, data.test)}, data.test)
        return
    trainer = build_trainer(cfg, model, data)
    if not (args.resume and trainer.resume(args.allow_changes)):
        load_weights(cfg, model, encoder, "RGB")
        model.restart_average()
    trainer.train()
    finish(cfg, model, trainer, data)
    if comm.is_main_process():
        end(Path(cfg.OUTPUT_DIR), next_command(cfg, data))
