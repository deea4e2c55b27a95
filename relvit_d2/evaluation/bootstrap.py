"""Uncertainty of COCO's box AP by a bootstrap over the images of a test set."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from relvit_d2.evaluation.average_precision import COCO_LIMIT
from relvit_d2.utils.randomness import generator

DRAWS = 300  # resampled test sets
MAX_IMAGES = 1000  # of a test set; the interval of a larger one is narrow and takes long
COVERAGE = 95  # percent of the draws within the interval
_AT_ONCE = 10  # draws


def ap_interval(
    truth: COCO, detections: Sequence[dict[str, Any]], limit: int = COCO_LIMIT
) -> tuple[float, float] | None:
    """Return the 95 % interval of box AP over test sets whose images are drawn with replacement from this one.

    Args:
        truth: the ground truth.
        detections: dicts in COCO's result format.
        limit: detections per image and class to evaluate.

    Returns:
        Lower and upper bound in percent; None without objects, for less than 2 images or more than ``MAX_IMAGES``.
    """
    count = len(truth.imgs)
    if not 2 <= count <= MAX_IMAGES or not truth.anns:
        return None
    weights = generator(0, "bootstrap").multinomial(count, np.full(count, 1 / count), DRAWS)
    values = weighted_ap(truth, detections, weights, limit)
    values = values[~np.isnan(values)]
    tail = (100 - COVERAGE) / 2
    return (float(np.percentile(values, tail)), float(np.percentile(values, 100 - tail))) if len(values) else None


def weighted_ap(
    truth: COCO, detections: Sequence[dict[str, Any]], weights: np.ndarray, limit: int = COCO_LIMIT
) -> np.ndarray:
    """Return box AP of test sets that contain each image as often as its weight.

    Args:
        truth, detections, limit: as for :func:`ap_interval`.
        weights: ``(draws, images)`` integers; the images are in the order of their ids.

    Returns:
        ``(draws,)`` in percent; NaN for a draw without objects.
    """
    matched = _matches(truth, detections, limit)
    images, thresholds = sorted(truth.imgs), matched.params.recThrs
    total, classes = np.zeros(len(weights)), np.zeros(len(weights))
    for index in range(len(matched.params.catIds)):
        found = matched.evalImgs[index * len(images) : (index + 1) * len(images)]
        objects = np.array([0 if e is None else np.sum(np.asarray(e["gtIgnore"]) == 0) for e in found])
        positives = weights @ objects
        counted = positives > 0
        classes += counted
        parts = [(number, e) for number, e in enumerate(found) if e is not None and len(e["dtScores"])]
        if not parts or not counted.any():
            continue
        order = np.argsort(-np.concatenate([e["dtScores"] for _, e in parts]), kind="mergesort")
        owner = np.repeat([number for number, _ in parts], [len(e["dtScores"]) for _, e in parts])[order]
        hit, ignored = (
            np.concatenate([e[key] for _, e in parts], axis=1)[:, order] > 0 for key in ("dtMatches", "dtIgnore")
        )
        for start in range(0, len(weights), _AT_ONCE):
            rows = np.flatnonzero(counted[start : start + _AT_ONCE]) + start
            copies = weights[rows][:, None, owner]
            true = np.cumsum((hit & ~ignored) * copies, axis=2)  # (draws, IoU thresholds, detections)
            false = np.cumsum((~hit & ~ignored) * copies, axis=2)
            recall = true / positives[rows, None, None]
            precision = true / np.maximum(true + false, 1)
            precision = np.maximum.accumulate(precision[..., ::-1], axis=2)[..., ::-1]
            for row, recalls, precisions in zip(rows, recall, precision, strict=True):
                total[row] += np.mean([_at(thresholds, r, p) for r, p in zip(recalls, precisions, strict=True)])
    with np.errstate(invalid="ignore"):
        return 100 * total / classes


def _at(thresholds: np.ndarray, recall: np.ndarray, precision: np.ndarray) -> float:
    """Return the mean of the precision at the first recall that reaches each threshold, 0 where none does."""
    positions = np.searchsorted(recall, thresholds, side="left")
    return float(np.append(precision, 0.0)[positions].mean())


def _matches(truth: COCO, detections: Sequence[dict[str, Any]], limit: int) -> COCOeval:
    """Match detections and objects of each image and class, of objects of any size."""
    boxes = [
        {key: d[key] for key in ("image_id", "category_id", "score", "bbox")}
        for d in detections
        if d["image_id"] in truth.imgs
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        found = truth.loadRes(boxes) if boxes else COCO()
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.imgIds = sorted(truth.imgs)
        evaluation.params.maxDets, evaluation.params.areaRng = [limit], evaluation.params.areaRng[:1]
        evaluation.params.areaRngLbl = ["all"]
        evaluation.evaluate()
    return evaluation
