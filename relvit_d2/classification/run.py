"""Data, training and evaluation of a classifier."""

import argparse
import logging
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.evaluation import inference_context
from detectron2.utils import comm
from fvcore.common.config import CfgNode

from relvit_d2.classification.model import ClassificationModel, build_classifier
from relvit_d2.classification.probes import features, linear_probe
from relvit_d2.data.classification.datasets import list_class_sets
from relvit_d2.data.classification.division import split
from relvit_d2.data.classification.image_folder import LabelledImages, check_same_classes
from relvit_d2.data.images.batches import ImageStack, TrainingBatches, count_left_out, fixed_batches
from relvit_d2.data.images.decode import image_size
from relvit_d2.data.images.seen import SEEN, SeenImages, count_seen, seen_metadata, training_metadata
from relvit_d2.data.listing import data_lines
from relvit_d2.engine.precision import choose_precision
from relvit_d2.engine.run_setup import save_config, start_run
from relvit_d2.engine.trainer import Trainer
from relvit_d2.engine.weight_average import SUFFIX, WeightAverage, build_average
from relvit_d2.engine.weights import export_encoder, holds_encoder, load_trained, load_weights
from relvit_d2.evaluation.base import UNREADABLE
from relvit_d2.pretext.monitor import knn_accuracy
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import write_json
from relvit_d2.utils.printing import shell_command

TEST_SELECTION = "watched_test"  # name of the test set in metrics if the model is selected on it

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassificationData:
    """The data sets of a run; None if not needed."""

    train: LabelledImages | None
    validation: LabelledImages | None
    test: LabelledImages | None

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(next(part for part in (self.train, self.test) if part).classes)


def list_data(cfg: CfgNode, training: bool) -> ClassificationData:
    """Return the data sets of a config, without decoding image files.

    Args:
        training: whether the training set is needed; ``DATASETS.VALIDATION`` is then held out from it.

    Raises:
        UserError: if data are missing or damaged, or the classes of the sets differ.
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
    """Return the data sets of :func:`list_data` with small images decoded, without unreadable training images.

    Raises:
        UserError: as :func:`list_data`, the sizes do not fit the config, or an image is unreadable and
            ``DATASETS.SKIP_UNREADABLE`` is not set.
    """
    listed, skip = list_data(cfg, training), cfg.DATASETS.SKIP_UNREADABLE

    def read(part: LabelledImages | None) -> LabelledImages | None:
        if part is None:
            return None
        checked = part.readable(skip)
        # An evaluation leaves unreadable images out and counts them.
        return (checked if part is listed.train else part).decoded(skip)

    data = ClassificationData(read(listed.train), read(listed.validation), read(listed.test))
    parts = [part for part in (data.train, data.validation, data.test) if part]
    for name, note in {part.name: part.note for part in parts if part.note}.items():
        logger.warning(f"data set '{name}': {note}")
    if data.train and cfg.INPUT.VIEW.CROP == "pad":
        _check_sizes(data.train, cfg.INPUT.VIEW.SIZE)
    return data


def _check_sizes(data: LabelledImages, size: int) -> None:
    """Raise a :class:`UserError` if an image is not ``size`` x ``size`` pixels, which ``INPUT.VIEW.CROP pad`` needs."""
    images = data.images
    shape = tuple(images.pixels.shape[2:]) if isinstance(images, ImageStack) else None
    wrong = data.name if shape else next((file for file in images if image_size(file) != (size, size)), None)
    if shape != (size, size) and wrong is not None:
        width, height = shape[::-1] if shape else image_size(wrong)
        raise UserError(
            f"'{wrong}' is {width}x{height} pixels, but INPUT.VIEW.CROP pad needs images of INPUT.VIEW.SIZE {size}: "
            "set the size to that of all images, or set INPUT.VIEW.CROP resized"
        )


def resolve_config(cfg: CfgNode, data: ClassificationData) -> CfgNode:
    """Return the config with ``TEST.BEST_METRIC`` set to ``top1`` of the set on which the model is selected, if any."""
    cfg = cfg.clone()
    if cfg.TEST.BEST_ON_TEST and data.test is None:
        raise UserError("TEST.BEST_ON_TEST selects the model on DATASETS.TEST, which is empty: name a data set")
    selection = TEST_SELECTION if cfg.TEST.BEST_ON_TEST else "validation" if data.validation else ""
    if selection and max(cfg.TEST.EVAL_PERIOD, cfg.TEST.EVAL_EPOCHS) > 0 and not cfg.TEST.BEST_METRIC:
        cfg.TEST.BEST_METRIC = f"{selection}/top1"
    cfg.freeze()
    return cfg


def build_trainer(cfg: CfgNode, model: ClassificationModel, data: ClassificationData) -> Trainer:
    """Return the trainer of a classifier, with evaluation on the set on which the model is selected."""
    train = data.train
    assert train is not None
    selection = {TEST_SELECTION: data.test} if cfg.TEST.BEST_ON_TEST else {"validation": data.validation}
    sets = {name: part for name, part in selection.items() if part}
    average = build_average(cfg, model)
    measure = partial(_measure, cfg, model, sets, average) if sets else None
    make_batches = partial(TrainingBatches, cfg, train.images, labels=train.labels)
    list_data = partial(data_lines, train.images, train.labels, cfg.DATASETS.HASH_CONTENTS)
    return Trainer(cfg, model, len(train), make_batches, measure, list_data, average)


def _measure(
    cfg: CfgNode, model: ClassificationModel, sets: dict[str, LabelledImages], average: WeightAverage | None
) -> dict[str, Any]:
    """Return the metrics of each set by name and, with the moving average of the weights, by name with ``_ema``."""
    results = {}
    for suffix in ("", SUFFIX) if average else ("",):
        with average.applied() if average and suffix else nullcontext():
            for key, part in sets.items():
                name = f"{key}{suffix}"
                if metrics := evaluate(cfg, model, part):
                    results[name] = metrics
                    logger.info(f"{name.replace('_', ' ')}: {_formatted(metrics)}; {len(part)} images")
    return results


def _formatted(metrics: dict[str, float]) -> str:
    return ", ".join(
        f"{name} {value:.2f} %" if "top1" in name else f"{name} {value:.4g}" for name, value in metrics.items()
    )


def evaluate(cfg: CfgNode, model: ClassificationModel, data: LabelledImages) -> dict[str, float]:
    """Return ``top1``, accuracy in percent, and ``loss``, mean cross entropy; empty in all processes but the first.

    ``UNREADABLE`` is the number of images that could not be read, if there are any.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    with inference_context(model), choose_precision(cfg.SOLVER.PRECISION, model.device).autocast():
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
    left_out = count_left_out(int(count), len(data), data.name)
    return {"top1": 100 * hits / count, "loss": loss / count} | ({UNREADABLE: left_out} if left_out else {})


def finish(cfg: CfgNode, model: ClassificationModel, trainer: Trainer, data: ClassificationData) -> None:
    """Load the selected model, if any, evaluate it on the test set, write the results and the encoder.

    The results are named ``test``, or ``best_on_test`` if the model was selected on the test set. The same is done for
    the moving average of the weights, if any; its names end with ``_ema``.
    """
    assert data.train is not None
    output, size, metric, chosen = Path(cfg.OUTPUT_DIR), cfg.INPUT.VIEW.SIZE, cfg.TEST.BEST_METRIC, "the last one"
    name, tested = "best_on_test" if cfg.TEST.BEST_ON_TEST else "test", dict[str, Any]()
    seen = {}
    if comm.is_main_process():
        seen = training_metadata({data.train.name: data.train.images}, SeenImages.of_metadata(trainer.metadata))
    for suffix in ("", SUFFIX) if trainer.average else ("",):
        if metric:
            extra = load_trained(cfg, model, output / f"model_best{suffix}.pth")
            chosen = f"the best by {metric} ({extra['value']:.2f}), after iteration {extra['iteration']}"
        elif suffix:
            load_trained(cfg, model, output / f"model_final{suffix}.pth")
        if data.test:
            tested[f"{name}{suffix}"] = evaluate(cfg, model, data.test)
        if comm.is_main_process():
            export_encoder(cfg, model.encoder, size, trainer.iter + 1, trainer.results | tested, suffix, **seen)
    log_results(cfg, tested, data.test, trainer.metadata, trainer.results | {"model": chosen})


def log_results(
    cfg: CfgNode,
    metrics: dict[str, Any],
    test: LabelledImages | None,
    metadata: dict[str, Any],
    more: dict[str, Any] | None = None,
    file: str = "results.json",
) -> None:
    """Log metrics on the test set and write them, and ``more``, into a ``file`` in ``inference``, in the first process.

    The metrics are written under the name of the test set, with the number of ``images``, that of unreadable ones, if
    any, its ``note``, if any, and the number of its images on which the initial weights were trained, if their
    ``metadata`` has it.
    """
    if not comm.is_main_process():
        return
    results: dict[str, Any] = dict(more or {})
    if test:
        left_out = max(values.get(UNREADABLE, 0) for values in metrics.values())
        images = {"images": len(test) - left_out} | ({UNREADABLE: {"images": left_out}} if left_out else {})
        metrics = {name: {k: v for k, v in values.items() if k != UNREADABLE} for name, values in metrics.items()}
        for name, values in metrics.items():
            logger.info(f"{name.replace('_', ' ')}: {_formatted(values)}; {images['images']} images of {test.name}")
        set_name = ", ".join(cfg.DATASETS.TEST)
        note = {"note": test.note} if test.note else {}
        counts = count_seen(metadata, {set_name: test.images})
        seen = {SEEN: counts[set_name]._asdict()} if counts else {}
        results[set_name] = {**metrics, **images, **note, **seen}
    write_json(Path(cfg.OUTPUT_DIR) / "inference" / file, results)


def probe(cfg: CfgNode, model: ClassificationModel, data: ClassificationData, kind: str) -> dict[str, Any]:
    """Return ``{kind: metrics}`` of the frozen encoder on the test set; empty in all processes but the first.

    Args:
        cfg, model, data: config, model and data sets with training images.
        kind: ``knn`` or ``linear``; the latter needs validation images.
    """
    assert data.train is not None and data.test is not None
    if kind == "linear" and data.validation is None:
        raise UserError("a linear probe selects its penalty on validation images: set DATASETS.VALIDATION, such as 10%")

    def read(part: LabelledImages) -> tuple[torch.Tensor, torch.Tensor]:
        with choose_precision(cfg.SOLVER.PRECISION, model.device).autocast():
            found, keys = features(model, fixed_batches(cfg, part.images, cfg.TEST.BATCH_SIZE))
        return found.to(model.device), part.labels[keys].to(model.device)

    known, unseen = read(data.train), read(data.test)
    held = read(data.validation) if kind == "linear" and data.validation else None
    if not comm.is_main_process():
        return {}
    left_out = count_left_out(len(unseen[1]), len(data.test), data.test.name)
    accuracy = (
        linear_probe(known, held, unseen, data.classes) if held else {"top1": 100 * knn_accuracy(*unseen, known=known)}
    )
    return {kind: accuracy | ({UNREADABLE: left_out} if left_out else {})}


def next_command(cfg: CfgNode, data: ClassificationData) -> str:
    """Return the next command to run after training: a probe, or the report if there is no test set."""
    output = Path(cfg.OUTPUT_DIR)
    if data.test is None:
        return shell_command(["relvit-d2", "report", str(output), "--output", "report.html"])
    kind = "linear" if data.validation else "knn"
    probe = ["relvit-d2", "classify", "--config-file", str(output / "config.yaml"), "--eval", kind]
    return shell_command([*probe, "MODEL.WEIGHTS", str(output / "encoder.safetensors")])


def run_process(requested: CfgNode, args: argparse.Namespace, end: Callable[[Path, str], None]) -> None:
    """Train, evaluate or probe a classifier in one of the processes.

    Args:
        requested: the config before :func:`resolve_config`.
        args: arguments of the command ``classify``.
        end: called in the first process after training, with ``OUTPUT_DIR`` and the next command to run.
    """
    args.eval_only |= bool(args.eval)
    start_run(requested, args)
    data = load_data(requested, training=not args.eval_only or bool(args.eval))
    cfg = resolve_config(requested, data)
    model = build_classifier(cfg, data.classes)
    encoder = model.network.encoder
    if args.eval_only:
        if data.test is None:
            raise UserError("DATASETS.TEST is empty; name a data set, such as ('cifar10_test',)")
        save_config(cfg)
        if args.eval and not args.resume and holds_encoder(cfg.MODEL.WEIGHTS):
            metadata = load_weights(cfg, model, encoder, "RGB")
        else:
            checkpoint = load_trained(cfg, model, cfg.OUTPUT_DIR if args.resume else cfg.MODEL.WEIGHTS)
            metadata = checkpoint.get("metadata", {})
        if args.eval:
            log_results(cfg, probe(cfg, model, data, args.eval), data.test, metadata, file=f"{args.eval}.json")
        else:
            log_results(cfg, {"test": evaluate(cfg, model, data.test)}, data.test, metadata)
        return
    trainer = build_trainer(cfg, model, data)
    if not (args.resume and trainer.resume(args.allow_changes)):
        trainer.metadata = seen_metadata(load_weights(cfg, model, encoder, "RGB"))
    trainer.train()
    finish(cfg, model, trainer, data)
    if comm.is_main_process():
        end(Path(cfg.OUTPUT_DIR), next_command(cfg, data))
