"""Evaluation of a detector on its test sets, and on some of its training images."""

import json
import logging
from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset, print_csv_format, verify_results
from detectron2.modeling import GeneralizedRCNN, GeneralizedRCNNWithTTA
from detectron2.utils import comm
from fvcore.common.config import CfgNode
from torch import nn

from relvit_d2.data.detection import catalog
from relvit_d2.data.detection.mapper import DetectionMapper
from relvit_d2.data.images.seen import SEEN, SeenImages, count_seen, fingerprints_of
from relvit_d2.data.loader import Batches, ordered_batches
from relvit_d2.detection.detections import TrainingSizes
from relvit_d2.detection.predictor import TiledDetector
from relvit_d2.engine.precision import choose_precision
from relvit_d2.engine.weight_average import SUFFIX, WeightAverage
from relvit_d2.evaluation.base import UNREADABLE, ReadableEvaluators
from relvit_d2.evaluation.coco import CocoStyleEvaluator, without_mask
from relvit_d2.evaluation.kitti import KittiEvaluator
from relvit_d2.evaluation.voc07 import Voc07Evaluator
from relvit_d2.utils.errors import UserError
from relvit_d2.utils.files import write_json
from relvit_d2.utils.loader_workers import loader_workers
from relvit_d2.utils.printing import first_few

Records = list[dict[str, Any]]

TRAINING_IMAGES = 100  # evaluated at the end
COMPARED = 5_000  # images whose pixels are compared; decoding them takes about a minute

logger = logging.getLogger(__name__)


def evaluated_records(tests: dict[str, Records]) -> Records:
    """Return the records for :func:`resolve_config` in evaluation only.

    They are those of the sets in which every object has a mask, or of all sets if none is like that.
    """
    return list(chain.from_iterable([test for test in tests.values() if not without_mask(test)] or tests.values()))


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


def evaluate(
    cfg: CfgNode, model: GeneralizedRCNN, tests: dict[str, Records], average: WeightAverage | None = None
) -> dict[str, Any]:
    """Evaluate on each of ``tests``; write results, settings and detections into ``inference/``.

    With several test sets, the detections of each are written into a subfolder with its name. With a moving average of
    the weights, the detections with it are written into ``inference/ema``.

    Returns:
        For one data set its results in percent, such as ``{"bbox": {"AP": ...}, "voc07": {"AP50": ...}}``, with an
        average also ``bbox_ema`` etc.; for several, those of each by name. Empty in all processes but the first.
    """
    results = _evaluate(cfg, model, tests, "inference")
    if average:
        logger.info("evaluation of the moving average of the weights (SOLVER.EMA)")
        with average.applied():
            results = _beside(results, _evaluate(cfg, model, tests, "inference/ema"), SUFFIX)
    return _write_results(cfg, results)


def _beside(results: dict[str, Any], more: dict[str, Any], suffix: str) -> dict[str, Any]:
    """Return the results of each test set and ``more`` of them, with a suffix in the name of each task."""
    return {
        name: results[name] | {f"{task}{suffix}": values for task, values in found.items() if task != UNREADABLE}
        for name, found in more.items()
    }


def evaluate_variants(
    cfg: CfgNode,
    model: GeneralizedRCNN,
    tests: dict[str, Records],
    results: dict[str, Any],
    sizes: TrainingSizes | None,
) -> dict[str, Any]:
    """Evaluate again with Detectron2's test-time augmentation (``TEST.AUG``) and in tiles (``TEST.TILES``), if set.

    Detections are written into ``inference/TTA`` and ``inference/tiles``.

    Args:
        cfg: the config.
        model: the detector.
        tests: records by name of the test set.
        results: what :func:`evaluate` returned.
        sizes: sizes in the training images, if known.

    Returns:
        ``results`` and those of the further evaluations, with the suffix ``_TTA`` or ``_tiles`` in the name of each
        task, such as ``bbox_tiles``.
    """
    variants: dict[str, nn.Module] = {}
    if cfg.TEST.AUG.ENABLED:
        variants["TTA"] = GeneralizedRCNNWithTTA(cfg, model)
    if cfg.TEST.TILES:
        variants["tiles"] = TiledDetector(cfg, model, sizes)
    if not variants or not tests:
        return results
    merged = dict.fromkeys(tests, results) if len(tests) == 1 else results
    for suffix, variant in variants.items():
        logger.info(f"evaluation with {'test-time augmentation' if suffix == 'TTA' else variant}")
        model.eval()  # Detectron2 sets the mode that the variant had before, also in the model, after its evaluation
        merged = _beside(merged, _evaluate(cfg, variant, tests, f"inference/{suffix}"), f"_{suffix}")
    return _write_results(cfg, merged)


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
    autocast = choose_precision(cfg.SOLVER.PRECISION, torch.device(cfg.MODEL.DEVICE)).autocast
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
        seen = SeenImages.of(fingerprints_of(files))
    shared = {}
    for name, test in tests.items():
        tested = [Path(record["file_name"]) for record in test]
        equal = set(seen.indices(fingerprints_of(tested))) if seen else set()
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
