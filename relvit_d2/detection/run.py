"""Data, training and evaluation of a detector."""

import argparse
import logging
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.modeling import GeneralizedRCNN
from detectron2.utils import comm
from fvcore.common.config import CfgNode

from relvit_d2.analysis.data_checks import before_training
from relvit_d2.data.detection import catalog
from relvit_d2.data.detection.augmentation import AugmentedMapper
from relvit_d2.data.detection.catalog import get_metadata, save_splits
from relvit_d2.data.detection.config import augments, changes_objects
from relvit_d2.data.detection.custom import register_custom
from relvit_d2.data.detection.mapper import DetectionMapper
from relvit_d2.data.images.archive import ImageFile
from relvit_d2.data.images.seen import seen_metadata
from relvit_d2.data.listing import data_lines
from relvit_d2.data.loader import Batches, EndlessOrder
from relvit_d2.detection.config_check import REPEATING
from relvit_d2.detection.evaluation import (
    Records,
    add_seen,
    check_expected_results,
    evaluate,
    evaluate_training_images,
    evaluate_variants,
    evaluated_records,
    evaluation_sets,
    list_shared_images,
)
from relvit_d2.detection.mean_teacher import MixedBatches, Teacher, first_iteration, unlabelled_images
from relvit_d2.detection.model import build_detector
from relvit_d2.detection.training_sizes import read_training_sizes, training_sizes, write_training_sizes
from relvit_d2.engine.run_setup import save_config, start_run
from relvit_d2.engine.trainer import Trainer
from relvit_d2.engine.weight_average import build_average
from relvit_d2.engine.weights import best_or_last, load_trained, load_weights
from relvit_d2.evaluation.coco import without_mask
from relvit_d2.utils.batch_source import BatchSource
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import write_json
from relvit_d2.utils.loader_workers import loader_workers
from relvit_d2.utils.printing import shell_command

logger = logging.getLogger(__name__)


def resolve_config(cfg: CfgNode, records: Records) -> CfgNode:
    """Return the config with the number of classes, and without a mask head unless all objects have masks.

    Args:
        records: the images to train on or, in evaluation only, to evaluate on.

    Raises:
        UserError: if a data set is unknown, the sets have different classes, or ``NUM_CLASSES`` contradicts them.
    """
    cfg = cfg.clone()
    names = [catalog.resolve(name) for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)]
    classes = {name: catalog.get_metadata(name).thing_classes for name in names}
    first = names[0]
    for name in names:
        if list(classes[name]) != list(classes[first]):
            raise UserError(f"data sets '{first}' and '{name}' have different classes; use the same class list in all")
    heads = cfg.MODEL.ROI_HEADS
    count = len(classes[first])
    if heads.NUM_CLASSES not in (0, count):
        raise UserError(
            f"MODEL.ROI_HEADS.NUM_CLASSES {heads.NUM_CLASSES} contradicts data set '{first}', which has {count} "
            f"classes; set it to {count}, or to 0 for the number of classes of the data set"
        )
    heads.NUM_CLASSES = count
    objects = [a for r in records for a in r.get("annotations", []) if not a.get("iscrowd")]
    cfg.MODEL.MASK_ON &= bool(objects) and not without_mask(records)
    if cfg.MODEL.MASK_ON and (changes_objects(cfg) or any(isinstance(a["segmentation"], dict) for a in objects)):
        cfg.INPUT.MASK_FORMAT = "bitmask"  # Detectron2 cannot convert RLE masks to polygons
    if cfg.MODEL.MASK_ON and (cfg.INPUT.CROP.ENABLED or cfg.INPUT.LSJ.SIZE) and not find_spec("shapely"):
        raise UserError(
            "Detectron2 needs shapely to crop polygon masks: run pip install shapely, or set INPUT.CROP.ENABLED False "
            "and INPUT.LSJ.SIZE 0"
        )
    cfg.freeze()
    return cfg


def mask_notes(requested: CfgNode, cfg: CfgNode, records: Records, tests: dict[str, Records]) -> list[str]:
    """Return notes on objects without masks, because of which masks are not predicted or not evaluated.

    Args:
        requested, cfg: the config before and after :func:`resolve_config`.
        records: see :func:`resolve_config`.
        tests: records by name of the test set.
    """
    if not requested.MODEL.MASK_ON:
        return []
    if not cfg.MODEL.MASK_ON:
        count = len(without_mask(records))
        reason = f"objects without a mask: {count}" if count else "there are no objects"
        return [f"the mask head is off and only box AP is computed ({reason})"]
    counts = {name: len(without_mask(test)) for name, test in tests.items()}
    return [f"only box AP is computed on {name} (objects without a mask: {n})" for name, n in counts.items() if n]


def training_records(cfg: CfgNode) -> Records:
    """Return the records to train on, without unreadable images if ``DATASETS.SKIP_UNREADABLE`` is set.

    Without VOC's difficult objects unless ``DATASETS.TRAIN_DIFFICULT`` is set, and without images that have no objects
    if ``DATALOADER.FILTER_EMPTY_ANNOTATIONS`` is set.
    """
    if not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty; name a data set, such as ('voc_2007_trainval',)")
    data = cfg.DATASETS
    records = [record for name in data.TRAIN for record in catalog.get_records(name, data.SKIP_MISSING)]
    records = catalog.readable_records(records, data.SKIP_UNREADABLE)
    if not cfg.DATASETS.TRAIN_DIFFICULT:
        records = [r | {"annotations": [a for a in r["annotations"] if not a.get("difficult")]} for r in records]
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        records = [r for r in records if any(not a.get("iscrowd") for a in r["annotations"])]
    if not records:
        raise UserError(
            f"DATASETS.TRAIN {list(cfg.DATASETS.TRAIN)} contains no image with an object; check the annotations"
        )
    return records


def repeat_factors(cfg: CfgNode, records: Records) -> np.ndarray | None:
    """Return how often an epoch contains each image, by Detectron2's rule for rare classes; None: once."""
    if cfg.DATALOADER.SAMPLER_TRAIN != REPEATING:
        return None
    by_frequency = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency
    return by_frequency(records, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT).numpy()


def training_batches(cfg: CfgNode, records: Records, start: int) -> Batches:
    """Return the endless training batches of this process from iteration ``start`` on."""
    solver = cfg.SOLVER
    rank, world = comm.get_rank(), comm.get_world_size()
    parts, repeats = solver.GRAD_ACCUM_STEPS, repeat_factors(cfg, records)
    order = EndlessOrder(len(records), solver.IMS_PER_BATCH, cfg.SEED, start, rank, world, parts, repeats)
    plain = DetectionMapper(cfg, is_train=True)
    mapper = AugmentedMapper(cfg, plain, records) if augments(cfg) else plain
    workers, timeout = loader_workers(cfg), cfg.DATALOADER.TIMEOUT
    return Batches(records, mapper, list, order, cfg.SEED, workers, timeout, cfg.DATASETS.SKIP_UNREADABLE)


def build_trainer(
    cfg: CfgNode,
    model: GeneralizedRCNN,
    records: Records,
    tests: dict[str, Records],
    unlabelled: Sequence[ImageFile] = (),
) -> Trainer:
    """Return the trainer of a detector on ``records``, with evaluation on ``tests`` (records by name).

    ``unlabelled`` are the images of ``SEMI.UNLABELLED``, on which it is trained too.
    """
    logger.info(f"{sum(not a.get('iscrowd') for r in records for a in r['annotations'])} training objects")
    if comm.is_main_process():
        classes = list(catalog.get_metadata(cfg.DATASETS.TRAIN[0]).thing_classes)
        write_json(Path(cfg.OUTPUT_DIR) / "classes.json", classes)  # for prediction without the data set
        write_training_sizes(cfg, records)
    average = build_average(cfg, model)
    make_batches: Callable[[int], BatchSource] = partial(training_batches, cfg, records)
    if unlabelled and average:
        model.teacher = Teacher(cfg, model, average)
        make_batches = partial(MixedBatches, cfg, make_batches, unlabelled, first_iteration(cfg, len(records)))
    measure = partial(evaluate, cfg, model, tests, average)
    list_data = partial(data_lines, [*records, *unlabelled], hash_contents=cfg.DATASETS.HASH_CONTENTS)
    return Trainer(cfg, model, len(records), make_batches, measure if tests else None, list_data, average)


def run_process(requested: CfgNode, args: argparse.Namespace, end: Callable[[Path, str], None]) -> None:
    """Train or evaluate a detector in one of the processes.

    Args:
        requested: the config before :func:`resolve_config`.
        args: arguments of the command ``train``.
        end: called in the first process after training, with ``OUTPUT_DIR`` and the next command to run.
    """
    start_run(requested, args)
    register_custom(requested.DATASETS)
    tests = evaluation_sets(requested)
    if args.eval_only and not tests:
        raise UserError("DATASETS.TEST is empty; name a data set, such as ('voc_2007_test',)")
    records = evaluated_records(tests) if args.eval_only else training_records(requested)
    save_splits(tests if args.eval_only else (*requested.DATASETS.TRAIN, *tests), Path(requested.OUTPUT_DIR))
    cfg = resolve_config(requested, records)
    for note in mask_notes(requested, cfg, records, tests):
        logger.info(note)
    if not args.eval_only:
        before_training(cfg, records, tests, get_metadata(cfg.DATASETS.TRAIN[0]).thing_classes)
    unlabelled = [] if args.eval_only else unlabelled_images(cfg)
    model = build_detector(cfg)
    if args.eval_only:
        save_config(cfg)
        weights = cfg.OUTPUT_DIR if args.resume else cfg.MODEL.WEIGHTS
        checkpoint = load_trained(cfg, model, weights)
        sizes = read_training_sizes(weights)
        results = evaluate_variants(cfg, model, tests, evaluate(cfg, model, tests), sizes)
        add_seen(cfg, tests, checkpoint.get("metadata", {}))
        check_expected_results(cfg, results)
        return
    trainer = build_trainer(cfg, model, records, tests, unlabelled)
    if not (args.resume and trainer.resume(args.allow_changes)):
        classes = get_metadata(cfg.DATASETS.TRAIN[0]).thing_classes
        loaded = load_weights(cfg, model, model.backbone.encoder, cfg.INPUT.FORMAT, classes)
        trainer.metadata = seen_metadata(loaded)
    trainer.train()
    results = evaluate_variants(cfg, model, tests, trainer.results, training_sizes(cfg, records))
    add_seen(cfg, tests, trainer.metadata)
    if tests:
        evaluate_training_images(cfg, model, records)
        if comm.is_main_process():
            list_shared_images(cfg, records, tests)
    if comm.is_main_process():
        end(
            Path(cfg.OUTPUT_DIR),
            shell_command(["relvit-d2", "predict", "--weights", best_or_last(cfg.OUTPUT_DIR), "--input", "IMAGES"]),
        )
    check_expected_results(cfg, results)
