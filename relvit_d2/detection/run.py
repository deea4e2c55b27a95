"""Data, training and evaluation of a detector."""

import argparse
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset, print_csv_format, verify_results
from detectron2.modeling import GeneralizedRCNN, GeneralizedRCNNWithTTA
from detectron2.utils import comm
from fvcore.common.config import CfgNode
from torch import nn

from relvit_d2.analysis.data_checks import before_training
from relvit_d2.data.detection import catalog
from relvit_d2.data.detection.catalog import get_metadata, save_splits
from relvit_d2.data.detection.custom import register_custom
from relvit_d2.data.detection.mapper import DetectionMapper
from relvit_d2.data.images.seen import SEEN, SeenImages, count_seen, fingerprints_of, seen_metadata
from relvit_d2.data.listing import data_lines
from relvit_d2.data.loader import Batches, EndlessOrder, ordered_batches
from relvit_d2.detection.config_check import REPEATING
from relvit_d2.detection.model import build_detector
from relvit_d2.engine.precision import choose_precision
from relvit_d2.engine.run_setup import save_config, start_run
from relvit_d2.engine.trainer import Trainer
from relvit_d2.engine.weights import best_or_last, load_trained, load_weights
from relvit_d2.evaluation.base import UNREADABLE, ReadableEvaluators
from relvit_d2.evaluation.coco import CocoStyleEvaluator, without_mask
from relvit_d2.evaluation.kitti import KittiEvaluator
from relvit_d2.evaluation.voc07 import Voc07Evaluator
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import write_json
from relvit_d2.utils.loader_workers import loader_workers
from relvit_d2.utils.printing import first_few, shell_command

Records = list[dict[str, Any]]

TRAINING_IMAGES = 100  # evaluated at the end
COMPARED = 5_000  # images whose pixels are compared; decoding them takes about a minute

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
    if cfg.MODEL.MASK_ON and any(isinstance(a["segmentation"], dict) for a in objects):
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


def evaluated_records(tests: dict[str, Records]) -> Records:
    """Return the records for :func:`resolve_config` in evaluation only.

    They are those of the sets in which every object has a mask, or of all sets if there is no such set.
    """
    return list(chain.from_iterable([test for test in tests.values() if not without_mask(test)] or tests.values()))


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
    mapper = DetectionMapper(cfg, is_train=True)
    workers, timeout = loader_workers(cfg), cfg.DATALOADER.TIMEOUT
    return Batches(records, mapper, list, order, cfg.SEED, workers, timeout, cfg.DATASETS.SKIP_UNREADABLE)


def evaluation_sets(cfg: CfgNode) -> dict[str, Records]:
    """Return the records of each set of ``DATASETS.TEST``, after a check of the headers of its images.

    Unreadable images remain in the records: :func:`evaluate` leaves them out and counts them.

    Raises:
        UserError: an image is unreadable and ``DATASETS.SKIP_UNREADABLE`` is not set, or all are.
    """
    sets = {name: catalog.get_records(name, cfg.DATASETS.SKIP_MISSING) for name in cfg.DATASETS.TEST}
    for records in sets.values():
        catalog.readable_records(records, cfg.DATASETS.SKIP_UNREADABLE)
    return sets


def build_trainer(cfg: CfgNode, model: GeneralizedRCNN, records: Records, tests: dict[str, Records]) -> Trainer:
    """Return the trainer of a detector on ``records``, with evaluation on ``tests`` (records by name)."""
    logger.info(f"{sum(not a.get('iscrowd') for r in records for a in r['annotations'])} training objects")
    if comm.is_main_process():
        classes = list(catalog.get_metadata(cfg.DATASETS.TRAIN[0]).thing_classes)
        write_json(Path(cfg.OUTPUT_DIR) / "classes.json", classes)  # for prediction without the data set
    make_batches = partial(training_batches, cfg, records)
    measure = partial(evaluate, cfg, model, tests) if tests else None
    list_data = partial(data_lines, records, hash_contents=cfg.DATASETS.HASH_CONTENTS)
    return Trainer(cfg, model, len(records), make_batches, measure, list_data)


def evaluate(cfg: CfgNode, model: GeneralizedRCNN, tests: dict[str, Records]) -> dict[str, Any]:
    """Evaluate on each of ``tests``; write results, settings and detections into ``inference/``.

    With several test sets, the detections of each are written into a subfolder with its name.

    Returns:
        For one data set its results in percent, such as ``{"bbox": {"AP": ...}, "voc07": {"AP50": ...}}``; for several,
        those of each by name. Empty in all processes but the first.
    """
    return _write_results(cfg, _evaluate(cfg, model, tests, "inference"))


def evaluate_with_tta(
    cfg: CfgNode, model: GeneralizedRCNN, tests: dict[str, Records], results: dict[str, Any]
) -> dict[str, Any]:
    """If ``TEST.AUG.ENABLED`` is set, evaluate again with Detectron2's test-time augmentation.

    Detections are written into ``inference/TTA``.

    Returns:
        ``results``, which :func:`evaluate` returned, and those with augmentation, with the suffix ``_TTA`` in the name
        of each task, such as ``bbox_TTA``.
    """
    if not cfg.TEST.AUG.ENABLED or not tests:
        return results
    logger.info("evaluation with test-time augmentation (TEST.AUG)")
    augmented = _evaluate(cfg, GeneralizedRCNNWithTTA(cfg, model), tests, "inference/TTA")
    plain = dict.fromkeys(augmented, results) if len(tests) == 1 else results
    return _write_results(
        cfg,
        {
            name: plain[name] | {f"{task}_TTA": values for task, values in found.items() if task != UNREADABLE}
            for name, found in augmented.items()
        },
    )


def add_seen(cfg: CfgNode, tests: dict[str, Records], metadata: dict[str, Any]) -> None:
    """Log how many test images the initial weights were trained on; add the counts to ``results.json``."""
    path = Path(cfg.OUTPUT_DIR) / "inference" / "results.json"
    if not tests or not comm.is_main_process():
        return
    images = {name: [Path(record["file_name"]) for record in records] for name, records in tests.items()}
    if counts := count_seen(metadata, images):
        results = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, {name: results[name] | {SEEN: count._asdict()} for name, count in counts.items()})


def check_expected_results(cfg: CfgNode, results: dict[str, Any]) -> None:
    """Compare the results of the test set with ``TEST.EXPECTED_RESULTS`` (Detectron2's ``verify_results``).

    Raises:
        UserError: a result is missing or differs by more than its tolerance.
    """
    if not comm.is_main_process():
        return
    try:
        verify_results(cfg, defaultdict(dict, results))
    except SystemExit as error:
        rows = [
            f"{task}/{metric} is {results.get(task, {}).get(metric)}, expected {value} +- {tolerance}"
            for task, metric, value, tolerance in cfg.TEST.EXPECTED_RESULTS
        ]
        raise UserError(f"results differ from TEST.EXPECTED_RESULTS: {', '.join(rows)}") from error


def _write_results(cfg: CfgNode, results: dict[str, Any]) -> dict[str, Any]:
    """Write the results by data set; return those of the only one, or all of them."""
    if comm.is_main_process() and results:
        inference = Path(cfg.OUTPUT_DIR) / "inference"
        write_json(inference / "results.json", results)
        write_json(inference / "evaluation.json", {"detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE})
    return next(iter(results.values())) if len(results) == 1 else results


def _evaluate(cfg: CfgNode, model: nn.Module, tests: dict[str, Records], folder: str) -> dict[str, Any]:
    """Return the results of each test set by name; write detections into ``folder`` in ``OUTPUT_DIR``."""
    results: dict[str, Any] = {}
    autocast = choose_precision(cfg.SOLVER.PRECISION, next(model.parameters()).device).autocast
    for name, records in tests.items():
        batches = _test_batches(cfg, records)
        with autocast():
            output = Path(cfg.OUTPUT_DIR) / folder / (name if len(tests) > 1 else "")
            evaluators = ReadableEvaluators(
                list(_evaluators(cfg, name, records, output)),
                partial(_unreadable_ids, records, batches),
            )
            result = inference_on_dataset(model, batches, evaluators)
        if comm.is_main_process():
            results[name] = result
            logger.info(f"results on {name}:")
            print_csv_format(result)
            if left_out := evaluators.left_out:
                files = [record["file_name"] for record in records if record["image_id"] in left_out]
                logger.warning(
                    f"{len(files)} of {len(records)} images of {name} cannot be read and are left out of the results: "
                    f"{first_few(files)}"
                )
                results[name] = result | {UNREADABLE: {"images": len(files)}}
    return results


def _unreadable_ids(records: Records, batches: Batches) -> list[Any]:
    return [records[index]["image_id"] for index in batches.unreadable]


def _test_batches(cfg: CfgNode, records: Records) -> Batches:
    rank, world, skip = comm.get_rank(), comm.get_world_size(), cfg.DATASETS.SKIP_UNREADABLE
    options = cfg.TEST.BATCH_SIZE, loader_workers(cfg), rank, world, cfg.DATALOADER.TIMEOUT
    return ordered_batches(records, DetectionMapper(cfg, is_train=False), list, *options, leaves_out=skip)


def evaluate_training_images(cfg: CfgNode, model: GeneralizedRCNN, records: Records) -> None:
    """Evaluate on at most :data:`TRAINING_IMAGES` training images, evenly spaced, and write the results.

    They are written into ``inference/training_images/results.json``, with the number of images.
    """
    chosen = records[:: -(-len(records) // TRAINING_IMAGES)]
    classes = catalog.get_metadata(cfg.DATASETS.TRAIN[0]).thing_classes
    folder = Path(cfg.OUTPUT_DIR) / "inference/training_images"
    limit, ignore = cfg.TEST.DETECTIONS_PER_IMAGE, cfg.DATASETS.IGNORE_DIFFICULT
    evaluator = CocoStyleEvaluator("training_images", chosen, classes, folder, ignore_difficult=ignore, limit=limit)
    batches = _test_batches(cfg, chosen)
    evaluators = ReadableEvaluators([evaluator], partial(_unreadable_ids, chosen, batches))
    logger.info(f"evaluation on {len(chosen)} training images, to compare with the test images")
    with choose_precision(cfg.SOLVER.PRECISION, next(model.parameters()).device).autocast():
        results = inference_on_dataset(model, batches, evaluators)
    if comm.is_main_process():
        write_json(folder / "results.json", {"images": len(chosen), **results})


def list_shared_images(cfg: CfgNode, records: Records, tests: dict[str, Records]) -> None:
    """Write the test images that are training images, or duplicates of one, into ``inference/shared_images.json``.

    Pixels are compared in data sets of at most :data:`COMPARED` images together, else only the names of files.
    """
    files = [Path(record["file_name"]) for record in records]
    names = set(files)
    seen = None
    if len(files) + sum(map(len, tests.values())) <= COMPARED:
        seen = SeenImages.of(fingerprints_of(files, cfg.DATASETS.TRAIN[0]))
    shared = {}
    for name, test in tests.items():
        tested = [Path(record["file_name"]) for record in test]
        equal = set(seen.indices(fingerprints_of(tested, name))) if seen else set()
        shared[name] = [str(file) for index, file in enumerate(tested) if index in equal or file in names]
    write_json(Path(cfg.OUTPUT_DIR) / "inference/shared_images.json", shared)


def _evaluators(cfg: CfgNode, name: str, records: Records, output: Path) -> Iterable[DatasetEvaluator]:
    metadata = catalog.get_metadata(name)
    metrics = metadata.get("metrics", ("coco",))
    ignore = cfg.DATASETS.IGNORE_DIFFICULT
    if "coco" in metrics:
        # With missing images, the annotation file has objects that cannot be detected: use the records instead.
        truth = None if metadata.get("json_file") and not cfg.DATASETS.SKIP_MISSING else records
        limit = cfg.TEST.DETECTIONS_PER_IMAGE
        yield CocoStyleEvaluator(name, truth, metadata.thing_classes, output, ignore_difficult=ignore, limit=limit)
    if "voc07" in metrics:
        yield Voc07Evaluator(name, records, metadata.thing_classes, ignore_difficult=ignore)
    if "kitti" in metrics:
        yield KittiEvaluator(name, records, metadata.thing_classes)


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
    model = build_detector(cfg)
    if args.eval_only:
        save_config(cfg)
        checkpoint = load_trained(cfg, model, cfg.OUTPUT_DIR if args.resume else cfg.MODEL.WEIGHTS)
        results = evaluate_with_tta(cfg, model, tests, evaluate(cfg, model, tests))
        add_seen(cfg, tests, checkpoint.get("metadata", {}))
        check_expected_results(cfg, results)
        return
    trainer = build_trainer(cfg, model, records, tests)
    if not (args.resume and trainer.resume(args.allow_changes)):
        trainer.metadata = seen_metadata(load_weights(cfg, model, model.backbone.encoder, cfg.INPUT.FORMAT))
    trainer.train()
    results = evaluate_with_tta(cfg, model, tests, trainer.results)
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
